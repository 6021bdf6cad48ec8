//! The driver library: whether it is there, which devices it has, and what its errors mean.
//!
//! cudarc, whose bindings are called here, panics where the library or a function is missing, so [`look`] asks for
//! everything once and comes before all else.

use super::driver::Info;
use crate::error::{Error, Result};
use cudarc::driver::sys::{self, CUdevice, CUdevice_attribute, CUresult, CUstreamCaptureMode};
use libloading::Library;
use std::error::Error as _;
use std::ffi::{CStr, c_char, c_int};
use std::ptr;
use std::sync::OnceLock;

/// The driver library's name.
const LIBRARY: &str = "libcuda.so.1";
/// Every driver function that is called. All are in the driver of CUDA 12.0 and in later ones.
const FUNCTIONS: &[&str] = &[
    "cuCtxSetCurrent",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuInit",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuStreamBeginCapture_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamEndCapture",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuThreadExchangeStreamCaptureMode",
];

/// What there is of a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// None: this machine never had a GPU, or not for this program.
    NoDriver,
    /// A driver that finds no GPU, as in a container that was given none.
    NoGpu,
    /// A driver that works.
    Ready,
}

/// Loads the driver library and starts it, once a process.
///
/// # Errors
/// [`Error::Gpu`]: it is there but too old, or does not start.
pub fn look() -> Result<Presence> {
    static LOADED: OnceLock<Result<Presence, String>> = OnceLock::new();
    let loaded = LOADED.get_or_init(|| start().map_err(|err| err.to_string()));
    loaded.clone().map_err(Error::Gpu)
}

/// The same where nothing less than a working driver will do.
///
/// # Errors
/// [`Error::Gpu`]: there is none, it finds no GPU, is too old, or does not start.
pub fn load() -> Result<()> {
    match look()? {
        Presence::NoDriver => Err(Error::Gpu(format!("there is no NVIDIA driver ({LIBRARY})"))),
        Presence::NoGpu => Err(Error::Gpu("the NVIDIA driver finds no GPU".into())),
        Presence::Ready => Ok(()),
    }
}

fn start() -> Result<Presence> {
    // SAFETY: loading runs the library's own start-up code, NVIDIA's.
    match unsafe { Library::new(LIBRARY) } {
        // It stays loaded: cudarc opens it by the same name.
        Ok(library) => std::mem::forget(library),
        Err(err) => {
            let why = err.source().map_or_else(|| err.to_string(), ToString::to_string);
            return match why.contains("No such file") {
                true => Ok(Presence::NoDriver),
                false => Err(Error::Gpu(format!("the NVIDIA driver cannot be loaded ({why})"))),
            };
        }
    }
    // SAFETY: the library is there, so this does not panic.
    let library = unsafe { sys::culib() };
    for name in FUNCTIONS {
        // SAFETY: the address is looked up, not called.
        if unsafe { library.get::<unsafe extern "C" fn()>(name.as_bytes()) }.is_err() {
            return Err(Error::Gpu(format!(
                "the NVIDIA driver lacks {name}: it is older than CUDA 12.0, install release 525 or newer"
            )));
        }
    }
    // SAFETY: the function is there; 0 is the only value its argument may have.
    match unsafe { sys::cuInit(0) } {
        CUresult::CUDA_ERROR_NO_DEVICE => Ok(Presence::NoGpu),
        status => check(status, "the NVIDIA driver does not start").map(|()| Presence::Ready),
    }
}

/// The newest CUDA that the driver supports, major and minor.
///
/// # Errors
/// Those of [`load`].
pub fn version() -> Result<(u32, u32)> {
    load()?;
    let mut version = 0;
    // SAFETY: a pointer to an integer.
    check(unsafe { sys::cuDriverGetVersion(&raw mut version) }, "the NVIDIA driver has no version")?;
    let version = version.unsigned_abs();
    Ok((version / 1000, version % 1000 / 10))
}

