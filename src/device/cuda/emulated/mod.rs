//! The emulator as a device: kernels compiled as C++ (tests/emulator), run on the CPU.

mod machine;
mod queue;

pub use machine::{kernel_names, mma_paths_agree};

use super::driver::{Driver, Event, Graph, Info, Launch, Stream, Symbol, out_of_memory};
use crate::error::{Error, Result};
use machine::{Entry, Machine};
use queue::{Queue, Work};
use std::sync::{Mutex, MutexGuard};

/// What an emulated device is and how its kernels run.
#[derive(Clone, Debug)]
pub struct Options {
    /// What it says it is; it has as much memory, and blocks have as much shared memory.
    pub info: Info,
    /// Host threads for the blocks of a launch; `None` chooses by its size.
    pub host_threads: Option<u32>,
    /// Seconds of CPU time after which a block that has not ended is taken for one that never will.
    pub block_seconds: u32,
}

impl Default for Options {
    fn default() -> Self {
        let info = Info {
            name: "emulated GPU".into(),
            capability: (9, 0),
            multiprocessors: 4,
            memory: 8 << 30,
            shared_per_block: 227 << 10,
        };
        Options { info, host_threads: None, block_seconds: 60 }
    }
}

/// An emulated GPU.
pub struct Emulated {
    info: Info,
    queue: Mutex<Queue>,
}

impl Emulated {
    /// A device whose schedule (of lanes, warps, blocks, copies and streams) is drawn from `seed`; 0 is the plain
    /// order, everything as late as possible.
    pub fn new(seed: u64) -> Self {
        Self::with_options(seed, Options::default())
    }

    /// A device that says it is `info`, and has as much memory and shared memory.
    pub fn with_info(seed: u64, info: Info) -> Self {
        Self::with_options(seed, Options { info, ..Options::default() })
    }

    /// The same with everything chosen.
    pub fn with_options(seed: u64, options: Options) -> Self {
        let queue = Queue::new(Machine::new(options.info.memory), seed, &options);
        Emulated { info: options.info, queue: Mutex::new(queue) }
    }

    /// How many groups of 8 rows of 16 bytes ldmatrix has read since the last call, and how many passes over the banks
    /// of shared memory that took: as many where there are no bank conflicts.
    pub fn bank_conflicts(&self) -> (u64, u64) {
        self.queue().machine.bank_conflicts()
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        // A panic under the lock is a failed assertion about the queue itself; others may still look at it.
        self.queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Driver for Emulated {
    fn info(&self) -> &Info {
        &self.info
    }

    fn free_memory(&self) -> Result<u64> {
        Ok(self.queue().machine.left())
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        let mut queue = self.queue();
        queue.check()?;
        let free = queue.machine.left();
        queue.machine.allocate(bytes).ok_or_else(|| out_of_memory(bytes, free, self.info.memory))
    }

    fn free(&self, address: u64, _: usize) {
        let mut queue = self.queue();
        queue.drain();
        queue.machine.release(address);
    }

    fn allocate_pinned(&self, bytes: usize) -> Result<*mut u8> {
        Ok(Box::leak(vec![0u8; bytes].into_boxed_slice()).as_mut_ptr())
    }

    unsafe fn free_pinned(&self, pointer: *mut u8, bytes: usize) {
        // SAFETY: the caller got it from `allocate_pinned` with this size.
        drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(pointer, bytes)) });
    }

    fn new_stream(&self) -> Result<Stream> {
        Ok(Stream(self.queue().new_stream()))
    }

    unsafe fn launch(&self, stream: Stream, kernel: Symbol, launch: Launch, args: &[u8]) -> Result<()> {
        let refuse =
            |why: String| Error::Internal(format!("{}: {kernel} cannot be launched: {why}", kernel.file));
        let entry = Entry::find(&kernel.to_string())
            .ok_or_else(|| refuse("the emulator has no such kernel".into()))?;
        let Launch { grid, threads, shared } = launch;
        let blocks = grid
            .iter()
            .try_fold(1u32, |product, &n| product.checked_mul(n))
            .filter(|&n| n <= i32::MAX as u32);
        if blocks.is_none_or(|n| n == 0) || grid[1] > 65535 || grid[2] > 65535 {
            return Err(refuse(format!("a grid of {grid:?} blocks")));
        }
        if threads == 0 || threads > entry.max_threads {
            return Err(refuse(format!("{threads} threads a block, it is for 1 to {}", entry.max_threads)));
        }
        if shared > self.info.shared_per_block {
            let most = self.info.shared_per_block;
            return Err(refuse(format!("{shared} bytes of shared memory, a block may have {most}")));
        }
        if args.len() != entry.args_bytes {
            return Err(refuse(format!("{} bytes of arguments, it takes {}", args.len(), entry.args_bytes)));
        }
        self.queue().push(stream.0, Work::Launch { entry, launch, args: args.into() })
    }

    unsafe fn copy_in(&self, stream: Stream, to: u64, from: *const u8, bytes: usize) -> Result<()> {
        self.queue().push(stream.0, Work::CopyIn { to, from: from as usize, bytes })
    }

    unsafe fn copy_out(&self, stream: Stream, to: *mut u8, from: u64, bytes: usize) -> Result<()> {
        self.queue().push(stream.0, Work::CopyOut { to: to as usize, from, bytes })
    }

    unsafe fn copy(&self, stream: Stream, to: u64, from: u64, bytes: usize) -> Result<()> {
        self.queue().push(stream.0, Work::Copy { to, from, bytes })
    }

    unsafe fn fill(&self, stream: Stream, to: u64, byte: u8, bytes: usize) -> Result<()> {
        self.queue().push(stream.0, Work::Fill { to, byte, bytes })
    }

    fn record(&self, stream: Stream) -> Result<Event> {
        self.queue().record(stream.0).map(Event)
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<()> {
        self.queue().push(stream.0, Work::Wait(event.0))
    }

    fn synchronize(&self, stream: Stream) -> Result<()> {
        self.queue().synchronize(stream.0)
    }

    fn begin_capture(&self, stream: Stream) -> Result<()> {
        self.queue().begin_capture(stream.0)
    }

    fn end_capture(&self, stream: Stream) -> Result<Graph> {
        self.queue().end_capture(stream.0).map(Graph)
    }

    unsafe fn replay(&self, stream: Stream, graph: Graph) -> Result<()> {
        self.queue().replay(stream.0, graph.0)
    }

    fn block_taken(&self, stream: Stream, address: u64, bytes: usize) {
        // A device that has failed keeps no queue: its blocks do not matter any more.
        let _ = self.queue().push(stream.0, Work::Taken { address, bytes });
    }

    fn block_dropped(&self, stream: Stream, address: u64) {
        let _ = self.queue().push(stream.0, Work::Dropped { address });
    }
}
