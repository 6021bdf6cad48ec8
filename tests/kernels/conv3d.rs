//! Convolutions: fprop with its statistics, dgrad.

use crate::conv_reference::{
    Field, Products, Schedules, check_partials, convolved, convolved_back, input, param, tolerance,
};
use crate::harness::{assert_close, on_devices, on_every_device, uniform};
use spleen_hpc::Error;
use spleen_hpc::device::cuda::{Cuda, Precision};
use spleen_hpc::ops::conv3d::cuda::{DeviceFilter, dgrad, fprop};
use spleen_hpc::tensor::Shape;
use std::sync::Arc;

struct Case {
    n: usize,
    space: [usize; 3],
    inputs: usize,
    outputs: &'static [usize],
    kernel: usize,
    stride: usize,
    pending: Option<bool>,
}

const fn case(
    n: usize,
    space: [usize; 3],
    inputs: usize,
    outputs: &'static [usize],
    [kernel, stride]: [usize; 2],
    pending: Option<bool>,
) -> Case {
    Case { n, space, inputs, outputs, kernel, stride, pending }
}

const CASES: &[Case] = &[
    case(1, [9, 10, 11], 16, &[16], [3, 1], Some(false)),
    case(1, [7, 8, 15], 16, &[16], [3, 1], Some(false)),
    case(1, [12, 6, 6], 16, &[64], [3, 1], None),
    case(3, [5, 4, 6], 16, &[32], [3, 1], Some(true)),
    case(1, [6, 6, 6], 32, &[32], [3, 1], Some(true)),
    case(1, [3, 9, 4], 5, &[7], [3, 1], Some(false)),
    case(2, [4, 5, 3], 4, &[6], [3, 1], None),
    case(1, [2, 3, 3], 64, &[128], [3, 1], Some(false)),
    case(1, [2, 2, 3], 128, &[256], [3, 1], None),
    case(1, [6, 5, 7], 16, &[16, 24], [3, 1], Some(false)),
    case(1, [2, 3, 3], 128, &[256], [1, 1], Some(false)),
    case(3, [3, 2, 5], 5, &[7, 9], [1, 1], Some(true)),
    case(1, [8, 12, 10], 16, &[32, 32], [3, 2], Some(false)),
    case(3, [5, 7, 9], 16, &[16], [3, 2], Some(true)),
    case(1, [5, 6, 3], 64, &[128, 128], [3, 2], None),
    case(2, [4, 3, 5], 6, &[12], [3, 2], Some(false)),
    case(1, [11, 18, 35], 1, &[16, 16], [3, 2], None),
    case(3, [5, 4, 7], 1, &[16], [3, 2], Some(true)),
    case(2, [6, 5, 9], 2, &[16, 40], [3, 2], Some(false)),
    case(1, [10, 18, 36], 2, &[2], [3, 1], Some(false)),
    case(3, [3, 4, 6], 2, &[2], [3, 1], Some(true)),
    case(1, [4, 5, 3], 1, &[16], [3, 1], Some(false)),
    case(2, [3, 5, 4], 2, &[2, 2], [3, 1], None),
    case(1, [2, 5, 8], 8, &[128], [1, 1], Some(false)),
];

#[test]
fn fprop_and_dgrad_are_the_definition() {
    let schedules = Schedules::default();
    on_every_device(|cuda| {
        for (index, case) in CASES.iter().enumerate() {
            schedules.compare(cuda.precision(), index, check(cuda, index as u64, case));
        }
    });
}

