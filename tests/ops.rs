//! Every op against loops in f64 that follow its formula, against finite differences, and against itself on every
//! vector unit and number of threads.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[path = "amx_emulator/mod.rs"]
mod amx_emulator;

use spleen_hpc::config::{Config, Net, Norm, Recipe};
use spleen_hpc::device::bf16::Operands;
use spleen_hpc::device::cpu::{Simd, amx, use_simd};
use spleen_hpc::nn::{Mode, UNet};
use spleen_hpc::ops::conv_transpose3d::conv_transpose3d;
use spleen_hpc::ops::conv3d::{Filter, conv3d};
use spleen_hpc::ops::norm_prelu::{Affine, Running, Statistics, norm_prelu};
use spleen_hpc::ops::residual::{add, materialize};
use spleen_hpc::rng::Philox;
use spleen_hpc::tensor::{Activation, Grads, Param, ParamId, Pending, Shape, Tape, Tensor, ValueId};
use spleen_hpc::train::trainer::Trainer;
use std::sync::Mutex;

/// A float32 sum of K random products is off by about sqrt(K) / 2 roundings of 2^-24 of its norm; K <= 27 * 40 here.
const CONV_TOLERANCE: f64 = 1e-6;

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
    Activation::lazy(raw, Pending { scale: uniform(rng, shape.c), shift: uniform(rng, shape.c), slope: 0.3 })
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

/// One layer: inputs to concatenate, filters side by side, geometry.
struct Case {
    n: usize,
    space: [usize; 3],
    inputs: &'static [usize],
    outputs: &'static [usize],
    kernel: usize,
    stride: usize,
    transposed: bool,
}

const fn conv(
    space: [usize; 3],
    input: &'static [usize],
    outputs: &'static [usize],
    kernel: usize,
    stride: usize,
) -> Case {
    Case { n: 2, space, inputs: input, outputs, kernel, stride, transposed: false }
}

const fn transposed(space: [usize; 3], inputs: &'static [usize], outputs: &'static [usize]) -> Case {
    Case { n: 2, space, inputs, outputs, kernel: 3, stride: 2, transposed: true }
}

/// Odd sizes, sizes of one, thin and wide channels, block tails (33 = 32 + 1, 20 = 16 + 4), siblings and concats.
const CASES: &[Case] = &[
    conv([5, 6, 7], &[3], &[5], 3, 1),
    conv([5, 6, 7], &[3], &[4, 6], 3, 2),
    conv([1, 2, 1], &[2], &[2], 3, 1),
    conv([2, 1, 3], &[2], &[2], 3, 2),
    conv([4, 3, 37], &[2], &[2], 3, 1),
    conv([3, 2, 50], &[1], &[3], 3, 1),
    conv([2, 3, 100], &[2], &[2], 3, 1),
    conv([2, 2, 45], &[16], &[16], 3, 1),
    conv([2, 3, 27], &[32], &[48], 3, 1),
    conv([4, 4, 16], &[33], &[20], 3, 1),
    conv([3, 4, 13], &[16], &[16, 16], 3, 2),
    conv([9, 10, 12], &[1], &[16, 16], 3, 2),
    conv([3, 3, 3], &[40], &[64], 3, 1),
    conv([3, 5, 6], &[18], &[70], 1, 1),
    transposed([3, 4, 5], &[4], &[3]),
    transposed([2, 3, 4], &[5, 3], &[16]),
    transposed([2, 2, 20], &[16, 16], &[2]),
    transposed([1, 2, 35], &[16, 16], &[2]),
    transposed([2, 1, 17], &[3], &[3]),
    transposed([1, 1, 1], &[34], &[33]),
    // Fewer products (channels by the dozen, H and W of two and more): block tails, siblings, a second slab of planes; and
    // volumes too flat for that.
    conv([13, 10, 9], &[25], &[24], 3, 1),
    conv([2, 9, 8], &[12], &[16, 9], 3, 1),
    conv([14, 40, 30], &[8], &[8], 3, 1),
    conv([3, 1, 20], &[33], &[20], 3, 1),
    // More tiles than tasks, the last ones clipped: neighbours share planes.
    conv([68, 37, 3], &[20], &[18], 3, 1),
    conv([68, 37, 17], &[3], &[2], 3, 1),
    conv([68, 37, 3], &[2], &[2], 3, 1),
    conv([70, 66, 3], &[17], &[5], 3, 2),
    transposed([38, 35, 2], &[3, 4], &[5]),
    transposed([38, 35, 17], &[3], &[2]),
];

