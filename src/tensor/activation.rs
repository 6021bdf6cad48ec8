//! A value whose norm and PReLU may still be pending.

use super::{Shape, Tensor, ValueId};
use std::sync::Arc;

/// y = PReLU(scale * x + shift): what a consumer applies while it loads x.
#[derive(Debug)]
pub struct Pending {
    /// One factor per channel, or per (sample, channel).
    pub scale: Vec<f32>,
    /// One summand per channel, or per (sample, channel).
    pub shift: Vec<f32>,
    /// PReLU's slope for values <= 0 after the affine map; 1 means no PReLU.
    pub slope: f32,
}

impl Pending {
    /// Scale and shift of the `c` channels of sample `n`.
    pub fn of_sample(&self, n: usize, c: usize) -> (&[f32], &[f32]) {
        let start = if self.scale.len() == c { 0 } else { n * c };
        (&self.scale[start..start + c], &self.shift[start..start + c])
    }
}

/// A tensor, or a tensor with a [`Pending`] map: consumers see only the mapped value.
///
/// Its `id` is the mapped value's: gradients with respect to it are handed to the op that made the map.
#[derive(Clone, Debug)]
pub struct Activation {
    raw: Tensor,
    pending: Option<Arc<Pending>>,
    id: ValueId,
    differentiable: bool,
}

impl Activation {
    /// `raw` seen through `pending`.
    pub fn lazy(raw: Tensor, pending: Pending) -> Self {
        Activation { raw, pending: Some(Arc::new(pending)), id: ValueId::fresh(), differentiable: true }
    }

    /// A value whose gradient nobody wants, such as the network's input.
    pub fn constant(raw: Tensor) -> Self {
        Activation { differentiable: false, ..raw.into() }
    }

    /// Whether a consumer must compute this value's gradient.
    pub fn is_differentiable(&self) -> bool {
        self.differentiable
    }

    /// The stored floats, before the pending map.
    pub fn raw(&self) -> &Tensor {
        &self.raw
    }

    /// The map still to be applied, if any.
    pub fn pending(&self) -> Option<&Pending> {
        self.pending.as_deref()
    }

    /// The id of the mapped value.
    pub fn id(&self) -> ValueId {
        self.id
    }

    /// The shape.
    pub fn shape(&self) -> Shape {
        self.raw.shape()
    }
}

impl From<Tensor> for Activation {
    fn from(raw: Tensor) -> Self {
        let id = raw.id();
        Activation { raw, pending: None, id, differentiable: true }
    }
}
