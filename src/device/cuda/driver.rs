//! What the engine needs of a CUDA device. Two implementations: the driver library (`native`), and the emulator that
//! tests use (`emulated`). Both are called with the same bytes, so what is proven on one is what runs on the other.
//!
//! Work on a stream runs in order; streams are ordered only by events. Nothing but [`Driver::synchronize`] waits.

use crate::device::nvtx::open_ranges;
use crate::error::{Error, Result};
use half::f16;
use half::slice::HalfFloatSliceExt;

/// Storage of activations: a module is compiled once for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Precision {
    /// fp16 storage and tensor-core inputs, f32 sums: mixed precision.
    Half,
    /// f32 storage, f32 FMA: `--amp off`.
    Single,
}

impl Precision {
    /// Bytes of a stored element.
    pub fn bytes(self) -> usize {
        match self {
            Precision::Half => 2,
            Precision::Single => 4,
        }
    }

    /// Rounds `values` to `bytes` as they are stored, of the same number.
    pub fn encode(self, values: &[f32], bytes: &mut [u8]) {
        match self {
            Precision::Single => bytes.copy_from_slice(bytemuck::cast_slice(values)),
            Precision::Half => {
                // Many at a time, by the processor's instructions for it.
                let mut block = [f16::ZERO; 256];
                for (to, values) in bytes.chunks_mut(2 * block.len()).zip(values.chunks(block.len())) {
                    let block = &mut block[..values.len()];
                    block.convert_from_f32_slice(values);
                    to.copy_from_slice(bytemuck::cast_slice(block));
                }
            }
        }
    }

    /// End of every kernel's symbol.
    pub fn suffix(self) -> &'static str {
        match self {
            Precision::Half => "_f16",
            Precision::Single => "_f32",
        }
    }
}

/// What a device is and allows.
#[derive(Clone, Debug, PartialEq)]
pub struct Info {
    /// Its name, as the driver has it.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of device memory.
    pub memory: u64,
    /// Bytes of dynamic shared memory that a block may ask for.
    pub shared_per_block: u32,
}

/// Shape of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks along x, y, z.
    pub grid: [u32; 3],
    /// Threads a block, along x.
    pub threads: u32,
    /// Bytes of dynamic shared memory a block.
    pub shared: u32,
}

impl Launch {
    /// One thread for each of `items`, `threads` a block.
    pub fn over(items: usize, threads: u32) -> Self {
        let blocks = u32::try_from(items.div_ceil(threads as usize)).expect("a grid has at most 2^31 blocks");
        Launch { grid: [blocks, 1, 1], threads, shared: 0 }
    }
}

/// Names a kernel's symbol: file in `kernels/`, entry point, storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Symbol {
    /// File in `kernels/`.
    pub file: &'static str,
    /// Entry point without its suffix.
    pub name: &'static str,
    /// Storage.
    pub precision: Precision,
}

impl std::fmt::Display for Symbol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.name, self.precision.suffix())
    }
}

/// What [`Driver::prepare`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prepared {
    /// Kernel files that were compiled.
    pub compiled: usize,
    /// Kernel files that were compiled before and read from disk.
    pub cached: usize,
    /// Why what was compiled could not be kept on disk, if so.
    pub warning: Option<String>,
}

/// A queue of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stream(pub usize);

/// A point in a stream's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Event(pub usize);

/// Recorded work, to be replayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Graph(pub usize);

/// The error of a device that has not `bytes` bytes more: names what asked for them by the ranges that are open.
pub fn out_of_memory(bytes: usize, free: u64, total: u64) -> Error {
    let cure =
        "lower --volumes-per-step, --samples-per-volume or --sw-batch, or let no other program use the GPU";
    Error::OutOfMemory { by: open_ranges(), bytes: bytes as u64, free, total, cure: cure.into() }
}

/// A device. Addresses are the device's; sizes are bytes.
pub trait Driver: Send + Sync {
    /// What it is.
    fn info(&self) -> &Info;

