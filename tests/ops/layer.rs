//! A layer of a convolution, by the library and by its definition in f64.

use crate::winograd::{self, Filtering};
use crate::{lazy, param, uniform};
use spleen_hpc::device::arena::Buffer;
use spleen_hpc::device::bf16::Operands;
use spleen_hpc::device::cpu::amx;
use spleen_hpc::device::list::List;
use spleen_hpc::ops::conv::Epilogue;
use spleen_hpc::ops::conv_transpose3d::{conv_transpose3d, conv_transpose3d_finished};
use spleen_hpc::ops::conv3d::{Filter, conv3d, conv3d_finished};
use spleen_hpc::rng::Philox;
use spleen_hpc::tensor::{Activation, Grads, Param, Pending, Shape, Tape, Tensor, Values};

/// One layer: inputs to concatenate, filters side by side, geometry.
pub struct Case {
    n: usize,
    space: [usize; 3],
    inputs: &'static [usize],
    outputs: &'static [usize],
    kernel: usize,
    stride: usize,
    transposed: bool,
}

pub const fn conv(
    space: [usize; 3],
    input: &'static [usize],
    outputs: &'static [usize],
    kernel: usize,
    stride: usize,
) -> Case {
    Case { n: 2, space, inputs: input, outputs, kernel, stride, transposed: false }
}

pub const fn transposed(space: [usize; 3], inputs: &'static [usize], outputs: &'static [usize]) -> Case {
    Case { n: 2, space, inputs, outputs, kernel: 3, stride: 2, transposed: true }
}

/// From which on backward passes of stride 2 are worth the transform of their filters.
const MIN_ANCHORS: usize = 256;

impl Case {
    /// The same of one sample.
    pub const fn alone(self) -> Self {
        Case { n: 1, ..self }
    }

    /// (D, H, W) of an output.
    fn out_space(&self) -> [usize; 3] {
        self.space.map(|s| if self.transposed { 2 * s } else { s.div_ceil(self.stride) })
    }

    /// (D, H, W) of the coarser side, x or y.
    fn coarse_space(&self) -> [usize; 3] {
        if self.transposed { self.space } else { self.out_space() }
    }

    /// Its voxels in all samples: the products that a gradient of a weight sums.
    pub fn anchors(&self) -> usize {
        self.n * self.coarse_space().iter().product::<usize>()
    }

    /// How vector units multiply transforms of bfloat16 in inference, `None` where they do not. AMX, if it is on, does not.
    pub fn filtering(&self) -> Option<Filtering> {
        let [inputs, outputs] = [self.inputs, self.outputs].map(|c| c.iter().sum::<usize>());
        let filtering = Filtering::of(self.stride, self.transposed);
        let pays = self.kernel == 3 && !amx() && filtering.pays(self.out_space(), inputs, outputs);
        let cubes = filtering.is_of_cubes(self.out_space(), inputs, outputs);
        pays.then_some(if cubes { Filtering::Cubes } else { filtering })
    }

    /// The same of a training step, for y, dx and dw: of stride 2 not for y, and with [`MIN_ANCHORS`] or more; dx where all anchors
    /// have all their outputs, dw where pairs of tiles pay as well.
    pub fn filtering_in_a_step(&self) -> [Option<Filtering>; 3] {
        let many = self.stride == 1 || self.anchors() >= MIN_ANCHORS;
        if self.kernel != 3 || amx() || !many {
            return [None; 3];
        }
        let [inputs, outputs] = [self.inputs, self.outputs].map(|c| c.iter().sum::<usize>());
        let back = Filtering::of(self.stride, !self.transposed);
        let whole = back != Filtering::Scattered || self.space.iter().all(|s| s.is_multiple_of(2));
        let dx = whole && back.pays(self.space, inputs, outputs);
        let (gather, coarse @ [d, h, w]) = (Filtering::of(self.stride, false), self.coarse_space());
        let pairs = [d, h, w.next_multiple_of(4)];
        let dw = gather.pays(coarse, inputs, outputs) && gather.saves(pairs, coarse);
        let forward = Filtering::of(self.stride, self.transposed);
        let y = self.filtering().is_some() && forward == Filtering::Dense;
        [y.then_some(forward), dx.then_some(back), dw.then_some(gather)]
    }
}

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

/// The f32 value of bfloat16's bits.
pub fn widened(bits: &u16) -> f32 {
    half::bf16::from_bits(*bits).to_f32()
}

/// Values rounded to bfloat16 and stored as such or as f32.
pub fn rounded(x: &Tensor, stored: Operands) -> Tensor {
    let bits: Vec<u16> = x.data().iter().map(|&v| half::bf16::from_f32(v).to_bits()).collect();
    if stored == Operands::Single {
        return Tensor::from_slice(x.shape(), &bits.iter().map(widened).collect::<Vec<_>>());
    }
    let pair = |b: &[u16]| f32::from_bits(u32::from(b[0]) | b.get(1).map_or(0, |&b| u32::from(b) << 16));
    Tensor::bf16(x.shape(), Buffer::from_slice(&bits.chunks(2).map(pair).collect::<Vec<_>>()))
}

