//! Finds and loads NVRTC, the CUDA compiler that is a library.
//!
//! cudarc could load it too, but takes the first `libnvrtc.so` of the loader's path whatever the user named, and
//! panics where a function is missing. Eleven functions are a short list.

use crate::data::cache::user_folder;
use crate::error::{Error, Result};
use libloading::Library;
use std::env;
use std::error::Error as _;
use std::ffi::{CStr, c_char, c_int};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

/// NVRTC's handle of a program.
#[repr(C)]
pub(super) struct ProgramHandle {
    opaque: [u8; 0],
}

pub(super) type Program = Option<NonNull<ProgramHandle>>;

/// `nvrtcResult`: numbers, for a later NVRTC may return one that a Rust enum has no name for.
pub(super) type Status = c_int;
pub(super) const SUCCESS: Status = 0;
pub(super) const COMPILATION: Status = 6;
pub(super) const BUILTIN_OPERATION_FAILURE: Status = 7;

macro_rules! functions {
    ($($name:ident: fn($($arg:ty),*) -> $result:ty;)+) => {
        /// The functions of nvrtc.h that are called, under their own names.
        #[allow(non_snake_case)]
        pub(super) struct Functions {
            $(pub(super) $name: unsafe extern "C" fn($($arg),*) -> $result,)+
        }

        impl Functions {
            /// The name of the first function that `library` lacks is the error.
            fn of(library: &Library) -> Result<Self, &'static str> {
                Ok(Functions {
                    $($name: {
                        // SAFETY: nvrtc.h declares the function with this type, unchanged since CUDA 11.2.
                        let symbol = unsafe { library.get(concat!(stringify!($name), "\0").as_bytes()) };
                        *symbol.map_err(|_| stringify!($name))?
                    },)+
                })
            }
        }
    };
}

functions! {
    nvrtcVersion: fn(*mut c_int, *mut c_int) -> Status;
    nvrtcGetErrorString: fn(Status) -> *const c_char;
    nvrtcGetNumSupportedArchs: fn(*mut c_int) -> Status;
    nvrtcGetSupportedArchs: fn(*mut c_int) -> Status;
    nvrtcCreateProgram: fn(
        *mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char
    ) -> Status;
    nvrtcDestroyProgram: fn(*mut Program) -> Status;
    nvrtcCompileProgram: fn(Program, c_int, *const *const c_char) -> Status;
    nvrtcGetProgramLogSize: fn(Program, *mut usize) -> Status;
    nvrtcGetProgramLog: fn(Program, *mut c_char) -> Status;
    nvrtcGetCUBINSize: fn(Program, *mut usize) -> Status;
    nvrtcGetCUBIN: fn(Program, *mut c_char) -> Status;
    nvrtcGetPTXSize: fn(Program, *mut usize) -> Status;
    nvrtcGetPTX: fn(Program, *mut c_char) -> Status;
}

/// The variable that names a libnvrtc or its folder.
pub const VARIABLE: &str = "SPLEEN_NVRTC";
/// The oldest NVRTC whose C++17 and sm_90a the kernels were written for.
const OLDEST: (c_int, c_int) = (12, 0);
/// Names of the library, newest first, as the loader knows them.
const NAMES: [&str; 2] = ["libnvrtc.so.13", "libnvrtc.so.12"];
/// Where the library lies below a toolkit, a wheel or a `site-packages`.
const BELOW: [&str; 6] =
    ["", "lib64", "lib", "targets/x86_64-linux/lib", "nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"];
/// What to do where there is none.
pub(super) const CURE: &str =
    "run scripts/fetch_nvrtc.sh, or `pip install nvidia-cuda-nvrtc` and set SPLEEN_NVRTC to its folder";

/// A loaded libnvrtc. It stays loaded as long as this lives.
pub(super) struct Loaded {
    pub(super) functions: Functions,
    pub(super) version: (u32, u32),
    pub(super) path: PathBuf,
    _libraries: [Option<Library>; 2],
}

