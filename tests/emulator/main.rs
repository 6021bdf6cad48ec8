//! The emulator itself: every detector finds the bug that is planted for it (planted.cu), correct kernels pass under
//! every schedule, fragments lie as the PTX ISA has them, and streams, events and graphs keep CUDA's promises.

#![cfg(emulated)]

mod detectors;
mod fragments;
mod streams;

use bytemuck::{Pod, Zeroable};
use spleen_hpc::Result;
use spleen_hpc::device::cuda::emulated::Emulated;
use spleen_hpc::device::cuda::{Buf, Cuda, In, InOut, Kernel, Launch, Precision};
use std::sync::Arc;

/// `Planted` of planted.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Planted {
    pub x: In<f32>,
    pub y: InOut<f32>,
    pub bytes: InOut<u8>,
    pub counter: InOut<u32>,
    pub n: u32,
    pub bug: u32,
}

/// A kernel of planted.cu.
pub const fn kernel(name: &'static str) -> Kernel<Planted> {
    Kernel::new("planted.cu", name)
}

/// A device with this schedule.
pub fn device(seed: u64) -> Arc<Cuda> {
    Cuda::new(Arc::new(Emulated::new(seed)), Precision::Half)
}

/// What a planted kernel works on: x[i] = i + 1; y of the same length and 64 more, counters at 0.
pub struct Data {
    pub x: Buf<f32>,
    pub y: Buf<f32>,
    pub bytes: Buf<u8>,
    pub counter: Buf<u32>,
}

impl Data {
    pub fn new(cuda: &Arc<Cuda>, len: usize) -> Result<Self> {
        let x: Vec<f32> = (0..len).map(|i| (i + 1) as f32).collect();
        let data = Data {
            x: cuda.upload(&x)?,
            y: cuda.upload(&vec![0.0; len + 64])?,
            bytes: cuda.buffer(len)?,
            counter: cuda.upload(&vec![0; 64])?,
        };
        Ok(data)
    }

    pub fn args(&self, n: u32, bug: u32) -> Planted {
        Planted {
            x: self.x.read(),
            y: self.y.both(),
            bytes: self.bytes.both(),
            counter: self.counter.both(),
            n,
            bug,
        }
    }
}

/// A grid of `blocks`.
pub fn launch(blocks: u32, threads: u32, shared: u32) -> Launch {
    Launch { grid: [blocks, 1, 1], threads, shared }
}
