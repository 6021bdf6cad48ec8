//! A value whose norm and PReLU may still be pending.

use super::{DevicePending, Shape, Tensor, ValueId, Values, View};
use crate::device::list::List;
use crate::device::shared::Shared;
use crate::error::Result;
use std::sync::Arc;

/// y = PReLU(scale * x + shift): what a consumer applies while it loads x.
#[derive(Debug)]
pub struct Pending {
    /// One factor per channel, or per (sample, channel).
    pub scale: List<f32>,
    /// One summand per channel, or per (sample, channel).
    pub shift: List<f32>,
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

/// The map, where its tensor is.
#[derive(Clone, Debug)]
enum Map {
    None,
    Host(Shared<Pending>),
    Device(Arc<DevicePending>),
}

/// A tensor, or a tensor with a [`Pending`] map: consumers see only the mapped value.
///
/// Its `id` is the mapped value's: gradients with respect to it are handed to the op that made the map.
#[derive(Clone, Debug)]
pub struct Activation {
    raw: Tensor,
    map: Map,
    id: ValueId,
    differentiable: bool,
}

impl Activation {
    /// `raw`, f32 in host memory, seen through `pending`.
    ///
    /// # Panics
    /// When `raw` is bfloat16, or on a device.
    pub fn lazy(raw: Tensor, pending: Pending) -> Self {
        assert!(matches!(raw.values(), Values::Single(_)), "a map is pending on f32 values alone");
        Activation { map: Map::Host(Shared::new(pending)), id: ValueId::fresh(), ..raw.into() }
    }

    /// `raw`, on a device, seen through `pending`.
    pub fn lazy_on_device(raw: Tensor, pending: Arc<DevicePending>) -> Self {
        Activation { map: Map::Device(pending), id: ValueId::fresh(), ..raw.into() }
    }

    /// A value whose gradient nobody wants, such as the network's input.
    pub fn constant(raw: Tensor) -> Self {
        Activation { differentiable: false, ..raw.into() }
    }

    /// Whether a consumer must compute this value's gradient.
    pub fn is_differentiable(&self) -> bool {
        self.differentiable
    }

    /// The stored elements, before the pending map.
    pub fn raw(&self) -> &Tensor {
        &self.raw
    }

    /// The stored elements by themselves.
    pub fn into_raw(self) -> Tensor {
        self.raw
    }

    /// The map still to be applied to a host tensor, if any.
    pub fn pending(&self) -> Option<&Pending> {
        match &self.map {
            Map::Host(pending) => Some(pending),
            Map::None | Map::Device(_) => None,
        }
    }

    /// As kernels see it, if it is on a device.
    pub fn view(&self) -> Option<View> {
        let pending = match &self.map {
            Map::Device(pending) => Some(pending.clone()),
            Map::None | Map::Host(_) => None,
        };
        Some(View { pending, ..self.raw.view()? })
    }

    /// The same value in host memory; waits for the device.
    ///
    /// # Errors
    /// What went wrong on the device.
    pub fn to_host(&self) -> Result<Activation> {
        let map = match &self.map {
            Map::Device(p) => {
                let slope = p.slope.as_ref().map_or(Ok(1.0), |s| s.download().map(|s| s[0]))?;
                let (scale, shift) = (p.scale.download()?.into(), p.shift.download()?.into());
                Map::Host(Shared::new(Pending { scale, shift, slope }))
            }
            map => map.clone(),
        };
        Ok(Activation { raw: self.raw.to_host()?, map, ..*self })
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
        Activation { raw, map: Map::None, id, differentiable: true }
    }
}