    /// Makes kernel files ready that are about to be used, all at once; without it each is made ready when it is used
    /// first. The emulator's always are.
    ///
    /// # Errors
    /// When one does not compile or load.
    fn prepare(&self, _files: &[&'static str], _precision: Precision) -> Result<Prepared> {
        Ok(Prepared::default())
    }

    /// Bytes of device memory that nobody has taken.
    ///
    /// # Errors
    /// When the driver does not tell.
    fn free_memory(&self) -> Result<u64>;

    /// Device memory, aligned to 256 bytes.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`] when it does not fit.
    fn allocate(&self, bytes: usize) -> Result<u64>;

    /// Gives memory back, after all work that was queued so far.
    fn free(&self, address: u64, bytes: usize);

    /// Page-locked host memory, which copies read or write when they run, not when they are queued.
    ///
    /// # Errors
    /// When the system refuses.
    fn allocate_pinned(&self, bytes: usize) -> Result<*mut u8>;

    /// Gives it back.
    ///
    /// # Safety
    /// `pointer` is from [`Driver::allocate_pinned`] with the same size, and no queued copy uses it.
    unsafe fn free_pinned(&self, pointer: *mut u8, bytes: usize);

    /// A further stream. There is one at the start, `Stream(0)`.
    ///
    /// # Errors
    /// When the driver refuses.
    fn new_stream(&self) -> Result<Stream>;

    /// Queues a kernel. `args` is its one struct of arguments, copied now.
    ///
    /// # Errors
    /// When it does not compile or load, or the launch is refused.
    ///
    /// # Safety
    /// Every address in `args` is of live memory as large as the kernel takes it to be.
    unsafe fn launch(&self, stream: Stream, kernel: Symbol, launch: Launch, args: &[u8]) -> Result<()>;

    /// Queues a copy from pinned memory.
    ///
    /// # Errors
    /// When the driver refuses.
    ///
    /// # Safety
    /// Both ranges stay live and `from` unchanged until the copy has run.
    unsafe fn copy_in(&self, stream: Stream, to: u64, from: *const u8, bytes: usize) -> Result<()>;

    /// Queues a copy to pinned memory.
    ///
    /// # Errors
    /// When the driver refuses.
    ///
    /// # Safety
    /// Both ranges stay live, and `to` unread, until the copy has run.
    unsafe fn copy_out(&self, stream: Stream, to: *mut u8, from: u64, bytes: usize) -> Result<()>;

    /// Queues a copy within the device.
    ///
    /// # Errors
    /// When the driver refuses.
    ///
    /// # Safety
    /// Both ranges are live device memory and do not overlap.
    unsafe fn copy(&self, stream: Stream, to: u64, from: u64, bytes: usize) -> Result<()>;

    /// Queues the filling of a range with one byte.
    ///
    /// # Errors
    /// When the driver refuses.
    ///
    /// # Safety
    /// The range is live device memory.
    unsafe fn fill(&self, stream: Stream, to: u64, byte: u8, bytes: usize) -> Result<()>;

    /// Marks the end of what is queued on `stream`.
    ///
    /// # Errors
    /// When the driver refuses.
    fn record(&self, stream: Stream) -> Result<Event>;

    /// Lets work queued on `stream` from now on wait for `event`.
    ///
    /// # Errors
    /// When the driver refuses.
    fn wait(&self, stream: Stream, event: Event) -> Result<()>;

    /// Waits on the host until all work of `stream` has run.
    ///
    /// # Errors
    /// What went wrong in that work, with the kernel's name.
    fn synchronize(&self, stream: Stream) -> Result<()>;

    /// From now on `stream` keeps its work instead of running it.
    ///
    /// # Errors
    /// When the driver refuses.
    fn begin_capture(&self, stream: Stream) -> Result<()>;

    /// Ends that; the work kept can be replayed. Arguments were copied when they were queued.
    ///
    /// # Errors
    /// When something was queued that cannot be kept.
    fn end_capture(&self, stream: Stream) -> Result<Graph>;

    /// Queues all work of a graph.
    ///
    /// # Errors
    /// When the driver refuses.
    ///
    /// # Safety
    /// All memory that the work names is still live.
    unsafe fn replay(&self, stream: Stream, graph: Graph) -> Result<()>;

    /// The pool hands out a block of which `bytes` bytes may be used. The emulator fills it with NaN, so that nothing
    /// can be read that was not written since.
    fn block_taken(&self, _stream: Stream, _address: u64, _bytes: usize) {}

    /// The pool took a block back: work queued from now on may not use it.
    fn block_dropped(&self, _stream: Stream, _address: u64) {}
}
