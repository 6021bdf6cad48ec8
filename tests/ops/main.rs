//! Every op against loops in f64 that follow its formula, against finite differences, and against itself on every
//! vector unit and number of threads.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[path = "../amx_emulator/mod.rs"]
mod amx_emulator;
mod bits;
mod cases;
mod finished;
mod first_level;
mod layer;
mod stored;
mod winograd;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use cases::AMX_CASES;
use cases::CASES;
use layer::{Case, Layer};

use spleen_hpc::device::bf16::Operands;
use spleen_hpc::device::cpu::{Simd, amx, use_simd};
use spleen_hpc::ops::norm_prelu::{Affine, Running, Statistics, norm_prelu};
use spleen_hpc::ops::residual::{add, materialize};
use spleen_hpc::rng::Philox;
use spleen_hpc::tensor::{Activation, Grads, Param, ParamId, Pending, Shape, Tape, Tensor, ValueId};
use std::sync::Mutex;

/// A float32 sum of K random products is off by about sqrt(K) / 2 roundings of 2^-24 of its norm; K <= 9 * 160 here.
const CONV_TOLERANCE: f64 = 1e-6;

/// The most for gradients of weights, whose K may be larger: up to 64 sums, of 1,400 products each here, are added up.
const WGRAD_TOLERANCE: f64 = 2e-6;

/// The vector unit is one setting of the process: tests that switch it take turns.
static UNIT: Mutex<()> = Mutex::new(());

fn uniform(rng: &mut Philox, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.range(-1.0, 1.0) as f32).collect()
}

fn param(id: usize, shape: &[usize], rng: &mut Philox) -> Param {
    Param::new(ParamId(id), shape.to_vec(), uniform(rng, shape.iter().product()))
}

fn lazy(shape: Shape, rng: &mut Philox) -> Activation {
    let raw = Tensor::from_slice(shape, &uniform(rng, shape.len()));
    Activation::lazy(
        raw,
        Pending { scale: uniform(rng, shape.c).into(), shift: uniform(rng, shape.c).into(), slope: 0.3 },
    )
}

/// |a - b| / |b| in the Euclidean norm.
fn relative_error(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let (mut diff, mut norm) = (0.0, 0.0);
    for (&a, &b) in a.iter().zip(b) {
        diff += (f64::from(a) - b).powi(2);
        norm += b * b;
    }
    (diff / norm.max(1e-30)).sqrt()
}

#[test]
fn convolutions_match_their_definition() {
    let _turn = UNIT.lock().unwrap_or_else(|p| p.into_inner());
    use_simd(Simd::Avx512);
    let (mut filtered, mut filtered_in_steps) = ([0; 4], [[0; 4]; 3]);
    for (i, case) in CASES.iter().enumerate() {
        for operands in [Operands::Single, Operands::Bf16] {
            compare(i, case, operands);
        }
        case.filtering().into_iter().for_each(|filtering| filtered[filtering as usize] += 1);
        for (of_pass, filtering) in filtered_in_steps.iter_mut().zip(case.filtering_in_a_step()) {
            filtering.into_iter().for_each(|filtering| of_pass[filtering as usize] += 1);
        }
    }
    assert_eq!(filtered, FILTERED, "cases that multiply transforms of bfloat16");
    assert_eq!(filtered_in_steps, FILTERED_IN_STEPS, "cases that do in a training step");
}

/// Cases of stride 1, of stride 2, of scatters and of stride 1 in cubes that multiply transforms of bfloat16: none is to drop out
/// unseen.
const FILTERED: [usize; 4] = [12, 12, 8, 7];

/// Those that do in a training step, for outputs and for gradients of inputs and of weights.
const FILTERED_IN_STEPS: [[usize; 4]; 3] = [[19, 0, 0, 0], [19, 3, 5, 0], [12, 10, 0, 0]];