/// The devices, in the driver's order: the numbers of `cuda:N`.
///
/// # Errors
/// Those of [`load`], and what the driver refuses to tell.
pub fn gpus() -> Result<Vec<Info>> {
    load()?;
    let mut count = 0;
    // SAFETY: a pointer to an integer.
    check(unsafe { sys::cuDeviceGetCount(&raw mut count) }, "the NVIDIA driver does not count its GPUs")?;
    (0..count.unsigned_abs()).map(|ordinal| info(device(ordinal)?)).collect()
}

/// The driver's handle of device `ordinal`.
pub(super) fn device(ordinal: u32) -> Result<CUdevice> {
    let mut device = 0;
    let number = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
    // SAFETY: a pointer to an integer.
    let status = unsafe { sys::cuDeviceGet(&raw mut device, number) };
    check(status, || format!("cuda:{ordinal} is not there"))?;
    Ok(device)
}

/// What a device is.
pub(super) fn info(device: CUdevice) -> Result<Info> {
    use CUdevice_attribute::*;
    let what = "the NVIDIA driver does not describe its GPU";
    let mut name: [c_char; 256] = [0; 256];
    // SAFETY: a buffer of the length said.
    check(unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, device) }, what)?;
    // SAFETY: the driver ends the name with a zero.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
    let mut memory = 0;
    // SAFETY: a pointer to an integer.
    check(unsafe { sys::cuDeviceTotalMem_v2(&raw mut memory, device) }, what)?;
    let number = |attribute| {
        let mut value = 0;
        // SAFETY: a pointer to an integer.
        check(unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, device) }, what)?;
        Ok::<_, Error>(value.unsigned_abs())
    };
    Ok(Info {
        name,
        capability: (
            number(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            number(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: number(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        memory: memory as u64,
        shared_per_block: number(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
    })
}

/// Turns a status into an error that begins with `what` was tried.
pub(super) fn check(status: CUresult, what: impl What) -> Result<()> {
    match status {
        CUresult::CUDA_SUCCESS => Ok(()),
        status => Err(Error::Gpu(format!("{}: {}", what.text(), describe(status)))),
    }
}

/// What was tried: text, or a closure where text takes work to make.
pub(super) trait What {
    fn text(self) -> String;
}

impl What for &str {
    fn text(self) -> String {
        self.into()
    }
}

impl<F: FnOnce() -> String> What for F {
    fn text(self) -> String {
        self()
    }
}

/// The driver's sentence for a status and its name.
pub(super) fn describe(status: CUresult) -> String {
    let text = |get: unsafe fn(CUresult, *mut *const c_char) -> CUresult| {
        let mut text = ptr::null();
        // SAFETY: a pointer to a pointer; the driver leaves null for a number it does not know.
        let known = unsafe { get(status, &raw mut text) } == CUresult::CUDA_SUCCESS && !text.is_null();
        // SAFETY: a static string.
        known.then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    };
    match (text(sys::cuGetErrorString), text(sys::cuGetErrorName)) {
        (Some(sentence), Some(name)) => format!("{sentence} ({name})"),
        _ => format!("error {}", status as u32),
    }
}

/// Whether a status is of work that was queued before, which leaves the context unusable.
pub(super) fn is_of_earlier_work(status: CUresult) -> bool {
    matches!(status as u32, 214 | 220 | 700 | 702 | 710..=719)
}

/// Runs `f`, which allocates or loads: the driver would refuse that to a thread whose stream is kept for a graph, though
/// it does no harm to what is kept.
pub(super) fn even_in_capture<T>(f: impl FnOnce() -> T) -> T {
    let mut mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    // SAFETY: a pointer to a mode, which is swapped with this thread's.
    let swapped = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) };
    let result = f();
    if swapped == CUresult::CUDA_SUCCESS {
        // SAFETY: as above, with the mode that this thread had.
        unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) };
    }
    result
}
