//! Compiles kernels with NVRTC: source text in, machine code and its use of registers and memory out.
//!
//! Headers are handed over in memory and the toolkit's own are not used, so that nothing but the library is needed.

use super::driver::Precision;
use super::nvrtc_library::{self, Loaded, Program, Status};
use super::sources::Source;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::ffi::{CString, c_char, c_int};
use std::path::Path;
use std::sync::OnceLock;

pub use super::nvrtc_library::VARIABLE;

/// The lowest compute capability that the kernels run on: cp.async and m16n8k16 came with it.
pub const OLDEST_CAPABILITY: (u32, u32) = (8, 0);

/// What a kernel is compiled for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target(String);

impl Target {
    /// `sm_90a` makes machine code for that chip; `compute_80` makes PTX, which the driver compiles for its own chip.
    pub fn named(arch: &str) -> Self {
        Target(arch.into())
    }

    /// The target for a device, given the chips that an NVRTC knows (90 for sm_90).
    ///
    /// From capability 9.0 on it is the variant `a`, which has all of the chip's instructions. A chip that is newer
    /// than NVRTC gets PTX.
    ///
    /// # Errors
    /// [`Error::Gpu`] for a device that is too old for the kernels.
    pub fn of(capability: (u32, u32), known: &[u32]) -> Result<Self> {
        let (major, minor) = capability;
        if capability < OLDEST_CAPABILITY {
            let (a, b) = OLDEST_CAPABILITY;
            return Err(Error::Gpu(format!(
                "the GPU has compute capability {major}.{minor}, but the kernels need {a}.{b} (A100) or newer"
            )));
        }
        let chip = major * 10 + minor;
        let variant = if major >= 9 { "a" } else { "" };
        Ok(Target(if known.contains(&chip) { format!("sm_{chip}{variant}") } else { "compute_80".into() }))
    }

    /// Whether the result is machine code, not PTX.
    pub fn is_machine_code(&self) -> bool {
        self.0.starts_with("sm_")
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

/// What an entry point needs of the chip, as ptxas reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its symbol.
    pub name: String,
    /// Registers a thread.
    pub registers: u32,
    /// Bytes of stack a thread.
    pub stack: u32,
    /// Bytes of registers stored to memory for want of room.
    pub spill_stores: u32,
    /// Bytes of registers loaded back.
    pub spill_loads: u32,
    /// Bytes of static shared memory a block.
    pub shared: u32,
}

/// A compiled kernel file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// A cubin, or PTX and a zero byte.
    pub image: Vec<u8>,
    /// Its entry points, in the order of the file; PTX reports none.
    pub entries: Vec<Entry>,
}

/// A loaded NVRTC.
pub struct Nvrtc(Loaded);

