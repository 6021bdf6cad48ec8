//! Which device is chosen, and what is said where it cannot be had. (Machines with a GPU: tests/native.)

use spleen_hpc::config::{Amp, DeviceChoice};
use spleen_hpc::device::Device;
use spleen_hpc::device::bf16::Operands;
use spleen_hpc::device::choice::resolve;
use spleen_hpc::device::cuda::libcuda::{self, Presence};
use spleen_hpc::device::cuda::{Compared, Precision, agree};

#[test]
fn the_cpu_can_always_be_had() {
    for (amp, operands, arithmetic) in [
        (Amp::Auto, Operands::Single, "f32"),
        (Amp::Off, Operands::Single, "f32"),
        (Amp::On, Operands::Bf16, "mixed precision (bfloat16)"),
    ] {
        let (device, why) = resolve(DeviceChoice::Cpu, amp).unwrap();
        assert!(matches!(device, Device::Cpu(got) if got == operands), "{device:?}");
        let end = format!("threads) in {arithmetic}, as asked");
        assert!(why.starts_with("cpu (") && why.ends_with(&end), "{why}");
    }
}

#[test]
fn without_a_driver_auto_is_the_cpu_and_cuda_is_refused() {
    if libcuda::look().is_ok_and(|found| found != Presence::NoDriver) {
        println!("skipped: this machine has an NVIDIA driver");
        return;
    }
    let (device, why) = resolve(DeviceChoice::Auto, Amp::Auto).unwrap();
    assert!(matches!(device, Device::Cpu(Operands::Single)));
    assert!(why.ends_with("for there is no NVIDIA driver (libcuda.so.1)"), "{why}");
    let err = resolve(DeviceChoice::Cuda(1), Amp::Auto).unwrap_err();
    assert_eq!(
        err.to_string(),
        "--device cuda:1: there is no NVIDIA driver (libcuda.so.1): use --device cpu, `spleen-hpc doctor` says more"
    );
    assert_eq!(err.exit_code(), 2);
}

#[cfg(emulated)]
#[test]
fn the_emulator_can_be_chosen_where_it_is_built() {
    for (text, name) in [("emulated", "emulated:0"), ("emulated:7", "emulated:7")] {
        let choice: DeviceChoice = text.parse().unwrap();
        assert_eq!(choice.to_string(), name);
        let (device, why) = resolve(choice, Amp::Off).unwrap();
        let Device::Cuda(cuda) = device else { panic!("{why}") };
        assert_eq!(cuda.precision(), Precision::Single);
        assert_eq!(why, "emulated GPU in f32, as asked");
    }
    assert!("emulated:x".parse::<DeviceChoice>().is_err());
}

#[test]
fn mixed_precision_is_fp16() {
    assert_eq!(Precision::from(Amp::Auto), Precision::Half);
    assert_eq!(Precision::from(Amp::On), Precision::Half);
    assert_eq!(Precision::from(Amp::Off), Precision::Single);
}

/// The comparison of self-tests lets nothing pass that is not close.
#[test]
fn disagreement_is_seen() {
    let compare = |got: &[f32], want: &[f32], allowed| {
        agree(&[Compared { name: "y", got: got.to_vec(), want: want.to_vec(), allowed }])
    };
    assert_eq!(compare(&[1.0, 2.0], &[1.0, 2.0], 0.0).unwrap(), "y exact");
    assert!(compare(&[1.0, 2.002], &[1.0, 2.0], 1e-6).is_ok());
    for got in [&[1.0, 2.1][..], &[1.0, f32::NAN], &[1.0], &[1.0, f32::INFINITY]] {
        assert!(compare(got, &[1.0, 2.0], 1e-6).is_err(), "{got:?}");
    }
    assert!(compare(&[0.1], &[0.0], 1e-6).is_err());
}
