//! Reuse of large buffers.
//!
//! A training step has static shapes, so the buffers of one step fit the next exactly. Giving them back to the
//! system would cost a page fault every 4 KiB on every step; the arena keeps them instead. Lengths that are a scan's may
//! never come again: of these it keeps a few large ones for whatever fits. Large buffers ask for huge
//! pages, so that even a process's first pass takes few faults, and all begin at a cache line: a vector of 16 floats
//! never lies across two, and a tile register is filled from whole lines six times as fast as from halves of two.

use bytemuck::{Pod, Zeroable};
#[cfg(target_os = "linux")]
use memmap2::Advice;
use memmap2::MmapMut;
use std::collections::HashMap;
use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

/// One pool for the process: a buffer has no owner but the tensor that holds it.
static POOL: Mutex<Pool> = Mutex::new(Pool { of_length: None, spare: Vec::new() });

/// Spare memory that is kept at most: as much as one scan needs besides what all scans need.
const SPARES: usize = 8;

/// Bytes from which a buffer has pages of its own: two huge ones, so that rounding up costs at most half.
const OWN_PAGES: usize = 4 << 20;

/// A cache line of floats.
#[derive(Clone, Copy, Debug, Zeroable, Pod)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// What holds the floats.
#[derive(Debug)]
enum Memory {
    Lines(Vec<Line>),
    Pages(MmapMut),
}

impl Memory {
    /// Not from the pool, and so without its lock.
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

/// Free memory.
struct Pool {
    /// For buffers of the same length.
    of_length: Option<HashMap<usize, Vec<Memory>>>,
    /// For those of any length: large ones, the last that came at the end.
    spare: Vec<MmapMut>,
}

impl Pool {
    /// What is kept for this length.
    fn take(&mut self, len: usize) -> Option<Memory> {
        self.of_length.get_or_insert_default().get_mut(&len).and_then(Vec::pop)
    }

    /// The smallest that is spare of at least this length. Not twice as much or more: it may be kept for this length.
    fn take_spare(&mut self, len: usize) -> Option<Memory> {
        let bytes = len * size_of::<f32>();
        let fits = |pages: &MmapMut| (bytes..2 * bytes).contains(&pages.len());
        let fitting = self.spare.iter().enumerate().filter(|(_, pages)| fits(pages));
        let (smallest, _) = fitting.min_by_key(|(_, pages)| pages.len())?;
        Some(Memory::Pages(self.spare.remove(smallest)))
    }

    /// Keeps memory for buffers of this length.
    fn keep(&mut self, len: usize, memory: Memory) {
        self.of_length.get_or_insert_default().entry(len).or_default().push(memory);
    }

    /// Keeps memory for whatever fits, if it is large; what has been spare for longest, if there is too much now.
    fn keep_spare(&mut self, memory: Memory) -> Option<MmapMut> {
        let Memory::Pages(pages) = memory else { return None };
        self.spare.push(pages);
        (self.spare.len() > SPARES).then(|| self.spare.remove(0))
    }

    /// Makes what is kept for this length spare; what there is too much of.
    fn release(&mut self, len: usize) -> Vec<MmapMut> {
        let free = self.of_length.get_or_insert_default().remove(&len);
        free.into_iter().flatten().filter_map(|memory| self.keep_spare(memory)).collect()
    }
}

/// Floats that return to the arena when dropped.
#[derive(Debug)]
pub struct Buffer {
    memory: Memory,
    len: usize,
    /// Whether for buffers of the same length.
    kept: bool,
}

impl Buffer {
    /// A buffer whose content is unspecified (the last tenant's): its writer must fill it.
    pub fn dirty(len: usize) -> Self {
        let mut pool = pool();
        let free = pool.take(len).or_else(|| pool.take_spare(len));
        drop(pool);
        Buffer { memory: free.unwrap_or_else(|| Memory::new(len)), len, kept: true }
    }

    /// The same for a length that may never come again, a scan's.
    pub fn once(len: usize) -> Self {
        // What is kept for this length is others', who ask for it again and again.
        let spare = pool().take_spare(len);
        Buffer { memory: spare.unwrap_or_else(|| Memory::new(len)), len, kept: false }
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

/// Of no floats, and not from the pool.
impl Default for Buffer {
    fn default() -> Self {
        Buffer { memory: Memory::Lines(Vec::new()), len: 0, kept: false }
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
        let memory = std::mem::replace(&mut self.memory, Memory::Lines(Vec::new()));
        if self.len == 0 {
            return;
        }
        if self.kept {
            pool().keep(self.len, memory);
            return;
        }
        // Unmapped without the lock.
        let evicted = pool().keep_spare(memory);
        drop(evicted);
    }
}

/// No longer keeps free buffers of this length for others of it: a scan's, which may never come again.
pub fn release(len: usize) {
    // Unmapped without the lock.
    let evicted = pool().release(len);
    drop(evicted);
}

/// Gives all memory that is left for others to come (buffers, lists, scratch, counters) back to the system, for example between training and whole-volume inference.
pub fn trim() {
    super::scratch::trim();
    super::shared::trim();
    super::list::trim();
    let free = std::mem::replace(&mut *pool(), Pool { of_length: None, spare: Vec::new() });
    // Unmapped without the lock.
    drop(free);
}

fn pool() -> std::sync::MutexGuard<'static, Pool> {
    // A panicking holder leaves only whole operations behind, so a poisoned pool is still a good one.
    POOL.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
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

    fn address(memory: &Memory) -> *const u8 {
        match memory {
            Memory::Lines(lines) => lines.as_ptr().cast(),
            Memory::Pages(pages) => pages.as_ptr(),
        }
    }

    #[test]
    fn spare_memory_is_for_whatever_fits() {
        let mut pool = Pool { of_length: None, spare: Vec::new() };
        let large = OWN_PAGES / size_of::<f32>();
        let memory = Memory::new(large + 10);
        let first = address(&memory);
        pool.keep(large + 10, memory);
        assert!(pool.take_spare(large + 9).is_none(), "it is kept for its own length");
        pool.release(large + 10);
        assert!(pool.take(large + 10).is_none(), "and no longer is");
        assert!(pool.take_spare(large + 11).is_none(), "it is too short");
        let memory = pool.take_spare(large + 9).unwrap();
        assert_eq!(address(&memory), first);

        // The smallest that fits.
        pool.keep_spare(Memory::new(large + 100));
        pool.keep_spare(memory);
        assert_eq!(address(&pool.take_spare(large).unwrap()), first);

        pool.keep_spare(Memory::new(100));
        assert_eq!(pool.spare.len(), 1, "small buffers are not worth it");
        for i in 1..2 * SPARES {
            assert_eq!(pool.keep_spare(Memory::new(large * i)).is_some(), i >= SPARES);
        }
        assert!(pool.take_spare(large).is_none(), "all are much larger");
        let kept: Vec<_> = pool.spare.iter().map(|pages| pages.len() / OWN_PAGES).collect();
        assert_eq!(kept, (SPARES..2 * SPARES).collect::<Vec<_>>(), "the last ones");
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
