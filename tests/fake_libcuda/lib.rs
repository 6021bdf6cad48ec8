//! A libcuda that has no GPU behind it but the emulator: the driver functions that src/device/cuda/native.rs calls, with
//! their rules (a context must be current, nothing may be allocated while a stream is captured, ..). With it the whole
//! native path runs on any machine: NVRTC's cubins are loaded and looked into, launches arrive as the driver gets them.
//!
//! `FAKE_CUDA` holds settings such as `init=999 capability=7.5 gpus=2 version=12040 memory=1000000`.
#![cfg(emulated)]

mod image;

use image::Image;
use spleen_hpc::device::cuda::Precision;
use spleen_hpc::device::cuda::driver::{Driver, Event, Graph, Launch, Stream, Symbol};
use spleen_hpc::device::cuda::emulated::Emulated;
use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::{Mutex, MutexGuard, OnceLock};

type Status = c_int;
const SUCCESS: Status = 0;
const INVALID_VALUE: Status = 1;
const OUT_OF_MEMORY: Status = 2;
const NO_DEVICE: Status = 100;
const INVALID_DEVICE: Status = 101;
const INVALID_IMAGE: Status = 200;
const INVALID_CONTEXT: Status = 201;
const NOT_FOUND: Status = 500;
const ILLEGAL_ADDRESS: Status = 700;
const CAPTURE_UNSUPPORTED: Status = 900;
const CAPTURE_INVALIDATED: Status = 901;

const NAMES: &[(Status, &CStr, &CStr)] = &[
    (SUCCESS, c"CUDA_SUCCESS", c"no error"),
    (INVALID_VALUE, c"CUDA_ERROR_INVALID_VALUE", c"invalid argument"),
    (OUT_OF_MEMORY, c"CUDA_ERROR_OUT_OF_MEMORY", c"out of memory"),
    (34, c"CUDA_ERROR_STUB_LIBRARY", c"CUDA driver is a stub library"),
    (NO_DEVICE, c"CUDA_ERROR_NO_DEVICE", c"no CUDA-capable device is detected"),
    (INVALID_DEVICE, c"CUDA_ERROR_INVALID_DEVICE", c"invalid device ordinal"),
    (INVALID_IMAGE, c"CUDA_ERROR_INVALID_IMAGE", c"device kernel image is invalid"),
    (INVALID_CONTEXT, c"CUDA_ERROR_INVALID_CONTEXT", c"invalid device context"),
    (
        222,
        c"CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
        c"the provided PTX was compiled with an unsupported toolchain.",
    ),
    (NOT_FOUND, c"CUDA_ERROR_NOT_FOUND", c"named symbol not found"),
    (ILLEGAL_ADDRESS, c"CUDA_ERROR_ILLEGAL_ADDRESS", c"an illegal memory access was encountered"),
    (
        CAPTURE_UNSUPPORTED,
        c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
        c"operation not permitted when stream is capturing",
    ),
    (
        CAPTURE_INVALIDATED,
        c"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
        c"operation failed due to a previous error during capture",
    ),
    (999, c"CUDA_ERROR_UNKNOWN", c"unknown error"),
];

/// A setting of `FAKE_CUDA`.
fn setting<T: std::str::FromStr>(name: &str, default: T) -> T {
    let all = std::env::var("FAKE_CUDA").unwrap_or_default();
    let value = all.split_whitespace().find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
    value.and_then(|value| value.parse().ok()).unwrap_or(default)
}

/// The one GPU behind all.
struct Gpu {
    emulated: Emulated,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Bytes of every allocation.
    allocated: HashMap<u64, usize>,
    /// Page-locked memory.
    pinned: HashMap<usize, usize>,
    streams: usize,
    /// Live modules, functions, events, executable graphs; all of them are gone at the end.
    live: HashMap<&'static str, isize>,
}

fn gpu() -> &'static Gpu {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    GPU.get_or_init(|| Gpu { emulated: Emulated::new(setting("seed", 0)), state: Mutex::default() })
}

fn state() -> MutexGuard<'static, State> {
    gpu().state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn count(what: &'static str, change: isize) {
    *state().live.entry(what).or_default() += change;
}

/// The context's handle is this static's address.
static CONTEXT: u8 = 0;

