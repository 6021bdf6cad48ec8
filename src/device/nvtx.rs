//! Named ranges on a profiler's timeline (NVTX: Nsight Systems, Nsight Compute).
//!
//! A profiler that wants ranges names its library in `NVTX_INJECTION64_PATH`; that library's `InitializeInjectionNvtx2`
//! is given tables of function pointers to fill. This is what NVIDIA's header-only NVTX 3 does inside a C program
//! (`nvtxDetail/nvtxInit.h`, `nvtxTypes.h`), spoken here directly: the crate `nvtx` needs a C compiler and libclang to
//! build, and cudarc's feature looks for libnvToolsExt, which CUDA 13 no longer has.
//!
//! The names of the open ranges are kept as well: they say what an error happened in.

use std::cell::RefCell;
use std::ffi::{CString, c_char, c_int, c_void};
use std::marker::PhantomData;
use std::mem::transmute;
use std::ptr::{null, null_mut};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

/// A range of the calling thread; it ends when it is dropped, in the reverse order of their beginnings.
#[must_use = "a range ends when it is dropped"]
#[derive(Debug)]
pub struct Range {
    tool: Option<&'static Tool>,
    /// Ranges nest a thread: one may not end on another.
    thread: PhantomData<*const ()>,
}

/// Begins a range. Where no profiler listens only its name is kept.
///
/// ```
/// # fn work() {}
/// let _step = spleen_hpc::device::nvtx::range("step");
/// work();
/// ```
pub fn range(name: &str) -> Range {
    static TOOL: OnceLock<Option<Tool>> = OnceLock::new();
    Range::begin(TOOL.get_or_init(find).as_ref(), name)
}

thread_local! {
    /// How many ranges of the calling thread are open, and their names, outermost first; behind them room that names had.
    static OPEN: RefCell<(usize, Vec<String>)> = const { RefCell::new((0, Vec::new())) };
}

/// Names of the calling thread's open ranges, outermost first: `step, model.0.conv.unit0, conv3d fprop`.
pub fn open_ranges() -> String {
    OPEN.with_borrow(|(open, names)| names[..*open].join(", "))
}

impl Range {
    fn begin(tool: Option<&'static Tool>, name: &str) -> Self {
        OPEN.with_borrow_mut(|(open, names)| {
            match names.get_mut(*open) {
                Some(room) => name.clone_into(room),
                None => names.push(name.to_owned()),
            }
            *open += 1;
        });
        let tool = tool.filter(|tool| {
            // A name with a zero inside is none: no range.
            let Ok(name) = CString::new(name) else { return false };
            // SAFETY: the tool's own function of this signature; it copies the string, which ends in zero.
            unsafe { (tool.push)(name.as_ptr()) };
            true
        });
        Range { tool, thread: PhantomData }
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        OPEN.with_borrow_mut(|(open, _)| *open -= 1);
        if let Some(tool) = self.tool {
            // SAFETY: the tool's own function of this signature; this thread's range is open.
            unsafe { (tool.pop)() };
        }
    }
}

/// What a tool wants to be called.
#[derive(Debug)]
struct Tool {
    push: Push,
    pop: Pop,
}

/// `nvtxRangePushA`.
type Push = unsafe extern "C" fn(*const c_char) -> c_int;
/// `nvtxRangePop`.
type Pop = unsafe extern "C" fn() -> c_int;

/// `NvtxGetExportTableFunc_t`.
type GetExportTable = unsafe extern "C" fn(u32) -> *const c_void;
/// `NvtxInitializeInjectionNvtxFunc_t`: 0 means that the tool refuses.
type Initialize = unsafe extern "C" fn(GetExportTable) -> c_int;

/// `NvtxExportTableCallbacks`.
#[repr(C)]
struct Callbacks {
    struct_size: usize,
    get_module_function_table: unsafe extern "C" fn(c_int, *mut *const Slot, *mut u32) -> c_int,
}

/// `NvtxExportTableVersionInfo`.
#[repr(C)]
struct VersionInfo {
    struct_size: usize,
    version: u32,
    reserved: u32,
    set_injection_nvtx_version: unsafe extern "C" fn(u32),
}

/// `NVTX_ETID_CALLBACKS`, `NVTX_ETID_VERSIONINFO`.
const CALLBACKS_ID: u32 = 1;
const VERSION_ID: u32 = 3;
/// `NVTX_CB_MODULE_CORE`.
const CORE: usize = 1;
/// `NVTX_CBID_CORE_RangePushA`, `NVTX_CBID_CORE_RangePop`.
const RANGE_PUSH_A: usize = 9;
const RANGE_POP: usize = 11;
/// Functions of each module, by `NvtxCallbackModule`: none, core, CUDA, OpenCL, CUDA runtime, core 2, sync. Tools fill
/// the tables of all; only two functions of the core are called here.
const SIZES: [usize; 7] = [0, 16, 9, 15, 7, 16, 7];
const LARGEST: usize = 16;

/// Where a tool writes its functions.
static FUNCTIONS: [[AtomicPtr<c_void>; LARGEST]; SIZES.len()] =
    [const { [const { AtomicPtr::new(null_mut()) }; LARGEST] }; SIZES.len()];

/// A pointer to one of [`FUNCTIONS`].
#[repr(transparent)]
struct Slot(*const AtomicPtr<c_void>);
// SAFETY: it points at a static of atomics.
unsafe impl Sync for Slot {}

/// Function 0 of a module is none.
static SLOTS: [[Slot; LARGEST]; SIZES.len()] = {
    let mut slots = [const { [const { Slot(null()) }; LARGEST] }; SIZES.len()];
    let mut module = 1;
    while module < SIZES.len() {
        let mut function = 1;
        while function < SIZES[module] {
            slots[module][function] = Slot(&raw const FUNCTIONS[module][function]);
            function += 1;
        }
        module += 1;
    }
    slots
};

