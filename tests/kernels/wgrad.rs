//! Weight and bias gradients of the convolution and the transposed one.
//!
//! Tolerances: inputs are exact in the reference, so what differs is the order and the precision (f32) of sums of up to
//! a few thousand products: about K 2^-50, 1e-12. A pending map is computed in f32 and its value rounded to fp16 before
//! it is multiplied: (2^-11)^2 / 12 a product, 2e-8 of the sum.

use crate::harness::{assert_close, on_every_device, uniform};
use spleen_hpc::device::cuda::{Buf, Cuda, Precision};
use spleen_hpc::ops::{conv_transpose3d, conv3d};
use spleen_hpc::tensor::{DevicePending, Shape, View};
use std::cell::RefCell;
use std::collections::HashMap;
use std::slice::from_ref;
use std::sync::Arc;

/// What is pending on an activation.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Map {
    Nothing,
    /// Norm and PReLU, one scale and shift a channel.
    PerChannel,
    /// A scale and shift for every sample and channel.
    PerSample,
    /// A norm without PReLU.
    NormOnly,
}

const SLOPE: f32 = -0.5;

/// An activation on the device and what its consumers see of it.
struct Case {
    view: View,
    seen: Vec<f64>,
}

impl Case {
    fn new(cuda: &Arc<Cuda>, name: u64, shape: Shape, map: Map) -> Self {
        let p = cuda.precision();
        let values = uniform(p, name, shape.len());
        let act = cuda.act(shape.len()).unwrap();
        act.upload(&values).unwrap();
        let mut view = View::plain(act, shape);
        let mut seen: Vec<f64> = values.iter().map(|&v| f64::from(v)).collect();
        if map != Map::Nothing {
            let groups = if map == Map::PerSample { shape.n * shape.c } else { shape.c };
            let scale = uniform(Precision::Single, name + 1, groups);
            // Far from 0, so that PReLU(norm(0)) outside the volume would be seen.
            let shift: Vec<f32> = uniform(Precision::Single, name + 2, groups)
                .iter()
                .map(|v| if *v < 0.0 { -3.0 + v } else { 3.0 + v })
                .collect();
            for (i, v) in seen.iter_mut().enumerate() {
                let (sample, c) = (i / (shape.voxels() * shape.c), i % shape.c);
                let group = if map == Map::PerSample { sample * shape.c + c } else { c };
                let z = f64::from(scale[group]) * *v + f64::from(shift[group]);
                *v = if z > 0.0 || map == Map::NormOnly { z } else { f64::from(SLOPE) * z };
            }
            view.pending = Some(Arc::new(DevicePending {
                scale: cuda.upload(&scale).unwrap(),
                shift: cuda.upload(&shift).unwrap(),
                slope: (map != Map::NormOnly).then(|| cuda.upload(&[SLOPE]).unwrap()),
                per_sample: map == Map::PerSample,
            }));
        }
        Case { view, seen }
    }

    /// The value at a voxel that may be outside.
    fn at(&self, n: usize, [d, h, w]: [i64; 3], c: usize) -> f64 {
        let s = self.view.shape;
        let inside = |v: i64, size: usize| (0..size as i64).contains(&v);
        if !inside(d, s.d) || !inside(h, s.h) || !inside(w, s.w) {
            return 0.0;
        }
        self.seen[(((n * s.d + d as usize) * s.h + h as usize) * s.w + w as usize) * s.c + c]
    }
}

/// Calls `f(v, x's voxel of tap t, t)` for all voxels v of `space` and taps of the kernel.
fn for_taps(space: [usize; 3], kernel: usize, stride: usize, mut f: impl FnMut([i64; 3], [i64; 3], usize)) {
    let [depth, height, width] = space.map(|s| s as i64);
    let (k, s, pad) = (kernel as i64, stride as i64, kernel as i64 / 2);
    for v in (0..depth * height * width).map(|i| [i / width / height, i / width % height, i % width]) {
        for t in 0..k * k * k {
            let tap = [t / k / k, t / k % k, t % k];
            f(v, std::array::from_fn(|a| v[a] * s + tap[a] - pad), t as usize);
        }
    }
}

/// dw[o][i][t] = sum over samples and voxels v of x[s v + t - p, i] dy[v, o].
fn reference(x: &Case, dy: &Case, kernel: usize, stride: usize) -> Vec<f64> {
    let (xs, ys, taps) = (x.view.shape, dy.view.shape, kernel.pow(3));
    let mut dw = vec![0.0; ys.c * xs.c * taps];
    for n in 0..xs.n {
        for_taps(ys.space(), kernel, stride, |v, from, t| {
            for (o, i) in (0..ys.c).flat_map(|o| (0..xs.c).map(move |i| (o, i))) {
                dw[(o * xs.c + i) * taps + t] += x.at(n, from, i) * dy.at(n, v, o);
            }
        });
    }
    dw
}

