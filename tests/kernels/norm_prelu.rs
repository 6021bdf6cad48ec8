//! Norm and PReLU: statistics merged from tiles, the map that consumers apply, running statistics, and the backward pass.

use crate::harness::{assert_close, on_every_device, stored, uniform};
use crate::same_bits::SameBits;
use spleen_hpc::device::cuda::{Act, Cuda, Precision};
use spleen_hpc::error::Error;
use spleen_hpc::ops::norm_prelu::cuda::{
    DeviceAffine, DeviceMoments, DeviceStatistics, backward, forward, update_running,
};
use spleen_hpc::ops::residual::cuda::materialize;
use spleen_hpc::tensor::{DeviceParam, Partials, Shape, View};
use std::sync::Arc;

const EPS: f64 = 1e-5;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Batch,
    Instance,
    /// Given mean and variance; with a bias that x is without, or not.
    Fixed(bool),
    Identity,
}

/// The op in f64, formula by formula.
#[derive(Clone)]
struct Reference {
    shape: Shape,
    kind: Kind,
    x: Vec<f64>,
    gamma: Vec<f64>,
    beta: Vec<f64>,
    slope: f64,
    mean: Vec<f64>,
    var: Vec<f64>,
}

struct Gradients {
    dx: Vec<f64>,
    dgamma: Vec<f64>,
    dbeta: Vec<f64>,
    dslope: f64,
}

impl Reference {
    fn group(&self, i: usize) -> usize {
        if self.kind == Kind::Instance { i / (self.shape.voxels() * self.shape.c) } else { 0 }
    }

    /// Elements of (group, channel).
    fn members(&self, g: usize, c: usize) -> Vec<usize> {
        (0..self.x.len()).filter(|&i| self.group(i) == g && i % self.shape.c == c).collect()
    }

    fn groups(&self) -> usize {
        if self.kind == Kind::Instance { self.shape.n } else { 1 }
    }

    /// (mean, biased variance) of (group, channel).
    fn moments(&self, g: usize, c: usize) -> (f64, f64) {
        match self.kind {
            Kind::Identity => (0.0, 1.0 - EPS),
            Kind::Fixed(_) => (self.mean[c], self.var[c]),
            Kind::Batch | Kind::Instance => {
                let members = self.members(g, c);
                let count = members.len() as f64;
                let mean = members.iter().map(|&i| self.x[i]).sum::<f64>() / count;
                (mean, members.iter().map(|&i| (self.x[i] - mean).powi(2)).sum::<f64>() / count)
            }
        }
    }

    fn y(&self) -> Vec<f64> {
        let mut y = vec![0.0; self.x.len()];
        for (g, c) in (0..self.groups()).flat_map(|g| (0..self.shape.c).map(move |c| (g, c))) {
            let (mean, var) = self.moments(g, c);
            for i in self.members(g, c) {
                let z = self.gamma[c] * (self.x[i] - mean) / (var + EPS).sqrt() + self.beta[c];
                y[i] = if z > 0.0 { z } else { self.slope * z };
            }
        }
        y
    }

    fn backward(&self, dy: &[f64]) -> Gradients {
        let c = self.shape.c;
        let mut grad =
            Gradients { dx: vec![0.0; dy.len()], dgamma: vec![0.0; c], dbeta: vec![0.0; c], dslope: 0.0 };
        for (g, c) in (0..self.groups()).flat_map(|g| (0..c).map(move |c| (g, c))) {
            let (mean, var) = self.moments(g, c);
            let rstd = 1.0 / (var + EPS).sqrt();
            let members = self.members(g, c);
            let xhat = |i: usize| (self.x[i] - mean) * rstd;
            let z = |i: usize| self.gamma[c] * xhat(i) + self.beta[c];
            let dz = |i: usize| if z(i) > 0.0 { dy[i] } else { self.slope * dy[i] };
            let sum = |f: &dyn Fn(usize) -> f64| members.iter().map(|&i| f(i)).sum::<f64>();
            let (sum_dz, sum_dz_xhat) = (sum(&dz), sum(&|i| dz(i) * xhat(i)));
            grad.dbeta[c] += sum_dz;
            grad.dgamma[c] += sum_dz_xhat;
            grad.dslope += sum(&|i| if z(i) > 0.0 { 0.0 } else { dy[i] * z(i) });
            let measured = matches!(self.kind, Kind::Batch | Kind::Instance);
            let weight = if measured { 1.0 / members.len() as f64 } else { 0.0 };
            for &i in &members {
                let dz = dz(i) - sum_dz * weight - xhat(i) * sum_dz_xhat * weight;
                grad.dx[i] = self.gamma[c] * rstd * dz;
            }
        }
        grad
    }
}

