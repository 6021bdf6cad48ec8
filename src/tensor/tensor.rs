//! A dense f32 tensor, shared and immutable once made.

use super::Shape;
use crate::device::arena::Buffer;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Names a value on the tape; two tensors of one id hold the same value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ValueId(u64);

impl ValueId {
    /// An id no other value has.
    pub fn fresh() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        ValueId(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// Floats in NDHWC order; cloning shares them.
#[derive(Clone, Debug)]
pub struct Tensor {
    id: ValueId,
    shape: Shape,
    data: Arc<Buffer>,
}

impl Tensor {
    /// Wraps a filled buffer. Its length must be `shape.len()`.
    pub fn new(shape: Shape, data: Buffer) -> Self {
        assert_eq!(shape.len(), data.len(), "a tensor of shape {shape}");
        Tensor { id: ValueId::fresh(), shape, data: Arc::new(data) }
    }

    /// Copies NDHWC floats. Their number must be `shape.len()`.
    pub fn from_slice(shape: Shape, values: &[f32]) -> Self {
        Tensor::new(shape, Buffer::from_slice(values))
    }

    /// Which value this is.
    pub fn id(&self) -> ValueId {
        self.id
    }

    /// Its shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Its floats, NDHWC.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// The floats for writing: in place when nobody else holds them, a copy otherwise.
    pub fn make_mut(&mut self) -> &mut [f32] {
        if Arc::get_mut(&mut self.data).is_none() {
            self.data = Arc::new(Buffer::from_slice(&self.data));
        }
        Arc::get_mut(&mut self.data).expect("the copy just made has one owner")
    }
}
