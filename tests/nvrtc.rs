//! The CUDA compiler and the cache of what it made: errors name our files, keys change with what matters, and nothing
//! that happens to a cached file is fatal.

mod skip;

use spleen_hpc::Error;
use spleen_hpc::device::cuda::Precision;
use spleen_hpc::device::cuda::kernel_cache::{KernelCache, in_parallel};
use spleen_hpc::device::cuda::nvrtc::Target;
use spleen_hpc::device::cuda::sources::{self, Source};
use std::path::{Path, PathBuf};
use std::process::Command;

const KERNEL: &str = "#include \"head.cuh\"\nKERNEL(twice, Args, 32) { args.y.set(0, FACTOR); }\n";
const HEAD: &str = "#include \"ptx.cuh\"\n#define FACTOR 2.0f\nstruct Args { Out<float> y; };\n";

/// A kernel with a header of its own.
fn with<'a>(text: &'a str, headers: &'a [(&'a str, &'a str)]) -> Source<'a> {
    Source { file: "twice.cu", text, headers }
}

/// The headers of the program and `head.cuh`.
fn headers(head: &str) -> Vec<(&str, &str)> {
    let own = sources::all().next().expect("a kernel").headers;
    own.iter().copied().chain([("head.cuh", head)]).collect()
}

fn sm_80() -> Target {
    Target::named("sm_80")
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut list: Vec<_> =
        std::fs::read_dir(folder).expect("there").map(|entry| entry.expect("readable").path()).collect();
    list.sort();
    list
}

#[test]
fn errors_name_our_files_and_lines() {
    let Some(nvrtc) = skip::nvrtc() else { return };
    let broken = KERNEL.replace("args.y", "args.z");
    let in_head = HEAD.replace("Out<float> y", "Out<flaot> y");
    for (text, head, place) in
        [(broken.as_str(), HEAD, "twice.cu(2): error"), (KERNEL, &in_head, "head.cuh(3): error")]
    {
        let headers = headers(head);
        let err = nvrtc.compile(&with(text, &headers), Precision::Half, &sm_80()).unwrap_err();
        let said = err.to_string();
        assert!(said.starts_with("twice.cu does not compile for sm_80:\n"), "{said}");
        assert!(said.contains(place), "{said}");
        assert!(said.contains("\n  "), "the log must be raw:\n{said}");
        assert!(matches!(err, Error::Nvrtc { .. }));
        assert_eq!(err.exit_code(), 1);
    }
}

#[test]
fn an_unknown_chip_is_named() {
    let Some(nvrtc) = skip::nvrtc() else { return };
    let source = sources::find("residual.cu").unwrap();
    let said = nvrtc.compile(&source, Precision::Half, &Target::named("sm_12")).unwrap_err().to_string();
    assert!(said.contains("residual.cu") && said.contains("sm_12"), "{said}");
}

#[test]
fn it_says_which_it_is() {
    let Some(nvrtc) = skip::nvrtc() else { return };
    assert!(nvrtc.version() >= (12, 0));
    assert!(nvrtc.path().is_file(), "{}", nvrtc.path().display());
    assert!(nvrtc.chips().unwrap().contains(&80));
    nvrtc.check_install().unwrap();
}

