//! Sums of activations on the CPU, activations written out, and sums of their channels: any of f32 or bfloat16, in fixed chunks
//! in parallel.

use super::single;
#[cfg(target_arch = "x86_64")]
use crate::device::bf16::Pairs;
use crate::device::bf16::{Operands, narrowed};
use crate::device::cpu::{Simd, simd, simd_of_pairs, vectorised};
#[cfg(target_arch = "x86_64")]
use crate::device::lanes::x86::{Avx2, Avx512};
use crate::device::lanes::{Lanes, Plain};
use crate::device::list::List;
use crate::ops::conv::{Affine, mapped};
use crate::tensor::{Activation, Tensor, Values, ValuesMut};
use rayon::prelude::*;

/// Values a task handles: 64 KB of f32, so that both operands and the sum stay in L2.
const CHUNK: usize = 1 << 14;

/// Values of a vector.
const LANES: usize = 16;

/// a + b, or a alone, both of one shape, computed in f32 and stored as f32 or, rounded, as bfloat16.
pub fn sum(a: &Activation, b: Option<&Activation>, stored: Operands) -> Tensor {
    let shape = a.shape();
    let mut y = Tensor::room(shape, stored);
    match Tensor::values_mut(shape, stored, &mut y) {
        ValuesMut::Single(y) => sum_samples(y, a, b, |y| ValuesMut::Single(y)),
        ValuesMut::Bf16(y) => sum_samples(y, a, b, |y| ValuesMut::Bf16(y)),
    }
    Tensor::stored(shape, stored, y)
}

fn sum_samples<T: Send>(
    y: &mut [T],
    a: &Activation,
    b: Option<&Activation>,
    out: fn(&mut [T]) -> ValuesMut<'_>,
) {
    let shape = a.shape();
    if shape.is_empty() {
        return;
    }
    let (c, sample) = (shape.c, shape.voxels() * shape.c);
    // Whole voxels; maps of whole vectors: channels repeat after so many values.
    let chunk = (CHUNK / c).max(1) * c;
    let period = LANES * (1..=c).find(|n| (n * LANES).is_multiple_of(c)).expect("c of them do");
    y.par_chunks_mut(sample).enumerate().for_each(|(n, y)| {
        let (a, b) = (Repeated::new(a, n, period), b.map(|b| Repeated::new(b, n, period)));
        y.par_chunks_mut(chunk).enumerate().for_each(|(i, y)| {
            let (start, len) = (n * sample + i * chunk, y.len());
            let b = b.as_ref().map(|b| b.part(start, len));
            Sum { a: a.part(start, len), b, period }.run(out(y));
        });
    });
}

/// An activation with the map of a sample, repeated to a number of whole vectors.
struct Repeated<'a> {
    x: Values<'a>,
    map: Option<(List<f32>, List<f32>, f32)>,
}

impl<'a> Repeated<'a> {
    fn new(x: &'a Activation, n: usize, period: usize) -> Self {
        let map = x.pending().map(|p| {
            let (scale, shift) = p.of_sample(n, x.shape().c);
            let repeat = |v: &[f32]| v.iter().cycle().take(period).copied().collect();
            (repeat(scale), repeat(shift), p.slope)
        });
        Repeated { x: x.raw().values(), map }
    }

    fn part(&self, start: usize, len: usize) -> Operand<'_> {
        let map = self.map.as_ref().map(|(scale, shift, slope)| (&scale[..], &shift[..], *slope));
        Operand { x: self.x.part(start, len), map }
    }
}

/// Some values of an activation, and its map, from the first value's channel on.
#[derive(Clone, Copy)]
struct Operand<'a> {
    x: Values<'a>,
    map: Affine<'a>,
}

impl Operand<'_> {
    /// The sixteen values from value `i` on, whose map is that of lanes `lane` on.
    ///
    /// # Safety
    /// V's vector unit must exist, and the values and the lanes be there.
    #[inline(always)]
    unsafe fn vector<V: Lanes>(&self, i: usize, lane: usize) -> V {
        // SAFETY: by the caller's promise.
        unsafe {
            let x = match self.x {
                Values::Single(x) => V::load(x.as_ptr().add(i)),
                Values::Bf16(x) => V::load_bf16(x.as_ptr().add(i)),
            };
            let Some((scale, shift, slope)) = self.map else { return x };
            let z = x.mul(V::load(scale.as_ptr().add(lane))).add(V::load(shift.as_ptr().add(lane)));
            z.prelu(V::splat(&raw const slope))
        }
    }

    /// Value `i`, whose map is that of lane `lane`.
    fn value(&self, i: usize, lane: usize) -> f32 {
        let x = self.x.at(i);
        self.map.map_or(x, |(scale, shift, slope)| mapped(x, scale[lane], shift[lane], slope))
    }
}

