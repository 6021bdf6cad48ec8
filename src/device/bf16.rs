//! bfloat16 operands: rounding, pairs in 32 bits, and the sums of products of pairs on every vector unit.
//!
//! AVX-512's VDPBF16PS adds two products to a float: `acc + a.odd b.odd`, rounded once, `+ a.even b.even`, rounded once,
//! a denormal operand or result counting as 0. A product of bfloat16 is exact in f32, so two fused multiply-adds and
//! the flush do the same on any unit, bit for bit. Operands are flushed when they are rounded, results here. Only AMX adds
//! in another order ([`super::amx`]).

use super::cpu::vectorised;
#[cfg(target_arch = "x86_64")]
use super::cpu::{Simd, simd_of_pairs};
use super::lanes::{Job, Lanes, Plain};

/// What the CPU's convolutions multiply. Sums are f32 in both, and so is all other arithmetic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Operands {
    /// f32, as stored.
    #[default]
    Single,
    /// bfloat16, rounded to nearest even when a tile is loaded or weights are packed, or before, when what convolutions read is
    /// stored, as in torch's CPU autocast. Where transforms are multiplied, those of inputs and of gradients of outputs are
    /// rounded, too, and those of weights instead of the weights.
    Bf16,
}

/// `v` rounded to bfloat16, in the upper half of the bits; denormals become 0.
#[inline(always)]
pub fn round(v: f32) -> u32 {
    let bits = v.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000;
    let finite = if bits & 0x7f80_0000 == 0 { bits & 0x8000_0000 } else { rounded };
    // A payload in the lower half alone must not round to infinity.
    if v.is_nan() { bits & 0xffff_0000 | 0x0040_0000 } else { finite }
}

/// Two values, `even` in the lower half. An f32 only by its size: it is moved, never computed with.
#[inline(always)]
pub fn pair(even: f32, odd: f32) -> f32 {
    f32::from_bits(round(even) >> 16 | round(odd))
}

/// The bits of `v` rounded to bfloat16.
#[inline(always)]
pub fn narrowed(v: f32) -> u16 {
    (round(v) >> 16) as u16
}