thread_local! {
    static CURRENT: Cell<*const u8> = const { Cell::new(ptr::null()) };
    static MODE: Cell<c_uint> = const { Cell::new(0) };
    static CAPTURES: Cell<bool> = const { Cell::new(false) };
}

/// What most functions demand: a current context.
fn in_context(f: impl FnOnce() -> Status) -> Status {
    if CURRENT.get() == &raw const CONTEXT { f() } else { INVALID_CONTEXT }
}

/// What allocations and loading demand too: that the thread does not capture, or has said that it knows what it does.
fn outside_capture(f: impl FnOnce() -> Status) -> Status {
    const RELAXED: c_uint = 2;
    in_context(|| if CAPTURES.get() && MODE.get() != RELAXED { CAPTURE_UNSUPPORTED } else { f() })
}

/// The emulator's error goes to stderr, the status to the caller.
fn status<T>(result: spleen_hpc::Result<T>, failure: Status) -> Status {
    result.map_or_else(
        |err| {
            eprintln!("fake libcuda: {err}");
            failure
        },
        |_| SUCCESS,
    )
}

fn stream(handle: *mut c_void) -> Stream {
    Stream(handle as usize - 1)
}

/// Defines driver functions: exported, with C's calling convention, returning a status.
///
/// Their callers, cudarc's bindings, pass valid pointers; that is what makes the dereferences in them sound.
macro_rules! driver {
    ($($name:ident($($arg:ident: $type:ty),*) $body:block)+) => {
        $(
            /// As in cuda.h.
            ///
            /// # Safety
            /// Pointers are valid, handles are from this library.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name($($arg: $type),*) -> Status {
                // SAFETY: the caller's.
                unsafe { $body }
            }
        )+
    };
}

// Some need none.
#[allow(unused_unsafe)]
mod functions {
    use super::*;

    driver! {
        cuInit(_flags: c_uint) { setting("init", SUCCESS) }
        cuDriverGetVersion(version: *mut c_int) { *version = setting("version", 13000); SUCCESS }
        cuDeviceGetCount(count: *mut c_int) { *count = setting("gpus", 1); SUCCESS }
        cuDeviceGet(device: *mut c_int, ordinal: c_int) {
            *device = ordinal;
            if ordinal < setting("gpus", 1) { SUCCESS } else { INVALID_DEVICE }
        }
        cuDeviceGetName(name: *mut c_char, len: c_int, _device: c_int) {
            let text = c"Fake GPU";
            assert!(len as usize > text.count_bytes());
            ptr::copy_nonoverlapping(text.as_ptr(), name, text.count_bytes() + 1);
            SUCCESS
        }
        cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) { *bytes = setting("memory", 1 << 33); SUCCESS }
        cuDeviceGetAttribute(value: *mut c_int, attribute: c_uint, _device: c_int) {
            let capability = setting("capability", 9.0);
            *value = match attribute {
                16 => 4,
                75 => capability as c_int,
                76 => (capability * 10.0) as c_int % 10,
                97 => 227 << 10,
                _ => return INVALID_VALUE,
            };
            SUCCESS
        }
        cuGetErrorName(code: Status, text: *mut *const c_char) {
            *text = NAMES.iter().find(|n| n.0 == code).map_or(ptr::null(), |n| n.1.as_ptr());
            if (*text).is_null() { INVALID_VALUE } else { SUCCESS }
        }
        cuGetErrorString(code: Status, text: *mut *const c_char) {
            *text = NAMES.iter().find(|n| n.0 == code).map_or(ptr::null(), |n| n.2.as_ptr());
            if (*text).is_null() { INVALID_VALUE } else { SUCCESS }
        }

        cuDevicePrimaryCtxRetain(context: *mut *const u8, _device: c_int) {
            *context = &raw const CONTEXT;
            count("context", 1);
            SUCCESS
        }
        cuDevicePrimaryCtxRelease_v2(_device: c_int) {
            count("context", -1);
            let state = state();
            let left: Vec<_> = state.live.iter().filter(|(_, n)| **n != 0).collect();
            println!("fake libcuda: left over: {left:?}, {} allocations", state.allocated.len() + state.pinned.len());
            SUCCESS
        }
        cuCtxSetCurrent(context: *const u8) { CURRENT.set(context); SUCCESS }
        cuThreadExchangeStreamCaptureMode(mode: *mut c_uint) { *mode = MODE.replace(*mode); SUCCESS }