/// The sum of a chunk.
struct Sum<'a> {
    a: Operand<'a>,
    b: Option<Operand<'a>>,
    /// Lanes of the maps.
    period: usize,
}

impl Sum<'_> {
    /// Computes it; `y` is as long as the operands.
    fn run(&self, y: ValuesMut) {
        let unit = match y {
            ValuesMut::Single(_) => simd(),
            ValuesMut::Bf16(_) => simd_of_pairs(),
        };
        // SAFETY: `simd()` or `simd_of_pairs()` found the features.
        unsafe {
            match (unit, y) {
                #[cfg(target_arch = "x86_64")]
                (Simd::Avx512, ValuesMut::Single(y)) => self.run_avx512(y),
                #[cfg(target_arch = "x86_64")]
                (Simd::Avx512, ValuesMut::Bf16(y)) => self.run_avx512_bf16(y),
                #[cfg(target_arch = "x86_64")]
                (Simd::Avx2, y) => self.run_avx2(y),
                (_, y) => self.run_lanes::<Plain>(y),
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,fma")]
    unsafe fn run_avx512(&self, y: &mut [f32]) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<Avx512>(ValuesMut::Single(y)) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bf16,fma")]
    unsafe fn run_avx512_bf16(&self, y: &mut [u16]) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<Pairs<Avx512>>(ValuesMut::Bf16(y)) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn run_avx2(&self, y: ValuesMut) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<Avx2>(y) }
    }

    /// # Safety
    /// V's vector unit must exist.
    #[inline(always)]
    unsafe fn run_lanes<V: Lanes>(&self, mut y: ValuesMut) {
        let len = match &y {
            ValuesMut::Single(y) => y.len(),
            ValuesMut::Bf16(y) => y.len(),
        };
        let mut lane = 0;
        for i in (0..len / LANES).map(|i| i * LANES) {
            // SAFETY: sixteen values from `i` on are there, and sixteen lanes: periods are whole vectors.
            unsafe {
                let mut sum: V = self.a.vector(i, lane);
                if let Some(b) = &self.b {
                    sum = sum.add(b.vector(i, lane));
                }
                match &mut y {
                    ValuesMut::Single(y) => sum.store(y.as_mut_ptr().add(i)),
                    ValuesMut::Bf16(y) => sum.store_bf16(y.as_mut_ptr().add(i)),
                }
            }
            lane = if lane + LANES == self.period { 0 } else { lane + LANES };
        }
        for (i, lane) in (len / LANES * LANES..len).zip(lane..) {
            let a = self.a.value(i, lane);
            let sum = self.b.as_ref().map_or(a, |b| a + b.value(i, lane));
            match &mut y {
                ValuesMut::Single(y) => y[i] = sum,
                ValuesMut::Bf16(y) => y[i] = narrowed(sum),
            }
        }
    }
}

/// Sum of every channel over all voxels and samples, in f64 over fixed chunks: the gradient of a bias.
pub fn channel_sums(x: &Tensor) -> List<f32> {
    let x = single(x);
    let c = x.shape().c;
    let chunk = (CHUNK / c).max(1) * c;
    let mut partials = List::of(0.0, x.data().len().div_ceil(chunk) * c);
    partials.par_chunks_exact_mut(c).zip(x.data().par_chunks(chunk)).for_each(|(sum, x)| {
        if LANES.is_multiple_of(c) {
            lane_sums(x).iter().enumerate().for_each(|(i, s)| sum[i % c] += s);
        } else {
            x.chunks_exact(c).for_each(|v| sum.iter_mut().zip(v).for_each(|(s, v)| *s += f64::from(*v)));
        }
    });
    (0..c).map(|i| partials.iter().skip(i).step_by(c).sum::<f64>() as f32).collect()
}

vectorised! {
    /// Every sixteenth value, summed: a whole number of voxels of 1, 2, 4, 8 or 16 channels.
    fn lane_sums(x: &[f32]) -> [f64; LANES] {
        let mut sums = [0.0; LANES];
        let (whole, rest) = x.as_chunks::<LANES>();
        for x in whole {
            for i in 0..LANES {
                sums[i] += f64::from(x[i]);
            }
        }
        rest.iter().zip(&mut sums).for_each(|(x, s)| *s += f64::from(*x));
        sums
    }
}
