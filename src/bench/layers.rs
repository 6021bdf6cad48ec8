//! The network's convolutions, each pass of each by itself.
//!
//! A layer here is what the network runs as one op: a unit's strided convolution and its residual sibling load their
//! input once and are one layer, and a transposed convolution reads skip and inner level without a concatenation.

use std::fmt;

use super::{Cost, Work, inputs::uniform};
use crate::config::Net;
use crate::device::bf16::Operands;
use crate::device::list::List;
use crate::nn::state_dict::names;
use crate::ops::conv_transpose3d::{self, conv_transpose3d};
use crate::ops::conv3d::{self, Filter, conv3d};
use crate::tensor::{Activation, Param, ParamId, Pending, Shape, Tape, Tensor};

const SINGLE: Operands = Operands::Single;

/// One of the three things that are computed of a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// The output.
    Fprop,
    /// The gradient of the input.
    Dgrad,
    /// The gradient of the weights.
    Wgrad,
}

/// In the order of a training step.
pub const PASSES: [Pass; 3] = [Pass::Fprop, Pass::Dgrad, Pass::Wgrad];

impl fmt::Display for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Pass::Fprop => "fprop",
            Pass::Dgrad => "dgrad",
            Pass::Wgrad => "wgrad",
        })
    }
}

/// One convolution of the network, or one with its residual sibling.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// Such as `down0_conv1`, `bottom_residual`, `up0_transposed`; 0 is the level of full resolution.
    pub name: String,
    /// PyTorch's shapes of the weights, one a filter: (O, I, k, k, k), or (I, O, 3, 3, 3) transposed.
    pub weights: Vec<[usize; 5]>,
    /// Channels of each input: two where the network concatenates.
    pub inputs: Vec<usize>,
    /// A patch's side divided by the input's.
    pub shrink: usize,
    /// Stride of a convolution; a transposed one doubles its input's sides.
    pub stride: usize,
    /// Whether it is a transposed convolution.
    pub transposed: bool,
    /// Whether a norm and PReLU are pending on the input.
    pub pending: bool,
    /// Whether no norm follows, so that biases are added, per filter.
    pub biased: Vec<bool>,
    /// Whether the input is the image, whose gradient nobody wants.
    pub first: bool,
}

/// Every convolution of `net`, in the order of its state dict.
pub fn layers(net: &Net) -> Vec<Layer> {
    let mut list: Vec<Layer> = Vec::new();
    for (name, shape) in names(net) {
        let Ok(weight) = <[usize; 5]>::try_from(shape) else { continue };
        let path = name.trim_start_matches("model.").trim_end_matches(".weight");
        let within = path.trim_start_matches("1.submodule.");
        let level = (path.len() - within.len()) / "1.submodule.".len();
        // Names say where a module is: 0 is the way down, 2 the way up, and the bottom is a unit by itself.
        let (at, part) = match within.split_once('.') {
            Some(("0", part)) => (format!("down{level}"), part),
            Some(("2", part)) => (format!("up{level}"), part),
            _ => ("bottom".to_owned(), within),
        };
        let down = at.starts_with("down");
        let stride = if down { 2 } else { 1 };
        let layer = Layer {
            name: String::new(),
            weights: vec![weight],
            inputs: vec![weight[1]],
            shrink: 1 << level,
            stride,
            transposed: false,
            pending: false,
            biased: vec![false],
            first: down && level == 0,
        };
        let layer = match part {
            "conv.unit0.conv" => Layer { name: format!("{at}_conv0"), ..layer },
            "conv.unit1.conv" => {
                let shrink = layer.shrink * stride;
                Layer { name: format!("{at}_conv1"), shrink, stride: 1, pending: true, first: false, ..layer }
            }
            "residual" if down => {
                let sibling = list.iter_mut().find(|l| l.name == format!("{at}_conv0"));
                let sibling = sibling.expect("a residual convolution comes after its unit");
                sibling.name.push_str("_residual");
                sibling.weights.push(weight);
                sibling.biased.push(true);
                continue;
            }
            "residual" => Layer { name: format!("{at}_residual"), biased: vec![true], ..layer },
            "0.conv" => {
                let skip = net.channels[level];
                let inputs = vec![skip, weight[0] - skip];
                let name = format!("{at}_transposed");
                Layer { name, inputs, shrink: 2 << level, transposed: true, ..layer }
            }
            "1.conv.unit0.conv" => {
                Layer { name: format!("{at}_conv"), pending: true, biased: vec![level == 0], ..layer }
            }
            other => unreachable!("MONAI's UNet has no convolution called {other}"),
        };
        list.push(layer);
    }
    list
}