#[test]
fn the_reference_agrees_with_finite_differences() {
    for kind in [Kind::Batch, Kind::Instance, Kind::Fixed(false), Kind::Identity] {
        let shape = Shape::new(2, [2, 3, 2], 3);
        let wide = |name, len| -> Vec<f64> {
            uniform(Precision::Single, name, len).into_iter().map(f64::from).collect()
        };
        let at = Reference {
            shape,
            kind,
            x: wide(1, shape.len()),
            gamma: wide(2, 3),
            beta: wide(3, 3),
            slope: -0.5,
            mean: wide(4, 3),
            var: vec![0.5, 1.5, 0.2],
        };
        let dy = wide(5, shape.len());
        let loss = |r: &Reference| r.y().iter().zip(&dy).map(|(y, dy)| y * dy).sum::<f64>();
        let slope_of = |change: &dyn Fn(&mut Reference, f64)| {
            let moved = |by| {
                let mut r = at.clone();
                change(&mut r, by);
                loss(&r)
            };
            (moved(1e-6) - moved(-1e-6)) / 2e-6
        };
        let grad = at.backward(&dy);
        let close = |what: &str, want: f64, got: f64| {
            assert!((want - got).abs() < 1e-7 * (1.0 + want.abs()), "{kind:?} {what}: {want} {got}");
        };
        for i in 0..shape.len() {
            close("dx", slope_of(&|r, by| r.x[i] += by), grad.dx[i]);
        }
        for c in 0..3 {
            close("dgamma", slope_of(&|r, by| r.gamma[c] += by), grad.dgamma[c]);
            close("dbeta", slope_of(&|r, by| r.beta[c] += by), grad.dbeta[c]);
        }
        close("dslope", slope_of(&|r, by| r.slope += by), grad.dslope);
    }
}

struct Case {
    shape: Shape,
    tiles: usize,
    kind: Kind,
    /// Whether there are gamma and beta.
    affine: bool,
    slope: Option<f32>,
    /// x is level + spread * uniform in [-1, 1).
    level: f32,
    spread: f32,
}

fn case(n: usize, space: [usize; 3], c: usize, tiles: usize, kind: Kind) -> Case {
    let shape = Shape::new(n, space, c);
    Case { shape, tiles, kind, affine: true, slope: Some(0.25), level: 0.5, spread: 1.0 }
}

/// A case on a device, and its reference.
struct Setup {
    x: View,
    tiles: Partials,
    /// gamma, beta, slope with gradients that already hold something.
    params: [Option<DeviceParam>; 3],
    bias: Vec<f32>,
    reference: Reference,
}

/// What the gradient of a parameter holds before the backward pass.
fn earlier(i: usize) -> f32 {
    0.5 - i as f32
}

impl Setup {
    fn new(cuda: &Arc<Cuda>, case: &Case) -> Self {
        let (p, shape, c) = (cuda.precision(), case.shape, case.shape.c);
        let x: Vec<f32> =
            uniform(p, 1, shape.len()).iter().map(|v| stored(p, case.level + case.spread * v)).collect();
        let of = |name, default: f32| {
            if case.affine { uniform(Precision::Single, name, c) } else { vec![default; c] }
        };
        let (gamma, beta) = (of(2, 1.0), of(3, 0.0));
        let mean = uniform(Precision::Single, 4, c);
        let var: Vec<f32> = uniform(Precision::Single, 5, c).iter().map(|v| 1.2 + v).collect();
        let bias =
            if case.kind == Kind::Fixed(true) { uniform(Precision::Single, 6, c) } else { vec![0.0; c] };
        let param = |wanted: bool, value: &[f32]| {
            wanted.then(|| {
                let grad: Vec<f32> = (0..value.len()).map(earlier).collect();
                DeviceParam::new(cuda.upload(value).unwrap(), Some(cuda.upload(&grad).unwrap()))
            })
        };
        let wide = |v: &[f32]| v.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>();
        let reference = Reference {
            shape,
            kind: case.kind,
            x: wide(&x),
            gamma: wide(&gamma),
            beta: wide(&beta),
            slope: case.slope.map_or(1.0, f64::from),
            mean: wide(&mean).iter().zip(wide(&bias)).map(|(m, b)| m - b).collect(),
            var: wide(&var),
        };
        let slope = case.slope.unwrap_or(1.0);
        let params =
            [(case.affine, &gamma[..]), (case.affine, &beta[..]), (case.slope.is_some(), &[slope][..])];
        Setup {
            x: View::plain(upload(cuda, &x), shape),
            tiles: tiles(cuda, &reference, case.tiles),
            params: params.map(|(wanted, value)| param(wanted, value)),
            bias,
            reference,
        }
    }

