//! `spleen-hpc doctor` and the choice of a device on machines with more, less and half of CUDA.

use crate::{fake, run_with, skip};
use std::path::Path;
use std::process::{Command, Output};

/// The doctor with a driver library and settings; its exit code and what it said.
fn doctor(library: &Path, settings: &str, nvrtc: Option<&Path>, args: &[&str]) -> (i32, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_spleen-hpc"));
    command.arg("doctor").args(args);
    if let Some(nvrtc) = nvrtc {
        command.env("SPLEEN_NVRTC", nvrtc);
    }
    let cache = tempfile::tempdir().expect("a temporary folder");
    told(run_with(library, settings, cache.path(), command))
}

fn told(out: Output) -> (i32, String) {
    let said = [&out.stdout, &out.stderr].map(|text| String::from_utf8_lossy(text).into_owned()).concat();
    assert!(!said.contains("panicked"), "{said}");
    (out.status.code().expect("it was not killed"), said)
}

/// With all that is needed: the GPU is chosen and tried at both precisions, and nothing is left behind.
#[test]
fn a_whole_installation_passes() {
    let (Some(library), Some(_)) = (fake(), skip::nvrtc()) else { return };
    let (code, said) = doctor(&library, "gpus=2", None, &["-v"]);
    assert_eq!(code, 0, "{said}");
    for part in [
        "driver     of CUDA 13.0",
        "cuda:0     Fake GPU, compute capability 9.0, 4 SMs, 8.0 GiB, 227 KiB of shared memory a block",
        "cuda:1     Fake GPU",
        "compiled for sm_90a in",
        "  residual_add_f16  ",
        "device     cuda:0, Fake GPU in mixed precision, the first GPU that can",
        "device     cuda:0, Fake GPU in f32, the first GPU that can",
        "self-test  residual: y ",
        "left over: [], 0 allocations",
    ] {
        assert!(said.contains(part), "no `{part}` in\n{said}");
    }
    let (code, said) = doctor(&library, "gpus=2", None, &["--device", "cuda:1", "--only", "residual.cu"]);
    assert!(code == 0 && said.contains("cuda:1, Fake GPU in mixed precision, as asked"), "{said}");
    let (code, said) = doctor(&library, "gpus=2", None, &["--device", "cuda:2", "--only", "residual.cu"]);
    assert!(code == 1 && said.contains("--device cuda:2: there are 2 GPUs, cuda:0 to cuda:1"), "{said}");
}

/// Each line: a driver, the exit code, and what is said of it.
#[test]
fn drivers_that_lack_something() {
    let (Some(library), Some(_)) = (fake(), skip::nvrtc()) else { return };
    for (settings, code, part) in [
        ("init=100", 0, "driver     finds no GPU"),
        ("init=100", 0, "device     cpu ("),
        ("gpus=0", 0, "for the NVIDIA driver finds no GPU"),
        (
            "init=999",
            1,
            "driver     BROKEN: the NVIDIA driver does not start: unknown error (CUDA_ERROR_UNKNOWN)",
        ),
        ("init=34", 1, "CUDA driver is a stub library"),
        ("init=12345", 1, "the NVIDIA driver does not start: error 12345"),
        ("capability=7.5", 0, "compute capability 7.5, too old for the kernels"),
        (
            "capability=7.5",
            0,
            "for the GPU has compute capability 7.5, but the kernels need 8.0 (A100) or newer",
        ),
        ("load=222 version=11080", 1, "self-test  BROKEN: residual: residual.cu for sm_90a"),
    ] {
        let (got, said) = doctor(&library, settings, None, &["--only", "residual.cu"]);
        assert!(got == code && said.contains(part), "{settings}: exit code {got}, no `{part}` in\n{said}");
    }
}

/// A library of that name that is no driver, or not even a library.
#[test]
fn what_is_no_driver_is_no_panic() {
    let Some(_) = skip::nvrtc() else { return };
    let maths = ["/lib/x86_64-linux-gnu/libm.so.6", "/usr/lib64/libm.so.6"].map(Path::new);
    if let Some(library) = maths.into_iter().find(|path| path.exists()) {
        let (code, said) = doctor(library, "", None, &[]);
        assert!(
            code == 1 && said.contains("driver     BROKEN: the NVIDIA driver lacks cuCtxSetCurrent"),
            "{said}"
        );
        assert!(said.contains("device     cpu ("), "{said}");
    }
    let junk = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(junk.path(), "not a library").expect("a temporary file");
    let (code, said) = doctor(junk.path(), "", None, &[]);
    assert!(code == 1 && said.contains("driver     BROKEN: the NVIDIA driver cannot be loaded ("), "{said}");
    assert!(said.contains("file too short"), "{said}");
}

/// A GPU that cannot be used for want of NVRTC is a fault; without a GPU nobody needs it.
#[test]
fn nvrtc_that_lacks_something() {
    let (Some(library), Some(nvrtc)) = (fake(), skip::nvrtc()) else { return };
    let half = tempfile::tempdir().expect("a temporary folder");
    let name = nvrtc.path().file_name().expect("a file");
    std::fs::copy(nvrtc.path(), half.path().join(name)).expect("a copy");
    let (code, said) = doctor(&library, "", Some(half.path()), &[]);
    assert!(code == 1 && said.contains("nvrtc      BROKEN: "), "{said}");
    assert!(said.contains("its libnvrtc-builtins is missing or of another version"), "{said}");
    assert!(said.contains("device     BROKEN: cpu ("), "{said}");

    let (code, said) = doctor(&library, "", Some(Path::new("/nowhere")), &[]);
    assert!(code == 1 && said.contains("SPLEEN_NVRTC=/nowhere: there is no libnvrtc.so.12 or .13"), "{said}");
    let (code, said) = doctor(&library, "init=100", Some(&library), &[]);
    assert!(code == 1 && said.contains("is no NVRTC 12 or 13, for it lacks nvrtcVersion"), "{said}");
}

/// Processes that start with an empty cache, at once.
#[test]
fn processes_share_a_cache() {
    let (Some(library), Some(_)) = (fake(), skip::nvrtc()) else { return };
    let cache = tempfile::tempdir().expect("a temporary folder");
    let all: Vec<_> = std::thread::scope(|scope| {
        let run = || {
            let mut command = Command::new(env!("CARGO_BIN_EXE_spleen-hpc"));
            command.args(["doctor", "--only", "residual.cu"]);
            told(run_with(&library, "", cache.path(), command))
        };
        let running: Vec<_> = (0..2).map(|_| scope.spawn(run)).collect();
        running.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    for (code, said) in all {
        assert_eq!(code, 0, "{said}");
    }
    let names: Vec<_> =
        std::fs::read_dir(cache.path()).expect("there").map(|e| e.expect("readable").file_name()).collect();
    assert!(
        !names.is_empty() && names.iter().all(|name| name.to_string_lossy().ends_with(".kernel")),
        "{names:?}"
    );
}