/// Costs of a forward pass of `net` on `n` patches of `side`^3.
pub fn forward_costs(net: &Net, n: usize, side: usize) -> Vec<Cost> {
    layers(net).iter().map(|l| l.cost(n, [side; 3])).collect()
}

/// Costs of a forward and a backward pass; the image's gradient is not computed.
pub fn step_costs(net: &Net, n: usize, side: usize) -> Vec<Cost> {
    let costs = |l: Layer| {
        PASSES.into_iter().filter(|&pass| l.has(pass)).map(|_| l.cost(n, [side; 3])).collect::<Vec<_>>()
    };
    layers(net).into_iter().flat_map(costs).collect()
}

impl Layer {
    /// Whether a training step computes this pass.
    pub fn has(&self, pass: Pass) -> bool {
        pass != Pass::Dgrad || !self.first
    }

    /// (D, H, W) of the input for patches of `patch` voxels.
    pub fn input_space(&self, patch: [usize; 3]) -> [usize; 3] {
        patch.map(|side| side / self.shrink)
    }

    /// (D, H, W) of the output.
    pub fn output_space(&self, patch: [usize; 3]) -> [usize; 3] {
        self.input_space(patch).map(|side| if self.transposed { 2 * side } else { side / self.stride })
    }

    /// Cost of one pass, the same for each: every weight meets every voxel of the coarser side once, and input, output
    /// and weights or their gradients, of 4 bytes a value, are each read or written once.
    pub fn cost(&self, n: usize, patch: [usize; 3]) -> Cost {
        let voxels = |space: [usize; 3]| n * space.iter().product::<usize>();
        let (input, output) = (voxels(self.input_space(patch)), voxels(self.output_space(patch)));
        let weights: usize = self.weights.iter().map(|w| w.iter().product::<usize>()).sum();
        let inputs: usize = self.inputs.iter().sum();
        let outputs: usize = self.weights.iter().map(|w| self.outputs(w)).sum();
        let values = input * inputs + output * outputs + weights;
        Cost { flop: 2.0 * (input.min(output) * weights) as f64, bytes: (size_of::<f32>() * values) as f64 }
    }

    /// Output channels of a filter.
    fn outputs(&self, weight: &[usize; 5]) -> usize {
        if self.transposed { weight[1] } else { weight[0] }
    }

