//! What the machine could do: multiply-adds in registers, and copying in memory.

use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;

use super::{Cost, Work};
use crate::device::bf16::Operands;
use crate::device::cpu::{Simd, simd, simd_of_pairs};
use crate::device::lanes::{Lanes, Plain};
#[cfg(target_arch = "x86_64")]
use crate::device::{amx::peak_bf16, cpu::amx};

/// Lanes of a [`Lanes`] register.
const LANES: usize = 16;
/// Floats of each buffer of the copy: 256 MiB, beyond the caches of a few cores.
const COPY_FLOATS: usize = 1 << 26;
/// Seconds that one run of the multiply-adds takes about.
const FMA_SECONDS: f64 = 0.02;

/// Both factors of each multiply-add: a power of two, so that sums are exact for a test and finite for ever.
const FACTOR: f32 = 1.0 / 1024.0;

/// Multiply-adds of such operands on every thread, all in registers, in the fastest unit that the kernels use for them.
pub fn fma(operands: Operands) -> Work {
    let chains = Chains::new(operands);
    let (run, per_step) = (chains.run, chains.per_step());
    let seconds = |steps| {
        let start = Instant::now();
        black_box(run(steps));
        start.elapsed().as_secs_f64()
    };
    // As many steps as take a while, whatever the unit; the fastest of three, for a run may have been interrupted.
    let mut steps = 1 << 10;
    while (0..3).map(|_| seconds(steps)).fold(f64::INFINITY, f64::min) < FMA_SECONDS {
        steps *= 2;
    }
    let flop = (2 * rayon::current_num_threads() * per_step * steps) as f64;
    Work::new(vec![Cost { flop, bytes: 0.0 }], move || Ok(rayon::broadcast(|_| run(steps))))
}

/// Independent chains of multiply-adds on one thread.
struct Chains {
    /// So many steps; something that depends on all of them.
    run: fn(usize) -> f32,
    /// Registers of sums.
    registers: usize,
    /// Multiply-adds of a lane in a step.
    products: usize,
}

impl Chains {
    /// For the unit in use. Where none multiplies pairs of bfloat16, every product is a multiply-add of f32, whose peak is
    /// then the bound of both.
    fn new(operands: Operands) -> Self {
        // A unit of latency 4 that begins two operations a cycle needs 8 independent registers, one of latency 6 (pairs)
        // 12, and more hide the loop; AVX2's lanes are two registers each, and its 16 must hold the operands too.
        const WIDE: usize = 24;
        const NARROW: usize = 6;
        #[cfg(target_arch = "x86_64")]
        if operands == Operands::Bf16 && amx() {
            // Six sums of 16 x 16 in tile registers, 32 products each.
            const TILES: usize = 6;
            return Chains { run: |steps| peak_bf16(steps) as f32, registers: TILES, products: 16 * 32 };
        }
        let (run, registers, products): (fn(usize) -> f32, _, _) = match (operands, simd(), simd_of_pairs()) {
            #[cfg(target_arch = "x86_64")]
            (Operands::Bf16, _, Simd::Avx512) => {
                // SAFETY: `simd_of_pairs()` found the features.
                (|steps| unsafe { x86::avx512_bf16::<WIDE>(steps) }, WIDE, 2)
            }
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `simd()` found the features.
            (_, Simd::Avx512, _) => (|steps| unsafe { x86::avx512::<WIDE>(steps) }, WIDE, 1),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `simd()` found the features.
            (_, Simd::Avx2, _) => (|steps| unsafe { x86::avx2::<NARROW>(steps) }, NARROW, 1),
            // SAFETY: plain Rust needs no feature.
            _ => (|steps| unsafe { chain::<Plain, NARROW>(steps, FACTOR) }, NARROW, 1),
        };
        Chains { run, registers, products }
    }

    /// Multiply-adds of a step.
    fn per_step(&self) -> usize {
        self.registers * LANES * self.products
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{FACTOR, chain};
    use crate::device::bf16::{Pairs, pair};
    use crate::device::lanes::x86::{Avx2, Avx512};

    /// # Safety
    /// The machine must have AVX-512F and FMA.
    #[target_feature(enable = "avx512f,fma")]
    pub unsafe fn avx512<const N: usize>(steps: usize) -> f32 {
        // SAFETY: the features are enabled here.
        unsafe { chain::<Avx512, N>(steps, FACTOR) }
    }

    /// # Safety
    /// The machine must have AVX-512F, AVX512_BF16 and FMA.
    #[target_feature(enable = "avx512f,avx512bf16,fma")]
    pub unsafe fn avx512_bf16<const N: usize>(steps: usize) -> f32 {
        // SAFETY: the features are enabled here.
        unsafe { chain::<Pairs<Avx512>, N>(steps, pair(FACTOR, FACTOR)) }
    }

    /// # Safety
    /// The machine must have AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2<const N: usize>(steps: usize) -> f32 {
        // SAFETY: the features are enabled here.
        unsafe { chain::<Avx2, N>(steps, FACTOR) }
    }
}

/// `steps` multiply-adds on each of N independent registers, both operands `factor` in every lane; something that
/// depends on all of them.
///
/// # Safety
/// V's vector unit must exist.
#[inline(always)]
unsafe fn chain<V: Lanes, const N: usize>(steps: usize, factor: f32) -> f32 {
    // Opaque and different, so that no two registers can be computed as one.
    let start: [[f32; LANES]; N] = black_box(std::array::from_fn(|i| [i as f32 * FACTOR; LANES]));
    let factors: [[f32; LANES]; 2] = black_box([[factor; LANES]; 2]);
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
    let read_and_written = 2 * COPY_FLOATS * size_of::<f32>();
    Work::new(vec![Cost { flop: 0.0, bytes: read_and_written as f64 }], move || {
        let part = COPY_FLOATS.div_ceil(rayon::current_num_threads());
        to.par_chunks_mut(part).zip(from.par_chunks(part)).for_each(|(to, from)| to.copy_from_slice(from));
        Ok(to[0])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The loop does what is counted: register i of every lane becomes i F + steps F F, or twice the latter for pairs. All
    /// of these are multiples of 2^-20 and their sum is below 16, so float32 holds it exactly in any order.
    #[test]
    fn every_multiply_add_is_done() {
        for operands in [Operands::Single, Operands::Bf16] {
            // On AMX the sums stay 0: its instructions have tests of their own.
            #[cfg(target_arch = "x86_64")]
            if operands == Operands::Bf16 && amx() {
                continue;
            }
            let chains = Chains::new(operands);
            let starts = (LANES * chains.registers * (chains.registers - 1) / 2) as f32 * FACTOR;
            for steps in [0, 1, 1000] {
                let grown = (chains.per_step() * steps) as f32 * FACTOR * FACTOR;
                assert_eq!((chains.run)(steps), starts + grown, "{steps} steps, {operands:?}");
            }
        }
    }
}
