//! Disjoint writes from many threads.

use std::marker::PhantomData;

/// A mutable slice that several threads write at places that do not meet.
pub struct Disjoint<'a, T = f32> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: `Disjoint` is a `&mut [T]` whose accesses are unsafe and, by their authors' promise, never overlap.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    /// Shares `slice` until the borrow ends.
    pub fn new(slice: &'a mut [T]) -> Self {
        Disjoint { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// Number of values.
    pub fn size(&self) -> usize {
        self.len
    }

    /// Where the `len` values from `offset` begin, for writes that the caller keeps apart.
    pub fn at(&self, offset: usize, len: usize) -> *mut T {
        assert!(offset <= self.len && len <= self.len - offset, "{len} values at {offset} of {}", self.len);
        // SAFETY: in bounds by the assertion.
        unsafe { self.start.add(offset) }
    }
}
