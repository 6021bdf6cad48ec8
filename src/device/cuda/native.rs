//! A GPU, through the NVIDIA driver.
//!
//! Every call makes the device's context current first: threads come and go, and it costs nothing measurable beside
//! what the call itself does. Streams do not wait for the legacy default stream, which is not used.

use super::driver::{Driver, Event, Graph, Info, Launch, Precision, Prepared, Stream, Symbol, out_of_memory};
use super::libcuda::{self, check, describe, even_in_capture};
use super::native_modules::Modules;
use crate::error::{Error, Result};
use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUevent, CUevent_flags, CUgraphExec, CUresult, CUstream, CUstream_flags,
    CUstreamCaptureMode,
};
use std::collections::VecDeque;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Mutex, MutexGuard};

/// Events of a stream. They are taken in turn; recorded again, an event marks a later point of the same stream, so
/// whoever waits for the old one waits too long, never too short.
const EVENTS: usize = 64;
/// Launches that are remembered, to be named when something fails later.
const REMEMBERED: usize = 6;

/// A GPU.
pub struct Native {
    info: Info,
    device: CUdevice,
    context: CUcontext,
    modules: Modules,
    streams: Mutex<Vec<Queue>>,
    graphs: Mutex<Vec<Replayable>>,
    recent: Mutex<VecDeque<Recent>>,
}

// SAFETY: the driver's handles may be used from any thread, and all that Rust owns here is behind mutexes.
unsafe impl Send for Native {}
// SAFETY: as above.
unsafe impl Sync for Native {}

/// A stream, its events, and how many kernels were launched on it, in all and before the capture began.
struct Queue {
    stream: CUstream,
    events: Vec<CUevent>,
    recorded: usize,
    launches: usize,
    before_capture: usize,
}

/// A graph and the number of kernels in it, for messages.
struct Replayable {
    graph: CUgraphExec,
    launches: usize,
}

/// Something that was launched.
#[derive(Clone, Copy)]
enum Recent {
    Kernel(Symbol, Launch),
    Graph { launches: usize },
}

impl std::fmt::Display for Recent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Recent::Kernel(symbol, Launch { grid: [x, y, z], threads, shared }) => write!(
                f,
                "{symbol} ({x}x{y}x{z} blocks of {threads} threads, {shared} bytes of shared memory each)"
            ),
            Recent::Graph { launches } => write!(f, "a graph of {launches} kernels"),
        }
    }
}

/// The content, also after a panic of its holder, who leaves only whole changes behind.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Native {
    /// GPU number `ordinal` and its first stream.
    ///
    /// # Errors
    /// [`Error::Gpu`] when driver, NVRTC or device are missing, too old or do not work.
    pub fn new(ordinal: u32) -> Result<Self> {
        libcuda::load()?;
        let device = libcuda::device(ordinal)?;
        let info = libcuda::info(device)?;
        let modules = Modules::new(&info)?;
        let mut context = ptr::null_mut();
        // SAFETY: a device of the driver; given back in `drop`.
        let status = unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, device) };
        check(status, || format!("cuda:{ordinal} ({}) cannot be used", info.name))?;
        let native = Native {
            info,
            device,
            context,
            modules,
            streams: Mutex::default(),
            graphs: Mutex::default(),
            recent: Mutex::default(),
        };
        native.new_stream()?;
        Ok(native)
    }

    /// Makes the context current in this thread.
    fn enter(&self) -> Result<()> {
        // SAFETY: the context lives as long as `self`.
        check(unsafe { sys::cuCtxSetCurrent(self.context) }, || format!("{} cannot be used", self.info.name))
    }

    /// The driver's stream.
    fn stream(&self, stream: Stream) -> CUstream {
        lock(&self.streams)[stream.0].stream
    }

    /// Waits for all streams, whatever became of their work. They are waited for one by one: the context is shared with
    /// whoever else uses this GPU in the process, and waiting for all of it would end their captures.
    fn finish(&self) {
        let streams: Vec<CUstream> = lock(&self.streams).iter().map(|queue| queue.stream).collect();
        for stream in streams {
            // SAFETY: streams live as long as `self`.
            unsafe { sys::cuStreamSynchronize(stream) };
        }
    }

    fn remember(&self, what: Recent) {
        let mut recent = lock(&self.recent);
        if recent.len() == REMEMBERED {
            recent.pop_front();
        }
        recent.push_back(what);
    }

    /// Turns a status into an error; if work queued earlier is to blame, names the kernels that may have been it.
    fn check(&self, status: CUresult, what: impl libcuda::What) -> Result<()> {
        if status == CUresult::CUDA_SUCCESS {
            return Ok(());
        }
        let mut text = format!("{}: {}", what.text(), describe(status));
        if libcuda::is_of_earlier_work(status) {
            let recent: Vec<String> = lock(&self.recent).iter().rev().map(Recent::to_string).collect();
            text += &format!(
                "; launched last: {}; CUDA_LAUNCH_BLOCKING=1 makes the kernel at fault the first of them",
                if recent.is_empty() { "nothing".into() } else { recent.join(", ") }
            );
        }
        Err(Error::Gpu(text))
    }

    /// Free and all bytes of the device.
    fn memory(&self) -> (u64, u64) {
        let (mut free, mut total) = (0, 0);
        // SAFETY: pointers to integers. Without an answer nothing is free, which is what made us ask.
        unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) };
        (free as u64, total as u64)
    }
}