/// The bits of values, of bfloat16 ones as they are.
pub fn bits(x: &Tensor) -> Vec<u32> {
    match x.values() {
        Values::Single(x) => x.iter().map(|v| v.to_bits()).collect(),
        Values::Bf16(x) => x.iter().map(|&v| v.into()).collect(),
    }
}

/// Everything a layer computes: outputs in training and in inference, dx of each input, dw and db of each filter.
pub struct Results {
    pub y: List<Tensor>,
    pub inferred: List<Tensor>,
    pub dx: Vec<Tensor>,
    pub dw: Vec<Vec<f32>>,
    pub db: Vec<Vec<f32>>,
}

/// [`Results`] in f64.
pub struct Reference {
    pub y: Vec<Vec<f64>>,
    pub inferred: Vec<Vec<f64>>,
    pub dx: Vec<Vec<f64>>,
    pub dw: Vec<Vec<f64>>,
    pub db: Vec<Vec<f64>>,
}

pub struct Layer {
    inputs: Vec<Activation>,
    weights: Vec<Param>,
    biases: Vec<Param>,
    dy: Vec<Tensor>,
    /// Norm and PReLU of each output.
    maps: Vec<Pending>,
}

impl Layer {
    pub fn new(case: &Case, seed: u64) -> Self {
        let mut rng = Philox::new(seed, 0);
        let inputs: Vec<_> =
            case.inputs.iter().map(|&c| lazy(Shape::new(case.n, case.space, c), &mut rng)).collect();
        let (cin, k) = (case.inputs.iter().sum(), case.kernel);
        let mut layer = Layer { inputs, weights: vec![], biases: vec![], dy: vec![], maps: vec![] };
        for (i, &o) in case.outputs.iter().enumerate() {
            let shape = if case.transposed { [cin, o, k, k, k] } else { [o, cin, k, k, k] };
            layer.weights.push(param(2 * i, &shape, &mut rng));
            layer.biases.push(param(2 * i + 1, &[o], &mut rng));
            let shape = Shape::new(case.n, case.out_space(), o);
            layer.dy.push(Tensor::from_slice(shape, &uniform(&mut rng, shape.len())));
            layer.maps.push(Pending {
                scale: uniform(&mut rng, o).into(),
                shift: uniform(&mut rng, o).into(),
                slope: 0.3,
            });
        }
        layer
    }

    /// The same layer of inputs that have nothing pending: values of bfloat16, stored as they are or as f32.
    pub fn of_rounded_inputs(mut self, stored: Operands) -> Self {
        self.inputs.iter_mut().for_each(|x| *x = rounded(x.raw(), stored).into());
        self
    }

    /// The same, and gradients of outputs of such values; input and output i are stored as `stored(i)`.
    pub fn of_rounded_values(mut self, stored: fn(usize) -> Operands) -> Self {
        self.inputs.iter_mut().enumerate().for_each(|(i, x)| *x = rounded(x.raw(), stored(i)).into());
        self.dy.iter_mut().enumerate().for_each(|(i, dy)| *dy = rounded(dy, stored(i)));
        self
    }

    /// Leaves NaN in all scratch that passes like these will find.
    pub fn poison(&self, case: &Case, operands: Operands) {
        let nan = |shape: Shape| Tensor::from_slice(shape, &vec![f32::NAN; shape.len()]);
        let input = |x: &Activation| {
            let p = x.pending().expect("inputs are lazy");
            let pending = Pending { scale: p.scale.clone(), shift: p.shift.clone(), slope: p.slope };
            Activation::lazy(nan(x.shape()), pending)
        };
        let inputs = self.inputs.iter().map(input).collect();
        let dy = self.dy.iter().map(|dy| nan(dy.shape())).collect();
        let [weights, biases] = [&self.weights, &self.biases].map(Vec::clone);
        Layer { inputs, weights, biases, dy, maps: vec![] }.run(case, operands);
    }

    /// Outputs in inference.
    pub fn inferred(&self, case: &Case, operands: Operands) -> List<Tensor> {
        let mut off = Tape::off();
        off.operands = operands;
        self.forward(case, &mut off)
    }

    /// A summand for every output, with nothing pending, of values of bfloat16.
    pub fn summands(&self, stored: Operands) -> Vec<Activation> {
        self.dy.iter().map(|dy| rounded(dy, stored).into()).collect()
    }

    /// Outputs in inference, finished by the layer's maps or none and by these summands, if there are any.
    pub fn finished(
        &self,
        case: &Case,
        operands: Operands,
        mapped: bool,
        plus: &[Activation],
        stored: Operands,
    ) -> List<Tensor> {
        let epilogue =
            |i: usize| Epilogue { map: mapped.then_some(&self.maps[i]), plus: plus.get(i), stored };
        let epilogues: Vec<_> = (0..self.weights.len()).map(epilogue).collect();
        if case.transposed {
            let inputs: Vec<_> = self.inputs.iter().collect();
            let (weight, bias) = (&self.weights[0], Some(&self.biases[0]));
            let y = conv_transpose3d_finished(&inputs, weight, bias, epilogues[0], operands);
            return List::of_one(y.expect("fits"));
        }
        let layers: Vec<_> = self.filters().into_iter().zip(epilogues).collect();
        conv3d_finished(&self.inputs[0], &layers, case.stride, operands).expect("fits")
    }

