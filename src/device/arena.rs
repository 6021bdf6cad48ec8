//! Reuse of large buffers.
//!
//! A training step has static shapes, so the buffers of one step fit the next exactly. Giving them back to the
//! system would cost a page fault every 4 KiB on every step; the arena keeps them instead.

use std::collections::HashMap;
use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

/// Free buffers by length. One pool for the process: a buffer has no owner but the tensor that holds it.
static FREE: Mutex<Option<HashMap<usize, Vec<Vec<f32>>>>> = Mutex::new(None);

/// Floats that return to the arena when dropped.
#[derive(Debug)]
pub struct Buffer {
    data: Vec<f32>,
}

impl Buffer {
    /// A buffer whose content is unspecified (the last tenant's): its writer must fill it.
    pub fn dirty(len: usize) -> Self {
        let reused = lock().get_or_insert_default().get_mut(&len).and_then(Vec::pop);
        Buffer { data: reused.unwrap_or_else(|| vec![0.0; len]) }
    }

    /// A buffer of zeros.
    pub fn zeroed(len: usize) -> Self {
        let mut buffer = Self::dirty(len);
        buffer.fill(0.0);
        buffer
    }

    /// A copy of `values`.
    pub fn from_slice(values: &[f32]) -> Self {
        let mut buffer = Self::dirty(values.len());
        buffer.copy_from_slice(values);
        buffer
    }
}

impl Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.data
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let data = std::mem::take(&mut self.data);
        lock().get_or_insert_default().entry(data.len()).or_default().push(data);
    }
}

/// Gives every free buffer back to the system, for example between training and whole-volume inference.
pub fn trim() {
    *lock() = None;
}

fn lock() -> std::sync::MutexGuard<'static, Option<HashMap<usize, Vec<Vec<f32>>>>> {
    // A panicking holder leaves only whole operations behind, so a poisoned pool is still a good one.
    FREE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_buffer_is_reused() {
        let len = 12_345; // no other test uses this length
        let first = Buffer::dirty(len);
        let address = first.as_ptr();
        drop(first);
        assert_eq!(Buffer::from_slice(&vec![3.0; len]).as_ptr(), address);
    }
}