    fn affine(&self) -> DeviceAffine<'_> {
        let [gamma, beta, slope] = self.params.each_ref().map(Option::as_ref);
        DeviceAffine { gamma, beta, slope }
    }

    fn forward(&self) -> (View, spleen_hpc::ops::norm_prelu::cuda::Saved, DeviceMoments) {
        let cuda = self.x.data.cuda();
        let narrow = |v: &[f64]| v.iter().map(|&v| v as f32).collect::<Vec<f32>>();
        let with_bias: Vec<f32> =
            narrow(&self.reference.mean).iter().zip(&self.bias).map(|(m, b)| m + b).collect();
        let (mean, var) =
            (cuda.upload(&with_bias).unwrap(), cuda.upload(&narrow(&self.reference.var)).unwrap());
        let bias = cuda.upload(&self.bias).unwrap();
        let statistics = match self.reference.kind {
            Kind::Batch => DeviceStatistics::Batch(&self.tiles),
            Kind::Instance => DeviceStatistics::Instance(&self.tiles),
            Kind::Fixed(biased) => {
                DeviceStatistics::Fixed { mean: &mean, var: &var, bias: biased.then_some(&bias) }
            }
            Kind::Identity => DeviceStatistics::Identity,
        };
        let (pending, saved, moments) = forward(&self.x, statistics, self.affine()).unwrap();
        (View { pending: Some(pending), ..self.x.clone() }, saved, moments)
    }
}

fn upload(cuda: &Arc<Cuda>, values: &[f32]) -> Act {
    let act = cuda.act(values.len()).unwrap();
    act.upload(values).unwrap();
    act
}

/// What a convolution leaves: (count, mean, M2) of runs of voxels of unequal length, some of them empty.
fn tiles(cuda: &Arc<Cuda>, r: &Reference, tiles: usize) -> Partials {
    let (voxels, c) = (r.shape.voxels(), r.shape.c);
    let mut stats = Vec::new();
    for (n, tile, channel) in
        (0..r.shape.n).flat_map(|n| (0..tiles).flat_map(move |t| (0..c).map(move |channel| (n, t, channel))))
    {
        let run = tile * voxels / tiles..(tile + 1) * voxels / tiles;
        let x: Vec<f64> = run.map(|v| r.x[(n * voxels + v) * c + channel]).collect();
        let count = x.len() as f64;
        let mean = if x.is_empty() { 0.0 } else { x.iter().sum::<f64>() / count };
        let m2: f64 = x.iter().map(|x| (x - mean).powi(2)).sum();
        stats.extend([count as f32, mean as f32, m2 as f32]);
    }
    Partials { stats: cuda.upload(&stats).unwrap(), tiles }
}

/// Every channel count of the network and odd ones, with samples of whole vectors and not; several blocks; more tiles
/// than voxels; channels beyond a block.
fn cases() -> Vec<Case> {
    use Kind::*;
    let mut cases = vec![
        case(1, [3, 3, 3], 1, 3, Batch),
        case(3, [2, 2, 2], 1, 2, Instance),
        case(3, [4, 3, 5], 2, 7, Batch),
        case(3, [3, 3, 3], 2, 2, Instance),
        case(3, [4, 3, 2], 4, 40, Instance),
        case(3, [3, 5, 2], 5, 4, Batch),
        case(3, [3, 5, 2], 5, 4, Instance),
        case(2, [4, 4, 2], 6, 4, Batch),
        case(2, [3, 3, 3], 8, 5, Instance),
        case(3, [3, 3, 4], 12, 3, Batch),
        case(3, [12, 12, 12], 16, 300, Batch),
        case(3, [12, 12, 12], 16, 27, Instance),
        case(3, [3, 5, 7], 32, 8, Batch),
        case(1, [3, 5, 7], 64, 8, Batch),
        case(3, [3, 3, 3], 128, 1, Instance),
        case(3, [3, 3, 3], 256, 1, Batch),
        case(1, [2, 2, 2], 1100, 2, Batch),
        case(3, [3, 3, 2], 16, 2, Fixed(true)),
        case(1, [3, 3, 2], 5, 2, Fixed(false)),
        case(3, [3, 3, 2], 32, 2, Identity),
    ];
    for c in [5, 16] {
        cases.push(Case { slope: Some(-0.5), ..case(3, [3, 5, 4], c, 4, Batch) });
        cases.push(Case { slope: None, ..case(2, [3, 5, 4], c, 4, Instance) });
        cases.push(Case { affine: false, ..case(3, [3, 5, 4], c, 4, Instance) });
        cases.push(Case { affine: false, slope: None, ..case(3, [3, 5, 4], c, 4, Batch) });
    }
    cases
}

