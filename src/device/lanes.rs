//! Vectors of 16 floats on each of the CPU's vector units.

use super::bf16;

/// A function over [`Lanes`] and its arguments.
pub trait Job {
    /// The function, to be `#[inline(always)]`.
    ///
    /// # Safety
    /// V's vector unit must exist, and what the job's type asks for.
    unsafe fn run<V: Lanes>(self);
}

/// Runs `$job` over `$lanes` as a function of its own with the instructions of these features. Its place is in an unsafe
/// function with the contract of [`Lanes::call`].
#[cfg(target_arch = "x86_64")]
macro_rules! call_with {
    ($features:literal, $lanes:ty, $job:ident) => {{
        #[target_feature(enable = $features)]
        unsafe fn with_features<J: Job>(job: J) {
            // SAFETY: handed on from the caller.
            unsafe { job.run::<$lanes>() }
        }
        // Of a function with features of its own rustc 1.95 forgets that it is not to be inlined. This one has none, so that
        // the other one cannot be inlined into it.
        #[inline(never)]
        unsafe fn call<J: Job>(job: J) {
            // SAFETY: handed on from the caller.
            unsafe { with_features(job) }
        }
        // SAFETY: handed on from the caller.
        unsafe { call($job) }
    }};
}
#[cfg(target_arch = "x86_64")]
pub(super) use call_with;

/// Sixteen f32 lanes.
pub trait Lanes: Copy {
    /// Floats that hold sixteen values as [`Lanes::fma`] multiplies them.
    const OPERANDS: usize = 16;
    /// Runs a job as a function of its own, compiled with the unit's instructions: registers are shared out among what it
    /// needs, not among all that its caller does.
    /// # Safety
    /// The vector unit must exist, and what the job asks for.
    unsafe fn call<J: Job>(job: J);
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
    /// Writes the lanes of both as pairs of bfloat16: one of `self` and one of `odd`, rounded.
    /// # Safety
    /// Sixteen floats from `p` must be writable.
    #[inline(always)]
    unsafe fn store_pairs(self, odd: Self, p: *mut f32) {
        let mut lanes = [[0.0; 16]; 2];
        // SAFETY: sixteen floats of our own each; then handed on from the caller.
        unsafe {
            self.store(lanes[0].as_mut_ptr());
            odd.store(lanes[1].as_mut_ptr());
            for l in 0..16 {
                *p.add(l) = bf16::pair(lanes[0][l], lanes[1][l]);
            }
        }
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
    /// Pieces of EACH lanes, a power of two up to 8, of both in turn: those of the first eight lanes of each, those of the
    /// last eight.
    fn interleave<const EACH: usize>(self, other: Self) -> [Self; 2];
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
    #[inline(never)]
    unsafe fn call<J: Job>(job: J) {
        // SAFETY: plain Rust needs no feature.
        unsafe { job.run::<Self>() }
    }
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
    fn interleave<const EACH: usize>(self, other: Self) -> [Self; 2] {
        let lane = |i: usize| [self.0, other.0][i / EACH % 2][i / (2 * EACH) * EACH + i % EACH];
        [Plain(std::array::from_fn(lane)), Plain(std::array::from_fn(|i| lane(16 + i)))]
    }
}

/// Pieces of EACH lanes of N vectors, a power of two, in turn: piece p of vector v is piece `p * N + v` of all the result's.
/// Of as many vectors as a vector has pieces that is their transpose.
#[inline(always)]
pub fn interleaved<V: Lanes, const EACH: usize, const N: usize>(mut vectors: [V; N]) -> [V; N] {
    // Every turn takes the number of a vector's half for the lowest bit of its pieces' numbers.
    for _ in 0..N.trailing_zeros() {
        let halves = vectors;
        for i in 0..N / 2 {
            [vectors[2 * i], vectors[2 * i + 1]] = halves[i].interleave::<EACH>(halves[i + N / 2]);
        }
    }
    vectors
}

/// AVX-512 and AVX2 lanes. Their methods must be inlined into a function with the target feature enabled, which
/// only a `#[target_feature]` entry chosen by [`super::cpu::simd`] does.
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86 {
    use super::{Job, Lanes, Plain};
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
        // SAFETY: as all of these.
        #[inline(always)]
        unsafe fn call<J: Job>(job: J) {
            call_with!("avx512f,fma", Avx512, job)
        }
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
        fn interleave<const EACH: usize>(self, other: Self) -> [Self; 2] {
            let [low, high] = const { [lanes_in_turn(EACH, 0), lanes_in_turn(EACH, 8)] };
            unsafe {
                let (low, high) = (_mm512_loadu_epi32(low.as_ptr()), _mm512_loadu_epi32(high.as_ptr()));
                // No closure: it would not have the unit's instructions.
                [
                    Avx512(_mm512_permutex2var_ps(self.0, low, other.0)),
                    Avx512(_mm512_permutex2var_ps(self.0, high, other.0)),
                ]
            }
        }
    }

