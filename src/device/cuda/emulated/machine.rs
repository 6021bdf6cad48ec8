//! The emulator's machine (tests/emulator), as Rust calls it: the only unsafe code of the emulated device.

use crate::device::cuda::driver::Launch;
use std::ffi::{CStr, CString, c_char, c_int, c_void};

unsafe extern "C" {
    fn cuemu_device(memory: u64) -> *mut c_void;
    fn cuemu_device_drop(device: *mut c_void);
    fn cuemu_allocate(device: *mut c_void, bytes: u64) -> *mut u8;
    fn cuemu_left(device: *const c_void) -> u64;
    fn cuemu_release(device: *mut c_void, pointer: *mut u8);
    fn cuemu_block_taken(device: *mut c_void, pointer: *mut u8, bytes: u64);
    fn cuemu_block_dropped(device: *mut c_void, pointer: *mut u8);
    fn cuemu_is_live(device: *const c_void, pointer: *const u8, bytes: u64) -> c_int;
    fn cuemu_bank_conflicts(device: *mut c_void, requests: *mut u64, wavefronts: *mut u64);
    fn cuemu_mma_paths_agree() -> c_int;
    fn cuemu_find(name: *const c_char) -> *const c_void;
    fn cuemu_name(index: usize) -> *const c_char;
    fn cuemu_limits(kernel: *const c_void, args_bytes: *mut u32, max_threads: *mut u32);
    fn cuemu_launch(
        device: *mut c_void,
        kernel: *const c_void,
        grid: *const u32,
        threads: u32,
        shared: u32,
        args: *const c_void,
        seed: u64,
        host_threads: u32,
        patience: u32,
        error: *mut c_char,
        error_bytes: u64,
    ) -> c_int;
}

/// Names of all kernels the emulator has, with their suffixes; not those that have bugs on purpose.
pub fn kernel_names() -> Vec<String> {
    (0..)
        .map_while(|i| {
            // SAFETY: returns null past the end, else a static string.
            let name = unsafe { cuemu_name(i) };
            // SAFETY: as above.
            (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned())
        })
        .filter(|name| !name.starts_with("planted_"))
        .collect()
}

/// Whether all ways of this CPU to multiply fragments (AVX-512, AVX2, plain C++) give the same bits.
pub fn mma_paths_agree() -> bool {
    // SAFETY: works on its own memory.
    unsafe { cuemu_mma_paths_agree() != 0 }
}

/// An entry point compiled for the CPU.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    kernel: *const c_void,
    /// Bytes of its struct of arguments.
    pub args_bytes: usize,
    /// Most threads a block.
    pub max_threads: u32,
}

// SAFETY: points to a static that nobody changes after the program's start.
unsafe impl Send for Entry {}
// SAFETY: as above.
unsafe impl Sync for Entry {}

impl Entry {
    /// The kernel of this name, with its suffix.
    pub fn find(name: &str) -> Option<Self> {
        let name = CString::new(name).ok()?;
        // SAFETY: a zero-ended string.
        let kernel = unsafe { cuemu_find(name.as_ptr()) };
        if kernel.is_null() {
            return None;
        }
        let (mut args_bytes, mut max_threads) = (0, 0);
        // SAFETY: a kernel, and two places to write.
        unsafe { cuemu_limits(kernel, &mut args_bytes, &mut max_threads) };
        Some(Entry { kernel, args_bytes: args_bytes as usize, max_threads })
    }
}

/// Memory and host threads of one emulated device.
pub struct Machine(*mut c_void);

// SAFETY: the C++ side has no state of the calling thread outside a call.
unsafe impl Send for Machine {}

impl Machine {
    /// A device with this much memory; it becomes real as it is used.
    pub fn new(memory: u64) -> Self {
        // SAFETY: returns a new device or null.
        let device = unsafe { cuemu_device(memory) };
        assert!(
            !device.is_null(),
            "the system has no address space for an emulated device of {memory} bytes"
        );
        Machine(device)
    }

    /// Bytes that are not allocated.
    pub fn left(&self) -> u64 {
        // SAFETY: our device.
        unsafe { cuemu_left(self.0) }
    }