    /// One value of output `i` after the layer's map, in f32, step by step.
    pub fn mapped(&self, i: usize, channel: usize, value: f32) -> f32 {
        let z = value * self.maps[i].scale[channel] + self.maps[i].shift[channel];
        if z > 0.0 { z } else { self.maps[i].slope * z }
    }

    fn filters(&self) -> Vec<Filter<'_>> {
        let pairs = self.weights.iter().zip(&self.biases);
        pairs.map(|(weight, b)| Filter { weight, bias: Some(b) }).collect()
    }

    fn forward(&self, case: &Case, tape: &mut Tape) -> List<Tensor> {
        if case.transposed {
            let inputs: Vec<_> = self.inputs.iter().collect();
            let y = conv_transpose3d(tape, &inputs, &self.weights[0], Some(&self.biases[0]));
            List::of_one(y.expect("fits"))
        } else {
            conv3d(tape, &self.inputs[0], &self.filters(), case.stride).expect("fits")
        }
    }

    pub fn run(&self, case: &Case, operands: Operands) -> Results {
        let mut tape = Tape::recording();
        tape.operands = operands;
        let y = self.forward(case, &mut tape);
        let inferred = self.inferred(case, operands);
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

    /// The same from the definition, in f64.
    pub fn reference(&self, case: &Case, operands: Operands) -> Reference {
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
        let mut result = Reference { inferred: ys.clone(), y: ys, dx, dw: dws, db: dbs };
        if operands == Operands::Single {
            return result;
        }
        // The same sums of other products.
        let outputs: usize = case.outputs.iter().sum();
        let value = |o: usize, c: usize, tap: usize| {
            let (mut filter, mut o) = (0, o);
            while o >= case.outputs[filter] {
                o -= case.outputs[filter];
                filter += 1;
            }
            let pair = if case.transposed { c * case.outputs[filter] + o } else { o * cin + c };
            self.weights[filter].value[pair * taps + tap]
        };
        let spaces @ [space, out_space] = [case.space, case.out_space()];
        let x = side_by_side(x.iter().zip(case.inputs).map(|(x, &c)| (&x[..], c)));
        let [in_step, of_inputs, of_weights] = case.filtering_in_a_step();
        let filtered = |filtering: Filtering| {
            let y = winograd::correlate(filtering, case.n, spaces, (&x, cin), outputs, value);
            let mut ys = apart(&y, case.outputs);
            for (y, b) in ys.iter_mut().zip(&self.biases) {
                y.iter_mut().enumerate().for_each(|(i, y)| *y += f64::from(b.value[i % b.value.len()]));
            }
            ys
        };
        if let Some(filtering) = case.filtering() {
            result.inferred = filtered(filtering);
        }
        if let Some(filtering) = in_step {
            result.y = filtered(filtering);
        }
        let dys: Vec<Vec<f64>> =
            self.dy.iter().map(|dy| dy.data().iter().map(|&v| factor(v)).collect()).collect();
        let dy = side_by_side(dys.iter().zip(case.outputs).map(|(dy, &c)| (&dy[..], c)));
        if let Some(filtering) = of_inputs {
            let mirrored = |tap: usize| if filtering == Filtering::Dense { 26 - tap } else { tap };
            let weight = |c: usize, o: usize, tap: usize| value(o, c, mirrored(tap));
            let dx = winograd::correlate(filtering, case.n, [out_space, space], (&dy, outputs), cin, weight);
            result.dx = apart(&dx, case.inputs);
        }
        if let Some(filtering) = of_weights {
            let (x, dy) = ((&x[..], cin), (&dy[..], outputs));
            let dw = if case.transposed {
                winograd::wgrad(filtering, case.n, [out_space, space], dy, x)
            } else {
                winograd::wgrad(filtering, case.n, spaces, x, dy)
            };
            let mut dw = dw.into_iter();
            result.dw = result.dw.iter().map(|of| dw.by_ref().take(of.len()).collect()).collect();
        }
        result
    }
}

/// Tensors of so many channels each, side by side in one.
fn side_by_side<'a>(tensors: impl Iterator<Item = (&'a [f64], usize)> + Clone) -> Vec<f64> {
    let voxels = tensors.clone().next().map_or(0, |(x, c)| x.len() / c);
    (0..voxels)
        .flat_map(|v| tensors.clone().flat_map(move |(x, c)| x[v * c..][..c].iter().copied()))
        .collect()
}

/// Tensors of so many channels each out of one.
fn apart(all: &[f64], channels: &[usize]) -> Vec<Vec<f64>> {
    let mut first = 0;
    let of = |&c: &usize| {
        let part = first..first + c;
        first += c;
        all.chunks_exact(channels.iter().sum()).flat_map(|v| v[part.clone()].iter().copied()).collect()
    };
    channels.iter().map(of).collect()
}
