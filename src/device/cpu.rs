//! The CPU: which vector unit it has and whether a matrix unit beside it, 16-lane vectors and compiled loops on each of
//! them, and prefetches.
//!
//! Kernels are written once over [`Lanes`] and instantiated for AVX-512, AVX2+FMA and plain Rust. Every
//! instantiation does the same operations in the same order, a fused multiply-add each, so results do not depend
//! on the machine. Loops that the compiler vectorises well by itself are written as `vectorised!` functions. Only AMX
//! sums bfloat16 products in an order of its own ([`super::amx`]).

use super::bf16;
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

/// The unit that products of bfloat16 pairs run on: AVX-512 only where it has the instruction for them.
pub fn simd_of_pairs() -> Simd {
    #[cfg(target_arch = "x86_64")]
    if simd() == Simd::Avx512 && !is_x86_feature_detected!("avx512bf16") {
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

/// Sixteen f32 lanes.
pub trait Lanes: Copy {
    /// Floats that hold sixteen values as [`Lanes::fma`] multiplies them.
    const OPERANDS: usize = 16;
    /// Sixteen values stored as operands.
    /// # Safety
    /// [`Self::OPERANDS`] floats from `p` must be readable.
    #[inline(always)]
    unsafe fn load_operands(p: *const f32) -> Self {
        // SAFETY: handed on from the caller.
        unsafe { Self::load(p) }
    }
    /// Writes the lanes as operands: rounded to what is multiplied.
    /// # Safety
    /// [`Self::OPERANDS`] floats from `p` must be writable.
    #[inline(always)]
    unsafe fn store_operands(self, p: *mut f32) {
        // SAFETY: handed on from the caller.
        unsafe { self.store(p) }
    }
    /// All lanes 0.
    fn zero() -> Self;
    /// All lanes `*p`.
    /// # Safety
    /// `p` must be readable.
    unsafe fn splat(p: *const f32) -> Self;
    /// Lanes `p[0..16]`, unaligned.
    /// # Safety
    /// Sixteen floats from `p` must be readable.
    unsafe fn load(p: *const f32) -> Self;
    /// Writes the lanes to `p[0..16]`, unaligned.
    /// # Safety
    /// Sixteen floats from `p` must be writable.
    unsafe fn store(self, p: *mut f32);
    /// `a * b + self`, rounded once.
    fn fma(self, a: Self, b: Self) -> Self;
    /// `self + other`.
    fn add(self, other: Self) -> Self;
    /// `self - other`.
    fn sub(self, other: Self) -> Self;
    /// `self * other`.
    fn mul(self, other: Self) -> Self;
    /// Lanes above 0 as they are, all others times `slope`.
    fn prelu(self, slope: Self) -> Self;
    /// Lanes of both in turn: those of the first eight of each, those of the last eight.
    fn interleave(self, other: Self) -> [Self; 2];
    /// The bfloat16 `p[0..16]`.
    /// # Safety
    /// Sixteen values from `p` must be readable.
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        let mut lanes = [0.0; 16];
        // SAFETY: handed on from the caller; then sixteen floats of our own. A loop: a closure would not have the unit's
        // instructions.
        unsafe {
            let values = p.cast::<[u16; 16]>().read_unaligned();
            for l in 0..16 {
                lanes[l] = bf16::widened(values[l]);
            }
            Self::load(lanes.as_ptr())
        }
    }
    /// Writes the lanes to `p[0..16]`, rounded to bfloat16.
    /// # Safety
    /// Sixteen values from `p` must be writable.
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16) {
        let (mut lanes, mut values) = ([0.0; 16], [0; 16]);
        // SAFETY: sixteen floats of our own; then handed on from the caller.
        unsafe {
            self.store(lanes.as_mut_ptr());
            for l in 0..16 {
                values[l] = bf16::narrowed(lanes[l]);
            }
            p.cast::<[u16; 16]>().write_unaligned(values);
        }
    }
}

/// Plain Rust lanes.
#[derive(Clone, Copy)]
pub struct Plain(pub(super) [f32; 16]);