impl Nvrtc {
    /// The NVRTC of this machine, if it has one; looked for once.
    ///
    /// # Errors
    /// [`Error::Gpu`] where there are only such as cannot be used.
    pub fn look() -> Result<Option<&'static Nvrtc>> {
        static FOUND: OnceLock<Result<Option<Nvrtc>, String>> = OnceLock::new();
        let find = || Ok(nvrtc_library::find().map_err(|err| err.to_string())?.map(Nvrtc));
        FOUND.get_or_init(find).as_ref().map(Option::as_ref).map_err(|what| Error::Gpu(what.clone()))
    }

    /// The same where it cannot be done without.
    ///
    /// # Errors
    /// [`Error::Gpu`] where there is none, or only such as cannot be used.
    pub fn get() -> Result<&'static Nvrtc> {
        let cure = nvrtc_library::CURE;
        let none =
            || Error::Gpu(format!("there is no NVRTC, the CUDA compiler (libnvrtc.so.13 or .12): {cure}"));
        Self::look()?.ok_or_else(none)
    }

    /// Major and minor version.
    pub fn version(&self) -> (u32, u32) {
        self.0.version
    }

    /// Where the library lies.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Chips it can compile for: 90 means sm_90.
    ///
    /// # Errors
    /// [`Error::Gpu`] when it does not say.
    pub fn chips(&self) -> Result<Vec<u32>> {
        let mut count = 0;
        // SAFETY: a pointer to an integer.
        self.check(unsafe { (self.0.functions.nvrtcGetNumSupportedArchs)(&raw mut count) })?;
        let mut chips: Vec<c_int> = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: room for as many integers as it said.
        self.check(unsafe { (self.0.functions.nvrtcGetSupportedArchs)(chips.as_mut_ptr()) })?;
        Ok(chips.into_iter().map(c_int::unsigned_abs).collect())
    }

    /// Proves that it can compile: one installed by halves loads and then cannot.
    ///
    /// # Errors
    /// [`Error::Gpu`] naming what is missing.
    pub fn check_install(&self) -> Result<()> {
        let text = "extern \"C\" __global__ void nothing() {}";
        let source = Source { file: "nothing.cu", text, headers: &[] };
        self.compile(&source, Precision::Single, &Target::named("compute_80")).map(|_| ())
    }

    /// Compiles one kernel file.
    ///
    /// # Errors
    /// [`Error::Nvrtc`] with the compiler's log when the source is at fault, [`Error::Gpu`] when NVRTC is.
    pub fn compile(&self, source: &Source<'_>, precision: Precision, target: &Target) -> Result<Module> {
        let mut program = Handle::new(self, source)?;
        let failed = program.compile(&options(self.version(), precision, target));
        if failed == nvrtc_library::BUILTIN_OPERATION_FAILURE {
            return Err(Error::Gpu(format!(
                "{}: its libnvrtc-builtins is missing or of another version: install NVRTC as a whole",
                self.path().display()
            )));
        }
        let log = program.log()?;
        match failed {
            nvrtc_library::SUCCESS => {}
            nvrtc_library::COMPILATION => {
                let log = log.trim_end().to_owned();
                return Err(Error::Nvrtc { file: source.file.into(), arch: target.to_string(), log });
            }
            other => {
                let why = nvrtc_library::describe(&self.0.functions, other);
                return Err(Error::Gpu(format!(
                    "{}: does not compile {} for {target} ({why}) {}",
                    self.path().display(),
                    source.file,
                    log.trim()
                )));
            }
        }
        Ok(Module { image: program.image(target)?, entries: entries(&log) })
    }

    fn check(&self, status: Status) -> Result<()> {
        if status == nvrtc_library::SUCCESS {
            return Ok(());
        }
        let why = nvrtc_library::describe(&self.0.functions, status);
        Err(Error::Gpu(format!("{}: {why}", self.path().display())))
    }
}

/// What an NVRTC of this version is told; part of the key of a cached kernel.
pub(super) fn options(version: (u32, u32), precision: Precision, target: &Target) -> Vec<String> {
    let mut options = vec![
        format!("-arch={target}"),
        "-std=c++17".into(),
        // Functions of the headers need no __device__, such as constexpr ones.
        "-default-device".into(),
        format!("-DELEM={}", precision.bytes() * 8),
        // Profilers and compute-sanitizer then name lines. Costs nothing at run time.
        "-lineinfo".into(),
    ];
    if target.is_machine_code() {
        options.push("--ptxas-options=-v".into());
    }
    if version >= (12, 9) {
        // Its own cache, since 12.9 and only where there is a driver, would keep ptxas' report from us; we have ours.
        options.push("--no-cache".into());
    }
    options
}

/// A program that NVRTC holds.
struct Handle<'a> {
    nvrtc: &'a Nvrtc,
    program: Program,
}

impl<'a> Handle<'a> {
    fn new(nvrtc: &'a Nvrtc, source: &Source<'_>) -> Result<Self> {
        let c_string = |text: &str| {
            CString::new(text)
                .map_err(|_| Error::Internal(format!("{}: a source has a zero byte", source.file)))
        };
        let (file, text) = (c_string(source.file)?, c_string(source.text)?);
        let names: Vec<CString> =
            source.headers.iter().map(|(name, _)| c_string(name)).collect::<Result<_>>()?;
        let texts: Vec<CString> =
            source.headers.iter().map(|(_, text)| c_string(text)).collect::<Result<_>>()?;
        let (names, texts) = (pointers(&names), pointers(&texts));
        let mut program = None;
        // SAFETY: zero-ended strings and arrays of as many as said, which NVRTC copies.
        nvrtc.check(unsafe {
            (nvrtc.0.functions.nvrtcCreateProgram)(
                &raw mut program,
                text.as_ptr(),
                file.as_ptr(),
                names.len() as c_int,
                texts.as_ptr(),
                names.as_ptr(),
            )
        })?;
        Ok(Handle { nvrtc, program })
    }

    fn compile(&mut self, options: &[String]) -> Status {
        let options: Vec<CString> =
            options.iter().map(|o| CString::new(o.as_str()).expect("options have no zero byte")).collect();
        let options = pointers(&options);
        // SAFETY: a live program and as many zero-ended strings as said.
        unsafe {
            (self.nvrtc.0.functions.nvrtcCompileProgram)(
                self.program,
                options.len() as c_int,
                options.as_ptr(),
            )
        }
    }