        cuMemAlloc_v2(address: *mut u64, bytes: usize) {
            outside_capture(|| {
                let used: usize = state().allocated.values().sum();
                if used + bytes > setting("memory", 1 << 33) {
                    return OUT_OF_MEMORY;
                }
                match gpu().emulated.allocate(bytes) {
                    Ok(at) => { *address = at; state().allocated.insert(at, bytes); SUCCESS }
                    Err(_) => OUT_OF_MEMORY,
                }
            })
        }
        cuMemFree_v2(address: u64) {
            outside_capture(|| {
                let Some(bytes) = state().allocated.remove(&address) else { return INVALID_VALUE };
                gpu().emulated.free(address, bytes);
                SUCCESS
            })
        }
        cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
            *total = setting("memory", 1 << 33);
            *free = *total - state().allocated.values().sum::<usize>();
            SUCCESS
        }
        cuMemHostAlloc(pointer: *mut *mut u8, bytes: usize, _flags: c_uint) {
            outside_capture(|| match gpu().emulated.allocate_pinned(bytes) {
                Ok(at) => { *pointer = at; state().pinned.insert(at as usize, bytes); SUCCESS }
                Err(_) => OUT_OF_MEMORY,
            })
        }
        cuMemFreeHost(pointer: *mut u8) {
            in_context(|| {
                let Some(bytes) = state().pinned.remove(&(pointer as usize)) else { return INVALID_VALUE };
                gpu().emulated.free_pinned(pointer, bytes);
                SUCCESS
            })
        }
        cuMemcpyHtoDAsync_v2(to: u64, from: *const u8, bytes: usize, queue: *mut c_void) {
            in_context(|| status(gpu().emulated.copy_in(stream(queue), to, from, bytes), INVALID_VALUE))
        }
        cuMemcpyDtoHAsync_v2(to: *mut u8, from: u64, bytes: usize, queue: *mut c_void) {
            in_context(|| status(gpu().emulated.copy_out(stream(queue), to, from, bytes), INVALID_VALUE))
        }
        cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, queue: *mut c_void) {
            in_context(|| status(gpu().emulated.copy(stream(queue), to, from, bytes), INVALID_VALUE))
        }
        cuMemsetD8Async(to: u64, byte: u8, bytes: usize, queue: *mut c_void) {
            in_context(|| status(gpu().emulated.fill(stream(queue), to, byte, bytes), INVALID_VALUE))
        }

        cuModuleLoadData(module: *mut *mut Image, image: *const u8) {
            outside_capture(|| {
                let refused = setting("load", SUCCESS);
                if refused != SUCCESS {
                    return refused;
                }
                match Image::read(image) {
                    Some(image) => { *module = Box::into_raw(Box::new(image)); count("module", 1); SUCCESS }
                    None => INVALID_IMAGE,
                }
            })
        }
        cuModuleUnload(module: *mut Image) {
            in_context(|| { drop(Box::from_raw(module)); count("module", -1); SUCCESS })
        }
        cuModuleGetFunction(function: *mut *const Function, module: *const Image, name: *const c_char) {
            in_context(|| {
                let name = CStr::from_ptr(name).to_str().expect("a symbol");
                let Some(args_bytes) = (*module).args_bytes(name) else { return NOT_FOUND };
                let (stem, precision) = match name.strip_suffix("_f16") {
                    Some(stem) => (stem, Precision::Half),
                    None => (name.strip_suffix("_f32").expect("a precision"), Precision::Single),
                };
                let stem: &'static str = stem.to_owned().leak();
                let symbol = Symbol { file: "cubin", name: stem, precision };
                // Lives as long as the process, like the name in it.
                *function = Box::leak(Box::new(Function { symbol, args_bytes, most_shared: Mutex::new(48 << 10) }));
                SUCCESS
            })
        }
        cuFuncSetAttribute(function: *const Function, attribute: c_uint, value: c_int) {
            assert_eq!(attribute, 8, "the most dynamic shared memory");
            *(*function).most_shared.lock().expect("no panic") = value as u32;
            SUCCESS
        }

        cuStreamCreate(handle: *mut *mut c_void, flags: c_uint) {
            in_context(|| {
                assert_eq!(flags, 1, "a stream that does not wait for the legacy one");
                let first = state().streams == 0;
                let made = if first { Ok(Stream(0)) } else { gpu().emulated.new_stream() };
                let Ok(Stream(index)) = made else { return OUT_OF_MEMORY };
                state().streams = index + 1;
                *handle = (index + 1) as *mut c_void;
                count("stream", 1);
                SUCCESS
            })
        }
        cuStreamDestroy_v2(_queue: *mut c_void) { in_context(|| { count("stream", -1); SUCCESS }) }
        cuStreamSynchronize(queue: *mut c_void) {
            in_context(|| {
                let done = status(gpu().emulated.synchronize(stream(queue)), ILLEGAL_ADDRESS);
                setting("sync", done)
            })
        }
        cuStreamWaitEvent(queue: *mut c_void, event: *const Mutex<Option<Event>>, _flags: c_uint) {
            in_context(|| match *(*event).lock().expect("no panic") {
                Some(event) => status(gpu().emulated.wait(stream(queue), event), INVALID_VALUE),
                // An event that was never recorded holds nobody up.
                None => SUCCESS,
            })
        }
        cuEventCreate(event: *mut *mut Mutex<Option<Event>>, flags: c_uint) {
            in_context(|| {
                assert_eq!(flags, 2, "timing costs time");
                *event = Box::into_raw(Box::new(Mutex::new(None)));
                count("event", 1);
                SUCCESS
            })
        }
        cuEventDestroy_v2(event: *mut Mutex<Option<Event>>) {
            in_context(|| { drop(Box::from_raw(event)); count("event", -1); SUCCESS })
        }
        cuEventRecord(event: *const Mutex<Option<Event>>, queue: *mut c_void) {
            in_context(|| {
                let recorded = gpu().emulated.record(stream(queue));
                *(*event).lock().expect("no panic") = recorded.as_ref().ok().copied();
                status(recorded, INVALID_VALUE)
            })
        }

        cuStreamBeginCapture_v2(queue: *mut c_void, mode: c_uint) {
            in_context(|| {
                assert_eq!(mode, 1, "other threads may go on");
                CAPTURES.set(true);
                status(gpu().emulated.begin_capture(stream(queue)), CAPTURE_UNSUPPORTED)
            })
        }
        cuStreamEndCapture(queue: *mut c_void, graph: *mut *mut c_void) {
            in_context(|| {
                CAPTURES.set(false);
                let kept = gpu().emulated.end_capture(stream(queue));
                *graph = kept.as_ref().map_or(ptr::null_mut(), |Graph(index)| (index + 1) as *mut c_void);
                count("graph", isize::from(kept.is_ok()));
                status(kept, CAPTURE_INVALIDATED)
            })
        }
        cuGraphInstantiateWithFlags(made: *mut *mut c_void, graph: *mut c_void, flags: u64) {
            in_context(|| {
                assert_eq!(flags, 0);
                *made = graph;
                count("executable graph", 1);
                SUCCESS
            })
        }
        cuGraphDestroy(_graph: *mut c_void) { in_context(|| { count("graph", -1); SUCCESS }) }
        cuGraphExecDestroy(_graph: *mut c_void) { in_context(|| { count("executable graph", -1); SUCCESS }) }
        cuGraphLaunch(graph: *mut c_void, queue: *mut c_void) {
            in_context(|| {
                let graph = Graph(graph as usize - 1);
                status(gpu().emulated.replay(stream(queue), graph), INVALID_VALUE)
            })
        }

        cuLaunchKernel(
            function: *const Function, x: c_uint, y: c_uint, z: c_uint, threads: c_uint, threads_y: c_uint,
            threads_z: c_uint, shared: c_uint, queue: *mut c_void, params: *mut *mut c_void, extra: *mut *mut c_void
        ) {
            in_context(|| {
                assert!(threads_y == 1 && threads_z == 1 && extra.is_null());
                let Function { symbol, args_bytes, most_shared } = &*function;
                if shared > *most_shared.lock().expect("no panic") {
                    return INVALID_VALUE;
                }
                let args = std::slice::from_raw_parts((*params).cast::<u8>(), *args_bytes);
                let launch = Launch { grid: [x, y, z], threads, shared };
                status(gpu().emulated.launch(stream(queue), *symbol, launch, args), INVALID_VALUE)
            })
        }
    }
}

/// A kernel of a module.
pub struct Function {
    symbol: Symbol,
    args_bytes: usize,
    most_shared: Mutex<u32>,
}
