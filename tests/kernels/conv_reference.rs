//! The definition of a convolution, in f64, with inputs and checks for the tests of its kernels.

use crate::harness::{stored, uniform};
use spleen_hpc::device::cuda::{Cuda, Precision};
use spleen_hpc::ops::conv3d::cuda::Output;
use spleen_hpc::tensor::{DeviceParam, DevicePending, Shape, View};
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

/// NDHWC values with their shape, in f64.
pub struct Field {
    pub shape: Shape,
    pub values: Vec<f64>,
}

impl Field {
    /// Value at (n, d, h, w, c), 0 outside the volume.
    fn at(&self, n: usize, [d, h, w]: [isize; 3], c: usize) -> f64 {
        let s = self.shape;
        let inside = |i: isize, len: usize| (0..len as isize).contains(&i);
        if !(inside(d, s.d) && inside(h, s.h) && inside(w, s.w)) {
            return 0.0;
        }
        self.values[(((n * s.d + d as usize) * s.h + h as usize) * s.w + w as usize) * s.c + c]
    }
}

/// The definition: y[n, o, co] = sum of x[n, o s + t - p, ci] w[co, ci, t] + b[co].
pub fn convolved(x: &Field, w: &[f32], dims: [usize; 5], stride: usize, bias: Option<&[f32]>) -> Field {
    let [channels, _, k, ..] = dims;
    let shape = Shape::new(x.shape.n, x.shape.space().map(|s| s.div_ceil(stride)), channels);
    let mut values = Vec::new();
    for n in 0..shape.n {
        for_each_voxel(shape.space(), |o| {
            for co in 0..channels {
                let mut sum = bias.map_or(0.0, |b| f64::from(b[co]));
                for_each_voxel([k; 3], |t| {
                    let at = [0, 1, 2].map(|i| (o[i] * stride + t[i]) as isize - (k / 2) as isize);
                    for ci in 0..x.shape.c {
                        let weight = w[(((co * x.shape.c + ci) * k + t[0]) * k + t[1]) * k + t[2]];
                        sum += x.at(n, at, ci) * f64::from(weight);
                    }
                });
                values.push(sum);
            }
        });
    }
    Field { shape, values }
}

/// Its adjoint: dx[n, o s + t - p, ci] += dy[n, o, co] w[co, ci, t].
pub fn convolved_back(dx: &mut Field, dy: &Field, w: &[f32], dims: [usize; 5], stride: usize) {
    let [channels, inputs, k, ..] = dims;
    let s = dx.shape;
    for n in 0..s.n {
        for_each_voxel(dy.shape.space(), |o| {
            for_each_voxel([k; 3], |t| {
                let at = [0, 1, 2].map(|i| (o[i] * stride + t[i]).wrapping_sub(k / 2));
                if at[0] >= s.d || at[1] >= s.h || at[2] >= s.w {
                    return;
                }
                for co in 0..channels {
                    let value = dy.at(n, o.map(|i| i as isize), co);
                    for ci in 0..inputs {
                        let weight = w[(((co * inputs + ci) * k + t[0]) * k + t[1]) * k + t[2]];
                        dx.values[(((n * s.d + at[0]) * s.h + at[1]) * s.w + at[2]) * s.c + ci] +=
                            value * f64::from(weight);
                    }
                }
            });
        });
    }
}

fn for_each_voxel([d, h, w]: [usize; 3], mut f: impl FnMut([usize; 3])) {
    for i in 0..d * h * w {
        f([i / (h * w), i / w % h, i % w]);
    }
}

/// A view of uniform values, with a norm and PReLU pending if `pending` (shift 3, slope -0.5), and what it stands for.
pub fn input(cuda: &Arc<Cuda>, name: u64, shape: Shape, pending: Option<bool>) -> (View, Field) {
    let p = cuda.precision();
    let raw = uniform(p, name, shape.len());
    let act = cuda.act(shape.len()).unwrap();
    act.upload(&raw).unwrap();
    let mut view = View::plain(act, shape);
    let mut values: Vec<f64> = raw.iter().map(|&v| f64::from(v)).collect();
    if let Some(per_sample) = pending {
        let groups = if per_sample { shape.n * shape.c } else { shape.c };
        let scale = uniform(Precision::Single, name + 100, groups);
        let shift: Vec<f32> =
            uniform(Precision::Single, name + 200, groups).iter().map(|v| 3.0 * v).collect();
        let slope = -0.5f32;
        for (i, v) in values.iter_mut().enumerate() {
            let sample = if per_sample { i / (shape.voxels() * shape.c) } else { 0 };
            let group = sample * shape.c + i % shape.c;
            let z = f64::from(scale[group]) * *v + f64::from(shift[group]);
            let z = if z > 0.0 { z } else { f64::from(slope) * z };
            // The kernel rounds it on its way to the tensor cores.
            *v = f64::from(stored(p, z as f32));
        }
        view.pending = Some(Arc::new(DevicePending {
            scale: cuda.upload(&scale).unwrap(),
            shift: cuda.upload(&shift).unwrap(),
            slope: Some(cuda.upload(&[slope]).unwrap()),
            per_sample,
        }));
    }
    (view, Field { shape, values })
}

