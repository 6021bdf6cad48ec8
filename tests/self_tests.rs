//! The small cases by which `spleen-hpc doctor` tries a device, on the emulator. tests/native runs them through the
//! driver's interface.

mod support;

use spleen_hpc::device::cuda::{Precision, sources};
use spleen_hpc::ops::self_tests;
use std::process::Command;

#[test]
fn every_op_agrees_with_the_cpu() {
    let mut wrong = Vec::new();
    for precision in [Precision::Half, Precision::Single] {
        let Some(cuda) = support::device(precision, 1) else { return };
        for test in self_tests() {
            match (test.run)(&cuda) {
                Ok(agreement) => println!("{precision:?} {}: {agreement}", test.name),
                Err(err) => wrong.push(format!("{precision:?} {}: {err}", test.name)),
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_kernel_file_has_a_case_of_its_op() {
    let ops: Vec<_> = self_tests().iter().map(|test| test.name.split([' ', ',']).next().unwrap()).collect();
    for source in sources::all() {
        let stem = source.file.trim_end_matches(".cu");
        let tried = |op: &&str| stem == *op || stem.starts_with(&format!("{op}_"));
        assert!(ops.iter().any(tried), "no self-test of {}", source.file);
    }
}

/// A line a case and precision, and nothing broken.
#[test]
fn the_doctor_tries_all_of_them() {
    if support::device(Precision::Half, 0).is_none() {
        return;
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_spleen-hpc"));
    // Without a compiler: tests/kernels_compile.rs and tests/native have one.
    let out = command.args(["doctor", "--device", "emulated"]).env("SPLEEN_NVRTC", "/nowhere").output();
    let said = String::from_utf8(out.expect("it runs").stdout).expect("text");
    for test in self_tests() {
        let line = format!("self-test  {}: ", test.name);
        assert_eq!(said.matches(&line).count(), 2, "{line} in\n{said}");
    }
    assert!(!said.contains("self-test  BROKEN"), "{said}");
}
