//! The native driver without a GPU: real NVRTC, and a libcuda that has the emulator behind it (tests/fake_libcuda). Each
//! test runs itself again in a process whose loader finds that one.
#![cfg(emulated)]

mod doctor;
mod driver;
#[path = "../skip/mod.rs"]
mod skip;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A folder in which the loader finds `library` under the driver's names.
fn folder_with(library: &Path) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for name in ["libcuda.so", "libcuda.so.1"] {
        std::os::unix::fs::symlink(library, folder.path().join(name)).expect("a link");
    }
    folder
}

/// The fake driver, which cargo builds beside the tests.
fn fake() -> Option<PathBuf> {
    let target = Path::new(env!("CARGO_BIN_EXE_spleen-hpc")).parent().expect("a folder");
    let library = target.join("examples/libfake_libcuda.so");
    if !library.exists() {
        assert!(!skip::required(), "{} is not built", library.display());
        println!("skipped: {} is not built: cargo build --example fake_libcuda", library.display());
        return None;
    }
    Some(library)
}

/// Runs `command` with `library` as driver, `settings` for it and its own cache of kernels.
fn run_with(library: &Path, settings: &str, cache: &Path, mut command: Command) -> Output {
    let folder = folder_with(library);
    command
        .env("LD_LIBRARY_PATH", folder.path())
        .env("FAKE_CUDA", settings)
        .env("SPLEEN_KERNEL_CACHE", cache);
    // The emulator's thread-local variables are laid out for a program, not for a library that is loaded later.
    command.env("GLIBC_TUNABLES", "glibc.rtld.optional_static_tls=262144");
    command.output().expect("it runs")
}

/// Runs `body` with the fake driver: in a second process, which runs only the test `name`.
fn with_fake(name: &str, settings: &str, body: impl FnOnce()) {
    if std::env::var_os("FAKE_CUDA").is_some() {
        return body();
    }
    let (Some(library), Some(_)) = (fake(), skip::nvrtc()) else { return };
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    command.args(["--exact", name, "--nocapture"]);
    let cache = tempfile::tempdir().expect("a temporary folder");
    let out = run_with(&library, settings, cache.path(), command);
    let said = [out.stdout, out.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(out.status.success() && said.contains("1 passed"), "{said}");
    if said.contains("left over") {
        assert!(said.contains("left over: [], 0 allocations"), "{said}");
    }
}