impl Lanes for Plain {
    #[inline(always)]
    fn zero() -> Self {
        Plain([0.0; 16])
    }
    #[inline(always)]
    unsafe fn splat(p: *const f32) -> Self {
        // SAFETY: the caller guarantees `p` readable.
        Plain([unsafe { *p }; 16])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller guarantees 16 readable floats; the read is unaligned.
        Plain(unsafe { p.cast::<[f32; 16]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller guarantees 16 writable floats; the write is unaligned.
        unsafe { p.cast::<[f32; 16]>().write_unaligned(self.0) }
    }
    // Without an FMA instruction every lane is a call anyway: one copy of the sixteen keeps the kernels small.
    #[cfg_attr(all(target_arch = "x86_64", not(target_feature = "fma")), inline(never))]
    #[cfg_attr(not(all(target_arch = "x86_64", not(target_feature = "fma"))), inline(always))]
    fn fma(self, a: Self, b: Self) -> Self {
        Plain(std::array::from_fn(|i| a.0[i].mul_add(b.0[i], self.0[i])))
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Plain(std::array::from_fn(|i| self.0[i] + other.0[i]))
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Plain(std::array::from_fn(|i| self.0[i] - other.0[i]))
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Plain(std::array::from_fn(|i| self.0[i] * other.0[i]))
    }
    #[inline(always)]
    fn prelu(self, slope: Self) -> Self {
        Plain(std::array::from_fn(|i| if self.0[i] > 0.0 { self.0[i] } else { slope.0[i] * self.0[i] }))
    }
    #[inline(always)]
    fn interleave(self, other: Self) -> [Self; 2] {
        let half = |start: usize| {
            let lane = |i: usize| [self.0, other.0][i % 2][start + i / 2];
            Plain(std::array::from_fn(lane))
        };
        [half(0), half(8)]
    }
}

/// AVX-512 and AVX2 lanes. Their methods must be inlined into a function with the target feature enabled, which
/// only a `#[target_feature]` entry chosen by [`simd`] does.
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86 {
    use super::Lanes;
    use std::arch::x86_64::*;

    /// One 512-bit register.
    #[derive(Clone, Copy)]
    pub struct Avx512(pub(in crate::device) __m512);

    /// Two 256-bit registers.
    #[derive(Clone, Copy)]
    pub struct Avx2(pub(in crate::device) __m256, pub(in crate::device) __m256);

    // SAFETY (all blocks below): AVX-512F is present because only entries chosen by `simd()` instantiate this
    // type; pointers are readable or writable for 16 floats by the trait's contract.
    impl Lanes for Avx512 {
        #[inline(always)]
        fn zero() -> Self {
            Avx512(unsafe { _mm512_setzero_ps() })
        }
        #[inline(always)]
        unsafe fn splat(p: *const f32) -> Self {
            Avx512(unsafe { _mm512_set1_ps(*p) })
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            Avx512(unsafe { _mm512_loadu_ps(p) })
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            unsafe { _mm512_storeu_ps(p, self.0) }
        }
        #[inline(always)]
        fn fma(self, a: Self, b: Self) -> Self {
            Avx512(unsafe { _mm512_fmadd_ps(a.0, b.0, self.0) })
        }
        #[inline(always)]
        fn add(self, other: Self) -> Self {
            Avx512(unsafe { _mm512_add_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            Avx512(unsafe { _mm512_sub_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            Avx512(unsafe { _mm512_mul_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn prelu(self, slope: Self) -> Self {
            unsafe {
                let rest = _mm512_cmp_ps_mask::<_CMP_NGT_UQ>(self.0, _mm512_setzero_ps());
                Avx512(_mm512_mask_mul_ps(self.0, rest, slope.0, self.0))
            }
        }
        // SAFETY: as all of these.
        #[inline(always)]
        fn interleave(self, other: Self) -> [Self; 2] {
            unsafe {
                let low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
                let high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
                // No closure: it would not have the unit's instructions.
                [
                    Avx512(_mm512_permutex2var_ps(self.0, low, other.0)),
                    Avx512(_mm512_permutex2var_ps(self.0, high, other.0)),
                ]
            }
        }
    }

    // SAFETY (all blocks below): as above, for AVX2 and FMA.
    impl Lanes for Avx2 {
        #[inline(always)]
        fn zero() -> Self {
            unsafe { Avx2(_mm256_setzero_ps(), _mm256_setzero_ps()) }
        }
        #[inline(always)]
        unsafe fn splat(p: *const f32) -> Self {
            let v = unsafe { _mm256_set1_ps(*p) };
            Avx2(v, v)
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            unsafe { Avx2(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            unsafe {
                _mm256_storeu_ps(p, self.0);
                _mm256_storeu_ps(p.add(8), self.1);
            }
        }
        #[inline(always)]
        fn fma(self, a: Self, b: Self) -> Self {
            unsafe { Avx2(_mm256_fmadd_ps(a.0, b.0, self.0), _mm256_fmadd_ps(a.1, b.1, self.1)) }
        }
        #[inline(always)]
        fn add(self, other: Self) -> Self {
            unsafe { Avx2(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
        }
        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            unsafe { Avx2(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1)) }
        }
        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            unsafe { Avx2(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)) }
        }
        #[inline(always)]
        fn prelu(self, slope: Self) -> Self {
            unsafe { Avx2(prelu(self.0, slope.0), prelu(self.1, slope.1)) }
        }
        // SAFETY: as all of these.
        #[inline(always)]
        fn interleave(self, other: Self) -> [Self; 2] {
            unsafe { [interleave(self.0, other.0), interleave(self.1, other.1)] }
        }
    }

    /// Eight lanes of [`Lanes::prelu`].
    ///
    /// # Safety
    /// AVX2 must be present.
    #[inline(always)]
    unsafe fn prelu(v: __m256, slope: __m256) -> __m256 {
        // SAFETY: by the caller's promise.
        unsafe {
            let above = _mm256_cmp_ps::<_CMP_GT_OQ>(v, _mm256_setzero_ps());
            _mm256_blendv_ps(_mm256_mul_ps(slope, v), v, above)
        }
    }

    /// Eight lanes of each in turn.
    ///
    /// # Safety
    /// AVX2 must be present.
    #[inline(always)]
    unsafe fn interleave(a: __m256, b: __m256) -> Avx2 {
        // SAFETY: by the caller's promise. Unpacking gives quarters 0 and 2 of the lanes in turn, and 1 and 3.
        unsafe {
            let (even, odd) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            Avx2(_mm256_permute2f128_ps::<0x20>(even, odd), _mm256_permute2f128_ps::<0x31>(even, odd))
        }
    }
}

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
