//! Activations on a CUDA device, as the kernels of an op see them.

use super::Shape;
use crate::device::cuda::{Act, Buf, In};
use bytemuck::{Pod, Zeroable};
use std::sync::Arc;

/// A norm and PReLU still to be applied, on the device: y = PReLU(scale x + shift).
#[derive(Clone, Debug)]
pub struct DevicePending {
    /// One factor per channel, or per (sample, channel).
    pub scale: Buf<f32>,
    /// One summand per channel, or per (sample, channel).
    pub shift: Buf<f32>,
    /// PReLU's slope; `None` means no PReLU.
    pub slope: Option<Buf<f32>>,
    /// Whether `scale` and `shift` have a value per (sample, channel).
    pub per_sample: bool,
}

/// `Pending` of kernels/pending.cuh.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct PendingArgs {
    scale: In<f32>,
    shift: In<f32>,
    slope: In<f32>,
    per_sample: u32,
    unused: u32,
}

/// Per-tile statistics that a convolution leaves for the norm after it: for each (sample, tile, channel), channels
/// fastest, three floats: number of voxels, their mean and their sum of squared deviations from it (M2).
#[derive(Clone, Debug)]
pub struct Partials {
    /// (N, tiles, C, 3).
    pub stats: Buf<f32>,
    /// Tiles a sample.
    pub tiles: usize,
}

/// NDHWC activations with what is pending on them.
#[derive(Clone, Debug)]
pub struct View {
    /// Stored elements.
    pub data: Act,
    /// Their shape.
    pub shape: Shape,
    /// The map still to be applied, if any.
    pub pending: Option<Arc<DevicePending>>,
}

impl View {
    /// Stored values that are final.
    pub fn plain(data: Act, shape: Shape) -> Self {
        assert_eq!(data.len(), shape.len(), "activations of shape {shape}");
        View { data, shape, pending: None }
    }

    /// The pending map for a kernel.
    pub fn pending_args(&self) -> PendingArgs {
        match &self.pending {
            None => PendingArgs::zeroed(),
            Some(p) => PendingArgs {
                scale: p.scale.read(),
                shift: p.shift.read(),
                slope: p.slope.as_ref().map_or(In::NULL, Buf::read),
                per_sample: u32::from(p.per_sample),
                unused: 0,
            },
        }
    }
}
