//! Reuse of large buffers.
//!
//! A training step has static shapes, so the buffers of one step fit the next exactly. Giving them back to the
//! system would cost a page fault every 4 KiB on every step; the arena keeps them instead. Large ones ask for huge
//! pages, so that even a process's first pass takes few faults, and all begin at a cache line: a vector of 16 floats
//! never lies across two, and a tile register is filled from whole lines six times as fast as from halves of two.

use bytemuck::{Pod, Zeroable};
#[cfg(target_os = "linux")]
use memmap2::Advice;
use memmap2::MmapMut;
use std::collections::HashMap;
use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

/// Free memory by its buffers' length. One pool for the process: a buffer has no owner but the tensor that holds it.
static FREE: Mutex<Option<HashMap<usize, Vec<Memory>>>> = Mutex::new(None);

/// Bytes from which a buffer has pages of its own: two huge ones, so that rounding up costs at most half.
const OWN_PAGES: usize = 4 << 20;

/// A cache line of floats.
#[derive(Clone, Copy, Debug, Zeroable, Pod)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// What holds the floats, zeros at first.
#[derive(Debug)]
enum Memory {
    Lines(Vec<Line>),
    Pages(MmapMut),
}

impl Memory {
    fn new(len: usize) -> Self {
        let bytes = len * size_of::<f32>();
        if bytes >= OWN_PAGES
            && let Ok(pages) = MmapMut::map_anon(bytes)
        {
            // A hint: a kernel without huge pages gives small ones.
            #[cfg(target_os = "linux")]
            let _ = pages.advise(Advice::HugePage);
            return Memory::Pages(pages);
        }
        Memory::Lines(vec![Line::zeroed(); len.div_ceil(16)])
    }
}

/// Floats that return to the arena when dropped, or to the system.
#[derive(Debug)]
pub struct Buffer {
    memory: Memory,
    len: usize,
    kept: bool,
}

impl Buffer {
    /// A buffer whose content is unspecified (the last tenant's): its writer must fill it.
    pub fn dirty(len: usize) -> Self {
        let reused = lock().get_or_insert_default().get_mut(&len).and_then(Vec::pop);
        Buffer { memory: reused.unwrap_or_else(|| Memory::new(len)), len, kept: true }
    }

    /// A buffer of zeros that goes back to the system when dropped: its length, a scan's, may never come again.
    pub fn once(len: usize) -> Self {
        Buffer { memory: Memory::new(len), len, kept: false }
    }

    /// A buffer of zeros.
    pub fn zeroed(len: usize) -> Self {
        let mut buffer = Self::dirty(len);
        buffer.fill(0.0);
        buffer
    }

    /// The first `len` floats of a scratch buffer, which is replaced by another, of unspecified content, if it has fewer.
    /// Lengths are powers of two: the arena keeps every length that it was ever asked for.
    pub fn first(&mut self, len: usize) -> &mut [f32] {
        if self.len < len {
            *self = Self::dirty(len.next_power_of_two());
        }
        &mut self[..len]
    }

    /// A copy of `values`.
    pub fn from_slice(values: &[f32]) -> Self {
        let mut buffer = Self::dirty(values.len());
        buffer.copy_from_slice(values);
        buffer
    }
}

/// Of no floats.
impl Default for Buffer {
    fn default() -> Self {
        Self::dirty(0)
    }
}

impl Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        let floats: &[f32] = match &self.memory {
            Memory::Lines(lines) => bytemuck::cast_slice(lines),
            Memory::Pages(pages) => bytemuck::cast_slice(pages),
        };
        &floats[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        let floats: &mut [f32] = match &mut self.memory {
            Memory::Lines(lines) => bytemuck::cast_slice_mut(lines),
            Memory::Pages(pages) => bytemuck::cast_slice_mut(pages),
        };
        &mut floats[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if !self.kept {
            return;
        }
        let memory = std::mem::replace(&mut self.memory, Memory::Lines(Vec::new()));
        lock().get_or_insert_default().entry(self.len).or_default().push(memory);
    }
}

/// Gives the free buffers of this length back to the system: a scan's, which may never come again.
pub fn release(len: usize) {
    lock().get_or_insert_default().remove(&len);
}

/// Gives every free buffer back to the system, for example between training and whole-volume inference.
pub fn trim() {
    *lock() = None;
}

fn lock() -> std::sync::MutexGuard<'static, Option<HashMap<usize, Vec<Memory>>>> {
    // A panicking holder leaves only whole operations behind, so a poisoned pool is still a good one.
    FREE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_of_every_length_begin_at_a_cache_line() {
        for len in [0, 1, 17, (4 << 20) / 4 - 1, (4 << 20) / 4, 1_500_001] {
            let mut buffer = Buffer::zeroed(len);
            assert_eq!((buffer.len(), buffer.as_ptr() as usize % 64), (len, 0));
            buffer.fill(1.0);
            assert_eq!(buffer.iter().sum::<f32>(), len as f32);
        }
    }

    #[test]
    fn a_buffer_for_once_is_not_kept() {
        let len = 54_321; // no other test uses this length
        assert!(Buffer::once(len).iter().all(|&v| v == 0.0));
        let kept = lock().as_ref().is_some_and(|free| free.contains_key(&len));
        assert!(!kept);
    }

    #[test]
    fn a_released_length_is_not_kept() {
        let len = 54_322; // no other test uses this length
        drop(Buffer::dirty(len));
        let kept = || lock().as_ref().is_some_and(|free| free.contains_key(&len));
        assert!(kept());
        release(len);
        assert!(!kept());
    }

    #[test]
    fn a_dropped_buffer_is_reused() {
        let len = 12_345; // no other test uses this length
        let first = Buffer::dirty(len);
        let address = first.as_ptr();
        drop(first);
        assert_eq!(Buffer::from_slice(&vec![3.0; len]).as_ptr(), address);
    }
}
