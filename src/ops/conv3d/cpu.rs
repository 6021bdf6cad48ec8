//! The three passes on the CPU, through the convolution engine of [`crate::ops::conv`].

use super::Filter;
use crate::device::arena::Buffer;
use crate::device::bf16::Operands;
use crate::device::list::List;
use crate::ops::conv::{self, Epilogue, Head, Map, Output, Phase, Problem, Source, Weights, correlate};
use crate::tensor::{Activation, Param, Shape, Tensor};

/// One raw output a filter.
pub fn fprop(
    x: &Activation,
    filters: &[Filter],
    stride: usize,
    operands: Operands,
    phase: Phase,
) -> List<Tensor> {
    convolve(x, filters, |_| None, stride, operands, phase)
}

/// One finished output a filter, in inference.
pub fn finished(
    x: &Activation,
    filters: &[Filter],
    epilogues: &[Epilogue],
    stride: usize,
    operands: Operands,
) -> List<Tensor> {
    convolve(x, filters, |i| Some(epilogues[i]), stride, operands, Phase::Inference)
}

/// The shape of a filter's output.
pub fn output(x: Shape, filter: &Filter, stride: usize) -> Shape {
    Shape::new(x.n, x.space().map(|s| s.div_ceil(stride)), filter.weight.shape[0])
}

/// One output a filter, which may have an epilogue.
fn convolve<'a>(
    x: &Activation,
    filters: &[Filter],
    epilogue: impl Fn(usize) -> Option<Epilogue<'a>>,
    stride: usize,
    operands: Operands,
    phase: Phase,
) -> List<Tensor> {
    let shape = x.shape();
    let kernel = filters[0].weight.shape[2];
    let out_space = shape.space().map(|s| s.div_ceil(stride));
    let mut outs: List<_> =
        filters.iter().enumerate().map(|(i, f)| Output::new(output(shape, f, stride), epilogue(i))).collect();
    let mut heads: List<Head> =
        outs.iter_mut().zip(filters).map(|(out, f)| out.head(f.bias.map(|b| b.value.as_slice()))).collect();
    let taps = kernel.pow(3);
    let map = Map::Gather { kernel, stride };
    let problem = Problem { map, operands, phase, n: shape.n, space: shape.space(), out_space };
    correlate(problem, &[x.into()], &mut heads, &|_, head| Weights {
        data: &filters[head].weight.value,
        offset: 0,
        head_stride: shape.c * taps,
        source_stride: taps,
        mirrored: false,
    });
    drop(heads);
    outs.into_iter().map(Output::tensor).collect()
}

/// The gradient of each filter's weights, in their layout.
pub fn wgrad(
    x: &Activation,
    dys: &[Tensor],
    kernel: usize,
    stride: usize,
    operands: Operands,
) -> List<Buffer> {
    let (shape, out_space) = (x.shape(), dys[0].shape().space());
    let lanes: List<Source> = dys.iter().map(Source::from).collect();
    let map = Map::Gather { kernel, stride };
    let problem =
        Problem { map, operands, phase: Phase::Backward, n: shape.n, space: shape.space(), out_space };
    conv::wgrad(problem, &[Source::from(x)], &lanes)
}

/// dx = sum over the filters of their dy convolved backwards.
pub fn dgrad(
    shape: Shape,
    dys: &[Tensor],
    weights: &[Param],
    (kernel, stride): (usize, usize),
    operands: Operands,
) -> Tensor {
    let mut dx = Buffer::dirty(shape.len());
    let sources: List<Source> = dys.iter().map(Source::from).collect();
    let taps = kernel.pow(3);
    let back = if stride == 1 { Map::Gather { kernel, stride } } else { Map::Scatter };
    let (space, out_space) = (dys[0].shape().space(), shape.space());
    correlate(
        Problem { map: back, operands, phase: Phase::Backward, n: shape.n, space, out_space },
        &sources,
        &mut [Head::sums(&mut dx, shape.c, None)],
        &|source, _| Weights {
            data: &weights[source].value,
            offset: 0,
            head_stride: taps,
            source_stride: shape.c * taps,
            mirrored: stride == 1,
        },
    );
    Tensor::new(shape, dx)
}
