//! A dense tensor, shared and immutable once made: in host memory, f32 or, where convolutions of bfloat16 read it,
//! bfloat16; or on a CUDA device in its precision.

use super::{Partials, Shape, View};
use crate::device::arena::Buffer;
use crate::device::bf16::{Operands, widened};
use crate::device::cuda::{Act, Cuda};
use crate::device::shared::Shared;
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

/// Elements in host memory, NDHWC.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    /// f32.
    Single(&'a [f32]),
    /// bfloat16, its bits.
    Bf16(&'a [u16]),
}

impl<'a> Values<'a> {
    /// Value `i`.
    pub fn at(self, i: usize) -> f32 {
        match self {
            Values::Single(x) => x[i],
            Values::Bf16(x) => widened(x[i]),
        }
    }

    /// The f32 values that they are.
    ///
    /// # Panics
    /// When they are bfloat16, which hardly anything but a convolution reads.
    pub fn single(self) -> &'a [f32] {
        match self {
            Values::Single(x) => x,
            Values::Bf16(_) => panic!("bfloat16 values where f32 ones are wanted"),
        }
    }

    /// The bits of the bfloat16 values that they are.
    ///
    /// # Panics
    /// When they are f32.
    pub fn bf16(self) -> &'a [u16] {
        match self {
            Values::Bf16(x) => x,
            Values::Single(_) => panic!("f32 values where bfloat16 ones are wanted"),
        }
    }

    /// `len` of them from value `start` on.
    pub fn part(self, start: usize, len: usize) -> Self {
        match self {
            Values::Single(x) => Values::Single(&x[start..][..len]),
            Values::Bf16(x) => Values::Bf16(&x[start..][..len]),
        }
    }
}

/// The same for writing.
#[derive(Debug)]
pub enum ValuesMut<'a> {
    /// f32.
    Single(&'a mut [f32]),
    /// bfloat16, its bits.
    Bf16(&'a mut [u16]),
}

#[derive(Clone, Debug)]
enum Storage {
    Host(Shared<Buffer>),
    /// bfloat16, two in the room of a float.
    HostBf16(Shared<Buffer>),
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
        Tensor { id: ValueId::fresh(), shape, storage: Storage::Host(Shared::new(data)), partials: None }
    }

    /// Copies NDHWC floats. Their number must be `shape.len()`.
    pub fn from_slice(shape: Shape, values: &[f32]) -> Self {
        Tensor::new(shape, Buffer::from_slice(values))
    }

    /// Wraps bfloat16 elements, two in the room of a float, the last float half empty if their number is odd.
    pub fn bf16(shape: Shape, data: Buffer) -> Self {
        assert_eq!(shape.len().div_ceil(2), data.len(), "a tensor of shape {shape}");
        Tensor { id: ValueId::fresh(), shape, storage: Storage::HostBf16(Shared::new(data)), partials: None }
    }

    /// Room for the elements of a host tensor, of unspecified values: what [`Tensor::stored`] is to wrap.
    pub fn room(shape: Shape, stored: Operands) -> Buffer {
        Buffer::dirty(Self::floats_of(shape, stored))
    }

    /// The elements of such a buffer.
    pub fn values_mut(shape: Shape, stored: Operands, room: &mut Buffer) -> ValuesMut<'_> {
        match stored {
            Operands::Single => ValuesMut::Single(room),
            Operands::Bf16 => ValuesMut::Bf16(&mut bytemuck::cast_slice_mut(room)[..shape.len()]),
        }
    }

    /// Wraps elements that are stored so.
    pub fn stored(shape: Shape, stored: Operands, data: Buffer) -> Self {
        match stored {
            Operands::Single => Tensor::new(shape, data),
            Operands::Bf16 => Tensor::bf16(shape, data),
        }
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

    /// Its floats, NDHWC; the tensor must be in host memory, and f32.
    pub fn data(&self) -> &[f32] {
        self.values().single()
    }

    /// Its elements, NDHWC; the tensor must be in host memory.
    pub fn values(&self) -> Values<'_> {
        match &self.storage {
            Storage::Host(data) => Values::Single(data),
            Storage::HostBf16(data) => Values::Bf16(&bytemuck::cast_slice(data)[..self.shape.len()]),
            Storage::Device(_) => panic!("only host code asks for values, and only of host tensors"),
        }
    }

    /// What its elements are stored as; the tensor must be in host memory.
    pub fn stored_as(&self) -> Operands {
        match self.values() {
            Values::Single(_) => Operands::Single,
            Values::Bf16(_) => Operands::Bf16,
        }
    }

    /// Floats of room that they take in host memory.
    pub fn floats(&self) -> usize {
        Self::floats_of(self.shape, self.stored_as())
    }

    /// Floats of room for the elements of a host tensor.
    fn floats_of(shape: Shape, stored: Operands) -> usize {
        match stored {
            Operands::Single => shape.len(),
            Operands::Bf16 => shape.len().div_ceil(2),
        }
    }

    /// Its elements on the device, if it is there.
    pub fn device(&self) -> Option<&Act> {
        match &self.storage {
            Storage::Host(_) | Storage::HostBf16(_) => None,
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
        if self.device().is_some() {
            return Ok(self.clone());
        }
        let act = cuda.act(self.shape.len())?;
        act.upload(self.data())?;
        Ok(Tensor { id: self.id, ..Tensor::on_device(self.shape, act, None) })
    }

    /// The floats for writing: in place when nobody else holds them, a copy otherwise. A host tensor, f32.
    pub fn make_mut(&mut self) -> &mut [f32] {
        match self.make_values_mut() {
            ValuesMut::Single(floats) => floats,
            ValuesMut::Bf16(_) => panic!("bfloat16 values where f32 ones are wanted"),
        }
    }

    /// The elements for writing: in place when nobody else holds them, a copy otherwise. A host tensor.
    pub fn make_values_mut(&mut self) -> ValuesMut<'_> {
        let stored = self.stored_as();
        let (Storage::Host(data) | Storage::HostBf16(data)) = &mut self.storage else {
            unreachable!("it is in host memory, or its elements are not asked for")
        };
        if data.get_mut().is_none() {
            *data = Shared::new(Buffer::from_slice(data));
        }
        let room = data.get_mut().expect("the copy just made has one owner");
        Tensor::values_mut(self.shape, stored, room)
    }
}

impl AsRef<[f32]> for Tensor {
    fn as_ref(&self) -> &[f32] {
        self.data()
    }
}