/// Index of voxel (n, d, h, w), channel c; `None` outside.
fn at(s: Shape, n: usize, v: [isize; 3], c: usize) -> Option<usize> {
    let inside = v.iter().zip(s.space()).all(|(&v, s)| v >= 0 && (v as usize) < s);
    let [d, h, w] = v.map(|v| v as usize);
    inside.then(|| (((n * s.d + d) * s.h + h) * s.w + w) * s.c + c)
}

/// Calls `f(x voxel index, y voxel index, n, tap)` for every product of the layer, from the definition of a
/// convolution: y[o] += x[o s + t - p] w[t]; a transposed one swaps the roles of x and y.
fn each_product(case: &Case, x: Shape, y: Shape, mut f: impl FnMut(usize, [isize; 3], [isize; 3], usize)) {
    let (fine, coarse) = if case.transposed { (y, x) } else { (x, y) };
    let (k, s, p) = (case.kernel as isize, case.stride as isize, (case.kernel / 2) as isize);
    for n in 0..x.n {
        for o in 0..coarse.voxels() {
            let o = [o / (coarse.h * coarse.w), o / coarse.w % coarse.h, o % coarse.w].map(|v| v as isize);
            for t in 0..k * k * k {
                let tap = [t / (k * k), t / k % k, t % k];
                let i: [isize; 3] = std::array::from_fn(|a| o[a] * s + tap[a] - p);
                if at(fine, n, i, 0).is_some() {
                    let (xv, yv) = if case.transposed { (o, i) } else { (i, o) };
                    f(n, xv, yv, t as usize);
                }
            }
        }
    }
}

/// Everything a layer computes: outputs in training and in inference, dx of each input, dw and db of each filter.
struct Results {
    y: Vec<Tensor>,
    inferred: Vec<Tensor>,
    dx: Vec<Tensor>,
    dw: Vec<Vec<f32>>,
    db: Vec<Vec<f32>>,
}

struct Layer {
    inputs: Vec<Activation>,
    weights: Vec<Param>,
    biases: Vec<Param>,
    dy: Vec<Tensor>,
}

impl Layer {
    fn new(case: &Case, seed: u64) -> Self {
        let mut rng = Philox::new(seed, 0);
        let inputs: Vec<_> =
            case.inputs.iter().map(|&c| lazy(Shape::new(case.n, case.space, c), &mut rng)).collect();
        let (cin, k) = (case.inputs.iter().sum(), case.kernel);
        let mut layer = Layer { inputs, weights: vec![], biases: vec![], dy: vec![] };
        for (i, &o) in case.outputs.iter().enumerate() {
            let shape = if case.transposed { [cin, o, k, k, k] } else { [o, cin, k, k, k] };
            layer.weights.push(param(2 * i, &shape, &mut rng));
            layer.biases.push(param(2 * i + 1, &[o], &mut rng));
            let space = case.space.map(|s| if case.transposed { 2 * s } else { s.div_ceil(case.stride) });
            let shape = Shape::new(case.n, space, o);
            layer.dy.push(Tensor::from_slice(shape, &uniform(&mut rng, shape.len())));
        }
        layer
    }

    fn forward(&self, case: &Case, tape: &mut Tape) -> Vec<Tensor> {
        if case.transposed {
            let inputs: Vec<_> = self.inputs.iter().collect();
            vec![conv_transpose3d(tape, &inputs, &self.weights[0], Some(&self.biases[0])).expect("fits")]
        } else {
            let pairs = self.weights.iter().zip(&self.biases);
            let filters: Vec<_> = pairs.map(|(weight, b)| Filter { weight, bias: Some(b) }).collect();
            conv3d(tape, &self.inputs[0], &filters, case.stride).expect("fits")
        }
    }