/// f32 roundings of the sums and of what they are made of: 1e-7 each, squared.
const SUMS: (f64, &str) = (1e-12, "f32 sums of some thousand values");

fn tolerance(p: Precision) -> (f64, &'static str) {
    match p {
        Precision::Half => (1e-7, "one rounding to fp16: 2^-22 / 3 over many values"),
        Precision::Single => (1e-12, "f32 statistics: 1e-7 each, squared, a few of them"),
    }
}

#[test]
fn forward_and_backward_follow_the_formulas_on_every_schedule() {
    let bits = SameBits::default();
    on_every_device(|cuda| {
        let p = cuda.precision();
        for (number, case) in cases().iter().enumerate() {
            let name = format!("case {number}: {} {:?} {p:?}", case.shape, case.kind);
            let s = Setup::new(cuda, case);
            let (y, saved, moments) = s.forward();
            let (allowed, why) = tolerance(p);
            let got = materialize(&y).unwrap().download().unwrap();
            assert_close(&name, &got, &s.reference.y(), allowed, why);

            let c = case.shape.c;
            let tables = (0..s.reference.groups()).flat_map(|g| (0..c).map(move |c| (g, c)));
            let (mean, var): (Vec<f64>, Vec<f64>) = tables.map(|(g, c)| s.reference.moments(g, c)).unzip();
            assert_close(&name, &moments.mean.download().unwrap(), &mean, SUMS.0, SUMS.1);
            assert_close(&name, &moments.var.download().unwrap(), &var, SUMS.0, SUMS.1);
            let group = case.shape.len() / c / s.reference.groups();
            let measured = matches!(case.kind, Kind::Batch | Kind::Instance);
            assert_eq!(moments.count, if measured { group as f64 } else { 1.0 }, "{name}");

            let dy = uniform(p, 7, case.shape.len());
            let wide: Vec<f64> = dy.iter().map(|&v| v.into()).collect();
            let want = s.reference.backward(&wide);
            let dy = upload(cuda, &dy);
            let dx = backward(&y, &dy, &saved, s.affine()).unwrap().download().unwrap();
            assert_close(&format!("{name} dx"), &dx, &want.dx, allowed, why);
            // A second time: gradients add up, and the last block is found again.
            let again = backward(&y, &dy, &saved, s.affine()).unwrap().download().unwrap();
            assert!(dx == again, "{name}: a second pass gave another dx");
            bits.check(p, &name, &dx);
            for (what, param, want) in [
                ("dgamma", &s.params[0], &want.dgamma),
                ("dbeta", &s.params[1], &want.dbeta),
                ("dslope", &s.params[2], &vec![want.dslope]),
            ] {
                let Some(grad) = param.as_ref().and_then(|p| p.grad.as_ref()) else { continue };
                let got = grad.download().unwrap();
                let want: Vec<f64> =
                    want.iter().enumerate().map(|(i, w)| f64::from(earlier(i)) + 2.0 * w).collect();
                assert_close(&format!("{name} {what}"), &got, &want, SUMS.0, SUMS.1);
                bits.check(p, &format!("{name} {what}"), &got);
            }
        }
    });
}

