//! The CPU: which vector unit it has and whether a matrix unit beside it, loops compiled for each of them, and prefetches.
//!
//! Kernels are written once over [`super::lanes::Lanes`] and instantiated for AVX-512, AVX2+FMA and plain Rust. Every
//! instantiation does the same operations in the same order, a fused multiply-add each, so results do not depend
//! on the machine. Loops that the compiler vectorises well by itself are written as `vectorised!` functions. Only AMX
//! sums bfloat16 products in an order of its own ([`super::amx`]).

use crate::error::{Error, Result};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

/// The vector unit a kernel is instantiated for, widest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Simd {
    /// 512-bit registers, 32 of them.
    Avx512,
    /// 256-bit registers with FMA, 16 of them.
    Avx2,
    /// Whatever the compiler makes of plain Rust.
    Portable,
}

impl std::fmt::Display for Simd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Simd::Avx512 => "AVX-512",
            Simd::Avx2 => "AVX2",
            Simd::Portable => "no AVX2",
        })
    }
}

/// The best vector unit of this machine.
fn detect() -> Simd {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("fma") {
            return Simd::Avx512;
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return Simd::Avx2;
        }
    }
    Simd::Portable
}

/// The unit in use, as its discriminant; `UNSET` before the first question.
static IN_USE: AtomicU8 = AtomicU8::new(UNSET);
const UNSET: u8 = u8::MAX;
const UNITS: [Simd; 3] = [Simd::Avx512, Simd::Avx2, Simd::Portable];

/// Whether AMX is in use beside it.
static AMX_IN_USE: AtomicBool = AtomicBool::new(false);

/// The environment variable that forces a unit: amx, avx512, avx2 or portable.
const VARIABLE: &str = "SPLEEN_SIMD";

/// The vector unit kernels run on: the best one, or the one that `SPLEEN_SIMD` names.
///
/// # Panics
/// When `SPLEEN_SIMD` cannot be obeyed: a program asks [`obey_environment`] first.
pub fn simd() -> Simd {
    match IN_USE.load(Ordering::Acquire) {
        UNSET => obey_environment().unwrap_or_else(|err| panic!("{err}")),
        unit => UNITS[usize::from(unit)],
    }
}

/// Whether bfloat16 matrices are multiplied by AMX, where that is faster than the vector unit.
///
/// # Panics
/// As [`simd`].
pub fn amx() -> bool {
    // The first question decides both.
    simd();
    AMX_IN_USE.load(Ordering::Relaxed)
}

/// What kernels run on, in words: "AVX-512", "AVX-512 and AMX".
pub fn units() -> String {
    let and_amx = if amx() { " and AMX" } else { "" };
    format!("{}{and_amx}", simd())
}

/// Runs kernels on the unit that the environment variable `SPLEEN_SIMD` names (amx, avx512, avx2, portable), or on the
/// best ones where it is not set or empty; returns which vector unit that is. The best vector unit comes with AMX.
///
/// # Errors
/// [`Error::Usage`] when it names none of these or one that this machine has not.
pub fn obey_environment() -> Result<Simd> {
    let Some(value) = std::env::var_os(VARIABLE).filter(|value| !value.is_empty()) else {
        return Ok(use_units(detect(), amx_available()));
    };
    let has_not =
        || Err(Error::Usage(format!("{VARIABLE}={}: this machine has {}", value.display(), detect())));
    let unit = match value.to_str() {
        Some("amx") if amx_available() => return Ok(use_units(detect(), true)),
        Some("amx") => return has_not(),
        Some("avx512") => Simd::Avx512,
        Some("avx2") => Simd::Avx2,
        Some("portable") => Simd::Portable,
        _ => {
            let text = format!("{VARIABLE}={}: it is amx, avx512, avx2 or portable", value.display());
            return Err(Error::Usage(text));
        }
    };
    if unit < detect() { has_not() } else { Ok(use_simd(unit)) }
}

/// Runs kernels on `unit`, or on the best one this machine has where that is narrower, and without AMX; returns which.
/// Results do not depend on the vector unit: this is for measuring and for proving just that.
pub fn use_simd(unit: Simd) -> Simd {
    use_units(unit.max(detect()), false)
}

/// Runs kernels on the best vector unit and bfloat16 matrices on AMX, found or not: for tests, which emulate it.
///
/// # Safety
/// From now on every instruction of AMX in this process must be executed: by the CPU, or by a handler of the signal that
/// it raises elsewhere.
#[cfg(target_arch = "x86_64")]
pub unsafe fn use_amx() {
    use_units(detect(), true);
}

fn use_units(vectors: Simd, amx: bool) -> Simd {
    AMX_IN_USE.store(amx, Ordering::Relaxed);
    // Published last: whoever sees the vector unit sees AMX's switch too.
    IN_USE.store(vectors as u8, Ordering::Release);
    vectors
}

fn amx_available() -> bool {
    #[cfg(target_arch = "x86_64")]
    return super::amx::available();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// The unit that products of bfloat16 pairs run on: AVX-512 only where it has the instructions for them.
pub fn simd_of_pairs() -> Simd {
    #[cfg(target_arch = "x86_64")]
    if simd() == Simd::Avx512
        && !(is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512bw"))
    {
        return Simd::Avx2;
    }
    simd()
}

/// Functions compiled three times, for AVX-512, for AVX2 with FMA and for the target's baseline; each call takes the
/// copy of [`simd()`]'s unit.
///
/// The body is repeated rather than called, so that its closures are compiled with the unit's instructions too; what
/// it calls should be `#[inline(always)]` for the same reason. Rust neither reorders float operations nor contracts
/// `a * b + c` to a fused one, so all copies return the same bits.
macro_rules! vectorised {
    ($(
        $(#[$attribute:meta])*
        $visibility:vis fn $name:ident $(<$generic:ident: $bound:path>)?
        ($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block
    )+) => {$(
        $(#[$attribute])*
        $visibility fn $name$(<$generic: $bound>)?($($argument: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,fma")]
                fn avx512$(<$generic: $bound>)?($($argument: $type),*) $(-> $result)? $body

                #[target_feature(enable = "avx2,fma")]
                fn avx2$(<$generic: $bound>)?($($argument: $type),*) $(-> $result)? $body

                match $crate::device::cpu::simd() {
                    // SAFETY: `simd()` found the features.
                    $crate::device::cpu::Simd::Avx512 => return unsafe { avx512$(::<$generic>)?($($argument),*) },
                    // SAFETY: `simd()` found the features.
                    $crate::device::cpu::Simd::Avx2 => return unsafe { avx2$(::<$generic>)?($($argument),*) },
                    $crate::device::cpu::Simd::Portable => {}
                }
            }
            $body
        }
    )+};
}
pub(crate) use vectorised;

/// Bytes of a line of a cache.
pub const LINE: usize = 64;

/// Asks the first-level cache for the line of an address that will be written. It reads and writes nothing. Every x86-64
/// CPU executes the instruction, some old ones as no operation; the compiler makes it a prefetch for reading unless it is
/// told so of the whole function.
#[inline(always)]
pub fn prefetch_to_write<T>(line: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch of any address is allowed.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) line, options(nostack, readonly, preserves_flags));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// The same of a line that will be read.
#[inline(always)]
pub fn prefetch_to_read<T>(line: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// The same of the second-level cache.
#[inline(always)]
pub fn prefetch_to_read_later<T>(line: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(line.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}