    fn run(&self, case: &Case, operands: Operands) -> Results {
        let (mut tape, mut off) = (Tape::recording(), Tape::off());
        (tape.operands, off.operands) = (operands, operands);
        let y = self.forward(case, &mut tape);
        let inferred = self.forward(case, &mut off);
        let params: Vec<_> = self.weights.iter().zip(&self.biases).flat_map(|(w, b)| [w, b]).collect();
        let mut grads = Grads::new(params.iter().map(|p| p.value.len()));
        y.iter().zip(&self.dy).for_each(|(y, dy)| grads.set(y.id(), dy.clone()));
        tape.backward(&mut grads).expect("fits");
        Results {
            dx: self.inputs.iter().map(|x| grads.take(x.id()).expect("has a gradient")).collect(),
            dw: self.weights.iter().map(|w| grads.param(w.id).to_vec()).collect(),
            db: self.biases.iter().map(|b| grads.param(b.id).to_vec()).collect(),
            y,
            inferred,
        }
    }

    /// The same from the definition, in f64: (y of each filter, dx of each input, dw and db of each filter).
    #[allow(clippy::type_complexity)]
    fn reference(
        &self,
        case: &Case,
        operands: Operands,
    ) -> (Vec<Vec<f64>>, Vec<Vec<f64>>, Vec<Vec<f64>>, Vec<Vec<f64>>) {
        // Every factor as it is multiplied.
        let factor = |v: f32| match operands {
            Operands::Single => f64::from(v),
            Operands::Bf16 => half::bf16::from_f32(v).to_f64(),
        };
        let x: Vec<Vec<f64>> = self
            .inputs
            .iter()
            .map(|x| {
                let p = x.pending().expect("inputs are lazy");
                // Mapped in f32, as it is stored.
                let value = |(i, &v): (usize, &f32)| {
                    let c = i % x.shape().c;
                    let z = v * p.scale[c] + p.shift[c];
                    factor(if z > 0.0 { z } else { p.slope * z })
                };
                x.raw().data().iter().enumerate().map(value).collect()
            })
            .collect();
        let mut dx: Vec<Vec<f64>> = x.iter().map(|x| vec![0.0; x.len()]).collect();
        let (mut ys, mut dws, mut dbs) = (vec![], vec![], vec![]);
        let (cin, taps) = (case.inputs.iter().sum::<usize>(), case.kernel.pow(3));
        for ((w, b), dy) in self.weights.iter().zip(&self.biases).zip(&self.dy) {
            let shape = dy.shape();
            let mut y: Vec<f64> = (0..shape.len()).map(|i| b.value[i % shape.c].into()).collect();
            let mut dw = vec![0.0; w.value.len()];
            let mut db = vec![0.0; shape.c];
            dy.data().iter().enumerate().for_each(|(i, &v)| db[i % shape.c] += f64::from(v));
            each_product(case, self.inputs[0].shape(), shape, |n, xv, yv, tap| {
                let mut first = 0;
                for (input, (x, dx)) in self.inputs.iter().zip(x.iter().zip(&mut dx)) {
                    for ci in 0..input.shape().c {
                        for co in 0..shape.c {
                            let i = first + ci;
                            let pair = if case.transposed { i * shape.c + co } else { co * cin + i };
                            let wi = pair * taps + tap;
                            let xi = at(input.shape(), n, xv, ci).expect("inside");
                            let yi = at(shape, n, yv, co).expect("inside");
                            y[yi] += x[xi] * factor(w.value[wi]);
                            dw[wi] += x[xi] * factor(dy.data()[yi]);
                            dx[xi] += factor(dy.data()[yi]) * factor(w.value[wi]);
                        }
                    }
                    first += input.shape().c;
                }
            });
            ys.push(y);
            dws.push(dw);
            dbs.push(db);
        }
        (ys, dx, dws, dbs)
    }
}

#[test]
fn convolutions_match_their_definition() {
    for (i, case) in CASES.iter().enumerate() {
        for operands in [Operands::Single, Operands::Bf16] {
            compare(i, case, operands);
        }
    }
}