    /// Device memory, aligned to 256 bytes, all of it live and NaN; `None` when there is not that much left.
    pub fn allocate(&mut self, bytes: usize) -> Option<u64> {
        // SAFETY: our device.
        let pointer = unsafe { cuemu_allocate(self.0, bytes as u64) };
        (!pointer.is_null()).then_some(pointer as u64)
    }

    /// Gives it back.
    pub fn release(&mut self, address: u64) {
        // SAFETY: the address is from `allocate`.
        unsafe { cuemu_release(self.0, address as *mut u8) }
    }

    /// The first `bytes` bytes of an allocation become live and NaN, the rest dead.
    pub fn block_taken(&mut self, address: u64, bytes: usize) {
        // SAFETY: the pool's block, which is as large as this at least.
        unsafe { cuemu_block_taken(self.0, address as *mut u8, bytes as u64) }
    }

    /// The allocation may not be used until it is taken again.
    pub fn block_dropped(&mut self, address: u64) {
        // SAFETY: the pool's block.
        unsafe { cuemu_block_dropped(self.0, address as *mut u8) }
    }

    fn check(&self, what: &str, address: u64, bytes: usize) -> Result<(), String> {
        // SAFETY: looks the range up, does not follow it.
        match unsafe { cuemu_is_live(self.0, address as *const u8, bytes as u64) } {
            0 => Err(format!("{what} of {bytes} bytes at {address:#x}, which is in no live block")),
            _ => Ok(()),
        }
    }

    /// Host to device.
    pub fn copy_in(&mut self, to: u64, from: usize, bytes: usize) -> Result<(), String> {
        self.check("copy from the host", to, bytes)?;
        // SAFETY: device memory was checked; the caller of `Driver::copy_in` keeps the host's until the copy has run.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    /// Device to host.
    pub fn copy_out(&mut self, to: usize, from: u64, bytes: usize) -> Result<(), String> {
        self.check("copy to the host", from, bytes)?;
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    /// Within the device.
    pub fn copy(&mut self, to: u64, from: u64, bytes: usize) -> Result<(), String> {
        self.check("copy from", from, bytes)?;
        self.check("copy to", to, bytes)?;
        // SAFETY: both ranges are live; `copy` allows overlap.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    /// Every byte of the range becomes `byte`.
    pub fn fill(&mut self, to: u64, byte: u8, bytes: usize) -> Result<(), String> {
        self.check("fill", to, bytes)?;
        // SAFETY: a live range.
        unsafe { std::ptr::write_bytes(to as *mut u8, byte, bytes) };
        Ok(())
    }

    /// Runs a kernel to its end, or says why it failed.
    pub fn launch(
        &mut self,
        entry: Entry,
        launch: Launch,
        args: &[u8],
        seed: u64,
        host_threads: u32,
        block_seconds: u32,
    ) -> Result<(), String> {
        assert_eq!(args.len(), entry.args_bytes, "checked when it was queued");
        let mut error = [0u8; 1024];
        // SAFETY: arguments are as many as the kernel takes; what they point to is checked at every access.
        let failed = unsafe {
            cuemu_launch(
                self.0,
                entry.kernel,
                launch.grid.as_ptr(),
                launch.threads,
                launch.shared,
                args.as_ptr().cast(),
                seed,
                host_threads,
                block_seconds,
                error.as_mut_ptr().cast(),
                error.len() as u64,
            )
        };
        match failed {
            0 => Ok(()),
            _ => Err(CStr::from_bytes_until_nul(&error)
                .map_or("no reason given".into(), |text| text.to_string_lossy().into_owned())),
        }
    }

    /// Groups of 8 rows that ldmatrix has read since the last call, and the passes over the banks that they took.
    pub fn bank_conflicts(&mut self) -> (u64, u64) {
        let (mut requests, mut wavefronts) = (0, 0);
        // SAFETY: our device, and two places to write.
        unsafe { cuemu_bank_conflicts(self.0, &mut requests, &mut wavefronts) };
        (requests, wavefronts)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // SAFETY: ours, and nobody uses it after.
        unsafe { cuemu_device_drop(self.0) }
    }
}
