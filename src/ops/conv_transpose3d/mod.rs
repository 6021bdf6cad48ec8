//! Transposed 3D convolution, kernel 3, stride 2, padding 1, output padding 1 (torch.nn.ConvTranspose3d), of the
//! channel concatenation of several inputs.
//!
//! ```text
//! fprop  y[2 i + t - 1] += x[i] w[t], y twice as large as x on every axis
//! dgrad  dx[i] = sum over t of dy[2 i + t - 1] w[t]: a convolution of stride 2
//! wgrad  dw[t] = sum over i of x[i] dy[2 i + t - 1]
//! ```
//! In fprop each output parity has its own taps, so nothing is scattered and no zero is multiplied.

pub mod cpu;
pub mod cuda;
pub mod cuda_wgrad;

use crate::device::arena::Buffer;
use crate::device::bf16::Operands;
use crate::device::cuda::{Cuda, SelfTest};
use crate::device::list::List;
use crate::device::nvtx::range;
use crate::error::{Error, Result};
use crate::ops::conv::{Epilogue, Phase};
use crate::ops::conv3d::cuda_biasgrad::bias_grad;
use crate::ops::residual::{channel_sums, give};
use crate::ops::self_test::taped;
use crate::tensor::{Activation, Grads, Param, Shape, Tape, Tensor, View};
use std::sync::Arc;

/// Taps of the 3 x 3 x 3 kernel.
const TAPS: usize = 27;

/// Transposed convolution of `cat(inputs)` with weights (I, O, 3, 3, 3); `bias` (O) is `None` where a norm follows.
///
/// # Errors
/// [`Error::Shape`] when the inputs do not agree with each other or the weights, and those of the device.
pub fn conv_transpose3d(
    tape: &mut Tape,
    inputs: &[&Activation],
    weight: &Param,
    bias: Option<&Param>,
) -> Result<Tensor> {
    let [i, o] = channels_of(inputs, weight, bias)?;
    let views: Vec<View> = inputs.iter().filter_map(|x| x.view()).collect();
    let y = if views.is_empty() {
        cpu::fprop(inputs, weight, bias, tape.operands, Phase::of(tape))
    } else {
        let _range = range("conv_transpose3d fprop");
        let views: Vec<&View> = views.iter().collect();
        let bias_on_device = bias.map(|b| &**b.device());
        // Without a bias a norm follows, which wants the statistics.
        let out = cuda::fprop(&views, weight.device(), [i, o, 3, 3, 3], bias_on_device, bias.is_none())?;
        Tensor::on_device(out.shape, out.data, out.partials)
    };
    if tape.is_recording() {
        let pass = Pass {
            inputs: inputs.iter().map(|&x| x.clone()).collect(),
            weight: weight.clone(),
            bias: bias.cloned(),
            operands: tape.operands,
        };
        let id = y.id();
        tape.record(move |grads| {
            let dy = grads
                .take(id)
                .ok_or_else(|| Error::Internal("conv_transpose3d: no gradient arrived".into()))?;
            pass.wgrad(grads, &dy)?;
            for (x, dx) in pass.inputs.iter().zip(pass.dgrad(&dy)?) {
                give(grads, x.id(), dx)?;
            }
            Ok(())
        });
    }
    Ok(y)
}

/// The same in inference on the CPU, finished by an epilogue.
///
/// # Errors
/// [`Error::Shape`] when the inputs do not agree with each other or the weights, or the epilogue not with the output.
pub fn conv_transpose3d_finished(
    inputs: &[&Activation],
    weight: &Param,
    bias: Option<&Param>,
    epilogue: Epilogue,
    operands: Operands,
) -> Result<Tensor> {
    channels_of(inputs, weight, bias)?;
    epilogue.check("conv_transpose3d", cpu::output(inputs[0].shape(), weight))?;
    Ok(cpu::finished(inputs, weight, bias, epilogue, operands))
}

/// Input and output channels of weights that fit the inputs.
fn channels_of(inputs: &[&Activation], weight: &Param, bias: Option<&Param>) -> Result<[usize; 2]> {
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
    if i != channels || !same || bias.is_some_and(|b| *b.shape != [o]) {
        return Err(Error::Shape {
            op: "conv_transpose3d",
            want: format!("inputs of one size with {i} channels together and {o} biases"),
            got: inputs.iter().map(|x| x.shape().to_string()).collect::<Vec<_>>().join(" + "),
        });
    }
    Ok([i, o])
}

/// What the backward pass needs.
struct Pass {
    inputs: List<Activation>,
    weight: Param,
    bias: Option<Param>,
    operands: Operands,
}

impl Pass {
    /// Adds the gradients of weights and bias.
    fn wgrad(&self, grads: &mut Grads, dy: &Tensor) -> Result<()> {
        if let Some(dy) = dy.view() {
            let _range = range("conv_transpose3d wgrad");
            let views: Vec<View> = self.inputs.iter().filter_map(Activation::view).collect();
            let views: Vec<&View> = views.iter().collect();
            cuda_wgrad::wgrad(&views, &dy, self.weight.device().grad())?;
            return self.bias.as_ref().map_or(Ok(()), |bias| bias_grad(&dy, bias.device().grad()));
        }
        grads.add_param(self.weight.id, cpu::wgrad(&self.inputs, dy, self.operands));
        if let Some(bias) = &self.bias {
            grads.add_param(bias.id, Buffer::from_slice(&channel_sums(dy)));
        }
        Ok(())
    }

    /// One dx an input.
    fn dgrad(&self, dy: &Tensor) -> Result<List<Tensor>> {
        let Some(view) = dy.view() else {
            return Ok(cpu::dgrad(&self.inputs, dy, &self.weight, self.operands));
        };
        let _range = range("conv_transpose3d dgrad");
        let dims = self.weight.shape[..].try_into().expect("checked to have five sides");
        let channels: Vec<usize> = self.inputs.iter().map(|x| x.shape().c).collect();
        let dxs = cuda::dgrad(&view, self.weight.device(), dims, &channels)?;
        Ok(self.inputs.iter().zip(dxs).map(|(x, dx)| Tensor::on_device(x.shape(), dx, None)).collect())
    }
}

/// See [`SelfTest`]. Two outputs, as the network's last one has, take other kernels backwards.
pub const SELF_TESTS: &[SelfTest] = &[
    SelfTest { name: "conv_transpose3d, 16 + 16 -> 16", run: |cuda| self_test(cuda, 16) },
    SelfTest { name: "conv_transpose3d, 16 + 16 -> 2", run: |cuda| self_test(cuda, 2) },
];

fn self_test(cuda: &Arc<Cuda>, outputs: usize) -> Result<String> {
    let (x, weight, bias) = (Shape::new(2, [3, 4, 5], 16), [32, outputs, 3, 3, 3], [outputs]);
    taped(cuda, &[x, x], &[("dw", &weight), ("db", &bias)], |tape, xs, ws| {
        let (a, b) = (xs[0].clone().into(), xs[1].clone().into());
        Ok(vec![conv_transpose3d(tape, &[&a, &b], &ws[0], Some(&ws[1]))?.into()])
    })
}