/// Products of bfloat16 are exact in f32, so sums of either operands are off by as much.
fn compare(i: usize, case: &Case, operands: Operands) {
    let layer = Layer::new(case, i as u64);
    let got = layer.run(case, operands);
    let (y, dx, dw, db) = layer.reference(case, operands);
    let check = |what: &str, got: &[f32], want: &[f64]| {
        let error = relative_error(got, want);
        assert!(error < CONV_TOLERANCE, "case {i}, {operands:?}, {what}: relative error {error:.2e}");
    };
    got.y.iter().zip(&y).for_each(|(g, w)| check("y", g.data(), w));
    got.inferred.iter().zip(&y).for_each(|(g, w)| check("y of inference", g.data(), w));
    got.dx.iter().zip(&dx).for_each(|(g, w)| check("dx", g.data(), w));
    got.dw.iter().zip(&dw).for_each(|(g, w)| check("dw", g, w));
    got.db.iter().zip(&db).for_each(|(g, w)| check("db", g, w));
}

/// A small network in inference, and one training step of it: every logit and gradient.
fn network_bits(norm: Norm, operands: Operands) -> Vec<u32> {
    let mut net = UNet::new(&Net { norm, channels: vec![4, 18, 33] }, 5).expect("a valid network");
    net.set_operands(operands);
    let shape = Shape::new(2, [8, 12, 20], 1);
    let x = Tensor::from_slice(shape, &uniform(&mut Philox::new(1, 1), shape.len()));
    let (inferred, _) = net.forward(&mut Tape::off(), x.clone(), Mode::Eval, None).expect("fits");
    let mut tape = Tape::recording();
    let (logits, _) = net.forward(&mut tape, x, Mode::Train, None).expect("fits");
    let mut grads = net.grads();
    grads.set(logits.id(), logits.clone());
    tape.backward(&mut grads).expect("fits");
    let params = (0..net.params().len()).flat_map(|i| grads.param(ParamId(i)));
    inferred.data().iter().chain(logits.data()).chain(params).map(|v| v.to_bits()).collect()
}

/// Two training steps of the same network, so that the second reads what the first wrote: losses, parameters and
/// the optimizer's moments.
fn training_bits(norm: Norm, operands: Operands) -> Vec<u64> {
    let recipe = Config::for_recipe(Recipe::Seed);
    let net = Net { norm, channels: vec![4, 18, 33] };
    let mut trainer = Trainer::new(&net, recipe.loss, recipe.optim, 5).expect("a valid network");
    trainer.net.set_operands(operands);
    let shape = [2, 8, 12, 20];
    let images = uniform(&mut Philox::new(1, 2), shape.iter().product());
    let labels: Vec<u8> = images.iter().map(|&v| u8::from(v > 0.3)).collect();
    let losses = [0; 2].map(|_| trainer.step(&images, &labels, shape).expect("finite").to_bits());
    let (moments, _) = trainer.optimizer_state().expect("on the CPU");
    let moments = moments.iter().flat_map(|m| m.exp_avg.iter().chain(&m.exp_avg_sq));
    let params = trainer.net.params().iter().flat_map(|p| p.value.iter());
    let values = params.chain(moments).map(|v| u64::from(v.to_bits()));
    losses.into_iter().chain(values).collect()
}

/// Every bit of a layer's outputs and gradients.
fn layer_bits(case: &Case, operands: Operands) -> Vec<u32> {
    let r = Layer::new(case, 3).run(case, operands);
    let tensors = r.y.iter().chain(&r.inferred).chain(&r.dx).map(Tensor::data);
    let params = r.dw.iter().chain(&r.db).map(Vec::as_slice);
    tensors.chain(params).flatten().map(|v| v.to_bits()).collect()
}