fn check(cuda: &Arc<Cuda>, index: u64, case: &Case) -> Vec<f32> {
    let p = cuda.precision();
    let (allowed, why) = tolerance(p);
    let name = format!(
        "[{}, {:?}, {}] -> {:?} k{} s{} {p:?}",
        case.n, case.space, case.inputs, case.outputs, case.kernel, case.stride
    );
    let x_shape = Shape::new(case.n, case.space, case.inputs);
    let (x, want_x) = input(cuda, 1000 * index, x_shape, case.pending);
    // The first output has a bias, the second statistics; a lone one without bias has statistics too.
    let with_bias = |i: usize| i == 0 && (case.outputs.len() == 2 || index % 4 == 3);
    let dims: Vec<[usize; 5]> =
        case.outputs.iter().map(|&o| [o, case.inputs, case.kernel, case.kernel, case.kernel]).collect();
    let weights: Vec<Vec<f32>> =
        dims.iter().zip(0..).map(|(d, i)| uniform(p, 1000 * index + 10 + i, d.iter().product())).collect();
    let biases: Vec<Vec<f32>> =
        case.outputs.iter().zip(0..).map(|(&o, i)| uniform(p, 1000 * index + 20 + i, o)).collect();
    let params: Vec<_> = weights.iter().map(|w| param(cuda, w)).collect();
    let bias_params: Vec<_> = biases.iter().map(|b| param(cuda, b)).collect();
    let filters: Vec<DeviceFilter> = (0..dims.len())
        .map(|i| DeviceFilter {
            weight: &params[i],
            dims: dims[i],
            bias: with_bias(i).then_some(&bias_params[i]),
        })
        .collect();
    let stats: Vec<bool> = (0..dims.len()).map(|i| !with_bias(i)).collect();
    let ys = fprop(&x, &filters, case.stride, &stats).unwrap();
    let mut want_dx = Field { shape: x_shape, values: vec![0.0; x_shape.len()] };
    let mut dys = Vec::new();
    let mut all = Vec::new();
    let mut products = Products::default();
    for (i, y) in ys.iter().enumerate() {
        let want =
            convolved(&want_x, &weights[i], dims[i], case.stride, with_bias(i).then_some(&biases[i][..]));
        assert_eq!(y.shape, want.shape, "{name}");
        let got = y.data.download().unwrap();
        assert_close(&format!("{name} y{i}"), &got, &want.values, allowed, why);
        match stats[i] {
            true => all.extend(check_partials(&format!("{name} y{i}"), y)),
            false => assert!(y.partials.is_none()),
        }
        let (dy, want_dy) = input(cuda, 1000 * index + 30 + i as u64, y.shape, None);
        convolved_back(&mut want_dx, &want_dy, &weights[i], dims[i], case.stride);
        let bias = |j: usize| if with_bias(i) { f64::from(biases[i][j % y.shape.c]) } else { 0.0 };
        let linear: Vec<f64> = got.iter().enumerate().map(|(j, &v)| f64::from(v) - bias(j)).collect();
        products.add(1.0, &linear, &want_dy.values);
        all.extend(got);
        dys.push(dy);
    }
    let dx = dgrad(&dys, &filters, x_shape, case.stride).unwrap().download().unwrap();
    assert_close(&format!("{name} dx"), &dx, &want_dx.values, allowed, why);
    let dx_exact: Vec<f64> = dx.iter().map(|&v| f64::from(v)).collect();
    products.add(-1.0, &dx_exact, &want_x.values);
    products.check(&name, allowed);
    all.extend(dx);
    all
}

#[test]
fn what_does_not_fit_is_refused() {
    on_devices(Precision::Half, &|cuda| {
        let (x, _) = input(cuda, 1, Shape::new(1, [2, 2, 2], 4), None);
        let weights = param(cuda, &uniform(Precision::Half, 2, 3 * 4 * 27));
        let filter =
            |i: usize, k: usize| DeviceFilter { weight: &weights, dims: [3, i, k, k, k], bias: None };
        assert!(fprop(&x, &[filter(4, 3)], 1, &[false]).is_ok());
        for (filters, stride, stats) in [
            (vec![], 1, vec![]),
            (vec![filter(4, 3); 3], 1, vec![false; 3]),
            (vec![filter(5, 3)], 1, vec![false]),
            (vec![filter(4, 2)], 1, vec![false]),
            (vec![filter(4, 3)], 3, vec![false]),
            (vec![filter(4, 3)], 1, vec![]),
        ] {
            let refused = fprop(&x, &filters, stride, &stats);
            assert!(matches!(refused, Err(Error::Shape { .. })), "{filters:?} {stride} {stats:?}");
            let refused = dgrad(&vec![x.clone(); stats.len()], &filters, x.shape, stride);
            assert!(matches!(refused, Err(Error::Shape { .. })), "{filters:?} {stride} {stats:?}");
        }
    });
}

/// The cases run with every instance of the kernel, and with warps that share channels, voxels and taps.
#[cfg(emulated)]
#[test]
fn cases_run_every_variant() {
    use spleen_hpc::device::cuda::{driver::Driver, emulated::Emulated};
    use spleen_hpc::ops::conv3d::plan::{Problem, VARIANTS, plan};
    let info = Emulated::new(0).info().clone();
    for precision in [Precision::Half, Precision::Single] {
        let plans = CASES.iter().flat_map(|case| {
            let out = case.space.map(|s| s.div_ceil(case.stride));
            let chunks = |c: usize| c.div_ceil(32 / precision.bytes());
            let groups = |c: usize| c.div_ceil(16);
            let p = Problem {
                precision,
                n: case.n,
                space: out,
                window: case.kernel,
                stride: case.stride,
                chunks: chunks(case.inputs),
                groups: case.outputs.iter().map(|&o| groups(o)).sum(),
            };
            let given = case.outputs.iter().map(|&o| chunks(o)).sum();
            let back = Problem { space: case.space, chunks: given, groups: groups(case.inputs), ..p };
            [Some(p), (case.stride == 1).then_some(back)]
        });
        let plans: Vec<_> = plans.flatten().map(|p| plan(&p, &VARIANTS, &info)).collect();
        for variant in &VARIANTS {
            let run = plans.iter().any(|p| p.variant == variant);
            assert!(run, "{} is not run with {precision:?}", variant.name);
        }
        for axis in 0..3 {
            let several = plans.iter().any(|p| p.warps[axis] > 1);
            assert!(several, "no case has several warps along axis {axis} with {precision:?}");
        }
    }
}