/// Products of bfloat16 are exact in f32, so sums of either operands are off by as much from those of the same factors.
fn compare(i: usize, case: &Case, operands: Operands) {
    let layer = Layer::new(case, i as u64);
    layer.poison(case, operands);
    let got = layer.run(case, operands);
    let want = layer.reference(case, operands);
    let check = |what: &str, got: &[f32], want: &[f64], tolerance: f64| {
        let error = relative_error(got, want);
        assert!(error < tolerance, "case {i}, {operands:?}, {what}: relative error {error:.2e}");
    };
    let many = ((case.anchors() as f64).sqrt() / 2.0 * 2f64.powi(-24)).clamp(CONV_TOLERANCE, WGRAD_TOLERANCE);
    got.y.iter().zip(&want.y).for_each(|(g, w)| check("y", g.data(), w, CONV_TOLERANCE));
    got.inferred
        .iter()
        .zip(&want.inferred)
        .for_each(|(g, w)| check("y of inference", g.data(), w, CONV_TOLERANCE));
    got.dx.iter().zip(&want.dx).for_each(|(g, w)| check("dx", g.data(), w, CONV_TOLERANCE));
    got.dw.iter().zip(&want.dw).for_each(|(g, w)| check("dw", g, w, many));
    got.db.iter().zip(&want.db).for_each(|(g, w)| check("db", g, w, CONV_TOLERANCE));
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[test]
fn convolutions_on_amx_match_their_definition() {
    let _turn = UNIT.lock().unwrap_or_else(|p| p.into_inner());
    amx_emulator::turn_on();
    let before = amx_emulator::emulated_products();
    for (i, case) in AMX_CASES.iter().chain(CASES).enumerate() {
        compare(i, case, Operands::Bf16);
    }
    let after = amx_emulator::emulated_products();
    assert!(amx() && (after.is_none() || after > before), "AMX multiplied");
    use_simd(Simd::Avx512);
}

/// An op on (x, parameters): its output and the ids of the x it read.
type Op<'a> = &'a dyn Fn(&mut Tape, &[f32], &[Param]) -> (Activation, Vec<ValueId>);

/// <op(x), r> in f64 for a random r, and its gradient by the tape.
fn directional(x: &[f32], params: &[Param], r: &[f32], op: Op) -> (f64, Vec<f32>, Grads) {
    let mut tape = Tape::recording();
    let (y, x_ids) = op(&mut tape, x, params);
    let y_value = materialize(&y).expect("fits");
    let value = y_value.data().iter().zip(r).map(|(y, r)| f64::from(*y) * f64::from(*r)).sum();
    let mut grads = Grads::new(params.iter().map(|p| p.value.len()));
    grads.set(y.id(), Tensor::from_slice(y.shape(), r));
    tape.backward(&mut grads).expect("fits");
    let dx = x_ids.iter().flat_map(|&id| grads.take(id).expect("has a gradient").data().to_vec()).collect();
    (value, dx, grads)
}

#[test]
fn norms_and_sums_match_finite_differences() {
    let shape = Shape::new(2, [3, 4, 5], 3);
    let running = Running::new(vec![0.1, -0.2, 0.3], vec![0.5, 1.0, 2.0]);
    for kind in 0..4 {
        let norm = |tape: &mut Tape, x: &Tensor, p: &[Param]| {
            let affine = Affine { gamma: Some(&p[0]), beta: Some(&p[1]), slope: Some(&p[2]) };
            let statistics = match kind {
                0 => Statistics::Batch,
                1 => Statistics::Instance,
                2 => Statistics::Fixed { running: &running, bias: None },
                _ => Statistics::Identity,
            };
            norm_prelu(tape, x, statistics, affine).expect("fits").0
        };
        let op = |tape: &mut Tape, x: &[f32], p: &[Param]| {
            let x = Tensor::from_slice(shape, x);
            let y = norm(tape, &x, p);
            // The sum reads y lazily and x as it is: both paths of a residual unit.
            let z = add(tape, &y, &x.clone().into(), Operands::Single).expect("fits");
            (z.into(), vec![x.id()])
        };
        let mut rng = Philox::new(11, kind);
        let x = uniform(&mut rng, shape.len());
        let params = [param(0, &[3], &mut rng), param(1, &[3], &mut rng), param(2, &[1], &mut rng)];
        let mut r = uniform(&mut rng, shape.len());
        // A difference across PReLU's kink is not its derivative: no weight on values a step can take there.
        let y = materialize(&norm(&mut Tape::off(), &Tensor::from_slice(shape, &x), &params)).expect("fits");
        r.iter_mut().zip(y.data()).filter(|(_, y)| y.abs() < 0.02).for_each(|(r, _)| *r = 0.0);
        let (_, dx, grads) = directional(&x, &params, &r, &op);
        // Central differences along random directions; h = 1e-3 leaves 1e-6 of truncation and about 1e-3 of
        // rounding (360 values of order 1 in f32, divided by 2 h).
        let h = 1e-3f32;
        for trial in 0..8 {
            let mut rng = Philox::keyed(12, &[kind, trial]);
            let direction = uniform(&mut rng, x.len());
            let dp: Vec<Vec<f32>> = params.iter().map(|p| uniform(&mut rng, p.value.len())).collect();
            let shifted = |sign: f32| {
                let x: Vec<f32> = x.iter().zip(&direction).map(|(x, d)| x + sign * h * d).collect();
                let move_param = |(p, d): (&Param, &Vec<f32>)| {
                    let value = p.value.iter().zip(d).map(|(p, d)| p + sign * h * d).collect();
                    Param::new(p.id, p.shape.clone(), value)
                };
                let params: Vec<_> = params.iter().zip(&dp).map(move_param).collect();
                directional(&x, &params, &r, &op).0
            };
            let numeric = (shifted(1.0) - shifted(-1.0)) / (2.0 * f64::from(h));
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            let tape = dot(&dx, &direction)
                + params.iter().zip(&dp).map(|(p, d)| dot(grads.param(p.id), d)).sum::<f64>();
            assert!((numeric - tape).abs() < 5e-3 * tape.abs().max(1.0), "kind {kind}: {numeric} and {tape}");
        }
    }
}