/// Every place where it is looked for, each with the files that belong together.
#[test]
fn it_is_found_where_people_have_it() {
    let Some(nvrtc) = skip::nvrtc() else { return };
    let here = nvrtc.path().parent().expect("a folder");
    let doctor = |variable: &str, value: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_spleen-hpc"));
        for other in
            ["SPLEEN_NVRTC", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "CONDA_PREFIX"]
        {
            command.env_remove(other);
        }
        // Without what scripts/fetch_nvrtc.sh left in the user's cache.
        command.env("XDG_CACHE_HOME", "/nowhere").env(variable, value);
        let out = command
            .args(["doctor", "--device", "cpu", "--arch", "sm_80", "--only", "residual.cu"])
            .output()
            .expect("it runs");
        (out.status.success(), String::from_utf8_lossy(&out.stdout).into_owned())
    };
    let (_, without) = doctor("NOTHING", Path::new(""));
    if !without.contains("nvrtc      none") {
        println!("skipped: this machine has an NVRTC without being told where");
        return;
    }
    for (variable, below) in [
        ("SPLEEN_NVRTC", ""),
        ("SPLEEN_NVRTC", "nvidia/cu13/lib"),
        ("CUDA_HOME", "lib64"),
        ("CUDA_PATH", "targets/x86_64-linux/lib"),
        ("VIRTUAL_ENV", "lib/python3.12/site-packages/nvidia/cu13/lib"),
        ("VIRTUAL_ENV", "lib/python3.9/site-packages/nvidia/cuda_nvrtc/lib"),
        ("CONDA_PREFIX", "lib"),
        ("XDG_CACHE_HOME", "spleen-hpc/nvrtc/nvidia/cu13/lib"),
        ("LD_LIBRARY_PATH", ""),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join(below);
        std::fs::create_dir_all(&folder).unwrap();
        for file in files(here).iter().filter(|file| file.to_string_lossy().contains("libnvrtc")) {
            std::os::unix::fs::symlink(file, folder.join(file.file_name().unwrap())).unwrap();
        }
        let (success, said) = doctor(variable, dir.path());
        let line = said.lines().find(|line| line.starts_with("nvrtc ")).expect("a line");
        // A library found by name is shown as it is mapped: links are followed.
        assert!(
            success && line.contains(folder.to_str().unwrap()) || variable == "LD_LIBRARY_PATH",
            "{said}"
        );
        assert!(success && said.contains("compiled for sm_80 in"), "{variable} {below}: {said}");
    }
}

#[test]
fn the_second_time_is_a_hit() {
    let Some(nvrtc) = skip::nvrtc() else { return };
    let dir = tempfile::tempdir().unwrap();
    let cache = KernelCache::at(dir.path().join("not/yet/there"));
    let headers = headers(HEAD);
    let source = with(KERNEL, &headers);
    let first = cache.module(nvrtc, &source, Precision::Half, &sm_80()).unwrap();
    let again = cache.module(nvrtc, &source, Precision::Half, &sm_80()).unwrap();
    assert!(!first.hit && again.hit);
    assert!(first.warning.is_none() && again.warning.is_none());
    assert_eq!(first.module, again.module);
    assert_eq!(first.module.entries[0].name, "twice_f16");
    assert_eq!(cache.size().0, 1);
    assert!(cache.size().1 > first.module.image.len() as u64);
}

/// Text, headers, precision and target each make another file; the same again does not.
#[test]
fn the_key_is_all_that_changes_the_code() {
    let Some(nvrtc) = skip::nvrtc() else { return };
    let dir = tempfile::tempdir().unwrap();
    let cache = KernelCache::at(dir.path());
    let (head, edited_head) = (headers(HEAD), HEAD.replace("2.0f", "3.0f"));
    let other_head = headers(&edited_head);
    let edited = KERNEL.replace("0, FACTOR", "1, FACTOR");
    let cases = [
        (with(KERNEL, &head), Precision::Half, sm_80()),
        (with(&edited, &head), Precision::Half, sm_80()),
        (with(KERNEL, &other_head), Precision::Half, sm_80()),
        (with(KERNEL, &head), Precision::Single, sm_80()),
        (with(KERNEL, &head), Precision::Half, Target::named("sm_90a")),
        (with(KERNEL, &head), Precision::Half, Target::named("compute_80")),
    ];
    for round in 0..2 {
        for (i, (source, precision, target)) in cases.iter().enumerate() {
            let cached = cache.module(nvrtc, source, *precision, target).unwrap();
            assert_eq!(cached.hit, round == 1, "case {i}");
        }
        assert_eq!(cache.size().0, cases.len());
    }
}