pub fn param(cuda: &Arc<Cuda>, values: &[f32]) -> DeviceParam {
    DeviceParam::new(cuda.upload(values).unwrap(), None)
}

pub fn tolerance(p: Precision) -> (f64, &'static str) {
    match p {
        Precision::Half => {
            (2e-7, "one rounding to fp16, 2^-11 relative, and rare input values that round differently")
        }
        Precision::Single => (1e-12, "sums of up to 7000 products in f32"),
    }
}

/// Statistics of the stored outputs against f64, merged over tiles; returns them as they are.
pub fn check_partials(case: &str, y: &Output) -> Vec<f32> {
    let partials = y.partials.as_ref().expect("statistics were asked for");
    let stats = partials.stats.download().unwrap();
    let values = y.data.download().unwrap();
    let s = y.shape;
    assert_eq!(stats.len(), s.n * partials.tiles * s.c * 3);
    for n in 0..s.n {
        for c in 0..s.c {
            let at =
                |tile: usize, i: usize| f64::from(stats[((n * partials.tiles + tile) * s.c + c) * 3 + i]);
            let tiles = 0..partials.tiles;
            let count: f64 = tiles.clone().map(|t| at(t, 0)).sum();
            assert_eq!(count, s.voxels() as f64, "{case}: every voxel is in one tile");
            let mean = tiles.clone().map(|t| at(t, 0) * at(t, 1)).sum::<f64>() / count;
            let m2: f64 = tiles.map(|t| at(t, 2) + at(t, 0) * (at(t, 1) - mean).powi(2)).sum();
            let own: Vec<f64> =
                (0..s.voxels()).map(|v| f64::from(values[(n * s.voxels() + v) * s.c + c])).collect();
            let want_mean = own.iter().sum::<f64>() / count;
            let want_m2: f64 = own.iter().map(|v| (v - want_mean).powi(2)).sum();
            let scale = own.iter().fold(1e-3f64, |a, v| a.max(v.abs()));
            assert!(
                (mean - want_mean).abs() < 1e-6 * scale,
                "{case}: mean {mean} of channel {c}, want {want_mean}"
            );
            let error = (m2 - want_m2).abs();
            assert!(error < 1e-5 * want_m2 + 1e-9, "{case}: M2 {m2} of channel {c}, want {want_m2}");
        }
    }
    stats
}

/// <A x, r> - <x, A* r>, which is 0 where the second is the adjoint of the first.
#[derive(Default)]
pub struct Products {
    sum: f64,
    squares: f64,
}

impl Products {
    /// Adds `sign` times the product of `a` and `b`.
    pub fn add(&mut self, sign: f64, a: &[f64], b: &[f64]) {
        assert_eq!(a.len(), b.len());
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        self.sum += sign * dot(a, b);
        self.squares += dot(a, a) * dot(b, b);
    }

    /// Independent errors of relative square `nmse` in either factor change a product by sqrt(nmse) of its norms.
    pub fn check(&self, case: &str, nmse: f64) {
        let allowed = (4.0 * nmse * self.squares).sqrt();
        assert!(self.sum.abs() <= allowed, "{case}: not adjoint by {:e}, allowed {allowed:e}", self.sum);
    }
}

/// Results of one precision must be the same bits on every schedule.
#[derive(Default)]
pub struct Schedules(RefCell<HashMap<(Precision, usize), Vec<f32>>>);

impl Schedules {
    /// Keeps the first results of a case and compares all others with them.
    pub fn compare(&self, precision: Precision, case: usize, results: Vec<f32>) {
        let mut kept = self.0.borrow_mut();
        let first = kept.entry((precision, case)).or_insert_with(|| results.clone());
        let same = first.iter().map(|v| v.to_bits()).eq(results.iter().map(|v| v.to_bits()));
        assert!(same, "case {case} {precision:?}: results depend on the schedule");
    }
}