#[test]
fn bits_of_layers_do_not_depend_on_the_vector_unit() {
    let _turn = UNIT.lock().unwrap_or_else(|p| p.into_inner());
    use_simd(Simd::Avx512);
    for (i, case) in CASES.iter().enumerate() {
        for operands in [Operands::Single, Operands::Bf16] {
            let want = layer_bits(case, operands);
            for unit in [Simd::Avx2, Simd::Portable] {
                use_simd(unit);
                let got = layer_bits(case, operands);
                use_simd(Simd::Avx512);
                assert!(got == want, "case {i}, {operands:?}: {unit:?} changes the result");
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads_or_vector_unit() {
    let _turn = UNIT.lock().unwrap_or_else(|p| p.into_inner());
    use_simd(Simd::Avx512);
    for (norm, operands) in
        [(Norm::Batch, Operands::Single), (Norm::Instance, Operands::Single), (Norm::Batch, Operands::Bf16)]
    {
        let want = network_bits(norm, operands);
        for threads in [1, 2, 4] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            assert!(
                pool.install(|| network_bits(norm, operands)) == want,
                "{norm:?}, {operands:?}: {threads} threads change the result"
            );
        }
        for unit in [Simd::Avx2, Simd::Portable] {
            use_simd(unit);
            let got = network_bits(norm, operands);
            use_simd(Simd::Avx512);
            assert!(got == want, "{norm:?}, {operands:?}: {unit:?} changes the result");
        }
    }
}

#[test]
fn bits_of_training_do_not_depend_on_the_vector_unit() {
    let _turn = UNIT.lock().unwrap_or_else(|p| p.into_inner());
    use_simd(Simd::Avx512);
    for norm in [Norm::Batch, Norm::Instance] {
        for operands in [Operands::Single, Operands::Bf16] {
            let want = training_bits(norm, operands);
            for unit in [Simd::Avx2, Simd::Portable] {
                use_simd(unit);
                let got = training_bits(norm, operands);
                use_simd(Simd::Avx512);
                assert!(got == want, "{norm:?}, {operands:?}: {unit:?} changes the result");
            }
        }
    }
}

/// Layers that fill tiles of AMX: whole and broken blocks of channels, rows shorter and longer than 16 voxels, both
/// strides, several sources, more channels than one halo tile holds.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
const AMX_CASES: &[Case] = &[
    conv([3, 4, 24], &[16], &[16], 3, 1),
    conv([2, 3, 50], &[16], &[32], 3, 1),
    conv([6, 6, 6], &[32], &[48], 3, 1),
    conv([5, 7, 9], &[20], &[18], 3, 1),
    conv([5, 6, 33], &[16], &[32, 32], 3, 2),
    conv([4, 4, 12], &[40], &[24], 3, 2),
    conv([3, 3, 4], &[160], &[16], 3, 1),
    conv([3, 5, 6], &[40], &[70], 1, 1),
    transposed([3, 3, 6], &[32, 32], &[16]),
    transposed([2, 3, 17], &[16, 24], &[33]),
    transposed([1, 1, 1], &[34], &[33]),
    transposed([2, 3, 5], &[16, 16], &[1]),
    transposed([3, 2, 19], &[16, 16], &[2]),
    transposed([2, 2, 6], &[40], &[4]),
    conv([5, 6, 27], &[1], &[16, 16], 3, 2),
    conv([4, 3, 10], &[1], &[24], 3, 1),
    conv([4, 3, 9], &[2], &[18], 3, 1),
    transposed([2, 3, 14], &[16, 16], &[2]),
    conv([3, 4, 40], &[2], &[2], 3, 1),
    conv([2, 9, 21], &[2], &[1], 3, 1),
];

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

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[test]
fn bits_on_amx_do_not_depend_on_threads() {
    let _turn = UNIT.lock().unwrap_or_else(|p| p.into_inner());
    amx_emulator::turn_on();
    let bits = [1, 2, 4].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        let layers =
            || AMX_CASES.iter().flat_map(|case| layer_bits(case, Operands::Bf16)).collect::<Vec<_>>();
        pool.install(|| (network_bits(Norm::Batch, Operands::Bf16), layers()))
    });
    use_simd(Simd::Avx512);
    assert!(bits[1..].iter().all(|b| *b == bits[0]));
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
            let z = add(tape, &y, &x.clone().into()).expect("fits");
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