fn tolerance(precision: Precision, maps: &[Map]) -> (f64, &'static str) {
    match precision {
        Precision::Half if maps.iter().any(|m| *m != Map::Nothing) => (1e-7, "mapped values rounded to fp16"),
        _ => (1e-11, "sums in f32"),
    }
}

/// Fails when a case gave other bits before: another schedule may not change a sum.
#[derive(Default)]
struct SameBits(RefCell<HashMap<String, Vec<u32>>>);

impl SameBits {
    fn check(&self, case: &str, values: &[f32]) {
        let bits: Vec<u32> = values.iter().map(|v| v.to_bits()).collect();
        let mut seen = self.0.borrow_mut();
        let before = seen.entry(case.to_owned()).or_insert_with(|| bits.clone());
        assert!(*before == bits, "{case}: the schedule changes the result");
    }
}

/// Gradients in one flat buffer with something in between that must stay.
struct Flat {
    all: Buf<f32>,
    start: Vec<f32>,
    parts: Vec<(usize, usize)>,
}

impl Flat {
    const GAP: usize = 3;

    fn new(cuda: &Arc<Cuda>, lens: &[usize]) -> Self {
        let total: usize = lens.iter().map(|l| l + Self::GAP).sum();
        let start = uniform(Precision::Single, 99, total + Self::GAP);
        let firsts =
            (0..lens.len()).map(|i| lens[..i].iter().map(|l| l + Self::GAP).sum::<usize>() + Self::GAP);
        let parts = firsts.zip(lens.iter().copied()).collect();
        Flat { all: cuda.upload(&start).unwrap(), start, parts }
    }

    fn slices(&self) -> Vec<Buf<f32>> {
        self.parts.iter().map(|&(first, len)| self.all.slice(first, len)).collect()
    }

    /// Compares with what was there and `times` x `want` of each part.
    fn assert_added(
        &self,
        case: &str,
        want: &[Vec<f64>],
        times: f64,
        (allowed, why): (f64, &str),
        bits: &SameBits,
    ) {
        let got = self.all.download().unwrap();
        let mut rest = got.clone();
        for (&(first, len), want) in self.parts.iter().zip(want) {
            let want: Vec<f64> =
                (0..len).map(|i| f64::from(self.start[first + i]) + times * want[i]).collect();
            assert_close(case, &got[first..first + len], &want, allowed, why);
            rest[first..first + len].copy_from_slice(&self.start[first..first + len]);
        }
        assert_eq!(rest, self.start, "{case}: wrote outside its dw");
        bits.check(case, &got);
    }
}

/// Samples, space and channels of x, channels of each dy, what is pending on x.
type Row<'a> = (usize, [usize; 3], usize, &'a [usize], Map);

type TransposedRow<'a> = (usize, [usize; 3], &'a [usize], usize, Map);

/// Two calls add the gradient twice.
fn check_conv3d(kernel: usize, stride: usize, cases: &[Row]) {
    let bits = SameBits::default();
    on_every_device(|cuda| {
        for &(n, space, cin, couts, map) in cases {
            let out = space.map(|s| s.div_ceil(stride));
            let name = format!(
                "k{kernel} s{stride} {n} x {space:?} {cin} -> {couts:?} {map:?} {:?}",
                cuda.precision()
            );
            let x = Case::new(cuda, 10, Shape::new(n, space, cin), map);
            let dys: Vec<Case> = couts
                .iter()
                .zip(20..)
                .map(|(&c, name)| Case::new(cuda, name, Shape::new(n, out, c), Map::Nothing))
                .collect();
            let lens: Vec<usize> = couts.iter().map(|c| c * cin * kernel.pow(3)).collect();
            let flat = Flat::new(cuda, &lens);
            let views: Vec<View> = dys.iter().map(|dy| dy.view.clone()).collect();
            for _ in 0..2 {
                conv3d::cuda_wgrad::wgrad(&x.view, &views, kernel, stride, &flat.slices()).unwrap();
            }
            let want: Vec<_> = dys.iter().map(|dy| reference(&x, dy, kernel, stride)).collect();
            flat.assert_added(&name, &want, 2.0, tolerance(cuda.precision(), &[map]), &bits);
        }
    });
}