/// Cut anywhere, or with any bit wrong, or another kernel's: compiled again, and good the next time.
#[test]
fn a_damaged_file_is_made_again() {
    let Some(nvrtc) = skip::nvrtc() else { return };
    let dir = tempfile::tempdir().unwrap();
    let cache = KernelCache::at(dir.path());
    let headers = headers(HEAD);
    let (source, edited) = (with(KERNEL, &headers), KERNEL.replace("0, FACTOR", "1, FACTOR"));
    let made = cache.module(nvrtc, &source, Precision::Half, &sm_80()).unwrap().module;
    let [file] = &files(dir.path())[..] else { panic!("one file") };
    let whole = std::fs::read(file).unwrap();
    let mut damaged: Vec<Vec<u8>> =
        [0, 1, 31, 32, 39, 40, 60, whole.len() - 1].iter().map(|&len| whole[..len].to_vec()).collect();
    for at in [0, 32, 36, 41, whole.len() / 2, whole.len() - 1] {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        damaged.push(bytes);
    }
    damaged.push([&whole[..], b"more"].concat());
    let foreign = tempfile::tempdir().unwrap();
    KernelCache::at(foreign.path())
        .module(nvrtc, &with(&edited, &headers), Precision::Half, &sm_80())
        .unwrap();
    damaged.push(std::fs::read(&files(foreign.path())[0]).unwrap());
    for (i, bytes) in damaged.iter().enumerate() {
        std::fs::write(file, bytes).unwrap();
        let again = cache.module(nvrtc, &source, Precision::Half, &sm_80()).unwrap();
        assert!(!again.hit && again.warning.is_none(), "damage {i}");
        assert_eq!(again.module, made, "damage {i}");
        assert!(cache.module(nvrtc, &source, Precision::Half, &sm_80()).unwrap().hit, "damage {i}");
    }
}

#[test]
fn a_folder_that_cannot_be_written_is_a_warning() {
    let Some(nvrtc) = skip::nvrtc() else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "in the way").unwrap();
    let source = sources::find("residual.cu").unwrap();
    for folder in [file.clone(), file.join("below")] {
        let cached = KernelCache::at(&folder).module(nvrtc, &source, Precision::Half, &sm_80()).unwrap();
        let warning = cached.warning.expect("it cannot be kept");
        assert!(warning.starts_with("a compiled kernel is not kept: "), "{warning}");
        assert!(warning.contains(file.to_str().unwrap()), "{warning}");
    }
    let nowhere = KernelCache::none().module(nvrtc, &source, Precision::Half, &sm_80()).unwrap();
    assert!(nowhere.warning.is_none());
}

/// Many threads that want the same kernels from one folder at the same time: all get them, whole, and one file of
/// each is left.
#[test]
fn many_at_once() {
    let Some(nvrtc) = skip::nvrtc() else { return };
    let dir = tempfile::tempdir().unwrap();
    let cache = KernelCache::at(dir.path());
    let headers = headers(HEAD);
    let source = with(KERNEL, &headers);
    let jobs: Vec<Precision> = [Precision::Half, Precision::Single].into_iter().cycle().take(32).collect();
    let modules = std::thread::scope(|scope| {
        let mut running: Vec<_> = Vec::new();
        for &precision in &jobs {
            let (cache, source) = (&cache, &source);
            running.push(scope.spawn(move || cache.module(nvrtc, source, precision, &sm_80())));
        }
        running.into_iter().map(|thread| thread.join().expect("no panic").unwrap()).collect::<Vec<_>>()
    });
    for (module, precision) in modules.iter().zip(&jobs) {
        assert!(module.warning.is_none(), "{:?}", module.warning);
        assert_eq!(module.module.entries[0].name, format!("twice{}", precision.suffix()));
    }
    assert_eq!(files(dir.path()).len(), 2, "{:?}", files(dir.path()));
}

#[test]
fn parallel_results_keep_their_order() {
    let items: Vec<u64> = (0..1000).collect();
    assert_eq!(in_parallel(&items, |&i| i * i), items.iter().map(|i| i * i).collect::<Vec<_>>());
    assert!(in_parallel(&[], |i: &u64| *i).is_empty());
}
