//! Residual sums.

use crate::harness::{assert_close, on_every_device, uniform};
use spleen_hpc::device::cuda::Precision;
use spleen_hpc::ops::residual::cuda::add;
use spleen_hpc::tensor::{DevicePending, Shape, View};
use std::sync::Arc;

#[test]
fn sums_apply_what_is_pending() {
    on_every_device(|cuda| {
        let p = cuda.precision();
        for (n, space, c) in [(1, [2, 3, 5], 2), (3, [1, 4, 7], 16), (2, [3, 3, 3], 5)] {
            let shape = Shape::new(n, space, c);
            let (a, b) = (uniform(p, 1, shape.len()), uniform(p, 2, shape.len()));
            let (scale, shift) = (uniform(Precision::Single, 3, n * c), uniform(Precision::Single, 4, n * c));
            let slope = -0.5;
            let view = |values: &[f32]| {
                let act = cuda.act(shape.len()).unwrap();
                act.upload(values).unwrap();
                View::plain(act, shape)
            };
            let pending = DevicePending {
                scale: cuda.upload(&scale).unwrap(),
                shift: cuda.upload(&shift).unwrap(),
                slope: Some(cuda.upload(&[slope]).unwrap()),
                per_sample: true,
            };
            let a_view = View { pending: Some(Arc::new(pending)), ..view(&a) };
            let got = add(&a_view, Some(&view(&b))).unwrap().download().unwrap();
            let want: Vec<f64> = (0..shape.len())
                .map(|i| {
                    let group = i / (shape.voxels() * c) * c + i % c;
                    let z = f64::from(scale[group]) * f64::from(a[i]) + f64::from(shift[group]);
                    (if z > 0.0 { z } else { f64::from(slope) * z }) + f64::from(b[i])
                })
                .collect();
            let (allowed, why) = match p {
                Precision::Half => (1e-7, "one rounding to fp16, 2^-11 relative"),
                Precision::Single => (1e-13, "a few roundings to f32"),
            };
            assert_close(&format!("{shape} {p:?}"), &got, &want, allowed, why);
        }
    });
}