unsafe extern "C" fn module_function_table(module: c_int, table: *mut *const Slot, size: *mut u32) -> c_int {
    let Some(index) = usize::try_from(module).ok().filter(|&m| (1..SIZES.len()).contains(&m)) else {
        return 0;
    };
    if !table.is_null() {
        // SAFETY: a tool passes null or a place for the pointer.
        unsafe { *table = SLOTS[index].as_ptr() };
    }
    if !size.is_null() {
        // SAFETY: a tool passes null or a place for the number.
        unsafe { *size = SIZES[index] as u32 };
    }
    1
}

unsafe extern "C" fn set_injection_nvtx_version(_: u32) {}

unsafe extern "C" fn export_table(id: u32) -> *const c_void {
    static CALLBACKS: Callbacks =
        Callbacks { struct_size: size_of::<Callbacks>(), get_module_function_table: module_function_table };
    static VERSION: VersionInfo = VersionInfo {
        struct_size: size_of::<VersionInfo>(),
        version: 3,
        reserved: 0,
        set_injection_nvtx_version,
    };
    match id {
        CALLBACKS_ID => (&raw const CALLBACKS).cast(),
        VERSION_ID => (&raw const VERSION).cast(),
        _ => null(),
    }
}

/// The profiler this process was started by, if it wants ranges.
fn find() -> Option<Tool> {
    let path = std::env::var_os("NVTX_INJECTION64_PATH")?;
    // SAFETY: a profiler asked for its library to be loaded; its initialisers are its own affair.
    let library = unsafe { libloading::Library::new(path) }.ok()?;
    // SAFETY: a symbol of this name has this type in every NVTX tool.
    let initialize = unsafe { library.get::<Initialize>(b"InitializeInjectionNvtx2\0") }.ok().map(|f| *f)?;
    // SAFETY: the library's own function; the library is never unloaded.
    let tool = unsafe { attach(initialize) };
    std::mem::forget(library);
    tool
}

/// Lets a tool fill in its functions.
///
/// # Safety
/// `initialize` is an NVTX tool's and stays loaded.
unsafe fn attach(initialize: Initialize) -> Option<Tool> {
    // SAFETY: the caller's promise; `export_table` gives what the protocol says.
    if unsafe { initialize(export_table) } == 0 {
        return None;
    }
    let function = |id: usize| {
        let function = FUNCTIONS[CORE][id].load(Ordering::Acquire);
        (!function.is_null()).then_some(function)
    };
    let (push, pop) = (function(RANGE_PUSH_A)?, function(RANGE_POP)?);
    // SAFETY: the tool wrote functions of these types there, as the protocol numbers them.
    let (push, pop) = unsafe { (transmute::<*mut c_void, Push>(push), transmute::<*mut c_void, Pop>(pop)) };
    Some(Tool { push, pop })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;
    use std::sync::Mutex;

    static SEEN: Mutex<Vec<String>> = Mutex::new(Vec::new());

    unsafe extern "C" fn push(name: *const c_char) -> c_int {
        // SAFETY: NVTX passes strings that end in zero.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
        SEEN.lock().unwrap().push(format!("push {name}"));
        0
    }

    unsafe extern "C" fn pop() -> c_int {
        SEEN.lock().unwrap().push("pop".into());
        0
    }

    /// What a tool does: takes the callbacks' table and writes its functions into the core module's.
    unsafe extern "C" fn initialize(tables: GetExportTable) -> c_int {
        let (mut table, mut size) = (null(), 0);
        // SAFETY: what the protocol promises a tool.
        unsafe {
            let version = &*tables(VERSION_ID).cast::<VersionInfo>();
            assert_eq!((version.struct_size, version.version), (24, 3));
            (version.set_injection_nvtx_version)(3);
            assert!(tables(2).is_null());
            let callbacks = &*tables(CALLBACKS_ID).cast::<Callbacks>();
            assert_eq!(callbacks.struct_size, 16);
            assert_eq!((callbacks.get_module_function_table)(0, &mut table, &mut size), 0);
            assert_eq!((callbacks.get_module_function_table)(7, &mut table, &mut size), 0);
            for (module, functions) in SIZES.into_iter().enumerate().skip(1) {
                assert_eq!((callbacks.get_module_function_table)(module as c_int, &mut table, &mut size), 1);
                assert_eq!(size as usize, functions);
                let slots = std::slice::from_raw_parts(table, functions);
                assert!(slots[0].0.is_null() && slots[1..].iter().all(|slot| !slot.0.is_null()));
                if module == CORE {
                    (*slots[9].0).store(push as *mut c_void, Ordering::Release);
                    (*slots[11].0).store(pop as *mut c_void, Ordering::Release);
                }
            }
        }
        1
    }

    unsafe extern "C" fn refuse(_: GetExportTable) -> c_int {
        0
    }

    #[test]
    fn ranges_reach_a_tool_and_nest() {
        drop(range("nobody listens"));
        // SAFETY: functions of this test.
        assert!(unsafe { attach(refuse) }.is_none());
        // SAFETY: as above.
        let tool: &'static Tool = Box::leak(Box::new(unsafe { attach(initialize) }.unwrap()));
        {
            let _epoch = Range::begin(Some(tool), "epoch");
            let _step = Range::begin(Some(tool), "step");
            assert_eq!(open_ranges(), "epoch, step");
            drop(Range::begin(Some(tool), "not\0a name"));
        }
        assert_eq!(open_ranges(), "");
        assert_eq!(*SEEN.lock().unwrap(), ["push epoch", "push step", "pop", "pop"]);
    }
}
