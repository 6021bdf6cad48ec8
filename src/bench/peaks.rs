//! What the machine could do: fused multiply-adds in registers, and copying in memory.

use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;

use super::Work;
use crate::device::cpu::{Lanes, Plain, Simd, simd};

/// Lanes of a [`Lanes`] register.
const LANES: usize = 16;
/// Floats of each buffer of the copy: 256 MiB, beyond the caches of a few cores.
const COPY_FLOATS: usize = 1 << 26;
/// Bytes that one copy reads and writes.
pub const COPY_BYTES: f64 = 2.0 * (COPY_FLOATS * size_of::<f32>()) as f64;
/// Seconds that one run of the multiply-adds takes about.
const FMA_SECONDS: f64 = 0.02;

/// Both factors of each multiply-add: a power of two, so that sums are exact for a test and finite for ever.
const FACTOR: f32 = 1.0 / 1024.0;

/// Multiply-adds on every thread, operands in registers, in the vector unit that the kernels use.
pub fn fma() -> Work {
    let (multiply_adds, per_step) = chains();
    let seconds = |steps| {
        let start = Instant::now();
        black_box(multiply_adds(steps));
        start.elapsed().as_secs_f64()
    };
    // As many steps as take a while, whatever the unit; the fastest of three, for a run may have been interrupted.
    let mut steps = 1 << 10;
    while (0..3).map(|_| seconds(steps)).fold(f64::INFINITY, f64::min) < FMA_SECONDS {
        steps *= 2;
    }
    let flop = (2 * rayon::current_num_threads() * per_step * steps) as f64;
    Work::new(Some(flop), move || Ok(rayon::broadcast(|_| multiply_adds(steps))))
}

/// One thread's loop of so many steps for the unit in use, and the multiply-adds of a step.
fn chains() -> (fn(usize) -> f32, usize) {
    // A unit of latency 4 that begins two operations a cycle needs 8 independent registers; AVX2's lanes are two
    // registers each, and its 16 must hold the operands too.
    const WIDE: usize = 12;
    const NARROW: usize = 6;
    match simd() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `simd()` found the features.
        Simd::Avx512 => (|steps| unsafe { x86::avx512::<WIDE>(steps) }, WIDE * LANES),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `simd()` found the features.
        Simd::Avx2 => (|steps| unsafe { x86::avx2::<NARROW>(steps) }, NARROW * LANES),
        // SAFETY: plain Rust needs no feature.
        _ => (|steps| unsafe { chain::<Plain, NARROW>(steps) }, NARROW * LANES),
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::chain;
    use crate::device::cpu::x86::{Avx2, Avx512};

    /// # Safety
    /// The machine must have AVX-512F and FMA.
    #[target_feature(enable = "avx512f,fma")]
    pub unsafe fn avx512<const N: usize>(steps: usize) -> f32 {
        // SAFETY: the features are enabled here.
        unsafe { chain::<Avx512, N>(steps) }
    }

    /// # Safety
    /// The machine must have AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2<const N: usize>(steps: usize) -> f32 {
        // SAFETY: the features are enabled here.
        unsafe { chain::<Avx2, N>(steps) }
    }
}

/// `steps` multiply-adds on each of N independent registers; something that depends on all of them.
///
/// # Safety
/// V's vector unit must exist.
#[inline(always)]
unsafe fn chain<V: Lanes, const N: usize>(steps: usize) -> f32 {
    // Opaque and different, so that no two registers can be computed as one.
    let start: [[f32; LANES]; N] = black_box(std::array::from_fn(|i| [i as f32 * FACTOR; LANES]));
    let factors: [[f32; LANES]; 2] = black_box([[FACTOR; LANES]; 2]);
    // SAFETY: each pointer is to 16 floats.
    let (a, b) = unsafe { (V::load(factors[0].as_ptr()), V::load(factors[1].as_ptr())) };
    // SAFETY: as above.
    let mut sums: [V; N] = std::array::from_fn(|i| unsafe { V::load(start[i].as_ptr()) });
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = sum.fma(a, b);
        }
    }
    let mut out = [0.0; LANES];
    let sum = sums.into_iter().fold(V::zero(), V::add);
    // SAFETY: `out` has 16 floats.
    unsafe { sum.store(out.as_mut_ptr()) };
    out.iter().sum()
}

/// Copies one large buffer to another on every thread.
pub fn copy() -> Work {
    let (from, mut to) = (vec![1f32; COPY_FLOATS], vec![0f32; COPY_FLOATS]);
    Work::new(None, move || {
        let part = COPY_FLOATS.div_ceil(rayon::current_num_threads());
        to.par_chunks_mut(part).zip(from.par_chunks(part)).for_each(|(to, from)| to.copy_from_slice(from));
        Ok(to[0])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The loop does what is counted: register i of every lane becomes i F + steps F F. All of these are multiples of
    /// 2^-20 and their sum is below 16, so float32 holds it exactly in any order.
    #[test]
    fn every_multiply_add_is_done() {
        let (multiply_adds, per_step) = chains();
        let registers = per_step / LANES;
        let starts = (LANES * registers * (registers - 1) / 2) as f32 * FACTOR;
        for steps in [0, 1, 1000] {
            let grown = (per_step * steps) as f32 * FACTOR * FACTOR;
            assert_eq!(multiply_adds(steps), starts + grown, "{steps} steps");
        }
    }
}