    /// One pass in f32 on `n` patches of random numbers. fprop is that of inference, which packs the
    /// weights once, and may take fewer products than a training step's.
    pub fn work(&self, pass: Pass, n: usize, patch: [usize; 3]) -> Work {
        let random = |space, channels| {
            let shape = Shape::new(n, space, channels);
            Tensor::from_slice(shape, &uniform(shape.len()))
        };
        let xs: Vec<Activation> = self
            .inputs
            .iter()
            .map(|&c| match random(self.input_space(patch), c) {
                raw if self.pending => {
                    let pending = Pending { scale: List::of(1.1, c), shift: List::of(-0.3, c), slope: 0.25 };
                    Activation::lazy(raw, pending)
                }
                raw => raw.into(),
            })
            .collect();
        let outputs = |w: &[usize; 5]| self.outputs(w);
        let dys: Vec<Tensor> =
            self.weights.iter().map(|w| random(self.output_space(patch), outputs(w))).collect();
        let param = |shape: &[usize]| {
            Param::new(ParamId(0), shape.to_vec(), uniform(shape.iter().product::<usize>()))
        };
        let weights: Vec<Param> = self.weights.iter().map(|w| param(w)).collect();
        let biases: Vec<Option<Param>> =
            self.weights.iter().zip(&self.biased).map(|(w, &b)| b.then(|| param(&[outputs(w)]))).collect();
        let (costs, stride, kernel) = (vec![self.cost(n, patch)], self.stride, self.weights[0][2]);
        match (pass, self.transposed) {
            (Pass::Fprop, false) => Work::new(costs, move || {
                let filters: Vec<Filter> = weights
                    .iter()
                    .zip(&biases)
                    .map(|(weight, bias)| Filter { weight, bias: bias.as_ref() })
                    .collect();
                conv3d(&mut Tape::off(), &xs[0], &filters, stride)
            }),
            (Pass::Fprop, true) => Work::new(costs, move || {
                let inputs: Vec<&Activation> = xs.iter().collect();
                conv_transpose3d(&mut Tape::off(), &inputs, &weights[0], None)
            }),
            (Pass::Dgrad, false) => Work::new(costs, move || {
                Ok(conv3d::cpu::dgrad(xs[0].shape(), &dys, &weights, (kernel, stride), SINGLE))
            }),
            (Pass::Dgrad, true) => {
                Work::new(costs, move || Ok(conv_transpose3d::cpu::dgrad(&xs, &dys[0], &weights[0], SINGLE)))
            }
            (Pass::Wgrad, false) => {
                Work::new(costs, move || Ok(conv3d::cpu::wgrad(&xs[0], &dys, kernel, stride, SINGLE)))
            }
            (Pass::Wgrad, true) => {
                Work::new(costs, move || Ok(conv_transpose3d::cpu::wgrad(&xs, &dys[0], SINGLE)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::config;
    use crate::config::Norm;

    /// The figures are of an independent count of the bundle's network: 10.24 GFLOP a patch of 96^3, 47.4 a window of
    /// 160^3, 246 a training step of 8 patches, each to the digits given.
    #[test]
    fn the_bundle_costs_what_it_is_known_to_cost() {
        let net = config().net;
        let giga = |costs: Vec<Cost>| costs.iter().map(|cost| cost.flop / 1e9).sum::<f64>();
        let patch = giga(forward_costs(&net, 1, 96));
        assert!((patch - 10.24).abs() < 0.005, "{patch}");
        let window = giga(forward_costs(&net, 1, 160));
        assert!((window - 47.4).abs() < 0.05, "{window}");
        let step = giga(step_costs(&net, 8, 96));
        assert!((step - 246.0).abs() < 2.0, "{step}");
    }

    /// By hand, for one patch of 96^3: 16 channels of 48^3 voxels in and out; 32 channels of 48^3 in, 2 of 96^3 out.
    #[test]
    fn bytes_are_input_output_and_weights() {
        let net = config().net;
        let bytes = |name: &str| {
            let layer = layers(&net).into_iter().find(|l| l.name == name).expect("the bundle has it");
            layer.cost(1, [96; 3]).bytes
        };
        assert_eq!(bytes("down0_conv1"), 4.0 * (2 * 16 * 110_592 + 27 * 16 * 16) as f64);
        assert_eq!(bytes("up0_transposed"), 4.0 * (32 * 110_592 + 2 * 884_736 + 27 * 32 * 2) as f64);
    }

    /// No weight is forgotten and none is counted twice, whatever the network.
    #[test]
    fn every_convolution_is_a_layer_once() {
        for channels in [vec![16, 32, 64, 128, 256], vec![4, 6], vec![4, 4, 4], vec![3, 5, 7, 9]] {
            let net = Net { norm: Norm::Batch, channels };
            let list = layers(&net);
            let mut counted: Vec<usize> =
                list.iter().flat_map(|l| l.weights.iter().map(|w| w.iter().product())).collect();
            let mut all: Vec<usize> = names(&net)
                .iter()
                .filter(|(_, shape)| shape.len() == 5)
                .map(|(_, shape)| shape.iter().product())
                .collect();
            counted.sort();
            all.sort();
            assert_eq!(counted, all);
            let mut unique: Vec<&str> = list.iter().map(|l| l.name.as_str()).collect();
            unique.sort();
            unique.dedup();
            assert_eq!(unique.len(), list.len(), "names are unique");
            assert_eq!(list.iter().filter(|l| l.first).count(), 1, "one layer sees the image");
        }
    }

    /// The op agrees with the description: every pass runs on the shapes that the layer claims.
    #[test]
    fn every_pass_of_every_layer_runs() {
        let net = Net { norm: Norm::Batch, channels: vec![4, 6, 8] };
        for layer in layers(&net) {
            for pass in PASSES {
                layer.work(pass, 1, [8; 3]).once().unwrap();
            }
            let [d, h, w] = layer.output_space([8; 3]);
            assert!(d * h * w > 0, "{}", layer.name);
        }
    }
}