/// The library that `SPLEEN_NVRTC` names, or else the first of the loader's path, CUDA_HOME, CUDA_PATH,
/// /usr/local/cuda*, the active Python environment and what scripts/fetch_nvrtc.sh fetched.
///
/// # Errors
/// [`Error::Gpu`] where there are only such as cannot be used.
pub(super) fn find() -> Result<Option<Loaded>> {
    if let Some(named) = variable(VARIABLE) {
        let file = match named.is_file() {
            true => std::path::absolute(&named).ok(),
            false => in_folder(&named),
        };
        let none =
            || Error::Gpu(format!("{VARIABLE}={}: there is no libnvrtc.so.12 or .13", named.display()));
        return load(&file.ok_or_else(none)?).map(Some);
    }
    let mut refusal = None;
    let found = folders().into_iter().filter_map(|folder| in_folder(&folder));
    for file in NAMES.iter().map(PathBuf::from).chain(found) {
        match load(&file) {
            Ok(loaded) => return Ok(Some(loaded)),
            // A name that the loader does not know is no news; a library that cannot be used is.
            Err(error) if file.is_absolute() => drop(refusal.get_or_insert(error)),
            Err(_) => {}
        }
    }
    refusal.map_or(Ok(None), Err)
}

fn variable(name: &str) -> Option<PathBuf> {
    env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// Folders where a library may lie, best first.
fn folders() -> Vec<PathBuf> {
    let mut list: Vec<PathBuf> = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable).collect();
    list.push("/usr/local/cuda".into());
    let mut toolkits = matches("/usr/local/cuda-*");
    toolkits.reverse();
    list.extend(toolkits);
    for environment in ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(variable) {
        let python = glob::Pattern::escape(&environment.to_string_lossy());
        list.extend(matches(&format!("{python}/lib/python3*/site-packages")));
        list.push(environment);
    }
    list.extend(user_folder().map(|cache| cache.join("nvrtc")));
    list
}

fn matches(pattern: &str) -> Vec<PathBuf> {
    glob::glob(pattern).into_iter().flatten().flatten().collect()
}

/// The newest libnvrtc of a folder, whichever kind of folder it is.
fn in_folder(folder: &Path) -> Option<PathBuf> {
    let places = BELOW.iter().flat_map(|below| NAMES.map(|name| folder.join(below).join(name)));
    places.into_iter().find(|file| file.is_file()).and_then(|file| std::path::absolute(file).ok())
}

/// Loads the library at `file`, a path or a name that the loader knows.
fn load(file: &Path) -> Result<Loaded> {
    // The builtins are loaded by name when a program is compiled: in a folder off the loader's path they are found
    // only if they are there already.
    let beside = file.parent().filter(|_| file.is_absolute()).map(|folder| {
        matches(&format!("{}/libnvrtc-builtins.so.*", glob::Pattern::escape(&folder.to_string_lossy())))
    });
    let builtins = beside.into_iter().flatten().find_map(|path| open(&path).ok());
    let library = open(file).map_err(|err| {
        // The loader's reason is the source; the error itself says no more than that it failed.
        let why = err.source().map_or_else(|| err.to_string(), ToString::to_string);
        Error::Gpu(format!("{}: cannot be loaded ({why})", file.display()))
    })?;
    let lacks = |name| Error::Gpu(format!("{}: is no NVRTC 12 or 13, for it lacks {name}", file.display()));
    let functions = Functions::of(&library).map_err(lacks)?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both point to integers.
    let status = unsafe { (functions.nvrtcVersion)(&raw mut major, &raw mut minor) };
    if status != SUCCESS || (major, minor) < OLDEST {
        let (path, (a, b)) = (file.display(), OLDEST);
        return Err(Error::Gpu(format!(
            "{path}: is NVRTC {major}.{minor}, but {a}.{b} or newer is needed: {CURE}"
        )));
    }
    let path = if file.is_absolute() { file.to_owned() } else { mapped(file) };
    let version = (major.unsigned_abs(), minor.unsigned_abs());
    Ok(Loaded { functions, version, path, _libraries: [builtins, Some(library)] })
}

fn open(file: &Path) -> Result<Library, libloading::Error> {
    // SAFETY: loading runs the library's own start-up code, NVIDIA's; the user chose where it comes from.
    unsafe { Library::new(file) }
}

/// Where the loader found a library that was opened by name, for the user to see.
fn mapped(name: &Path) -> PathBuf {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let paths = maps.lines().filter_map(|line| line.find('/').map(|start| Path::new(&line[start..])));
    let stem = name.as_os_str().as_encoded_bytes();
    // libnvrtc.so.13 is a link to libnvrtc.so.13.0.88.
    let found = paths
        .into_iter()
        .find(|path| path.file_name().is_some_and(|file| file.as_encoded_bytes().starts_with(stem)));
    found.unwrap_or(name).to_owned()
}

/// What NVRTC calls a status.
pub(super) fn describe(functions: &Functions, status: Status) -> String {
    // SAFETY: returns a static string, also for numbers it does not know.
    let text = unsafe { CStr::from_ptr((functions.nvrtcGetErrorString)(status)) };
    text.to_string_lossy().into_owned()
}