/// The f32 value of bits of bfloat16.
#[inline(always)]
pub fn widened(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

vectorised! {
    /// `out` = `x` in f32; of one length.
    pub fn widen(x: &[u16], out: &mut [f32]) {
        out.iter_mut().zip(x).for_each(|(out, &x)| *out = widened(x));
    }
}

/// `out` = `x` rounded to bfloat16; of one length.
pub fn narrow(x: &[f32], out: &mut [u16]) {
    #[cfg(target_arch = "x86_64")]
    if simd_of_pairs() == Simd::Avx512 {
        // SAFETY: `simd_of_pairs()` found the features.
        return unsafe { x86::narrow(x, out) };
    }
    narrow_each(x, out);
}

vectorised! {
    /// [`narrow`] without the instruction for it.
    fn narrow_each(x: &[f32], out: &mut [u16]) {
        out.iter_mut().zip(x).for_each(|(out, &x)| *out = narrowed(x));
    }
}

/// A vector unit's f32 lanes that can also add products of pairs.
pub trait Dot: Lanes {
    /// `self` plus the products of the pairs in `a` and `b`.
    fn dot(self, a: Self, b: Self) -> Self;
    /// [`Lanes::call`] of [`Pairs`] of these.
    /// # Safety
    /// As there.
    unsafe fn call_of_pairs<J: Job>(job: J);
    /// [`Lanes::store_bf16`] where the unit has an instruction for it.
    /// # Safety
    /// As there.
    #[inline(always)]
    unsafe fn narrow(self, p: *mut u16) {
        // SAFETY: handed on from the caller.
        unsafe { self.store_bf16(p) }
    }
    /// [`Lanes::store_pairs`] where the unit has an instruction for it.
    /// # Safety
    /// As there.
    #[inline(always)]
    unsafe fn narrow_pairs(self, odd: Self, p: *mut f32) {
        // SAFETY: handed on from the caller.
        unsafe { self.store_pairs(odd, p) }
    }
}

/// Lanes whose operands are pairs: [`Lanes::fma`] adds both products of each lane.
#[derive(Clone, Copy)]
pub struct Pairs<V>(V);

impl<V: Dot> Lanes for Pairs<V> {
    const OPERANDS: usize = 8;
    #[inline(always)]
    unsafe fn call<J: Job>(job: J) {
        // SAFETY: handed on from the caller.
        unsafe { V::call_of_pairs(job) }
    }
    #[inline(always)]
    unsafe fn load_operands(p: *const f32) -> Self {
        // SAFETY: handed on from the caller: eight floats hold sixteen bfloat16.
        unsafe { Self::load_bf16(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store_operands(self, p: *mut f32) {
        // SAFETY: as above.
        unsafe { self.store_bf16(p.cast()) }
    }
    #[inline(always)]
    fn zero() -> Self {
        Pairs(V::zero())
    }
    #[inline(always)]
    unsafe fn splat(p: *const f32) -> Self {
        // SAFETY: handed on from the caller.
        Pairs(unsafe { V::splat(p) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: handed on from the caller.
        Pairs(unsafe { V::load(p) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: handed on from the caller.
        unsafe { self.0.store(p) }
    }
    #[inline(always)]
    fn fma(self, a: Self, b: Self) -> Self {
        Pairs(self.0.dot(a.0, b.0))
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Pairs(self.0.add(other.0))
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Pairs(self.0.sub(other.0))
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Pairs(self.0.mul(other.0))
    }
    #[inline(always)]
    fn prelu(self, slope: Self) -> Self {
        Pairs(self.0.prelu(slope.0))
    }
    #[inline(always)]
    fn interleave<const EACH: usize>(self, other: Self) -> [Self; 2] {
        let [low, high] = self.0.interleave::<EACH>(other.0);
        [Pairs(low), Pairs(high)]
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        // SAFETY: handed on from the caller.
        Pairs(unsafe { V::load_bf16(p) })
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16) {
        // SAFETY: handed on from the caller.
        unsafe { self.0.narrow(p) }
    }
    #[inline(always)]
    unsafe fn store_pairs(self, odd: Self, p: *mut f32) {
        // SAFETY: handed on from the caller.
        unsafe { self.0.narrow_pairs(odd.0, p) }
    }
}

impl Dot for Plain {
    #[inline(never)]
    unsafe fn call_of_pairs<J: Job>(job: J) {
        // SAFETY: plain Rust needs no feature.
        unsafe { job.run::<Pairs<Self>>() }
    }
    // As Plain's fma.
    #[cfg_attr(all(target_arch = "x86_64", not(target_feature = "fma")), inline(never))]
    #[cfg_attr(not(all(target_arch = "x86_64", not(target_feature = "fma"))), inline(always))]
    fn dot(self, a: Self, b: Self) -> Self {
        let flush = |v: f32| if v.abs() < f32::MIN_POSITIVE { 0.0f32.copysign(v) } else { v };
        let odd = |v: f32| f32::from_bits(v.to_bits() & 0xffff_0000);
        let even = |v: f32| f32::from_bits(v.to_bits() << 16);
        Plain(std::array::from_fn(|i| {
            let sum = flush(odd(a.0[i]).mul_add(odd(b.0[i]), self.0[i]));
            flush(even(a.0[i]).mul_add(even(b.0[i]), sum))
        }))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Dot, Pairs, narrowed};
    use crate::device::lanes::x86::{Avx2, Avx512};
    use crate::device::lanes::{Job, Lanes, call_with};
    use std::arch::x86_64::*;

    /// See [`super::narrow`].
    ///
    /// # Safety
    /// The CPU must have AVX-512F and AVX512_BF16.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub unsafe fn narrow(x: &[f32], out: &mut [u16]) {
        let ((x, x_rest), (out, rest)) = (x.as_chunks::<16>(), out.as_chunks_mut::<16>());
        for (x, out) in x.iter().zip(out) {
            // SAFETY: sixteen of each; the features are enabled here.
            unsafe { Avx512::load(x.as_ptr()).narrow(out.as_mut_ptr()) };
        }
        rest.iter_mut().zip(x_rest).for_each(|(out, &x)| *out = narrowed(x));
    }

    impl Dot for Avx512 {
        #[inline(always)]
        unsafe fn call_of_pairs<J: Job>(job: J) {
            call_with!("avx512f,avx512bf16,fma", Pairs<Avx512>, job)
        }
        #[inline(always)]
        fn dot(self, a: Self, b: Self) -> Self {
            // SAFETY: only entries that found AVX512_BF16 instantiate this; a __m512bh is 512 bits like any other.
            unsafe {
                let halves = |v: __m512| std::mem::transmute::<__m512, __m512bh>(v);
                Avx512(_mm512_dpbf16_ps(self.0, halves(a.0), halves(b.0)))
            }
        }
        #[inline(always)]
        unsafe fn narrow(self, p: *mut u16) {
            // SAFETY: as above; handed on from the caller. The instruction rounds as `round` does.
            unsafe {
                let halves = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(self.0));
                _mm256_storeu_si256(p.cast(), halves);
            }
        }
        #[inline(always)]
        unsafe fn narrow_pairs(self, odd: Self, p: *mut f32) {
            // Value l of the first sixteen, then of the second.
            const IN_TURN: [u16; 32] = {
                let (mut values, mut i) = ([0; 32], 0);
                while i < 32 {
                    values[i] = (i / 2 + i % 2 * 16) as u16;
                    i += 1;
                }
                values
            };
            // SAFETY: as above; they found AVX512BW, too, which AVX512_BF16 builds on.
            unsafe {
                let halves = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(odd.0, self.0));
                let in_turn = _mm512_loadu_si512(IN_TURN.as_ptr().cast());
                _mm512_storeu_si512(p.cast(), _mm512_permutexvar_epi16(in_turn, halves));
            }
        }
    }

    impl Dot for Avx2 {
        #[inline(always)]
        unsafe fn call_of_pairs<J: Job>(job: J) {
            call_with!("avx2,fma", Pairs<Avx2>, job)
        }
        #[inline(always)]
        fn dot(self, a: Self, b: Self) -> Self {
            // SAFETY: AVX2 and FMA are present wherever Avx2 is instantiated.
            unsafe { Avx2(dot(self.0, a.0, b.0), dot(self.1, a.1, b.1)) }
        }
    }

    /// Eight lanes.
    ///
    /// # Safety
    /// AVX2 and FMA must be present.
    #[inline(always)]
    unsafe fn dot(acc: __m256, a: __m256, b: __m256) -> __m256 {
        // SAFETY: by the caller's promise.
        unsafe {
            let odd = |v| _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0xffff_0000_u32 as i32)));
            let even = |v| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(v)));
            let sum = flush(_mm256_fmadd_ps(odd(a), odd(b), acc));
            flush(_mm256_fmadd_ps(even(a), even(b), sum))
        }
    }

    /// Denormals to 0, signs kept.
    ///
    /// # Safety
    /// AVX2 must be present.
    #[inline(always)]
    unsafe fn flush(v: __m256) -> __m256 {
        // SAFETY: by the caller's promise.
        unsafe {
            let sign = _mm256_set1_ps(-0.0);
            let small =
                _mm256_cmp_ps::<_CMP_LT_OQ>(_mm256_andnot_ps(sign, v), _mm256_set1_ps(f32::MIN_POSITIVE));
            _mm256_andnot_ps(_mm256_andnot_ps(sign, small), v)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_to_nearest_even_and_keeps_what_is_no_number() {
        let rounded = |v: f32| f32::from_bits(round(v));
        for v in [0.0, 1.0, -2.5, 1.0e30, 0.1, f32::MAX, 257.0, 259.0, f32::INFINITY] {
            assert_eq!(rounded(v), half::bf16::from_f32(v).to_f32(), "{v}");
            assert_eq!(rounded(-v), half::bf16::from_f32(-v).to_f32(), "{v}");
        }
        assert!(rounded(f32::from_bits(0x7f80_0001)).is_nan() && rounded(f32::NAN).is_nan());
        assert_eq!(rounded(-f32::MIN_POSITIVE / 2.0).to_bits(), (-0.0f32).to_bits());
    }

    /// Zeros, a denormal, what is no number or not finite, what rounds to the next power or to infinity, a tie.
    const SPECIAL: [f32; 9] =
        [0.0, -0.0, 1e-40, f32::INFINITY, f32::NAN, 1.0 + f32::EPSILON, f32::MAX, -257.0, 0.1];

    /// Stores the lanes of both as pairs.
    struct StorePairs<'a>(&'a [[f32; 16]; 2], &'a mut [f32; 16]);

    impl Job for StorePairs<'_> {
        #[inline(always)]
        unsafe fn run<V: Lanes>(self) {
            let [even, odd] = self.0;
            // SAFETY: sixteen floats each.
            unsafe { V::load(even.as_ptr()).store_pairs(V::load(odd.as_ptr()), self.1.as_mut_ptr()) };
        }
    }

    fn check_pairs<V: Dot>(unit: &str) {
        let special = |start: usize| -> [f32; 16] {
            std::array::from_fn(|i| match start + i {
                // A payload in the lower half alone.
                13 => f32::from_bits(0x7f80_0001),
                i => SPECIAL[i % SPECIAL.len()],
            })
        };
        for start in 0..SPECIAL.len() {
            let values = [special(0), special(start)];
            let mut pairs = [0.0; 16];
            // SAFETY: the callers found the unit.
            unsafe { Pairs::<V>::call(StorePairs(&values, &mut pairs)) };
            for (l, got) in pairs.into_iter().enumerate() {
                let want = pair(values[0][l], values[1][l]);
                assert_eq!(got.to_bits(), want.to_bits(), "{unit}: {} and {}", values[0][l], values[1][l]);
            }
        }
    }

    #[test]
    fn pairs_are_stored_as_one_by_one_on_every_unit() {
        check_pairs::<Plain>("portable");
        #[cfg(target_arch = "x86_64")]
        {
            use crate::device::lanes::x86::{Avx2, Avx512};
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                check_pairs::<Avx2>("AVX2");
            }
            if simd_of_pairs() == Simd::Avx512 {
                check_pairs::<Avx512>("AVX-512");
            }
        }
    }

    #[test]
    fn rows_are_narrowed_as_one_by_one() {
        for len in [0, 1, 15, 16, 17, 100] {
            let x: Vec<f32> = SPECIAL.into_iter().cycle().take(len).collect();
            let mut out = vec![0; len];
            narrow(&x, &mut out);
            assert_eq!(out, x.iter().map(|&x| narrowed(x)).collect::<Vec<_>>());
        }
    }
}
