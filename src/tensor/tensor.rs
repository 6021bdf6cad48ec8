//! A dense tensor, shared and immutable once made: f32 in host memory, or on a CUDA device in its precision.

use super::{Partials, Shape, View};
use crate::device::arena::Buffer;
use crate::device::cuda::{Act, Cuda};
use crate::error::Result;
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

#[derive(Clone, Debug)]
enum Storage {
    Host(Arc<Buffer>),
    Device(Act),
}

/// Elements in NDHWC order; cloning shares them.
#[derive(Clone, Debug)]
pub struct Tensor {
    id: ValueId,
    shape: Shape,
    storage: Storage,
    partials: Option<Partials>,
}

impl Tensor {
    /// Wraps a filled buffer. Its length must be `shape.len()`.
    pub fn new(shape: Shape, data: Buffer) -> Self {
        assert_eq!(shape.len(), data.len(), "a tensor of shape {shape}");
        Tensor { id: ValueId::fresh(), shape, storage: Storage::Host(Arc::new(data)), partials: None }
    }

    /// Copies NDHWC floats. Their number must be `shape.len()`.
    pub fn from_slice(shape: Shape, values: &[f32]) -> Self {
        Tensor::new(shape, Buffer::from_slice(values))
    }

    /// Wraps elements on a device, with what the kernel that wrote them left for a norm.
    pub fn on_device(shape: Shape, data: Act, partials: Option<Partials>) -> Self {
        assert_eq!(shape.len(), data.len(), "a tensor of shape {shape}");
        Tensor { id: ValueId::fresh(), shape, storage: Storage::Device(data), partials }
    }

    /// Which value this is.
    pub fn id(&self) -> ValueId {
        self.id
    }

    /// Its shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Its floats, NDHWC; the tensor must be in host memory.
    pub fn data(&self) -> &[f32] {
        match &self.storage {
            Storage::Host(data) => data,
            Storage::Device(_) => panic!("only host code asks for floats, and only of host tensors"),
        }
    }

    /// Its elements on the device, if it is there.
    pub fn device(&self) -> Option<&Act> {
        match &self.storage {
            Storage::Host(_) => None,
            Storage::Device(data) => Some(data),
        }
    }

    /// As kernels see it, if it is on a device.
    pub fn view(&self) -> Option<View> {
        self.device().map(|data| View::plain(data.clone(), self.shape))
    }

    /// Per-tile statistics, where the kernel that wrote it left them.
    pub fn partials(&self) -> Option<&Partials> {
        self.partials.as_ref()
    }

    /// The same value in host memory; waits for the device.
    ///
    /// # Errors
    /// What went wrong on the device.
    pub fn to_host(&self) -> Result<Tensor> {
        let Storage::Device(data) = &self.storage else { return Ok(self.clone()) };
        Ok(Tensor { id: self.id, ..Tensor::from_slice(self.shape, &data.download()?) })
    }

    /// The same value on a device, rounded to its precision.
    ///
    /// # Errors
    /// When the device has not enough memory.
    pub fn to_device(&self, cuda: &Arc<Cuda>) -> Result<Tensor> {
        let Storage::Host(data) = &self.storage else { return Ok(self.clone()) };
        let act = cuda.act(data.len())?;
        act.upload(data)?;
        Ok(Tensor { id: self.id, ..Tensor::on_device(self.shape, act, None) })
    }

    /// The floats for writing: in place when nobody else holds them, a copy otherwise. A host tensor.
    pub fn make_mut(&mut self) -> &mut [f32] {
        let Storage::Host(data) = &mut self.storage else {
            panic!("only host code asks for floats, and only of host tensors")
        };
        if Arc::get_mut(data).is_none() {
            *data = Arc::new(Buffer::from_slice(data));
        }
        Arc::get_mut(data).expect("the copy just made has one owner")
    }
}

impl AsRef<[f32]> for Tensor {
    fn as_ref(&self) -> &[f32] {
        self.data()
    }
}