#[test]
fn kernel_3_stride_1() {
    check_conv3d(
        3,
        1,
        &[
            (1, [5, 6, 7], 16, &[16], Map::Nothing),
            (3, [3, 5, 19], 16, &[32], Map::PerSample),
            (5, [4, 3, 5], 32, &[32], Map::PerChannel),
            (1, [2, 3, 4], 5, &[7], Map::PerChannel),
            (1, [1, 1, 1], 4, &[6], Map::Nothing),
            (3, [2, 2, 3], 12, &[8, 20], Map::NormOnly),
            (3, [2, 2, 2], 64, &[128], Map::PerChannel),
            (1, [2, 2, 2], 128, &[256], Map::Nothing),
        ],
    );
}

#[test]
fn kernel_3_stride_2() {
    check_conv3d(
        3,
        2,
        &[
            (1, [8, 10, 6], 16, &[32, 32], Map::PerChannel),
            (3, [5, 7, 9], 16, &[16], Map::PerSample),
            (5, [4, 5, 11], 8, &[16, 5], Map::Nothing),
            (1, [3, 4, 5], 5, &[7], Map::PerChannel),
            (1, [2, 3, 2], 64, &[64, 64], Map::PerChannel),
            (1, [1, 1, 1], 16, &[8], Map::Nothing),
        ],
    );
}

#[test]
fn one_channel() {
    check_conv3d(
        3,
        2,
        &[
            (1, [9, 10, 12], 1, &[16, 16], Map::Nothing),
            (3, [5, 4, 37], 1, &[16], Map::PerSample),
            (1, [4, 6, 6], 1, &[4, 30], Map::PerChannel),
        ],
    );
    check_conv3d(
        3,
        1,
        &[(3, [3, 6, 5], 1, &[16], Map::PerChannel), (1, [5, 3, 18], 1, &[40, 3], Map::Nothing)],
    );
}

#[test]
fn two_channels() {
    check_conv3d(
        3,
        1,
        &[
            (1, [4, 9, 6], 2, &[2], Map::PerChannel),
            (3, [7, 3, 35], 2, &[2], Map::PerSample),
            (1, [26, 2, 3], 2, &[2], Map::Nothing),
            (1, [4, 3, 5], 2, &[5], Map::PerChannel),
            (1, [3, 3, 3], 2, &[2, 2], Map::NormOnly),
        ],
    );
    check_conv3d(3, 2, &[(1, [5, 7, 6], 2, &[4, 4], Map::PerChannel)]);
}

#[test]
fn biases() {
    let bits = SameBits::default();
    on_every_device(|cuda| {
        for (n, space, c) in [
            (1, [3, 5, 7], 2),
            (3, [9, 11, 10], 2),
            (2, [4, 5, 6], 16),
            (1, [3, 3, 3], 5),
            (3, [2, 2, 3], 300),
        ] {
            let dy = Case::new(cuda, 10, Shape::new(n, space, c), Map::Nothing);
            let flat = Flat::new(cuda, &[c]);
            for _ in 0..2 {
                conv3d::cuda_biasgrad::bias_grad(&dy.view, &flat.slices()[0]).unwrap();
            }
            let want = (0..c).map(|c| dy.seen.iter().skip(c).step_by(dy.view.shape.c).sum()).collect();
            let name = format!("bias {} {:?}", dy.view.shape, cuda.precision());
            flat.assert_added(&name, &[want], 2.0, (1e-11, "sums in f32"), &bits);
        }
    });
}

#[test]
fn kernel_1() {
    check_conv3d(
        1,
        1,
        &[
            (3, [3, 4, 5], 16, &[32], Map::PerChannel),
            (1, [2, 3, 3], 128, &[256], Map::PerSample),
            (1, [1, 2, 3], 5, &[7, 4], Map::PerChannel),
            (3, [5, 5, 5], 4, &[6], Map::Nothing),
        ],
    );
}

