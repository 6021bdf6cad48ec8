//! The emulator as a device: kernels compiled as C++ (tests/emulator), run on the CPU.

use super::driver::{Driver, Event, Graph, Info, Launch, Stream, Symbol};
use crate::error::{Error, Result};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::Mutex;

unsafe extern "C" {
    fn cuemu_find(name: *const c_char) -> *const c_void;
    fn cuemu_name(index: usize) -> *const c_char;
    fn cuemu_launch(
        kernel: *const c_void,
        grid: *const u32,
        block: *const u32,
        shared: u32,
        args: *const c_void,
        args_bytes: u64,
        seed: u64,
        error: *mut c_char,
        error_bytes: u64,
    ) -> c_int;
    fn cuemu_alloc(bytes: u64) -> *mut c_void;
    fn cuemu_free(pointer: *mut c_void, bytes: u64);
}

/// Names of all kernels the emulator has, with their suffixes.
pub fn kernel_names() -> Vec<String> {
    (0..)
        .map_while(|i| {
            // SAFETY: returns null past the end, else a static string.
            let name = unsafe { cuemu_name(i) };
            // SAFETY: as above.
            (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned())
        })
        .collect()
}

/// An emulated GPU.
pub struct Emulated {
    info: Info,
    seed: u64,
    one_at_a_time: Mutex<()>,
}

impl Emulated {
    /// A device whose schedule is drawn from `seed`; 0 is the plain order.
    pub fn new(seed: u64) -> Self {
        let info = Info {
            name: "emulated GPU".into(),
            capability: (9, 0),
            multiprocessors: 4,
            memory: 8 << 30,
            shared_per_block: 227 << 10,
        };
        Emulated { info, seed, one_at_a_time: Mutex::new(()) }
    }
}

impl Driver for Emulated {
    fn info(&self) -> &Info {
        &self.info
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        // SAFETY: returns null or memory of this size.
        let pointer = unsafe { cuemu_alloc(bytes as u64) };
        if pointer.is_null() {
            return Err(Error::Internal(format!("the emulator has no {bytes} bytes")));
        }
        Ok(pointer as u64)
    }

    fn free(&self, address: u64, bytes: usize) {
        // SAFETY: the address is from `allocate` with the same size.
        unsafe { cuemu_free(address as *mut c_void, bytes as u64) }
    }

    fn allocate_pinned(&self, bytes: usize) -> Result<*mut u8> {
        Ok(Box::leak(vec![0u8; bytes].into_boxed_slice()).as_mut_ptr())
    }

    unsafe fn free_pinned(&self, pointer: *mut u8, bytes: usize) {
        // SAFETY: the caller got it from `allocate_pinned` with this size.
        drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(pointer, bytes)) });
    }

    fn new_stream(&self) -> Result<Stream> {
        Err(Error::Internal("the emulator has one stream".into()))
    }

    unsafe fn launch(&self, _: Stream, kernel: Symbol, launch: Launch, args: &[u8]) -> Result<()> {
        let name = CString::new(kernel.to_string()).expect("symbols have no zero byte");
        // SAFETY: a zero-ended string.
        let found = unsafe { cuemu_find(name.as_ptr()) };
        if found.is_null() {
            return Err(Error::Internal(format!("{}: {kernel} is not in the emulator", kernel.file)));
        }
        let mut error = [0u8; 1024];
        let _turn = self.one_at_a_time.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // SAFETY: the kernel is known, its arguments are checked for size, `error` is as large as said.
        let failed = unsafe {
            cuemu_launch(
                found,
                launch.grid.as_ptr(),
                [launch.threads, 1, 1].as_ptr(),
                launch.shared,
                args.as_ptr().cast(),
                args.len() as u64,
                self.seed,
                error.as_mut_ptr().cast(),
                error.len() as u64,
            )
        };
        if failed != 0 {
            let text =
                CStr::from_bytes_until_nul(&error).map_or("no reason given".into(), CStr::to_string_lossy);
            return Err(Error::Internal(text.into_owned()));
        }
        Ok(())
    }

    unsafe fn copy_in(&self, _: Stream, to: u64, from: *const u8, bytes: usize) -> Result<()> {
        // SAFETY: the caller's ranges.
        unsafe { std::ptr::copy_nonoverlapping(from, to as *mut u8, bytes) };
        Ok(())
    }

    unsafe fn copy_out(&self, _: Stream, to: *mut u8, from: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller's ranges.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to, bytes) };
        Ok(())
    }

    unsafe fn copy(&self, _: Stream, to: u64, from: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller's ranges.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    unsafe fn fill(&self, _: Stream, to: u64, byte: u8, bytes: usize) -> Result<()> {
        // SAFETY: the caller's range.
        unsafe { std::ptr::write_bytes(to as *mut u8, byte, bytes) };
        Ok(())
    }

    fn record(&self, _: Stream) -> Result<Event> {
        Ok(Event(0))
    }

    fn wait(&self, _: Stream, _: Event) -> Result<()> {
        Ok(())
    }

    fn synchronize(&self, _: Stream) -> Result<()> {
        Ok(())
    }

    fn begin_capture(&self, _: Stream) -> Result<()> {
        Err(Error::Internal("the emulator cannot capture".into()))
    }

    fn end_capture(&self, _: Stream) -> Result<Graph> {
        Err(Error::Internal("the emulator cannot capture".into()))
    }

    unsafe fn replay(&self, _: Stream, _: Graph) -> Result<()> {
        Err(Error::Internal("the emulator cannot capture".into()))
    }

    fn block_taken(&self, _: Stream, address: u64, bytes: usize) {
        // SAFETY: a block that the pool has just taken.
        unsafe { std::ptr::write_bytes(address as *mut u8, 0xFF, bytes) };
    }
}
