//! Typed device memory and the pointers that kernels get.

use super::Cuda;
use super::driver::Precision;
use super::pool::Block;
use crate::error::Result;
use bytemuck::{Pod, Zeroable};
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::marker::PhantomData;
use std::sync::Arc;

/// An activation's element, fp16 or f32 as the module is compiled (`elem` in the kernels).
#[derive(Clone, Copy, Debug)]
pub struct Elem;

macro_rules! pointer {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[repr(transparent)]
        pub struct $name<T>(u64, PhantomData<T>);

        impl<T> Clone for $name<T> {
            fn clone(&self) -> Self {
                *self
            }
        }
        impl<T> Copy for $name<T> {}
        impl<T> $name<T> {
            /// No memory: kernels test for it.
            pub const NULL: Self = $name(0, PhantomData);
        }
        // SAFETY: a transparent u64; every bit pattern is a value, and only kernels follow it.
        unsafe impl<T> Zeroable for $name<T> {}
        // SAFETY: as above; no padding.
        unsafe impl<T: 'static> Pod for $name<T> {}
    };
}

pointer!(
    /// Memory that the launch only reads.
    In
);
pointer!(
    /// Memory that the launch only writes.
    Out
);
pointer!(
    /// Memory that the launch reads and writes.
    InOut
);

/// Device memory of `len` values. Cloning shares it; like a `Cell` it may be written through any handle, in the order
/// in which work is queued.
pub struct Buf<T> {
    block: Arc<Block>,
    start: usize,
    len: usize,
    kind: PhantomData<T>,
}

impl<T> Clone for Buf<T> {
    fn clone(&self) -> Self {
        Buf { block: self.block.clone(), start: self.start, len: self.len, kind: PhantomData }
    }
}

impl<T> std::fmt::Debug for Buf<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} values at {:#x}", self.len, self.address())
    }
}

impl<T> Buf<T> {
    pub(super) fn new(block: Block, len: usize) -> Self {
        Buf { block: Arc::new(block), start: 0, len, kind: PhantomData }
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `len` values from `start` on.
    pub fn slice(&self, start: usize, len: usize) -> Self {
        assert!(start + len <= self.len, "{len} values at {start} of {}", self.len);
        Buf { start: self.start + start, len, ..self.clone() }
    }

    /// For a kernel to read.
    pub fn read(&self) -> In<T> {
        In(self.address(), PhantomData)
    }

    /// For a kernel to write.
    pub fn write(&self) -> Out<T> {
        Out(self.address(), PhantomData)
    }

    /// For a kernel to read and write.
    pub fn both(&self) -> InOut<T> {
        InOut(self.address(), PhantomData)
    }

    /// The device it is on.
    pub fn cuda(&self) -> &Arc<Cuda> {
        self.block.cuda()
    }

    /// The device's address of the first value.
    pub fn address(&self) -> u64 {
        self.block.address() + (self.start * size_of::<T>()) as u64
    }

    /// Queues that every byte becomes `byte`.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn fill(&self, byte: u8) -> Result<()> {
        let cuda = self.cuda();
        // SAFETY: the range is this buffer's own.
        unsafe { cuda.driver().fill(cuda.stream(), self.address(), byte, self.len * size_of::<T>()) }
    }
}

impl<T: Pod> Buf<T> {
    /// Copies `values` in; returns when the host may change them.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn upload(&self, values: &[T]) -> Result<()> {
        assert_eq!(values.len(), self.len, "one value for each");
        self.cuda().copy_in(self.address(), bytemuck::cast_slice(values))
    }

    /// Waits for all queued work and copies the values out.
    ///
    /// # Errors
    /// What went wrong in that work.
    pub fn download(&self) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); self.len];
        self.cuda().copy_out(bytemuck::cast_slice_mut(&mut values), self.address())?;
        Ok(values)
    }
}

/// Activations: `len` elements of the device's precision.
#[derive(Clone, Debug)]
pub struct Act {
    bytes: Buf<u8>,
    precision: Precision,
}

impl Act {
    pub(super) fn new(bytes: Buf<u8>, precision: Precision) -> Self {
        Act { bytes, precision }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.precision.bytes()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// How elements are stored.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// For a kernel to read.
    pub fn read(&self) -> In<Elem> {
        In(self.bytes.address(), PhantomData)
    }

    /// For a kernel to write.
    pub fn write(&self) -> Out<Elem> {
        Out(self.bytes.address(), PhantomData)
    }

    /// For a kernel to read and write.
    pub fn both(&self) -> InOut<Elem> {
        InOut(self.bytes.address(), PhantomData)
    }

    /// The device it is on.
    pub fn cuda(&self) -> &Arc<Cuda> {
        self.bytes.cuda()
    }

    /// The same memory as bytes.
    pub fn bytes(&self) -> &Buf<u8> {
        &self.bytes
    }

    /// Rounds `values` to the precision and copies them in.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn upload(&self, values: &[f32]) -> Result<()> {
        let mut bytes = vec![0; values.len() * self.precision.bytes()];
        self.precision.encode(values, &mut bytes);
        self.bytes.upload(&bytes)
    }

    /// Copies half-precision `values` in, exactly.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn upload_f16(&self, values: &[f16]) -> Result<()> {
        match self.precision {
            Precision::Single => self.upload(&values.to_f32_vec()),
            Precision::Half => self.bytes.upload(bytemuck::cast_slice(values)),
        }
    }

    /// Waits for all queued work and copies the values out, exactly.
    ///
    /// # Errors
    /// What went wrong in that work.
    pub fn download(&self) -> Result<Vec<f32>> {
        let bytes = self.bytes.download()?;
        Ok(match self.precision {
            Precision::Single => {
                bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
            Precision::Half => {
                bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
            }
        })
    }
}
