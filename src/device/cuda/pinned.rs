//! Page-locked host memory: what the host and the device hand each other without waiting.

use super::driver::Stream;
use super::{Buf, Cuda};
use crate::error::Result;
use bytemuck::Pod;
use std::marker::PhantomData;
use std::sync::Arc;

/// `len` values that queued copies read or write when they run. Whoever touches them makes sure, by waiting for the
/// device, that no copy of theirs is still queued.
pub struct Pinned<T: Pod> {
    cuda: Arc<Cuda>,
    start: *mut u8,
    len: usize,
    kind: PhantomData<T>,
}

// SAFETY: plain memory with one owner; no thread is tied to it.
unsafe impl<T: Pod + Send> Send for Pinned<T> {}

impl<T: Pod> Pinned<T> {
    /// Memory for `len` zero values.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn new(cuda: &Arc<Cuda>, len: usize) -> Result<Self> {
        let bytes = len * size_of::<T>();
        let start = cuda.driver().allocate_pinned(bytes)?;
        // SAFETY: just allocated with this size.
        unsafe { start.write_bytes(0, bytes) };
        Ok(Pinned { cuda: cuda.clone(), start, len, kind: PhantomData })
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The values. No copy to them may be queued.
    pub fn values(&self) -> &[T] {
        // SAFETY: `len` values, aligned to a page, written by zeros or whole copies of `T`s.
        unsafe { std::slice::from_raw_parts(self.start.cast(), self.len) }
    }

    /// The values for writing. No copy of them may be queued.
    pub fn values_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and `self` is borrowed for as long as the slice lives.
        unsafe { std::slice::from_raw_parts_mut(self.start.cast(), self.len) }
    }

    /// Queues on `stream` a copy of the values from `at` on that fills `to`.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn queue_to(&self, stream: Stream, at: usize, to: &Buf<T>) -> Result<()> {
        assert!(at + to.len() <= self.len, "{} values at {at} of {}", to.len(), self.len);
        let bytes = to.len() * size_of::<T>();
        // SAFETY: both ranges are checked; they are freed only after all queued work.
        unsafe {
            let from = self.start.add(at * size_of::<T>());
            self.cuda.driver().copy_in(stream, to.address(), from, bytes)
        }
    }

    /// Queues a copy of `from` to the values from `at` on.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn queue_from(&self, at: usize, from: &Buf<T>) -> Result<()> {
        assert!(at + from.len() <= self.len, "{} values at {at} of {}", from.len(), self.len);
        let bytes = from.len() * size_of::<T>();
        // SAFETY: both ranges are checked; they are freed only after all queued work.
        unsafe {
            let to = self.start.add(at * size_of::<T>());
            self.cuda.driver().copy_out(self.cuda.stream(), to, from.address(), bytes)
        }
    }
}

impl<T: Pod> Drop for Pinned<T> {
    fn drop(&mut self) {
        // Work that failed will not touch it any more either.
        let _ = self.cuda.synchronize();
        // SAFETY: from `allocate_pinned` with this size, and nothing queued uses it any more.
        unsafe { self.cuda.driver().free_pinned(self.start, self.len * size_of::<T>()) };
    }
}
