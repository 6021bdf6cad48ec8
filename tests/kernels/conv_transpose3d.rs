//! Transposed convolutions: fprop with its statistics, dgrad.

use crate::conv_reference::{
    Field, Products, Schedules, check_partials, convolved, convolved_back, input, param, tolerance,
};
use crate::harness::{assert_close, on_every_device, uniform};
use spleen_hpc::device::cuda::Cuda;
use spleen_hpc::ops::conv_transpose3d::cuda::{dgrad, fprop};
use spleen_hpc::tensor::Shape;
use std::sync::Arc;

struct Case {
    n: usize,
    space: [usize; 3],
    inputs: &'static [usize],
    outputs: usize,
    bias: bool,
    pending: Option<bool>,
}

const CASES: &[Case] = &[
    Case { n: 1, space: [5, 6, 9], inputs: &[16, 16], outputs: 2, bias: false, pending: Some(false) },
    Case { n: 3, space: [2, 3, 5], inputs: &[32, 32], outputs: 2, bias: true, pending: Some(true) },
    Case { n: 1, space: [2, 3, 2], inputs: &[7], outputs: 1, bias: false, pending: None },
    Case { n: 1, space: [4, 5, 6], inputs: &[32, 32], outputs: 16, bias: false, pending: Some(false) },
    Case { n: 2, space: [3, 4, 3], inputs: &[64, 64], outputs: 32, bias: false, pending: Some(true) },
    Case { n: 1, space: [1, 2, 2], inputs: &[128, 256], outputs: 64, bias: true, pending: None },
    Case { n: 3, space: [2, 1, 3], inputs: &[5, 4], outputs: 6, bias: false, pending: Some(true) },
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

/// y is what the adjoint of a convolution of stride 2 makes of x, dx what the convolution makes of dy: the weights
/// (I, O, 3, 3, 3) are those of a convolution from O to I channels.
fn check(cuda: &Arc<Cuda>, index: u64, case: &Case) -> Vec<f32> {
    let p = cuda.precision();
    let (allowed, why) = tolerance(p);
    let name = format!("[{}, {:?}, {:?}] -> {} {p:?}", case.n, case.space, case.inputs, case.outputs);
    let total: usize = case.inputs.iter().sum();
    let dims = [total, case.outputs, 3, 3, 3];
    let weights = uniform(p, 7000 + index, dims.iter().product());
    let bias = uniform(p, 8000 + index, case.outputs);
    let (w, b) = (param(cuda, &weights), param(cuda, &bias));
    let x_shape = |c: usize| Shape::new(case.n, case.space, c);
    let (views, fields): (Vec<_>, Vec<_>) = case
        .inputs
        .iter()
        .zip(0..)
        .map(|(&c, i)| input(cuda, 9000 + 10 * index + i, x_shape(c), case.pending))
        .unzip();
    let cat = concatenated(&fields, x_shape(total));
    let y_shape = Shape::new(case.n, case.space.map(|s| 2 * s), case.outputs);
    let values = (0..y_shape.len()).map(|i| if case.bias { f64::from(bias[i % case.outputs]) } else { 0.0 });
    let mut want = Field { shape: y_shape, values: values.collect() };
    convolved_back(&mut want, &cat, &weights, dims, 2);

    let inputs: Vec<_> = views.iter().collect();
    let y = fprop(&inputs, &w, dims, case.bias.then_some(&b), !case.bias).unwrap();
    assert_eq!(y.shape, y_shape, "{name}");
    let mut all = y.data.download().unwrap();
    assert_close(&format!("{name} y"), &all, &want.values, allowed, why);
    let bias = |i: usize| if case.bias { f64::from(bias[i % case.outputs]) } else { 0.0 };
    let linear: Vec<f64> = all.iter().enumerate().map(|(i, &v)| f64::from(v) - bias(i)).collect();
    if !case.bias {
        all.extend(check_partials(&name, &y));
    }

    let (dy, want_dy) = input(cuda, 9500 + index, y_shape, None);
    let want_dx = convolved(&want_dy, &weights, dims, 2, None);
    let dxs = dgrad(&dy, &w, dims, case.inputs).unwrap();
    let mut products = Products::default();
    products.add(1.0, &linear, &want_dy.values);
    let mut first = 0;
    for ((dx, &c), x) in dxs.iter().zip(case.inputs).zip(&fields) {
        let own: Vec<f64> = want_dx.values.chunks(total).flat_map(|v| v[first..first + c].to_vec()).collect();
        let dx = dx.download().unwrap();
        assert_close(&format!("{name} dx from {first}"), &dx, &own, allowed, why);
        let exact: Vec<f64> = dx.iter().map(|&v| f64::from(v)).collect();
        products.add(-1.0, &exact, &x.values);
        all.extend(dx);
        first += c;
    }
    products.check(&name, allowed);
    all
}

fn concatenated(fields: &[Field], shape: Shape) -> Field {
    let voxels = shape.n * shape.voxels();
    let of_voxel = |v: usize, f: &Field| f.values[v * f.shape.c..(v + 1) * f.shape.c].to_vec();
    let values = (0..voxels).flat_map(|v| fields.iter().flat_map(move |f| of_voxel(v, f))).collect();
    Field { shape, values }
}