impl Driver for Native {
    fn info(&self) -> &Info {
        &self.info
    }

    fn prepare(&self, files: &[&'static str], precision: Precision) -> Result<Prepared> {
        self.enter()?;
        self.modules.prepare(files, precision)
    }

    fn free_memory(&self) -> Result<u64> {
        self.enter()?;
        Ok(self.memory().0)
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.enter()?;
        let mut address = 0;
        // SAFETY: a pointer to an address.
        let status = even_in_capture(|| unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes) });
        if status == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            let (free, total) = self.memory();
            return Err(out_of_memory(bytes, free, total));
        }
        self.check(status, || format!("{bytes} bytes of GPU memory cannot be had"))?;
        Ok(address)
    }

    fn free(&self, address: u64, _bytes: usize) {
        if self.enter().is_err() {
            return;
        }
        // cuMemFree waits for the work before it in practice, but nothing says it must.
        self.finish();
        // SAFETY: the address is from `allocate`. A failure is that of earlier work, which `synchronize` reports.
        unsafe { sys::cuMemFree_v2(address) };
    }

    fn allocate_pinned(&self, bytes: usize) -> Result<*mut u8> {
        self.enter()?;
        let mut pointer = ptr::null_mut();
        // SAFETY: a pointer to a pointer; no flags.
        let status = even_in_capture(|| unsafe { sys::cuMemHostAlloc(&raw mut pointer, bytes, 0) });
        self.check(status, || format!("{bytes} bytes of page-locked memory cannot be had"))?;
        Ok(pointer.cast())
    }

    unsafe fn free_pinned(&self, pointer: *mut u8, _bytes: usize) {
        if self.enter().is_ok() {
            // SAFETY: the caller got it from `allocate_pinned`. A failure is that of earlier work.
            unsafe { sys::cuMemFreeHost(pointer.cast()) };
        }
    }

    fn new_stream(&self) -> Result<Stream> {
        self.enter()?;
        let mut stream = ptr::null_mut();
        let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: a pointer to a handle; destroyed in `drop`.
        self.check(unsafe { sys::cuStreamCreate(&raw mut stream, flags) }, "a stream cannot be made")?;
        let mut streams = lock(&self.streams);
        streams.push(Queue { stream, events: Vec::new(), recorded: 0, launches: 0, before_capture: 0 });
        Ok(Stream(streams.len() - 1))
    }

    unsafe fn launch(&self, stream: Stream, kernel: Symbol, launch: Launch, args: &[u8]) -> Result<()> {
        self.enter()?;
        let function = self.modules.function(kernel)?;
        let queue = {
            let mut streams = lock(&self.streams);
            streams[stream.0].launches += 1;
            streams[stream.0].stream
        };
        let mut params = [args.as_ptr().cast::<c_void>().cast_mut()];
        let ([x, y, z], threads) = (launch.grid, launch.threads);
        // SAFETY: the kernel takes one parameter, which the driver copies now; the caller vouches for its addresses.
        let status = unsafe {
            sys::cuLaunchKernel(
                function,
                x,
                y,
                z,
                threads,
                1,
                1,
                launch.shared,
                queue,
                params.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        self.remember(Recent::Kernel(kernel, launch));
        self.check(status, || format!("{}: launch of {}", kernel.file, Recent::Kernel(kernel, launch)))
    }

    unsafe fn copy_in(&self, stream: Stream, to: u64, from: *const u8, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: the caller's ranges.
        let status = unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, self.stream(stream)) };
        self.check(status, || format!("copy of {bytes} bytes to the GPU"))
    }

    unsafe fn copy_out(&self, stream: Stream, to: *mut u8, from: u64, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: the caller's ranges.
        let status = unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, self.stream(stream)) };
        self.check(status, || format!("copy of {bytes} bytes from the GPU"))
    }

    unsafe fn copy(&self, stream: Stream, to: u64, from: u64, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: the caller's ranges.
        let status = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream(stream)) };
        self.check(status, || format!("copy of {bytes} bytes on the GPU"))
    }

    unsafe fn fill(&self, stream: Stream, to: u64, byte: u8, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: the caller's range.
        let status = unsafe { sys::cuMemsetD8Async(to, byte, bytes, self.stream(stream)) };
        self.check(status, || format!("filling of {bytes} bytes on the GPU"))
    }

    fn record(&self, stream: Stream) -> Result<Event> {
        self.enter()?;
        let mut streams = lock(&self.streams);
        let queue = &mut streams[stream.0];
        let turn = queue.recorded % EVENTS;
        if turn == queue.events.len() {
            let mut event = ptr::null_mut();
            let flags = CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
            // SAFETY: a pointer to a handle; destroyed in `drop`.
            self.check(unsafe { sys::cuEventCreate(&raw mut event, flags) }, "an event cannot be made")?;
            queue.events.push(event);
        }
        // SAFETY: live handles.
        self.check(unsafe { sys::cuEventRecord(queue.events[turn], queue.stream) }, "recording of an event")?;
        queue.recorded += 1;
        Ok(Event(stream.0 * EVENTS + turn))
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<()> {
        self.enter()?;
        let streams = lock(&self.streams);
        let awaited = streams[event.0 / EVENTS].events[event.0 % EVENTS];
        // SAFETY: live handles; no flags.
        self.check(
            unsafe { sys::cuStreamWaitEvent(streams[stream.0].stream, awaited, 0) },
            "waiting for an event",
        )
    }

    fn synchronize(&self, stream: Stream) -> Result<()> {
        self.enter()?;
        // SAFETY: a live stream.
        self.check(unsafe { sys::cuStreamSynchronize(self.stream(stream)) }, "work on the GPU failed")
    }

    fn begin_capture(&self, stream: Stream) -> Result<()> {
        self.enter()?;
        // Other threads may go on allocating and copying.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        let mut streams = lock(&self.streams);
        let queue = &mut streams[stream.0];
        queue.before_capture = queue.launches;
        // SAFETY: a live stream.
        self.check(unsafe { sys::cuStreamBeginCapture_v2(queue.stream, mode) }, "a graph cannot be begun")
    }

    fn end_capture(&self, stream: Stream) -> Result<Graph> {
        self.enter()?;
        let (queue, launches) = {
            let streams = lock(&self.streams);
            let queue = &streams[stream.0];
            (queue.stream, queue.launches - queue.before_capture)
        };
        let (mut kept, mut graph) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: a live stream, a pointer to a handle.
        let ended = unsafe { sys::cuStreamEndCapture(queue, &raw mut kept) };
        self.check(ended, "something was queued that a graph cannot keep")?;
        // SAFETY: the graph that was just made; no flags. The executable one is destroyed in `drop`.
        let made = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut graph, kept, 0) };
        // SAFETY: the same graph, not used again.
        unsafe { sys::cuGraphDestroy(kept) };
        self.check(made, "a graph cannot be made ready")?;
        let mut graphs = lock(&self.graphs);
        graphs.push(Replayable { graph, launches });
        Ok(Graph(graphs.len() - 1))
    }

    unsafe fn replay(&self, stream: Stream, graph: Graph) -> Result<()> {
        self.enter()?;
        let Replayable { graph, launches } = lock(&self.graphs)[graph.0];
        // SAFETY: live handles; the caller vouches for the memory.
        let status = unsafe { sys::cuGraphLaunch(graph, self.stream(stream)) };
        self.remember(Recent::Graph { launches });
        self.check(status, || format!("launch of {}", Recent::Graph { launches }))
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        if self.enter().is_ok() {
            // What is destroyed below is then idle.
            self.finish();
            for Replayable { graph, .. } in lock(&self.graphs).drain(..) {
                // SAFETY: a live handle, not used again. So below; failures leave nothing to mend.
                unsafe { sys::cuGraphExecDestroy(graph) };
            }
            for Queue { stream, events, .. } in lock(&self.streams).drain(..) {
                for event in events {
                    // SAFETY: as above.
                    unsafe { sys::cuEventDestroy_v2(event) };
                }
                // SAFETY: as above.
                unsafe { sys::cuStreamDestroy_v2(stream) };
            }
            self.modules.unload();
        }
        // SAFETY: retained once, in `new`.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}