    /// Which lanes of two vectors, the second one's from 16 on, pieces of `each` in turn are, from `first` of each vector on.
    const fn lanes_in_turn(each: usize, first: usize) -> [i32; 16] {
        let (mut lanes, mut i) = ([0; 16], 0);
        while i < 16 {
            lanes[i] = (i / each % 2 * 16 + first + i / (2 * each) * each + i % each) as i32;
            i += 1;
        }
        lanes
    }

    // SAFETY (all blocks below): as above, for AVX2 and FMA.
    impl Lanes for Avx2 {
        // SAFETY: as all of these.
        #[inline(always)]
        unsafe fn call<J: Job>(job: J) {
            call_with!("avx2,fma", Avx2, job)
        }
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
        // SAFETY: as all of these.
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
        fn interleave<const EACH: usize>(self, other: Self) -> [Self; 2] {
            if EACH == 1 {
                return unsafe { [interleave(self.0, other.0), interleave(self.1, other.1)] };
            }
            let [mut a, mut b] = [[0.0; 16]; 2];
            unsafe {
                self.store(a.as_mut_ptr());
                other.store(b.as_mut_ptr());
                let [low, high] = Plain(a).interleave::<EACH>(Plain(b));
                [Self::load(low.0.as_ptr()), Self::load(high.0.as_ptr())]
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The lanes of N vectors, numbered, with their pieces in turn.
    struct Interleaved<'a, const EACH: usize, const N: usize>(&'a mut [[f32; 16]; N]);

    impl<const EACH: usize, const N: usize> Job for Interleaved<'_, EACH, N> {
        #[inline(always)]
        unsafe fn run<V: Lanes>(self) {
            let mut vectors = [V::zero(); N];
            // SAFETY: sixteen floats each.
            unsafe {
                for v in 0..N {
                    let numbers: [f32; 16] = std::array::from_fn(|lane| (v * 16 + lane) as f32);
                    vectors[v] = V::load(numbers.as_ptr());
                }
                let vectors = interleaved::<V, EACH, N>(vectors);
                for v in 0..N {
                    vectors[v].store(self.0[v].as_mut_ptr());
                }
            }
        }
    }

    fn check<V: Lanes, const EACH: usize, const N: usize>(unit: &str) {
        let mut lanes = [[0.0; 16]; N];
        // SAFETY: the callers found the unit.
        unsafe { V::call(Interleaved::<EACH, N>(&mut lanes)) };
        for (i, &lane) in lanes.as_flattened().iter().enumerate() {
            let (piece, within) = (i / EACH, i % EACH);
            assert_eq!(
                lane,
                (piece % N * 16 + piece / N * EACH + within) as f32,
                "{unit}, {EACH} of {N}: {i}"
            );
        }
    }

    fn check_all<V: Lanes>(unit: &str) {
        check::<V, 1, 4>(unit);
        check::<V, 2, 8>(unit);
        check::<V, 4, 2>(unit);
        check::<V, 4, 4>(unit);
        check::<V, 8, 2>(unit);
    }

    #[test]
    fn pieces_are_interleaved_on_every_unit() {
        check_all::<Plain>("portable");
        check_all::<bf16::Pairs<Plain>>("portable, pairs");
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                check_all::<x86::Avx2>("AVX2");
            }
            if is_x86_feature_detected!("avx512f") {
                check_all::<x86::Avx512>("AVX-512");
            }
            if is_x86_feature_detected!("avx512bf16") {
                check_all::<bf16::Pairs<x86::Avx512>>("AVX-512, pairs");
            }
        }
    }
}
