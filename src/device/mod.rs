//! What computes: threads and vector units of the CPU and the memory they write, or a CUDA device.

#[cfg(target_arch = "x86_64")]
pub mod amx;
pub mod arena;
pub mod bf16;
mod by_type;
pub mod choice;
pub mod cpu;
pub mod cuda;
pub mod disjoint;
pub mod lanes;
pub mod list;
pub mod nvtx;
pub mod scratch;
pub mod shared;

use std::sync::Arc;

/// What computes.
#[derive(Clone, Debug)]
pub enum Device {
    /// The processor, and what its convolutions multiply.
    Cpu(bf16::Operands),
    /// A CUDA device, in its precision.
    Cuda(Arc<cuda::Cuda>),
}
