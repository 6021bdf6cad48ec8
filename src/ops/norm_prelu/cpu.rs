//! Statistics and the backward pass on the CPU: fixed chunks in parallel, merged in chunk order.

use super::{Affine, EPS, HostMoments, Running, Statistics};
use crate::device::arena::Buffer;
use crate::device::bf16::{Operands, narrow};
use crate::device::cpu::vectorised;
use crate::device::list::List;
use crate::device::scratch::Scratch;
use crate::tensor::{Activation, Param, Pending, Tensor, ValuesMut};
use rayon::prelude::*;

/// Floats a task handles: 64 KB.
const CHUNK: usize = 1 << 14;

/// The statistics that `statistics` asks for.
pub fn moments_of(x: &Tensor, statistics: Statistics) -> HostMoments {
    let c = x.shape().c;
    match statistics {
        Statistics::Batch => moments(x, x.shape().n),
        Statistics::Instance => moments(x, 1),
        Statistics::Identity => {
            HostMoments { mean: List::of(0.0, c), var: List::of(1.0 - EPS, c), count: 1.0 }
        }
        Statistics::Fixed { running, bias } => fixed_moments(running, bias),
    }
}

/// Running statistics of what a convolution without its bias makes.
pub fn fixed_moments(running: &Running, bias: Option<&Param>) -> HostMoments {
    // Subtracted in f32.
    let mean = |(i, &mean): (usize, &f32)| f64::from(mean - bias.map_or(0.0, |b| b.value[i]));
    HostMoments {
        mean: running.mean.iter().enumerate().map(mean).collect(),
        var: running.var.iter().map(|&v| v.into()).collect(),
        count: 1.0,
    }
}

/// rstd, one a (group, channel).
pub fn rstd_of(moments: &HostMoments) -> List<f64> {
    moments.var.iter().map(|v| 1.0 / (v + EPS).sqrt()).collect()
}

/// The map that normalises and activates.
pub fn pending_of(moments: &HostMoments, rstd: &[f64], affine: Affine, c: usize) -> Pending {
    let of_channel =
        |p: Option<&Param>, i: usize, default: f64| p.map_or(default, |p| f64::from(p.value[i % c]));
    let scale: List<f64> =
        rstd.iter().enumerate().map(|(i, r)| r * of_channel(affine.gamma, i, 1.0)).collect();
    let shift = (0..scale.len()).map(|i| of_channel(affine.beta, i, 0.0) - moments.mean[i] * scale[i]);
    Pending {
        shift: shift.map(|s| s as f32).collect(),
        scale: scale.iter().map(|&s| s as f32).collect(),
        slope: affine.slope.map_or(1.0, |p| p.value[0]),
    }
}

/// Per-channel statistics over groups of `samples` samples.
fn moments(x: &Tensor, samples: usize) -> HostMoments {
    let (shape, c) = (x.shape(), x.shape().c);
    let group = samples * shape.voxels() * c;
    let period = period(c);
    let chunk = (CHUNK / period).max(1) * period;
    // (mean, M2) of every channel of every group.
    let mut merged = List::of((0.0, 0.0), shape.n / samples * c);
    merged.par_chunks_exact_mut(c).zip(x.data().par_chunks(group)).for_each(|(merged, x)| {
        let mut moments = Scratch::<Vec<_>>::take();
        moments.resize(x.len().div_ceil(chunk) * c, (0.0, 0.0));
        moments
            .par_chunks_exact_mut(c)
            .zip(x.par_chunks(chunk))
            .for_each_init(Scratch::take, |scratch, (moments, x)| chunk_moments(x, moments, period, scratch));
        let mut count = 0.0;
        for (x, moments) in x.chunks(chunk).zip(moments.chunks_exact(c)) {
            let n = (x.len() / c) as f64;
            for ((mean, m2), (chunk_mean, chunk_m2)) in merged.iter_mut().zip(moments) {
                // Chan, Golub, LeVeque 1983.
                let delta = chunk_mean - *mean;
                *mean += delta * n / (count + n);
                *m2 += chunk_m2 + delta * delta * count * n / (count + n);
            }
            count += n;
        }
    });
    let count = (group / c) as f64;
    let [mean, var] = [merged.iter().map(|m| m.0).collect(), merged.iter().map(|m| m.1 / count).collect()];
    HostMoments { mean, var, count }
}

