//! Which device computes, and why that one.

use super::Device;
use super::bf16::Operands;
use super::cpu::units;
use super::cuda::native::Native;
use super::cuda::nvrtc::{Nvrtc, OLDEST_CAPABILITY, Target};
use super::cuda::{Cuda, Precision, libcuda};
use crate::config::{Amp, DeviceChoice};
use crate::error::{Error, Result};
use std::sync::Arc;

impl From<Amp> for Precision {
    fn from(amp: Amp) -> Self {
        match amp {
            Amp::Auto | Amp::On => Precision::Half,
            Amp::Off => Precision::Single,
        }
    }
}

impl From<Amp> for Operands {
    fn from(amp: Amp) -> Self {
        match amp {
            Amp::On => Operands::Bf16,
            Amp::Auto | Amp::Off => Operands::Single,
        }
    }
}

/// The device that `choice` means, and one sentence that names it and says why it is that one.
///
/// `auto` is the first GPU of compute capability 8.0 or newer where driver and NVRTC work too, else the CPU.
///
/// # Errors
/// [`Error::Usage`] where a device was asked for by name and cannot be had.
pub fn resolve(choice: DeviceChoice, amp: Amp) -> Result<(Device, String)> {
    let (precision, operands) = (amp.into(), amp.into());
    let cannot = |why: Error| {
        Error::Usage(format!("--device {choice}: {why}: use --device cpu, `spleen-hpc doctor` says more"))
    };
    match choice {
        DeviceChoice::Cpu => Ok((Device::Cpu(operands), format!("{}, as asked", cpu(operands)))),
        DeviceChoice::Cuda(ordinal) => {
            let cuda = gpu(ordinal, precision).map_err(cannot)?;
            let why = format!("cuda:{ordinal}, {}, as asked", describe(&cuda));
            Ok((Device::Cuda(cuda), why))
        }
        DeviceChoice::Auto => Ok(match first().and_then(|n| Ok((n, gpu(n, precision)?))) {
            Ok((ordinal, cuda)) => {
                let why = format!("cuda:{ordinal}, {}, the first GPU that can", describe(&cuda));
                (Device::Cuda(cuda), why)
            }
            Err(why) => (Device::Cpu(operands), format!("{}, for {why}", cpu(operands))),
        }),
        #[cfg(emulated)]
        DeviceChoice::Emulated(seed) => {
            let cuda = Cuda::new(Arc::new(super::cuda::emulated::Emulated::new(seed)), precision);
            let why = format!("{}, as asked", describe(&cuda));
            Ok((Device::Cuda(cuda), why))
        }
    }
}

/// Number of the first GPU that the kernels run on.
fn first() -> Result<u32> {
    let gpus = libcuda::gpus()?;
    if let Some(ordinal) = gpus.iter().position(|gpu| gpu.capability >= OLDEST_CAPABILITY) {
        return Ok(ordinal as u32);
    }
    match gpus.first() {
        Some(gpu) => {
            Err(Target::of(gpu.capability, &[]).err().unwrap_or(Error::Gpu("no GPU is new enough".into())))
        }
        None => Err(Error::Gpu("the NVIDIA driver finds no GPU".into())),
    }
}

/// GPU `ordinal`, proven to have all that kernels need.
fn gpu(ordinal: u32, precision: Precision) -> Result<Arc<Cuda>> {
    let count = libcuda::gpus()?.len();
    if ordinal as usize >= count {
        return Err(Error::Gpu(match count {
            1 => "there is one GPU, cuda:0".into(),
            _ => format!("there are {count} GPUs, cuda:0 to cuda:{}", count.saturating_sub(1)),
        }));
    }
    Nvrtc::get()?.check_install()?;
    Ok(Cuda::new(Arc::new(Native::new(ordinal)?), precision))
}

fn describe(cuda: &Cuda) -> String {
    let precision = match cuda.precision() {
        Precision::Half => "mixed precision",
        Precision::Single => "f32",
    };
    format!("{} in {precision}", cuda.info().name)
}

fn cpu(operands: Operands) -> String {
    let arithmetic = match operands {
        Operands::Single => "f32",
        Operands::Bf16 => "mixed precision (bfloat16)",
    };
    format!("cpu ({}, {} threads) in {arithmetic}", units(), rayon::current_num_threads())
}
