//! Residual sums and materialised activations.

use crate::harness::{assert_close, on_every_device, uniform};
use spleen_hpc::device::cuda::{Act, Cuda, Precision};
use spleen_hpc::error::Error;
use spleen_hpc::ops::residual::cuda::{add, materialize};
use spleen_hpc::tensor::{DevicePending, Shape, View};
use std::sync::Arc;

/// A norm and PReLU for a test: what is uploaded, and the reference.
#[derive(Clone)]
struct Map {
    scale: Vec<f32>,
    shift: Vec<f32>,
    slope: Option<f32>,
    per_sample: bool,
}

impl Map {
    fn new(name: u64, shape: Shape, slope: Option<f32>, per_sample: bool) -> Self {
        let len = if per_sample { shape.n * shape.c } else { shape.c };
        let shift = uniform(Precision::Single, name + 1, len).iter().map(|v| 3.0 * v).collect();
        Map { scale: uniform(Precision::Single, name, len), shift, slope, per_sample }
    }

    fn upload(&self, cuda: &Arc<Cuda>) -> Arc<DevicePending> {
        Arc::new(DevicePending {
            scale: cuda.upload(&self.scale).unwrap(),
            shift: cuda.upload(&self.shift).unwrap(),
            slope: self.slope.map(|s| cuda.upload(&[s]).unwrap()),
            per_sample: self.per_sample,
        })
    }

    fn apply(&self, shape: Shape, i: usize, x: f32) -> f64 {
        let (n, c) = (i / (shape.voxels() * shape.c), i % shape.c);
        let group = if self.per_sample { n * shape.c + c } else { c };
        let z = f64::from(self.scale[group]) * f64::from(x) + f64::from(self.shift[group]);
        if z > 0.0 { z } else { self.slope.map_or(1.0, f64::from) * z }
    }
}

fn upload(cuda: &Arc<Cuda>, values: &[f32]) -> Act {
    let act = cuda.act(values.len()).unwrap();
    act.upload(values).unwrap();
    act
}

fn tolerance(p: Precision) -> (f64, &'static str) {
    match p {
        // Uniform rounding error of relative size up to 2^-11: 2^-22 / 3 at worst.
        Precision::Half => (8e-8, "one rounding to fp16"),
        // z = scale x + shift is rounded twice, the sum once: each 2^-24 of values up to 4 times the result.
        Precision::Single => (2e-13, "a few roundings to f32"),
    }
}

#[test]
fn sums_apply_what_is_pending() {
    // Vectors of 8 and 4: samples of whole vectors and not, channels beyond, below and across a vector.
    let shapes = [
        (1, [2, 4, 4], 1),
        (3, [2, 2, 4], 2),
        (1, [3, 3, 3], 16),
        (2, [1, 1, 3], 32),
        (1, [2, 1, 3], 64),
        (1, [1, 1, 3], 128),
        (3, [1, 1, 1], 256),
        (2, [2, 4, 3], 5),
        (2, [2, 5, 30], 12),
        (3, [1, 3, 7], 1),
        (3, [3, 3, 3], 5),
        (2, [3, 3, 3], 2),
    ];
    on_every_device(|cuda| {
        let p = cuda.precision();
        for (n, space, c) in shapes {
            let shape = Shape::new(n, space, c);
            let (a, b) = (uniform(p, 1, shape.len()), uniform(p, 2, shape.len()));
            let maps_of = |name| {
                [
                    None,
                    Some(Map::new(name, shape, Some(-0.5), true)),
                    Some(Map::new(name, shape, Some(0.25), false)),
                    Some(Map::new(name, shape, None, false)),
                ]
            };
            let view = |values: &[f32], map: &Option<Map>| View {
                pending: map.as_ref().map(|m| m.upload(cuda)),
                ..View::plain(upload(cuda, values), shape)
            };
            let mapped = |values: &[f32], map: &Option<Map>| -> Vec<f64> {
                let value = |(i, &x): (usize, &f32)| map.as_ref().map_or(x.into(), |m| m.apply(shape, i, x));
                values.iter().enumerate().map(value).collect()
            };
            let (allowed, why) = tolerance(p);
            for map_a in maps_of(10) {
                let (a_view, want_a) = (view(&a, &map_a), mapped(&a, &map_a));
                let got = materialize(&a_view).unwrap().download().unwrap();
                assert_close(&format!("{shape} {p:?} alone"), &got, &want_a, allowed, why);
                for map_b in maps_of(20) {
                    let got = add(&a_view, Some(&view(&b, &map_b))).unwrap().download().unwrap();
                    let want: Vec<f64> = want_a.iter().zip(mapped(&b, &map_b)).map(|(a, b)| a + b).collect();
                    assert_close(&format!("{shape} {p:?}"), &got, &want, allowed, why);
                }
            }
        }
    });
}

#[test]
fn other_shapes_are_refused() {
    on_every_device(|cuda| {
        let view = |c| {
            let shape = Shape::new(1, [2, 2, 2], c);
            View::plain(upload(cuda, &vec![0.0; shape.len()]), shape)
        };
        assert!(matches!(add(&view(2), Some(&view(4))), Err(Error::Shape { .. })));
    });
}