/// The shortest run of whole voxels that fills vector registers: per-channel arrays are repeated to this length.
fn period(c: usize) -> usize {
    c * (64 / c).max(1)
}

/// (mean, M2) of every channel of a chunk, in two passes over it.
fn chunk_moments(
    x: &[f32],
    moments: &mut [(f64, f64)],
    period: usize,
    (sums, centre): &mut (Vec<f32>, Vec<f32>),
) {
    let c = moments.len();
    let fold = |sums: &[f32], i: usize| sums.iter().skip(i).step_by(c).map(|&s| f64::from(s)).sum::<f64>();
    sums.clear();
    sums.resize(period, 0.0);
    sum_periodic(x, sums);
    let count = (x.len() / c) as f64;
    moments.iter_mut().enumerate().for_each(|(i, m)| m.0 = fold(sums, i) / count);
    centre.clear();
    centre.extend((0..period).map(|i| moments[i % c].0 as f32));
    sums.fill(0.0);
    square_periodic(x, centre, sums);
    moments.iter_mut().enumerate().for_each(|(i, m)| m.1 = fold(sums, i));
}

vectorised! {
    fn sum_periodic(x: &[f32], sums: &mut [f32]) {
        for x in x.chunks(sums.len()) {
            sums.iter_mut().zip(x).for_each(|(s, x)| *s += x);
        }
    }

    fn square_periodic(x: &[f32], centre: &[f32], sums: &mut [f32]) {
        for x in x.chunks(sums.len()) {
            for ((s, x), m) in sums.iter_mut().zip(x).zip(centre) {
                *s += (x - m) * (x - m);
            }
        }
    }
}

/// Sums over a group that the gradients need, one a channel.
pub struct Sums {
    /// Sum of dz.
    pub dz: List<f64>,
    /// Sum of dz xhat.
    pub dz_xhat: List<f64>,
    /// Sum of dy z over z <= 0.
    pub slope: List<f64>,
}

/// What a chunk needs per float, repeated to the period.
struct Lane {
    scale: List<f32>,
    shift: List<f32>,
    mean: List<f32>,
    rstd: List<f32>,
    slope: f32,
}