#[test]
fn statistics_hold_where_the_mean_is_large_beside_the_deviation() {
    on_every_device(|cuda| {
        let p = cuda.precision();
        for kind in [Kind::Batch, Kind::Instance] {
            let case = Case { level: 100.0, spread: 0.17, ..case(3, [7, 5, 6], 16, 10, kind) };
            let s = Setup::new(cuda, &case);
            let (y, saved, moments) = s.forward();
            let tables = (0..s.reference.groups()).flat_map(|g| (0..16).map(move |c| (g, c)));
            let var: Vec<f64> = tables.map(|(g, c)| s.reference.moments(g, c).1).collect();
            // A tile's mean of 100 is off by 2^-18; it differs from the others by 0.1 / sqrt(21), which is squared:
            // 2e-4 of a 20th of the variance. A mean of squares in f32 would be off by 6 % (NMSE 4e-3).
            let why = "tile means rounded to f32";
            assert_close(&format!("{kind:?} {p:?}"), &moments.var.download().unwrap(), &var, 1e-10, why);
            let dy = uniform(p, 7, case.shape.len());
            let wide: Vec<f64> = dy.iter().map(|&v| v.into()).collect();
            let want = s.reference.backward(&wide);
            let dx = backward(&y, &upload(cuda, &dy), &saved, s.affine()).unwrap().download().unwrap();
            // z = scale x + shift of about 1000 each is off by 1e-4: as many values near 0 take the other slope.
            assert_close(&format!("{kind:?} {p:?} dx"), &dx, &want.dx, 1e-3, "signs of z within 1e-4 of 0");
        }
    });
}

#[test]
fn at_zero_the_slope_counts() {
    on_every_device(|cuda| {
        let s = Setup::new(cuda, &case(1, [2, 2, 2], 2, 1, Kind::Identity));
        let [gamma, beta, _] = s.params.each_ref().map(|p| p.as_ref().unwrap());
        gamma.value.upload(&[1.0; 2]).unwrap();
        beta.value.upload(&[0.0; 2]).unwrap();
        s.x.data.upload(&[0.0; 16]).unwrap();
        let (y, saved, _) = s.forward();
        let dx = backward(&y, &upload(cuda, &[8.0; 16]), &saved, s.affine()).unwrap();
        assert_eq!(dx.download().unwrap(), [2.0; 16], "torch takes slope * dy at z == 0");
        let dbeta = beta.grad.as_ref().unwrap().download().unwrap();
        assert_eq!(dbeta, [earlier(0) + 16.0, earlier(1) + 16.0], "so does the sum of dz");
    });
}

#[test]
fn running_statistics_move_a_tenth_of_the_way() {
    on_every_device(|cuda| {
        let s = Setup::new(cuda, &case(3, [3, 2, 2], 12, 4, Kind::Batch));
        let (_, _, moments) = s.forward();
        let old = [uniform(Precision::Single, 8, 12), uniform(Precision::Single, 9, 12)];
        let bias = uniform(Precision::Single, 10, 12);
        let running = old.each_ref().map(|v| cuda.upload(v).unwrap());
        update_running(&moments, &running[0], &running[1], &cuda.upload(&bias).unwrap()).unwrap();
        let want = |c: usize| {
            let (mean, var) = s.reference.moments(0, c);
            let mix = |old: f32, new: f64| 0.9 * f64::from(old) + 0.1 * new;
            (mix(old[0][c], mean + f64::from(bias[c])), mix(old[1][c], var * 36.0 / 35.0))
        };
        let (mean, var): (Vec<f64>, Vec<f64>) = (0..12).map(want).unzip();
        assert_close("mean", &running[0].download().unwrap(), &mean, 1e-13, "f32 moments");
        assert_close("var", &running[1].download().unwrap(), &var, 1e-13, "f32 moments");
    });
}

#[test]
fn what_does_not_fit_is_refused() {
    on_every_device(|cuda| {
        let s = Setup::new(cuda, &case(1, [2, 2, 2], 4, 2, Kind::Batch));
        let refused = |statistics, affine| {
            matches!(forward(&s.x, statistics, affine), Err(Error::Shape { op: "norm_prelu", .. }))
        };
        let good = DeviceStatistics::Batch(&s.tiles);
        let two_slopes = DeviceParam::new(cuda.upload(&[0.25f32; 2]).unwrap(), None);
        let affine = |gamma, slope| DeviceAffine { gamma, beta: None, slope };
        assert!(refused(good, affine(Some(&two_slopes), None)));
        assert!(refused(good, affine(None, Some(&two_slopes))));
        let fewer = Partials { tiles: 1, ..s.tiles.clone() };
        assert!(refused(DeviceStatistics::Instance(&fewer), s.affine()));
        let three = cuda.upload(&[1.0f32; 3]).unwrap();
        assert!(refused(DeviceStatistics::Fixed { mean: &three, var: &three, bias: None }, s.affine()));
        let (y, saved, _) = s.forward();
        assert!(backward(&y, &upload(cuda, &[0.0; 8]), &saved, s.affine()).is_err());
        assert!(forward(&y, good, s.affine()).is_err(), "something is pending");
        assert!(backward(&s.x, &upload(cuda, &[0.0; 32]), &saved, s.affine()).is_err(), "nothing is pending");
    });
}
