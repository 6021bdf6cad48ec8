//! Short lists of a pass: blocks of channels, tiles, tasks, numbers of channels. They leave their memory to lists to come, so that
//! a training step asks the system for nothing that the step before did not have.

use allocator_api2::alloc::{AllocError, Allocator, Global, Layout};
use allocator_api2::vec::{IntoIter, Vec as VecIn};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard};

/// Bytes of the smallest block, and what all are aligned to: a cache line.
const LINE: usize = 64;

/// Sizes of blocks: `LINE << class` bytes.
const CLASSES: usize = 32;

/// Memory that nobody uses.
struct Block(NonNull<u8>);

// SAFETY: whoever takes it is its only user.
unsafe impl Send for Block {}

static FREE: Mutex<[Vec<Block>; CLASSES]> = Mutex::new([const { Vec::new() }; CLASSES]);

fn free() -> MutexGuard<'static, [Vec<Block>; CLASSES]> {
    // A panicking holder leaves only whole operations behind, so poisoned lists are still good ones.
    FREE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The block for a layout: the smallest class that has room for it.
fn class_of(layout: Layout) -> Result<usize, AllocError> {
    let class = layout.size().div_ceil(LINE).next_power_of_two().ilog2() as usize;
    if layout.align() <= LINE && class < CLASSES { Ok(class) } else { Err(AllocError) }
}

/// What the blocks of a class are.
fn block(class: usize) -> Layout {
    Layout::from_size_align(LINE << class, LINE).expect("far below the address space")
}

/// Memory that is used again and again.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reused;

// SAFETY: a block is one list's until it is given back, whichever copy of the allocator gave it; all sizes from the one that was
// asked for to the one that was given are of one class.
unsafe impl Allocator for Reused {
    fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
        let class = class_of(layout)?;
        let left = free()[class].pop();
        match left {
            Some(Block(memory)) => Ok(NonNull::slice_from_raw_parts(memory, block(class).size())),
            None => Global.allocate(block(class)),
        }
    }

    unsafe fn deallocate(&self, memory: NonNull<u8>, layout: Layout) {
        let class = class_of(layout).expect("a layout that was allocated");
        free()[class].push(Block(memory));
    }
}

/// Gives what nobody uses back to the system.
pub(super) fn trim() {
    for (class, blocks) in free().iter_mut().enumerate() {
        for Block(memory) in blocks.drain(..) {
            // SAFETY: the system gave it as such a block.
            unsafe { Global.deallocate(memory, block(class)) };
        }
    }
}

/// A vector in [`Reused`] memory.
#[derive(Clone, Debug)]
pub struct List<T>(VecIn<T, Reused>);

impl<T> Default for List<T> {
    fn default() -> Self {
        List(VecIn::new_in(Reused))
    }
}

impl<T> List<T> {
    /// `item` alone.
    pub fn of_one(item: T) -> Self {
        [item].into_iter().collect()
    }
}

impl<T: Clone> List<T> {
    /// `len` times `value`.
    pub fn of(value: T, len: usize) -> Self {
        std::iter::repeat_n(value, len).collect()
    }
}

impl<T> FromIterator<T> for List<T> {
    fn from_iter<I: IntoIterator<Item = T>>(items: I) -> Self {
        let mut list = Self::default();
        list.extend(items);
        list
    }
}

impl<T> From<Vec<T>> for List<T> {
    fn from(items: Vec<T>) -> Self {
        items.into_iter().collect()
    }
}

/// As many items as an array has.
impl<T, const N: usize> TryFrom<List<T>> for [T; N] {
    type Error = List<T>;
    fn try_from(list: List<T>) -> Result<Self, List<T>> {
        list.0.try_into().map_err(List)
    }
}

impl<T> Deref for List<T> {
    type Target = VecIn<T, Reused>;
    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl<T> DerefMut for List<T> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl<T> IntoIterator for List<T> {
    type Item = T;
    type IntoIter = IntoIter<T, Reused>;
    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<'a, T> IntoIterator for &'a List<T> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;
    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_has_what_another_left() {
        // No other test's lists are as long.
        let long = || (0..1_000_000u64).collect::<List<_>>();
        let first = long();
        let second = long();
        assert_ne!(first.as_ptr(), second.as_ptr());
        assert!(first.iter().zip(&second).all(|(a, b)| a == b));
        let address = first.as_ptr() as usize;
        assert_eq!(address % LINE, 0);
        drop(first);
        assert_eq!(long().as_ptr() as usize, address);
    }

    #[test]
    fn blocks_have_room_for_what_is_asked() {
        for size in [0, 1, 64, 65, 128, 129, 4096, 5000] {
            let class = class_of(Layout::from_size_align(size, 8).unwrap()).unwrap();
            assert!(block(class).size() >= size);
            assert!(class == 0 || block(class - 1).size() < size);
        }
        assert!(class_of(Layout::from_size_align(1, 2 * LINE).unwrap()).is_err(), "no such alignment");
        assert!(class_of(Layout::from_size_align(LINE << CLASSES, 8).unwrap()).is_err(), "too large");
    }

    /// Values that are dropped are counted: each once.
    #[test]
    fn values_are_dropped_once() {
        use std::sync::Arc;
        let value = Arc::new(());
        let mut list = List::of(value.clone(), 100);
        list.truncate(60);
        assert_eq!(Arc::strong_count(&value), 61);
        let ten: List<_> = list.into_iter().take(10).collect();
        assert_eq!(Arc::strong_count(&value), 11);
        drop(ten);
        assert_eq!(Arc::strong_count(&value), 1);
    }
}