/// The sums and dx. `count` is the number of voxels of a group, or `None` when the statistics are constants. dx is stored as what
/// the convolution that made x multiplies.
pub fn backward(
    y: &Activation,
    dy: &Tensor,
    (mean, rstd): (&[f32], &[f32]),
    count: Option<f64>,
    stored: Operands,
) -> (Sums, Tensor) {
    let (shape, c) = (y.shape(), y.shape().c);
    let pending = y.pending().expect("norm_prelu makes lazy activations");
    let period = period(c);
    let groups = mean.len() / c;
    let group = shape.len() / groups;
    let chunk = (CHUNK / period).max(1) * period;
    let lane_of = |g: usize| {
        let repeat = |v: &[f32]| (0..period).map(|i| v[g * c + i % c]).collect::<List<_>>();
        Lane {
            scale: repeat(&pending.scale),
            shift: repeat(&pending.shift),
            mean: repeat(mean),
            rstd: repeat(rstd),
            slope: pending.slope,
        }
    };
    let x = y.raw().data();
    let mut dx = Tensor::room(shape, stored);
    let mut all = Sums { dz: List::default(), dz_xhat: List::default(), slope: List::default() };
    for g in 0..groups {
        let lane = lane_of(g);
        let range = g * group..(g + 1) * group;
        let (x, dy) = (&x[range.clone()], &dy.data()[range.clone()]);
        // dz, dz xhat and slope of every chunk, one a lane of the period.
        let mut partials = Buffer::zeroed(x.len().div_ceil(chunk) * 3 * period);
        let of_chunks = partials.par_chunks_exact_mut(3 * period);
        of_chunks.zip(x.par_chunks(chunk)).zip(dy.par_chunks(chunk)).for_each(|((sums, x), dy)| {
            let (dz, sums) = sums.split_at_mut(period);
            let (dz_xhat, slope) = sums.split_at_mut(period);
            chunk_sums(x, dy, &lane, dz, dz_xhat, slope);
        });
        let fold = |which: usize| {
            let mut sums = List::of(0.0, c);
            for partial in partials.chunks_exact(period).skip(which).step_by(3) {
                partial.iter().enumerate().for_each(|(i, &v)| sums[i % c] += f64::from(v));
            }
            sums
        };
        let (dz, dz_xhat) = (fold(0), fold(1));
        let mean_of = |v: &[f64]| -> List<f32> {
            (0..period).map(|i| count.map_or(0.0, |m| (v[i % c] / m) as f32)).collect()
        };
        let (mean_dz, mean_dz_xhat) = (mean_of(&dz), mean_of(&dz_xhat));
        let chunks = x.par_chunks(chunk).zip(dy.par_chunks(chunk));
        match Tensor::values_mut(shape, stored, &mut dx) {
            ValuesMut::Single(dx) => dx[range]
                .par_chunks_mut(chunk)
                .zip(chunks)
                .for_each(|(dx, (x, dy))| chunk_dx(dx, x, dy, &lane, &mean_dz, &mean_dz_xhat)),
            ValuesMut::Bf16(dx) => {
                let dx = dx[range].par_chunks_mut(chunk);
                dx.zip(chunks).for_each_init(Scratch::take, |wide: &mut Scratch<Vec<_>>, (dx, (x, dy))| {
                    wide.resize(dx.len(), 0.0);
                    chunk_dx(wide, x, dy, &lane, &mean_dz, &mean_dz_xhat);
                    narrow(wide, dx);
                })
            }
        }
        all.slope.extend(fold(2));
        all.dz.extend(dz);
        all.dz_xhat.extend(dz_xhat);
    }
    (all, Tensor::stored(shape, stored, dx))
}

vectorised! {
    fn chunk_sums(
        x: &[f32],
        dy: &[f32],
        lane: &Lane,
        dz: &mut [f32],
        dz_xhat: &mut [f32],
        slope: &mut [f32],
    ) {
        let period = dz.len();
        for (x, dy) in x.chunks(period).zip(dy.chunks(period)) {
            let len = x.len();
            let (scale, shift, mean, rstd) =
                (&lane.scale[..len], &lane.shift[..len], &lane.mean[..len], &lane.rstd[..len]);
            let (dz, dz_xhat, slope) = (&mut dz[..len], &mut dz_xhat[..len], &mut slope[..len]);
            let dy = &dy[..len];
            for i in 0..len {
                let z = x[i] * scale[i] + shift[i];
                let g = if z > 0.0 { dy[i] } else { lane.slope * dy[i] };
                slope[i] += if z > 0.0 { 0.0 } else { dy[i] * z };
                dz[i] += g;
                dz_xhat[i] += g * ((x[i] - mean[i]) * rstd[i]);
            }
        }
    }

    fn chunk_dx(dx: &mut [f32], x: &[f32], dy: &[f32], lane: &Lane, mean_dz: &[f32], mean_dz_xhat: &[f32]) {
        let period = mean_dz.len();
        for ((dx, x), dy) in dx.chunks_mut(period).zip(x.chunks(period)).zip(dy.chunks(period)) {
            let len = dx.len();
            let (scale, shift, mean, rstd) =
                (&lane.scale[..len], &lane.shift[..len], &lane.mean[..len], &lane.rstd[..len]);
            let (mean_dz, mean_dz_xhat) = (&mean_dz[..len], &mean_dz_xhat[..len]);
            let (x, dy) = (&x[..len], &dy[..len]);
            for i in 0..len {
                let z = x[i] * scale[i] + shift[i];
                let g = if z > 0.0 { dy[i] } else { lane.slope * dy[i] };
                let xhat = (x[i] - mean[i]) * rstd[i];
                dx[i] = scale[i] * (g - mean_dz[i] - xhat * mean_dz_xhat[i]);
            }
        }
    }
}
