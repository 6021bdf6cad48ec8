//! 3D convolution on the CPU: a gather core and an outer-product core serve every pass, and two that save products some.
//!
//! | pass | core | tile taken from | lanes |
//! |---|---|---|---|
//! | conv fprop | [`correlate()`], [`Map::Gather`] | x | output channels |
//! | conv dgrad, stride 1 | [`correlate()`], [`Map::Gather`], taps mirrored | dy | input channels |
//! | conv dgrad, stride 2 | [`correlate()`], [`Map::Scatter`] | dy | input channels |
//! | transposed fprop | [`correlate()`], [`Map::Scatter`] | x | output channels |
//! | transposed dgrad | [`correlate()`], [`Map::Gather`] stride 2 | dy | input channels |
//! | conv wgrad | [`wgrad()`] | x | output channels, from dy |
//! | transposed wgrad | [`wgrad()`] | dy | input channels, from x |
//!
//! Where the outputs have at most four channels, or both sides of a wgrad two, neighbouring voxels fill the lanes instead.
//!
//! A task copies an input tile with its halo into a buffer that fits L2, applying the pending norm and PReLU once,
//! and multiplies shifted views of it: there is no im2col matrix. Several inputs (concat) and several
//! outputs (a convolution and its residual sibling) share one tile. With bfloat16 operands tile and weights hold pairs, of
//! channels (gather core; of voxels where a stride of 2 meets a single channel) or of voxels or tiles (outer products); the
//! micro-kernels are the same code over other lanes.
//!
//! Passes of kernel 3 with 8 channels or more on both sides (of bfloat16: 16) multiply transforms of the input instead, which
//! takes fewer products (`winograd`), but for volumes too small or of odd sizes that leave too many, and for strided and
//! transposed convolutions in the forward pass of a step in bfloat16. That of a step in f32 never does. Its values would be as
//! good, but the slope of a PReLU jumps at 0: in a golden of two patches of 48^3 rounding gave one value of three million another
//! sign than float64, which moved gradients by 3e-4 to 7e-4 of their largest. The direct sum happens to give all of them the same
//! sign there, and trajectories of training are held against PyTorch's.
//!
//! In inference a convolution whose norm is known beforehand finishes its outputs as it writes them (`epilogue`): norm and
//! PReLU, a residual sum, and with bfloat16 operands rounding to bfloat16, as which they are stored. The next convolution
//! copies them, where it would map every value of a raw tensor for each tile that reads it.
//!
//! On a CPU with AMX the first two cores multiply matrices of bfloat16 instead (`amx`): never transforms, and products in
//! another order. No result depends on the number of threads: every sum has one order.

#[cfg(target_arch = "x86_64")]
mod amx;
mod correlate;
mod epilogue;
mod halves;
mod kept;
mod micro;
mod narrow;
mod pack;
mod partials;
mod plan;
mod row;
mod rows;
mod run;
mod target;
mod thin_wgrad;
mod tile;
mod transpose;
mod wgrad;
mod winograd;

pub use correlate::correlate;
pub use epilogue::{Epilogue, Head, Output};
pub use plan::Map;
pub use row::{Affine, mapped};
pub use wgrad::wgrad;

use crate::device::bf16::{Operands, widen};
use crate::tensor::{Activation, Pending, Tape, Tensor, Values};
use std::sync::Arc;

/// When a pass runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// No gradient will be asked of it. The weights are to stay as they are: their packs are kept for passes to come.
    Inference,
    /// The forward pass of a training step. In f32 its sums are those of the definition, product by product.
    Forward,
    /// The backward pass of a training step.
    Backward,
}

impl Phase {
    /// That of ops that `tape` sees.
    pub fn of(tape: &Tape) -> Self {
        if tape.is_recording() { Phase::Forward } else { Phase::Inference }
    }
}

/// The shape and arithmetic of a pass.
#[derive(Clone, Copy, Debug)]
pub struct Problem {
    /// Which input voxels feed an output voxel.
    pub map: Map,
    /// What is multiplied.
    pub operands: Operands,
    /// When it runs.
    pub phase: Phase,
    /// Samples.
    pub n: usize,
    /// (D, H, W) of the sources.
    pub space: [usize; 3],
    /// (D, H, W) of what the map leads to: heads, or lane sources.
    pub out_space: [usize; 3],
}

/// One input of a pass: values in NDHWC, f32 ones maybe with a map still to be applied.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    data: Values<'a>,
    channels: usize,
    pending: Option<&'a Pending>,
}

impl<'a> From<&'a Activation> for Source<'a> {
    fn from(x: &'a Activation) -> Self {
        Source { data: x.raw().values(), channels: x.shape().c, pending: x.pending() }
    }
}

impl<'a> From<&'a Tensor> for Source<'a> {
    fn from(x: &'a Tensor) -> Self {
        Source { data: x.values(), channels: x.shape().c, pending: None }
    }
}

impl<'a> Source<'a> {
    /// `len` values from value `start` on; bfloat16 ones are widened into `row`.
    fn row<'r>(&self, start: usize, len: usize, row: &'r mut Vec<f32>) -> &'r [f32]
    where
        'a: 'r,
    {
        match self.data {
            Values::Single(x) => &x[start..][..len],
            Values::Bf16(x) => {
                row.resize(len, 0.0);
                widen(&x[start..][..len], row);
                row
            }
        }
    }

    /// The map of a block's channels in sample `n`.
    fn affine(&self, n: usize, block: plan::Block) -> Affine<'a> {
        self.pending.map(|p| {
            let (scale, shift) = p.of_sample(n, self.channels);
            (&scale[block.first..][..block.len], &shift[block.first..][..block.len], p.slope)
        })
    }
}

/// How the weights between one source and one head lie in a PyTorch tensor (O, I, 3, 3, 3) or (I, O, 3, 3, 3).
#[derive(Clone, Copy)]
pub struct Weights<'a> {
    /// The whole tensor.
    pub data: &'a Arc<Vec<f32>>,
    /// Index of this source's and this head's first channel pair.
    pub offset: usize,
    /// Distance between channels of the head.
    pub head_stride: usize,
    /// Distance between channels of the source.
    pub source_stride: usize,
    /// Taps in reverse order on all axes, for dgrad.
    pub mirrored: bool,
}
