//! Short lists of a pass (blocks of channels, tiles, tasks, numbers of channels) and other small things in memory that is left to
//! such things to come, so that a training step asks the system for nothing that the step before did not have. The system has
//! none of it back before [`super::arena::trim`].

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

// SAFETY: a block is its owner's until it is given back, whichever copy of the allocator gave it; all sizes from the one that was
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

    unsafe fn grow(
        &self,
        memory: NonNull<u8>,
        old: Layout,
        new: Layout,
    ) -> Result<NonNull<[u8]>, AllocError> {
        let class = class_of(new)?;
        if class_of(old)? == class {
            return Ok(NonNull::slice_from_raw_parts(memory, block(class).size()));
        }
        let grown = self.allocate(new)?;
        // SAFETY: by the caller's promise `memory` is of layout `old`, which is no larger than `new`; the blocks are two.
        unsafe {
            memory.copy_to_nonoverlapping(grown.cast(), old.size());
            self.deallocate(memory, old);
        }
        Ok(grown)
    }
}

/// Gives what nobody uses back to the system.
pub(super) fn trim() {
    // Freed without the lock.
    let left = std::mem::replace(&mut *free(), [const { Vec::new() }; CLASSES]);
    for (class, blocks) in left.into_iter().enumerate() {
        for Block(memory) in blocks {
            // SAFETY: the system gave it as such a block.
            unsafe { Global.deallocate(memory, block(class)) };
        }
    }
}

/// A vector in [`Reused`] memory. Items that borrow do so until it is dropped, where those of a `Vec` do until their last use.
#[derive(Clone, Debug)]
pub struct List<T>(VecIn<T, Reused>);

impl<T> Default for List<T> {
    fn default() -> Self {
        const { assert!(align_of::<T>() <= LINE, "blocks are aligned to a line") };
        List(VecIn::new_in(Reused))
    }
}

impl<T> List<T> {
    /// `item` alone.
    pub fn of_one(item: T) -> Self {
        [item].into_iter().collect()
    }

    /// No items, and room for `len`.
    pub fn with_room(len: usize) -> Self {
        let mut list = Self::default();
        list.0.reserve(len);
        list
    }

    /// Appends an item.
    pub fn push(&mut self, item: T) {
        self.0.push(item);
    }

    /// Takes item `i` out; those after it move up.
    pub fn remove(&mut self, i: usize) -> T {
        self.0.remove(i)
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

impl<T> Extend<T> for List<T> {
    fn extend<I: IntoIterator<Item = T>>(&mut self, items: I) {
        self.0.extend(items);
    }
}

impl<T> Deref for List<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T> DerefMut for List<T> {
    fn deref_mut(&mut self) -> &mut [T] {
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
    use std::sync::Arc;

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

    #[test]
    fn a_list_that_grows_keeps_its_items() {
        let mut list = List::default();
        for i in 0..10_000 {
            list.push(i);
            assert_eq!((list[0], list[i / 2], list[i]), (0, i / 2, i));
        }
        // Eight of eight bytes: one block, whatever room was asked for at first.
        let mut list = List::with_room(1);
        let place = list.as_ptr();
        (0..8u64).for_each(|i| list.push(i));
        assert_eq!((list.as_ptr(), &list[..]), (place, &[0, 1, 2, 3, 4, 5, 6, 7][..]));
    }

    /// Owners are counted: every item is dropped once.
    #[test]
    fn items_are_dropped_once() {
        let value = Arc::new(());
        let mut list = List::of(value.clone(), 100);
        drop(list.remove(3));
        assert_eq!(Arc::strong_count(&value), 100);
        let ten: List<_> = list.into_iter().take(10).collect();
        assert_eq!(Arc::strong_count(&value), 11);
        drop(ten);
        assert_eq!(Arc::strong_count(&value), 1);
    }
}
