//! 3D convolution, kernel 3 (padding 1, stride 1 or 2) or kernel 1 (torch.nn.Conv3d).
//!
//! ```text
//! fprop  y[o]  = sum over taps t and input channels of x[o s + t - p] w[t] + b
//! dgrad  dx[i] = sum over t with (i + p - t) = o s of dy[o] w[t]
//! wgrad  dw[t] = sum over o of x[o s + t - p] dy[o];   db = sum of dy
//! ```
//! dgrad is a convolution of dy with the taps mirrored for stride 1, a scatter for stride 2.
//!
//! Several filters over one input (a unit's convolution and its residual sibling) load the input once.

pub mod cuda_thinwgrad;
pub mod cuda_wgrad;

use crate::device::arena::Buffer;
use crate::error::{Error, Result};
use crate::ops::conv::{Head, Map, Source, Weights, correlate, wgrad};
use crate::tensor::{Activation, Param, ParamId, Shape, Tape, Tensor};

/// The parameters of one convolution.
#[derive(Clone, Debug)]
pub struct Filter<'a> {
    /// (O, I, k, k, k).
    pub weight: &'a Param,
    /// (O); `None` where a norm follows, which cancels it.
    pub bias: Option<&'a Param>,
}

/// Convolves `x` with every filter; all have one kernel size. Returns one raw output a filter.
///
/// # Errors
/// [`Error::Shape`] when a filter does not fit `x`.
pub fn conv3d(tape: &mut Tape, x: &Activation, filters: &[Filter], stride: usize) -> Result<Vec<Tensor>> {
    let shape = x.shape();
    let kernel = filters.first().map_or(0, |f| f.weight.shape[2]);
    for f in filters {
        let fits = matches!(f.weight.shape[..], [_, i, a, b, c] if i == shape.c && [a, b, c] == [kernel; 3])
            && f.bias.is_none_or(|b| b.shape[..] == f.weight.shape[..1]);
        if !fits || !matches!((kernel, stride), (1, 1) | (3, 1) | (3, 2)) {
            return Err(Error::Shape {
                op: "conv3d",
                want: format!("weights [O, {}, k, k, k] with k s of 1 1, 3 1 or 3 2", shape.c),
                got: format!("{:?} with stride {stride}", f.weight.shape),
            });
        }
    }
    let map = Map::Gather { kernel, stride };
    let out_space = shape.space().map(|s| s.div_ceil(stride));
    let mut outs: Vec<(Shape, Buffer)> = filters
        .iter()
        .map(|f| Shape::new(shape.n, out_space, f.weight.shape[0]))
        .map(|s| (s, Buffer::dirty(s.len())))
        .collect();
    let mut heads: Vec<Head> = outs
        .iter_mut()
        .zip(filters)
        .map(|((s, b), f)| Head { out: b, channels: s.c, bias: f.bias.map(|b| b.value.as_slice()) })
        .collect();
    let taps = kernel.pow(3);
    correlate(map, shape.n, shape.space(), out_space, &[x.into()], &mut heads, &|_, head| Weights {
        data: &filters[head].weight.value,
        offset: 0,
        head_stride: shape.c * taps,
        source_stride: taps,
        mirrored: false,
    });
    let outs: Vec<Tensor> = outs.into_iter().map(|(s, b)| Tensor::new(s, b)).collect();
    if tape.is_recording() {
        let ids: Vec<_> = outs.iter().map(Tensor::id).collect();
        let weights: Vec<_> = filters.iter().map(|f| f.weight.clone()).collect();
        let biases: Vec<Option<ParamId>> = filters.iter().map(|f| f.bias.map(|b| b.id)).collect();
        let x = x.clone();
        tape.record(move |grads| {
            let dys: Vec<_> = ids.iter().filter_map(|&id| grads.take(id)).collect();
            if dys.len() != ids.len() {
                return Err(Error::Internal("conv3d: an output has no gradient".into()));
            }
            let lanes: Vec<Source> = dys.iter().map(Source::from).collect();
            let dws = wgrad(map, shape.n, shape.space(), out_space, &[Source::from(&x)], &lanes);
            for ((dw, weight), (bias, dy)) in dws.iter().zip(&weights).zip(biases.iter().zip(&dys)) {
                grads.add_param(weight.id, dw);
                if let Some(bias) = bias {
                    grads.add_param(*bias, &crate::ops::residual::channel_sums(dy));
                }
            }
            if x.is_differentiable() {
                grads.add(x.id(), dgrad(map, shape, &dys, &weights));
            }
            Ok(())
        });
    }
    Ok(outs)
}

/// dx = sum over the filters of their dy convolved backwards.
fn dgrad(map: Map, shape: Shape, dys: &[Tensor], weights: &[Param]) -> Tensor {
    let mut dx = Buffer::dirty(shape.len());
    let sources: Vec<Source> = dys.iter().map(Source::from).collect();
    let taps = map.kernel().pow(3);
    let back = if map.stride() == 1 { map } else { Map::Scatter };
    correlate(
        back,
        shape.n,
        dys[0].shape().space(),
        shape.space(),
        &sources,
        &mut [Head { out: &mut dx, channels: shape.c, bias: None }],
        &|source, _| Weights {
            data: &weights[source].value,
            offset: 0,
            head_stride: taps,
            source_stride: shape.c * taps,
            mirrored: map.stride() == 1,
        },
    );
    Tensor::new(shape, dx)
}
