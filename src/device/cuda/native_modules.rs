//! Kernel files as modules in a GPU's context, made ready when they are used first or all at once.

use super::driver::{Info, Precision, Prepared, Symbol};
use super::kernel_cache::{Cached, KernelCache, in_parallel};
use super::libcuda::{self, check, describe, even_in_capture};
use super::nvrtc::{Nvrtc, Target};
use super::sources;
use crate::error::{Error, Result};
use cudarc::driver::sys::{self, CUfunction, CUfunction_attribute, CUmodule, CUresult};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CString, c_int};
use std::ptr;
use std::sync::{Mutex, MutexGuard};

/// The modules of one context, which must be current where they are used.
pub(super) struct Modules {
    nvrtc: &'static Nvrtc,
    target: Target,
    cache: KernelCache,
    shared_per_block: u32,
    loaded: Mutex<Loaded>,
}

#[derive(Default)]
struct Loaded {
    modules: HashMap<(&'static str, Precision), CUmodule>,
    functions: HashMap<Symbol, CUfunction>,
}

impl Modules {
    /// None yet, for a device.
    ///
    /// # Errors
    /// [`Error::Gpu`] when there is no NVRTC, or the device is too old.
    pub(super) fn new(info: &Info) -> Result<Self> {
        let nvrtc = Nvrtc::get()?;
        Ok(Modules {
            nvrtc,
            target: Target::of(info.capability, &nvrtc.chips()?)?,
            cache: KernelCache::open(),
            shared_per_block: info.shared_per_block,
            loaded: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Loaded> {
        // A panicking holder leaves only whole entries behind.
        self.loaded.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Compiles what is not there, in parallel, and loads it.
    pub(super) fn prepare(&self, files: &[&'static str], precision: Precision) -> Result<Prepared> {
        let mut loaded = self.lock();
        let missing: Vec<&'static str> =
            files.iter().copied().filter(|file| !loaded.modules.contains_key(&(file, precision))).collect();
        let (nvrtc, target, cache) = (self.nvrtc, &self.target, &self.cache);
        let made =
            in_parallel(&missing, |file| cache.module(nvrtc, &sources::find(file)?, precision, target));
        let mut prepared = Prepared::default();
        for (file, made) in missing.into_iter().zip(made) {
            let made = made?;
            loaded.modules.insert((file, precision), self.load(file, &made)?);
            *(if made.hit { &mut prepared.cached } else { &mut prepared.compiled }) += 1;
            prepared.warning = prepared.warning.or(made.warning);
        }
        Ok(prepared)
    }

    /// The kernel, compiled and loaded if it is used for the first time.
    pub(super) fn function(&self, symbol: Symbol) -> Result<CUfunction> {
        let loaded = &mut *self.lock();
        if let Some(function) = loaded.functions.get(&symbol) {
            return Ok(*function);
        }
        let module = match loaded.modules.entry((symbol.file, symbol.precision)) {
            Entry::Occupied(entry) => *entry.get(),
            Entry::Vacant(entry) => {
                let source = sources::find(symbol.file)?;
                let made = self.cache.module(self.nvrtc, &source, symbol.precision, &self.target)?;
                *entry.insert(self.load(symbol.file, &made)?)
            }
        };
        let mut function = ptr::null_mut();
        let name = CString::new(symbol.to_string()).expect("symbols have no zero byte");
        // SAFETY: a live module, a zero-ended name, a pointer to a handle.
        let status = unsafe { sys::cuModuleGetFunction(&raw mut function, module, name.as_ptr()) };
        check(status, || format!("{} has no kernel {symbol}", symbol.file))?;
        // A launch may ask for more than 48 KiB of shared memory only after this; it changes nothing else.
        let limit = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let bytes = c_int::try_from(self.shared_per_block).unwrap_or(c_int::MAX);
        // SAFETY: a live function.
        let status = unsafe { sys::cuFuncSetAttribute(function, limit, bytes) };
        check(status, || format!("{symbol} cannot have {bytes} bytes of shared memory"))?;
        loaded.functions.insert(symbol, function);
        Ok(function)
    }

    fn load(&self, file: &str, made: &Cached) -> Result<CUmodule> {
        let mut module = ptr::null_mut();
        let image = made.module.image.as_ptr().cast();
        // SAFETY: a cubin or zero-ended PTX, as NVRTC made it; a pointer to a handle.
        let status = even_in_capture(|| unsafe { sys::cuModuleLoadData(&raw mut module, image) });
        if status == CUresult::CUDA_SUCCESS {
            return Ok(module);
        }
        let (nvrtc, driver) = (self.nvrtc.version(), libcuda::version()?);
        let cure = if nvrtc > driver {
            let ((a, b), (c, d)) = (nvrtc, driver);
            format!(
                "; NVRTC is {a}.{b} but the driver is of CUDA {c}.{d}: install that NVRTC, or a newer driver"
            )
        } else {
            String::new()
        };
        Err(Error::Gpu(format!(
            "{file} for {}: the NVIDIA driver does not load it: {}{cure}",
            self.target,
            describe(status)
        )))
    }

    /// Unloads everything; the context must be idle.
    pub(super) fn unload(&self) {
        let mut loaded = self.lock();
        loaded.functions.clear();
        for (_, module) in loaded.modules.drain() {
            // SAFETY: a live module, not used again. A failure leaves nothing to mend.
            unsafe { sys::cuModuleUnload(module) };
        }
    }
}