#[test]
fn transposed() {
    let bits = SameBits::default();
    // n, space of the inputs, their channels, channels of the output, what is pending on the last input.
    let cases: &[TransposedRow] = &[
        (1, [3, 4, 5], &[32, 32], 2, Map::PerChannel),
        (3, [2, 3, 2], &[64, 64], 16, Map::PerSample),
        (1, [2, 2, 3], &[6], 4, Map::PerChannel),
        (1, [1, 2, 2], &[24, 40], 32, Map::Nothing),
        (3, [2, 1, 9], &[16, 16, 5], 2, Map::NormOnly),
    ];
    on_every_device(|cuda| {
        for &(n, space, cins, cout, map) in cases {
            let name =
                format!("transposed {n} x {space:?} {cins:?} -> {cout} {map:?} {:?}", cuda.precision());
            let dy = Case::new(cuda, 10, Shape::new(n, space.map(|s| 2 * s), cout), Map::Nothing);
            // The first input is a skip with nothing pending; one channel count after the other along I.
            let inputs: Vec<Case> = (0..cins.len())
                .map(|i| {
                    let map = if i == 0 && cins.len() > 1 { Map::Nothing } else { map };
                    Case::new(cuda, 20 + 5 * i as u64, Shape::new(n, space, cins[i]), map)
                })
                .collect();
            let flat = Flat::new(cuda, &[cins.iter().sum::<usize>() * cout * 27]);
            let views: Vec<&View> = inputs.iter().map(|x| &x.view).collect();
            for _ in 0..2 {
                conv_transpose3d::cuda_wgrad::wgrad(&views, &dy.view, &flat.slices()[0]).unwrap();
            }
            // dw[i][o][t] = sum over v of x[v, i] dy[2 v + t - 1, o].
            let want: Vec<f64> = inputs.iter().flat_map(|x| reference(&dy, x, 3, 2)).collect();
            flat.assert_added(&name, &[want], 2.0, tolerance(cuda.precision(), &[map]), &bits);
        }
    });
}

/// <conv(x; w), r> = <w, wgrad(x, r)>, and for the transposed convolution the same.
#[test]
fn gradients_are_adjoint() {
    let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    on_every_device(|cuda| {
        for stride in [1, 2] {
            let (space, cin, cout) = ([4, 2, 6], 16, 24);
            let x = Case::new(cuda, 10, Shape::new(2, space, cin), Map::Nothing);
            let r = Case::new(cuda, 20, Shape::new(2, space.map(|s| s.div_ceil(stride)), cout), Map::Nothing);
            let w: Vec<f64> =
                uniform(Precision::Single, 30, cout * cin * 27).iter().map(|&v| f64::from(v)).collect();
            let mut y = vec![0.0; r.seen.len()];
            let out = r.view.shape;
            for n in 0..out.n {
                for_taps(out.space(), 3, stride, |v, from, t| {
                    let voxel = ((n * out.d + v[0] as usize) * out.h + v[1] as usize) * out.w + v[2] as usize;
                    for (o, i) in (0..cout).flat_map(|o| (0..cin).map(move |i| (o, i))) {
                        y[voxel * cout + o] += x.at(n, from, i) * w[(o * cin + i) * 27 + t];
                    }
                });
            }
            let gradient =
                |dw: Buf<f32>| -> Vec<f64> { dw.download().unwrap().iter().map(|&v| f64::from(v)).collect() };
            let zeros = || cuda.upload(&vec![0f32; w.len()]).unwrap();
            let dw = zeros();
            conv3d::cuda_wgrad::wgrad(&x.view, from_ref(&r.view), 3, stride, from_ref(&dw)).unwrap();
            let (left, right) = (dot(&y, &r.seen), dot(&w, &gradient(dw)));
            // Rounding errors of f32 sums, 1e-7 each, add up as random numbers do.
            let allowed = 1e-6 * (dot(&y, &y) * dot(&r.seen, &r.seen)).sqrt();
            assert!((left - right).abs() < allowed, "stride {stride}: {left} {right}");
            if stride == 2 {
                // conv_transpose3d of r with w gives x's shape: <conv_transpose(r; w), x> = <r, conv(x; w)>.
                let dw = zeros();
                conv_transpose3d::cuda_wgrad::wgrad(&[&r.view], &x.view, &dw).unwrap();
                let right = dot(&w, &gradient(dw));
                assert!((left - right).abs() < allowed, "transposed: {left} {right}");
            }
        }
    });
}

#[test]
fn what_does_not_fit_is_refused() {
    on_every_device(|cuda| {
        let of = |space, c| Case::new(cuda, 10, Shape::new(1, space, c), Map::Nothing).view;
        let dw = |len| cuda.buffer::<f32>(len).unwrap();
        let (x, dy) = (of([4, 4, 4], 4), of([2, 2, 2], 4));
        let conv = |dy: &View, k, s, len| conv3d::cuda_wgrad::wgrad(&x, from_ref(dy), k, s, &[dw(len)]);
        assert!(conv(&dy, 3, 1, 432).is_err(), "dy of another size");
        assert!(conv(&dy, 3, 2, 431).is_err(), "dw of another length");
        assert!(conv(&x, 5, 1, 2000).is_err(), "a kernel there is not");
        assert!(conv_transpose3d::cuda_wgrad::wgrad(&[&dy], &x, &dw(433)).is_err(), "dw of another length");
        assert!(conv_transpose3d::cuda_wgrad::wgrad(&[&dy], &dy, &dw(432)).is_err(), "dy of another size");
    });
}
