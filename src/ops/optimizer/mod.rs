//! The optimizer step over all parameters at once, on a CUDA device (kernels/optimizer.cu has the maths). The CPU's is
//! `train::optimizer`.
//!
//! All tensors lie in one flat buffer, so that a step is two launches however many there are, and a gradient is zeroed
//! by the kernel that used it.

pub mod cuda;

use crate::config::{Optim, Optimizer as Kind};
use crate::device::cuda::{Compared, Cuda, SelfTest, agree};
use crate::error::Result;
use crate::ops::self_test::{SUMS, uniform};
use bytemuck::{Pod, Zeroable};
use std::ops::Range;
use std::sync::Arc;

/// Floats that a block of a launch works on: 4 vectors of 16 bytes a thread. The network's 4.8 M parameters are some
/// 1,200 blocks, nine for each multiprocessor of an H100.
const CHUNK: usize = 4096;

/// Tensors start at multiples of this many floats: 16 bytes.
const ALIGN: usize = 4;

/// A run of floats of one tensor: `Chunk` of kernels/optimizer.cu.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Chunk {
    /// First float in the flat buffer.
    pub start: u32,
    /// Floats, with the gap after the tensor: a multiple of 4.
    pub len: u32,
    /// Whose.
    pub tensor: u32,
}

/// Where tensors lie in a flat buffer of floats: one after another, each from a multiple of 4 on.
#[derive(Clone, Debug)]
pub struct Tensors {
    lens: Vec<usize>,
    starts: Vec<usize>,
    total: usize,
}

impl Tensors {
    /// Tensors of `lens` floats.
    pub fn new(lens: &[usize]) -> Self {
        let mut total = 0;
        let starts = lens
            .iter()
            .map(|len| {
                let start = total;
                total += len.next_multiple_of(ALIGN);
                start
            })
            .collect();
        Tensors { lens: lens.to_vec(), starts, total }
    }

    /// Number of tensors.
    pub fn count(&self) -> usize {
        self.lens.len()
    }

    /// Floats of the flat buffer, gaps included.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Where tensor `i` lies.
    pub fn slice(&self, i: usize) -> Range<usize> {
        self.starts[i]..self.starts[i] + self.lens[i]
    }

    /// The flat buffer cut into chunks of one tensor each, and where each tensor's chunks begin: one number more than
    /// there are tensors.
    fn chunks(&self) -> (Vec<Chunk>, Vec<u32>) {
        let mut chunks = Vec::new();
        let mut first = vec![0];
        for (tensor, (&start, len)) in self.starts.iter().zip(&self.lens).enumerate() {
            let len = len.next_multiple_of(ALIGN);
            chunks.extend((0..len).step_by(CHUNK).map(|at| Chunk {
                start: (start + at) as u32,
                len: CHUNK.min(len - at) as u32,
                tensor: tensor as u32,
            }));
            first.push(chunks.len() as u32);
        }
        (chunks, first)
    }
}

/// See [`SelfTest`].
pub const SELF_TESTS: &[SelfTest] = &[
    SelfTest { name: "optimizer, Adam", run: |cuda| self_test(cuda, Kind::Adam) },
    SelfTest { name: "optimizer, Novograd", run: |cuda| self_test(cuda, Kind::Novograd) },
];

/// Two steps from 0 with one gradient g and without weight decay. Adam's corrected moments are g and g^2 then, Novograd's
/// second one is |g|^2, and its first b1 + 1 times what it was after the first step.
fn self_test(cuda: &Arc<Cuda>, optimizer: Kind) -> Result<String> {
    let c = Optim { optimizer, lr: 1e-2, beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.0 };
    let lens = [5, CHUNK + 3, 300];
    // With the scale of mixed precision, a power of two.
    let device = cuda::DeviceOptimizer::new(cuda, c, &lens, true)?;
    let scale = device.scale().download()?[0];
    let grads: Vec<_> = (0..).zip(lens).map(|(name, len)| uniform(name, len)).collect();
    for _ in 0..2 {
        for (i, g) in grads.iter().enumerate() {
            device.grad(i).upload(&g.iter().map(|g| g * scale).collect::<Vec<_>>())?;
        }
        device.step()?;
    }
    let (mut got, mut want) = (Vec::new(), Vec::new());
    for (i, g) in grads.iter().enumerate() {
        got.extend(device.value(i).download()?);
        let norm = g.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
        want.extend(g.iter().map(|&g| {
            let g = f64::from(g);
            let moved = match optimizer {
                Kind::Adam => 2.0 * g / (g.abs() + c.eps),
                Kind::Novograd => (2.0 + c.beta1) * g / (norm + c.eps),
            };
            (-c.lr * moved) as f32
        }));
    }
    agree(&[Compared { name: "values", got, want, allowed: SUMS }])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_every_tensor_once_and_in_order() {
        let tensors = Tensors::new(&[1, 4096, 0, 33_001, 3]);
        assert_eq!(tensors.total(), 4 + 4096 + 33_004 + 4);
        assert_eq!((tensors.slice(1), tensors.slice(4)), (4..4100, 37_104..37_107));
        let (chunks, first) = tensors.chunks();
        assert_eq!(first, [0, 1, 2, 2, 11, 12]);
        let mut next = 0;
        for (i, chunk) in chunks.iter().enumerate() {
            assert_eq!(chunk.start, next, "{chunk:?}");
            assert!(chunk.len % 4 == 0 && (1..=4096).contains(&chunk.len), "{chunk:?}");
            assert!((first[chunk.tensor as usize]..first[chunk.tensor as usize + 1]).contains(&(i as u32)));
            next += chunk.len;
        }
        assert_eq!(next as usize, tensors.total());
    }
}