    fn log(&self) -> Result<String> {
        let functions = &self.nvrtc.0.functions;
        let mut bytes = self.output(functions.nvrtcGetProgramLogSize, functions.nvrtcGetProgramLog)?;
        bytes.truncate(bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len()));
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn image(&self, target: &Target) -> Result<Vec<u8>> {
        let functions = &self.nvrtc.0.functions;
        match target.is_machine_code() {
            true => self.output(functions.nvrtcGetCUBINSize, functions.nvrtcGetCUBIN),
            false => self.output(functions.nvrtcGetPTXSize, functions.nvrtcGetPTX),
        }
    }

    /// What one of NVRTC's pairs of functions, a size and its bytes, has to say.
    fn output(
        &self,
        size: unsafe extern "C" fn(Program, *mut usize) -> Status,
        bytes: unsafe extern "C" fn(Program, *mut c_char) -> Status,
    ) -> Result<Vec<u8>> {
        let mut len = 0;
        // SAFETY: a live program, a pointer to an integer.
        self.nvrtc.check(unsafe { size(self.program, &raw mut len) })?;
        let mut out = vec![0u8; len];
        // SAFETY: a live program, room for as many bytes as it said.
        self.nvrtc.check(unsafe { bytes(self.program, out.as_mut_ptr().cast()) })?;
        Ok(out)
    }
}

impl Drop for Handle<'_> {
    fn drop(&mut self) {
        // SAFETY: the program is live and not used again. A failure leaves nothing to mend.
        unsafe { (self.nvrtc.0.functions.nvrtcDestroyProgram)(&raw mut self.program) };
    }
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|s| s.as_ptr()).collect()
}

/// Reads ptxas' report:
///
/// ```text
/// ptxas info    : Compiling entry function 'residual_add_f16' for 'sm_90a'
/// ptxas info    : Function properties for residual_add_f16
/// ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
/// ptxas info    : Used 18 registers, used 1 barriers, 1024 bytes smem
/// ```
/// Functions that were not inlined have properties of their own, which count for the entry they follow.
fn entries(log: &str) -> Vec<Entry> {
    let number_before = |line: &str, unit: &str| -> u32 {
        let before = line.find(unit).map_or("", |at| line[..at].trim_end());
        let start = before.rfind(|c: char| !c.is_ascii_digit()).map_or(0, |at| at + 1);
        before[start..].parse().unwrap_or(0)
    };
    let mut entries: Vec<Entry> = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let name = rest.split('\'').next().unwrap_or(rest).to_owned();
            entries.push(Entry { name, ..Entry::default() });
        }
        let Some(entry) = entries.last_mut() else { continue };
        if line.contains(" bytes stack frame") {
            entry.stack += number_before(line, "bytes stack frame");
            entry.spill_stores += number_before(line, "bytes spill stores");
            entry.spill_loads += number_before(line, "bytes spill loads");
        } else if line.contains(": Used ") {
            entry.registers = number_before(line, "registers");
            entry.shared = number_before(line, "bytes smem");
        }
    }
    // ptxas reports last entries first.
    entries.reverse();
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets() {
        let known = [75, 80, 86, 89, 90, 100, 103, 120];
        let target = |capability| Target::of(capability, &known).map(|t| t.to_string());
        for (capability, arch) in [
            ((8, 0), "sm_80"),
            ((8, 9), "sm_89"),
            ((9, 0), "sm_90a"),
            ((10, 3), "sm_103a"),
            ((12, 0), "sm_120a"),
            // Newer than this NVRTC.
            ((12, 1), "compute_80"),
            ((13, 0), "compute_80"),
        ] {
            assert_eq!(target(capability).unwrap(), arch);
        }
        let refusal = target((7, 5)).unwrap_err().to_string();
        assert_eq!(refusal, "the GPU has compute capability 7.5, but the kernels need 8.0 (A100) or newer");
    }

    #[test]
    fn reports_are_read() {
        let log = "ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'b' for 'sm_90a'
ptxas info    : Function properties for b
ptxas         .     16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compiling entry function 'a' for 'sm_90a'
ptxas info    : Function properties for helper
ptxas         .     4 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for a
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 18 registers, used 0 barriers
";
        let a = Entry { name: "a".into(), registers: 18, stack: 4, ..Entry::default() };
        let b = Entry {
            name: "b".into(),
            registers: 255,
            stack: 16,
            spill_stores: 8,
            spill_loads: 12,
            shared: 1024,
        };
        assert_eq!(entries(log), [a, b]);
    }
}
