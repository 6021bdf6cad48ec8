//! A CUDA device: memory, kernels, streams. Knows no op.

pub mod driver;
#[cfg(emulated)]
pub mod emulated;
pub mod kernel_cache;
pub mod libcuda;
mod memory;
pub mod native;
mod native_modules;
pub mod nvrtc;
mod nvrtc_library;
mod pinned;
mod pool;
mod self_test;
pub mod sources;

pub use driver::{Info, Launch, Precision, Prepared};
pub use memory::{Act, Buf, Elem, In, InOut, Out};
pub use pinned::Pinned;
pub use pool::size_class;
pub use self_test::{Compared, SelfTest, agree};

use crate::error::Result;
use bytemuck::Pod;
use driver::{Driver, Graph, Stream, Symbol};
use pool::{Block, Pool};
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// An entry point of a kernel file and the struct of arguments it takes.
///
/// The struct is `repr(C)` and `Pod`, so it has no padding; the kernel file asserts the same size.
pub struct Kernel<A> {
    file: &'static str,
    name: &'static str,
    args: PhantomData<fn(A)>,
}

impl<A> Kernel<A> {
    /// `name` as the kernel file has it, without the suffix of the precision.
    pub const fn new(file: &'static str, name: &'static str) -> Self {
        Kernel { file, name, args: PhantomData }
    }
}

/// Work kept by [`Cuda::record`].
#[derive(Debug)]
pub struct Recording(Graph);

/// One device with one stream of work and the precision of its activations.
pub struct Cuda {
    driver: Arc<dyn Driver>,
    precision: Precision,
    pools: [Pool; 2],
    in_step: AtomicBool,
}

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({:?})", self.info().name, self.precision)
    }
}

impl Cuda {
    /// A device seen through `driver`.
    pub fn new(driver: Arc<dyn Driver>, precision: Precision) -> Arc<Self> {
        let in_step = AtomicBool::new(false);
        Arc::new(Cuda { driver, precision, pools: [Pool::default(), Pool::default()], in_step })
    }

    /// What the device is.
    pub fn info(&self) -> &Info {
        self.driver.info()
    }

    /// How activations are stored.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The device's own interface.
    pub fn driver(&self) -> &dyn Driver {
        &*self.driver
    }

    /// The stream that kernels run on.
    pub fn stream(&self) -> Stream {
        Stream(0)
    }

    fn pool(&self, of_step: bool) -> &Pool {
        &self.pools[usize::from(of_step)]
    }

    fn in_step(&self) -> bool {
        self.in_step.load(Ordering::Relaxed)
    }

    /// Runs `work`, whose buffers are a step's own: they must not be used after the next step begins.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn step<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<R> {
        /// Ends the step even if the work panics.
        struct End<'a>(&'a AtomicBool);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.store(false, Ordering::Relaxed);
            }
        }
        self.in_step.store(true, Ordering::Relaxed);
        let _end = End(&self.in_step);
        work()
    }

    /// Like [`Cuda::step`], but the work is kept, not run: it is run by each [`Cuda::replay`]. Whatever changes from
    /// one run to the next must be in device memory.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn record<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<(R, Recording)> {
        self.driver.begin_capture(self.stream())?;
        let result = self.step(work);
        // Capturing ends whatever became of the work.
        let graph = self.driver.end_capture(self.stream());
        Ok((result?, Recording(graph?)))
    }

    /// Gives all free blocks back to the device, those of steps too: no recording may be replayed any more.
    ///
    /// # Errors
    /// What went wrong in queued work.
    pub fn trim(&self) -> Result<()> {
        self.synchronize()?;
        for (address, bytes) in self.pools.iter().flat_map(Pool::drain) {
            self.driver.free(address, bytes);
        }
        Ok(())
    }

    /// Queues recorded work.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn replay(&self, recording: &Recording) -> Result<()> {
        // SAFETY: blocks of a step stay allocated as long as the device; buffers from outside the step that its work
        // names are owned by the trainer that owns the recording.
        unsafe { self.driver.replay(self.stream(), recording.0) }
    }

    /// Memory for `len` values, content unspecified.
    ///
    /// # Errors
    /// When the device has not enough.
    pub fn buffer<T>(self: &Arc<Self>, len: usize) -> Result<Buf<T>> {
        Ok(Buf::new(Block::new(self, len * size_of::<T>())?, len))
    }

    /// Memory with `values`.
    ///
    /// # Errors
    /// When the device has not enough.
    pub fn upload<T: Pod>(self: &Arc<Self>, values: &[T]) -> Result<Buf<T>> {
        let buf = self.buffer(values.len())?;
        buf.upload(values)?;
        Ok(buf)
    }

    /// Memory for `len` activations, content unspecified.
    ///
    /// # Errors
    /// When the device has not enough.
    pub fn act(self: &Arc<Self>, len: usize) -> Result<Act> {
        Ok(Act::new(self.buffer(len * self.precision.bytes())?, self.precision))
    }

    /// Makes kernel files ready that are about to be used, all at once; else each is when it is used first.
    ///
    /// # Errors
    /// When one does not compile or load.
    pub fn prepare(&self, files: &[&'static str]) -> Result<Prepared> {
        self.driver.prepare(files, self.precision)
    }

    /// Queues a kernel.
    ///
    /// # Errors
    /// When it does not compile or load, or the launch is refused.
    pub fn launch<A: Pod>(&self, kernel: &Kernel<A>, launch: Launch, args: &A) -> Result<()> {
        let symbol = Symbol { file: kernel.file, name: kernel.name, precision: self.precision };
        // SAFETY: pointers in `args` come from live buffers; that they are as large as the kernel takes them to be is
        // the contract between an op's Rust and its .cu, which the emulator's bounds checks prove case by case.
        unsafe { self.driver.launch(self.stream(), symbol, launch, bytemuck::bytes_of(args)) }
    }

    /// Waits for all queued work.
    ///
    /// # Errors
    /// What went wrong in it.
    pub fn synchronize(&self) -> Result<()> {
        self.driver.synchronize(self.stream())
    }

    fn copy_in(&self, to: u64, bytes: &[u8]) -> Result<()> {
        // SAFETY: `to` is the caller's buffer of this many bytes; waiting ends the copy before `bytes` can change.
        unsafe { self.driver.copy_in(self.stream(), to, bytes.as_ptr(), bytes.len())? };
        self.synchronize()
    }

    fn copy_out(&self, bytes: &mut [u8], from: u64) -> Result<()> {
        // SAFETY: `from` is the caller's buffer of this many bytes; waiting ends the copy before `bytes` are read.
        unsafe { self.driver.copy_out(self.stream(), bytes.as_mut_ptr(), from, bytes.len())? };
        self.synchronize()
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        for (address, bytes) in self.pools.iter().flat_map(Pool::drain) {
            self.driver.free(address, bytes);
        }
    }
}
