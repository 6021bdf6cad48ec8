//! `SPLEEN_SIMD` forces a vector unit, and what it cannot force is refused in one sentence.

use spleen_hpc::device::cpu::{Simd, amx, simd, units};
use std::process::{Command, Output};

/// What the doctor says with this unit forced; it is asked about one kernel only, to be quick.
fn doctor(unit: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_spleen-hpc"));
    let quick = ["doctor", "--device", "cpu", "--only", "residual.cu", "--arch", "sm_80"];
    command.args(quick).env("SPLEEN_SIMD", unit).output().expect("the binary starts")
}

/// The name of this machine's vector unit.
fn vector_unit() -> &'static str {
    match simd() {
        Simd::Avx512 => "avx512",
        Simd::Avx2 => "avx2",
        Simd::Portable => "portable",
    }
}

#[test]
fn a_forced_unit_is_the_one_in_use() {
    let stdout = String::from_utf8(doctor("portable").stdout).expect("text");
    assert!(stdout.contains("no AVX2"), "{stdout}");
    // In this process nothing is forced: the best units are in use, and they can be forced too.
    let name = if amx() { "amx" } else { vector_unit() };
    let stdout = String::from_utf8(doctor(name).stdout).expect("text");
    assert!(stdout.contains(&units()), "{stdout}");
    let stdout = String::from_utf8(doctor("").stdout).expect("text");
    assert!(stdout.contains(&units()), "empty is not set: {stdout}");
}

#[test]
fn a_vector_unit_is_forced_without_amx() {
    let stdout = String::from_utf8(doctor(vector_unit()).stdout).expect("text");
    assert!(stdout.contains(&simd().to_string()) && !stdout.contains("AMX"), "{stdout}");
}

#[test]
fn amx_is_refused_where_there_is_none() {
    if amx() {
        return;
    }
    let output = doctor("amx");
    assert_eq!(output.status.code(), Some(2));
    let stderr = String::from_utf8(output.stderr).expect("text");
    assert_eq!(stderr.trim(), format!("error: SPLEEN_SIMD=amx: this machine has {}", simd()));
}

#[test]
fn an_unknown_unit_is_refused() {
    let output = doctor("sse9");
    assert_eq!(output.status.code(), Some(2));
    let stderr = String::from_utf8(output.stderr).expect("text");
    assert_eq!(stderr.trim(), "error: SPLEEN_SIMD=sse9: it is amx, avx512, avx2 or portable");
}
