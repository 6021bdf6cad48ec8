//! Transposed 3D convolution, kernel 3, stride 2, padding 1, output padding 1 (torch.nn.ConvTranspose3d), of the
//! channel concatenation of several inputs.
//!
//! ```text
//! fprop  y[2 i + t - 1] += x[i] w[t], y twice as large as x on every axis
//! dgrad  dx[i] = sum over t of dy[2 i + t - 1] w[t]: a convolution of stride 2
//! wgrad  dw[t] = sum over i of x[i] dy[2 i + t - 1]
//! ```
//! In fprop each output parity has its own taps, so nothing is scattered and no zero is multiplied.

pub mod cuda_wgrad;

use crate::device::arena::Buffer;
use crate::error::{Error, Result};
use crate::ops::conv::{Head, Map, Source, Weights, correlate, wgrad};
use crate::tensor::{Activation, Param, Shape, Tape, Tensor};

/// Taps of the 3 x 3 x 3 kernel.
const TAPS: usize = 27;

/// Transposed convolution of `cat(inputs)` with weights (I, O, 3, 3, 3); `bias` (O) is `None` where a norm follows.
///
/// # Errors
/// [`Error::Shape`] when the inputs do not agree with each other or the weights.
pub fn conv_transpose3d(
    tape: &mut Tape,
    inputs: &[&Activation],
    weight: &Param,
    bias: Option<&Param>,
) -> Result<Tensor> {
    let shape = inputs.first().map_or(Shape::new(0, [0; 3], 0), |x| x.shape());
    let channels: usize = inputs.iter().map(|x| x.shape().c).sum();
    let same = inputs.iter().all(|x| x.shape().with_channels(0) == shape.with_channels(0));
    let &[i, o, 3, 3, 3] = &weight.shape[..] else {
        return Err(Error::Shape {
            op: "conv_transpose3d",
            want: "weights [I, O, 3, 3, 3]".into(),
            got: format!("{:?}", weight.shape),
        });
    };
    if i != channels || !same || bias.is_some_and(|b| b.shape != [o]) {
        return Err(Error::Shape {
            op: "conv_transpose3d",
            want: format!("inputs of one size with {i} channels together and {o} biases"),
            got: inputs.iter().map(|x| x.shape().to_string()).collect::<Vec<_>>().join(" + "),
        });
    }
    let out = Shape::new(shape.n, shape.space().map(|s| 2 * s), o);
    let starts: Vec<usize> =
        (0..inputs.len()).map(|s| inputs[..s].iter().map(|x| x.shape().c).sum()).collect();
    let sources: Vec<Source> = inputs.iter().map(|x| Source::from(*x)).collect();
    let mut y = Buffer::dirty(out.len());
    let head = Head { out: &mut y, channels: o, bias: bias.map(|b| b.value.as_slice()) };
    correlate(Map::Scatter, shape.n, shape.space(), out.space(), &sources, &mut [head], &|source, _| {
        Weights {
            data: &weight.value,
            offset: starts[source] * o * TAPS,
            head_stride: TAPS,
            source_stride: o * TAPS,
            mirrored: false,
        }
    });
    let y = Tensor::new(out, y);
    if tape.is_recording() {
        let (id, weight, bias) = (y.id(), weight.clone(), bias.map(|b| b.id));
        let inputs: Vec<Activation> = inputs.iter().map(|&x| x.clone()).collect();
        tape.record(move |grads| {
            let dy = grads
                .take(id)
                .ok_or_else(|| Error::Internal("conv_transpose3d: no gradient arrived".into()))?;
            let map = Map::Gather { kernel: 3, stride: 2 };
            let lanes: Vec<Source> = inputs.iter().map(Source::from).collect();
            let dw = wgrad(map, out.n, out.space(), shape.space(), &[Source::from(&dy)], &lanes);
            grads.add_param(weight.id, &dw.concat());
            if let Some(bias) = bias {
                grads.add_param(bias, &crate::ops::residual::channel_sums(&dy));
            }
            let mut dxs: Vec<_> = inputs.iter().map(|x| Buffer::dirty(x.shape().len())).collect();
            let mut heads: Vec<Head> = dxs
                .iter_mut()
                .zip(&inputs)
                .map(|(dx, x)| Head { out: dx, channels: x.shape().c, bias: None })
                .collect();
            correlate(
                map,
                out.n,
                out.space(),
                shape.space(),
                &[Source::from(&dy)],
                &mut heads,
                &|_, head| Weights {
                    data: &weight.value,
                    offset: starts[head] * o * TAPS,
                    head_stride: o * TAPS,
                    source_stride: TAPS,
                    mirrored: false,
                },
            );
            for (x, dx) in inputs.iter().zip(dxs) {
                grads.add(x.id(), Tensor::new(x.shape(), dx));
            }
            Ok(())
        });
    }
    Ok(y)
}
