//! The three passes on the CPU, through the convolution engine of [`crate::ops::conv`].

use super::TAPS;
use crate::device::arena::Buffer;
use crate::device::bf16::Operands;
use crate::device::list::List;
use crate::ops::conv::{self, Epilogue, Head, Map, Output, Phase, Problem, Source, Weights, correlate};
use crate::tensor::{Activation, Param, Shape, Tensor};
use std::borrow::Borrow;

/// First channel of each input in the concatenation.
fn starts<A: Borrow<Activation>>(inputs: &[A]) -> List<usize> {
    (0..inputs.len()).map(|s| inputs[..s].iter().map(|x| x.borrow().shape().c).sum()).collect()
}

/// y of `cat(inputs)`.
pub fn fprop(
    inputs: &[&Activation],
    weight: &Param,
    bias: Option<&Param>,
    operands: Operands,
    phase: Phase,
) -> Tensor {
    convolve(inputs, (weight, bias), None, operands, phase)
}

/// The same finished, in inference.
pub fn finished(
    inputs: &[&Activation],
    weight: &Param,
    bias: Option<&Param>,
    epilogue: Epilogue,
    operands: Operands,
) -> Tensor {
    convolve(inputs, (weight, bias), Some(epilogue), operands, Phase::Inference)
}

/// The shape of y.
pub fn output(x: Shape, weight: &Param) -> Shape {
    Shape::new(x.n, x.space().map(|s| 2 * s), weight.shape[1])
}

fn convolve(
    inputs: &[&Activation],
    (weight, bias): (&Param, Option<&Param>),
    epilogue: Option<Epilogue>,
    operands: Operands,
    phase: Phase,
) -> Tensor {
    let (shape, o) = (inputs[0].shape(), weight.shape[1]);
    let out = output(shape, weight);
    let mut y = Output::new(out, epilogue);
    let starts = starts(inputs);
    let sources: List<Source> = inputs.iter().map(|x| Source::from(*x)).collect();
    let head = y.head(bias.map(|b| b.value.as_slice()));
    let (space, out_space) = (shape.space(), out.space());
    let problem = Problem { map: Map::Scatter, operands, phase, n: shape.n, space, out_space };
    correlate(problem, &sources, &mut [head], &|source, _| Weights {
        data: &weight.value,
        offset: starts[source] * o * TAPS,
        head_stride: TAPS,
        source_stride: o * TAPS,
        mirrored: false,
    });
    y.tensor()
}

/// From dy, of shape `out`, to the inputs.
fn backwards(out: Shape, input: Shape, operands: Operands) -> Problem {
    let map = Map::Gather { kernel: 3, stride: 2 };
    Problem { map, operands, phase: Phase::Backward, n: out.n, space: out.space(), out_space: input.space() }
}

/// The gradient of the weights, in their layout.
pub fn wgrad(inputs: &[Activation], dy: &Tensor, operands: Operands) -> Buffer {
    let (shape, out) = (inputs[0].shape(), dy.shape());
    let lanes: List<Source> = inputs.iter().map(Source::from).collect();
    let dws = conv::wgrad(backwards(out, shape, operands), &[Source::from(dy)], &lanes);
    let mut all = Buffer::dirty(dws.iter().map(|dw| dw.len()).sum());
    let mut rest = &mut all[..];
    for dw in &dws {
        let (of_input, tail) = rest.split_at_mut(dw.len());
        of_input.copy_from_slice(dw);
        rest = tail;
    }
    all
}

/// One dx an input.
pub fn dgrad(inputs: &[Activation], dy: &Tensor, weight: &Param, operands: Operands) -> List<Tensor> {
    let (shape, o, starts) = (inputs[0].shape(), weight.shape[1], starts(inputs));
    let mut dxs: List<_> = inputs.iter().map(|x| Buffer::dirty(x.shape().len())).collect();
    let mut heads: List<Head> =
        dxs.iter_mut().zip(inputs).map(|(dx, x)| Head::sums(dx, x.shape().c, None)).collect();
    let problem = backwards(dy.shape(), shape, operands);
    correlate(problem, &[Source::from(dy)], &mut heads, &|_, head| Weights {
        data: &weight.value,
        offset: starts[head] * o * TAPS,
        head_stride: o * TAPS,
        source_stride: TAPS,
        mirrored: false,
    });
    drop(heads);
    inputs.iter().zip(dxs).map(|(x, dx)| Tensor::new(x.shape(), dx)).collect()
}
