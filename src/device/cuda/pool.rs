//! Device memory for values of static shapes: the same sequence of requests gets the same addresses.
//!
//! Freed blocks are kept by size and handed out again, last freed first. All kernels run on one stream, so a block
//! may be reused as soon as its last handle is gone: what was queued with it runs before what is queued now.
//!
//! Blocks taken inside a step ([`Cuda::step`]) have a pool of their own. A recorded step writes to them each time it
//! is replayed, so nothing that lives from one step to the next may ever be one of them.

use super::Cuda;
use crate::error::Result;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// Sizes are rounded up to this: the alignment of every block.
const UNIT: usize = 256;

/// Room for `len` values whose number changes from volume to volume, at most an eighth more: eight sizes an octave, so
/// that blocks fit again instead of piling up. Below a million the number itself.
pub fn size_class(len: usize) -> usize {
    const SMALL: usize = 1 << 20;
    if len < SMALL { len } else { len.next_multiple_of(1 << (len.ilog2() - 3)) }
}

/// Free blocks by size.
#[derive(Debug, Default)]
pub struct Pool {
    free: Mutex<HashMap<usize, Vec<u64>>>,
}

impl Pool {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<usize, Vec<u64>>> {
        // A panicking holder leaves only whole operations behind, so a poisoned pool is still a good one.
        self.free.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// All free blocks, which the pool forgets: (address, bytes).
    pub fn drain(&self) -> Vec<(u64, usize)> {
        let free = std::mem::take(&mut *self.lock());
        free.into_iter().flat_map(|(bytes, list)| list.into_iter().map(move |a| (a, bytes))).collect()
    }
}

/// A block of device memory; goes back to its pool when dropped.
#[derive(Debug)]
pub struct Block {
    cuda: Arc<Cuda>,
    address: u64,
    size: usize,
    of_step: bool,
}

impl Block {
    /// At least `bytes` bytes, content unspecified.
    pub fn new(cuda: &Arc<Cuda>, bytes: usize) -> Result<Self> {
        let size = bytes.max(1).next_multiple_of(UNIT);
        let of_step = cuda.in_step();
        let reused = cuda.pool(of_step).lock().get_mut(&size).and_then(Vec::pop);
        let address = match reused {
            Some(address) => address,
            None => cuda.driver().allocate(size)?,
        };
        cuda.driver().block_taken(cuda.stream(), address, bytes);
        Ok(Block { cuda: cuda.clone(), address, size, of_step })
    }

    /// Where it is.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The device it is on.
    pub fn cuda(&self) -> &Arc<Cuda> {
        &self.cuda
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.cuda.driver().block_dropped(self.cuda.stream(), self.address);
        self.cuda.pool(self.of_step).lock().entry(self.size).or_default().push(self.address);
    }
}

#[cfg(test)]
mod tests {
    use super::size_class;

    #[test]
    fn size_classes_are_few_and_near() {
        let lens = (1usize << 20..1 << 24).step_by(997);
        let classes: std::collections::BTreeSet<_> = lens.clone().map(size_class).collect();
        assert!(classes.len() <= 8 * 4 + 1, "{}", classes.len());
        assert!(lens.clone().all(|len| (len..=len + len / 8).contains(&size_class(len))));
        assert_eq!(size_class(12_345), 12_345);
    }
}
