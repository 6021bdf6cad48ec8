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

pub(super) mod args;
pub mod cpu;
pub mod cuda;
pub mod cuda_biasgrad;
pub mod cuda_thinwgrad;
pub mod cuda_wgrad;
pub(super) mod narrow;
pub(super) mod pack;
pub mod plan;
pub(super) mod tiled;
mod wgrad_args;

use crate::device::arena::Buffer;
use crate::device::bf16::Operands;
use crate::device::cuda::{Cuda, SelfTest};
use crate::device::list::List;
use crate::device::nvtx::range;
use crate::error::{Error, Result};
use crate::ops::conv::{Epilogue, Phase};
use crate::ops::residual::{channel_sums, give};
use crate::ops::self_test::taped;
use crate::tensor::{Activation, Grads, Param, Shape, Tape, Tensor};
use std::sync::Arc;

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
/// [`Error::Shape`] when a filter does not fit `x`, and those of the device.
pub fn conv3d(tape: &mut Tape, x: &Activation, filters: &[Filter], stride: usize) -> Result<List<Tensor>> {
    let kernel = kernel_of(x.shape(), filters, stride)?;
    let outs = match x.view() {
        Some(view) => {
            let _range = range("conv3d fprop");
            // A convolution without a bias stands before a norm, which wants the statistics of its output.
            let stats: Vec<bool> = filters.iter().map(|f| f.bias.is_none()).collect();
            let outs = cuda::fprop(&view, &on_device(filters), stride, &stats)?;
            outs.into_iter().map(|o| Tensor::on_device(o.shape, o.data, o.partials)).collect()
        }
        None => cpu::fprop(x, filters, stride, tape.operands, Phase::of(tape)),
    };
    if tape.is_recording() {
        let pass = Pass {
            x: x.clone(),
            weights: filters.iter().map(|f| f.weight.clone()).collect(),
            biases: filters.iter().map(|f| f.bias.cloned()).collect(),
            kernel,
            stride,
            operands: tape.operands,
        };
        let ids: List<_> = outs.iter().map(Tensor::id).collect();
        tape.record(move |grads| {
            let dys: List<_> = ids.iter().filter_map(|&id| grads.take(id)).collect();
            if dys.len() != ids.len() {
                return Err(Error::Internal("conv3d: an output has no gradient".into()));
            }
            pass.wgrad(grads, &dys)?;
            if pass.x.is_differentiable() {
                let dx = pass.dgrad(&dys)?;
                give(grads, pass.x.id(), dx)?;
            }
            Ok(())
        });
    }
    Ok(outs)
}

/// The same in inference on the CPU, every output finished by its epilogue.
///
/// # Errors
/// [`Error::Shape`] when a filter does not fit `x`, or an epilogue its output.
pub fn conv3d_finished(
    x: &Activation,
    layers: &[(Filter, Epilogue)],
    stride: usize,
    operands: Operands,
) -> Result<List<Tensor>> {
    let (filters, epilogues): (Vec<_>, Vec<_>) = layers.iter().cloned().unzip();
    kernel_of(x.shape(), &filters, stride)?;
    for (filter, epilogue) in layers {
        epilogue.check("conv3d", cpu::output(x.shape(), filter, stride))?;
    }
    Ok(cpu::finished(x, &filters, &epilogues, stride, operands))
}

/// The kernel size of filters that fit `shape`.
fn kernel_of(shape: Shape, filters: &[Filter], stride: usize) -> Result<usize> {
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
    Ok(kernel)
}

fn on_device<'a>(filters: &[Filter<'a>]) -> Vec<cuda::DeviceFilter<'a>> {
    filters.iter().map(|f| device_filter(f.weight, f.bias)).collect()
}

fn device_filter<'a>(weight: &'a Param, bias: Option<&'a Param>) -> cuda::DeviceFilter<'a> {
    let dims = weight.shape[..].try_into().expect("checked to have five sides");
    cuda::DeviceFilter { weight: weight.device(), dims, bias: bias.map(|b| &**b.device()) }
}

/// What the backward pass needs.
struct Pass {
    x: Activation,
    weights: List<Param>,
    biases: List<Option<Param>>,
    kernel: usize,
    stride: usize,
    operands: Operands,
}

impl Pass {
    /// Adds the gradients of weights and biases.
    fn wgrad(&self, grads: &mut Grads, dys: &[Tensor]) -> Result<()> {
        if let Some(x) = self.x.view() {
            let _range = range("conv3d wgrad");
            let dys: Vec<_> = dys.iter().filter_map(Tensor::view).collect();
            let dws: Vec<_> = self.weights.iter().map(|w| w.device().grad().clone()).collect();
            cuda_wgrad::wgrad(&x, &dys, self.kernel, self.stride, &dws)?;
            for (bias, dy) in self.biases.iter().zip(&dys) {
                if let Some(bias) = bias {
                    cuda_biasgrad::bias_grad(dy, bias.device().grad())?;
                }
            }
            return Ok(());
        }
        let dws = cpu::wgrad(&self.x, dys, self.kernel, self.stride, self.operands);
        for ((dw, weight), (bias, dy)) in dws.into_iter().zip(&self.weights).zip(self.biases.iter().zip(dys))
        {
            grads.add_param(weight.id, dw);
            if let Some(bias) = bias {
                grads.add_param(bias.id, Buffer::from_slice(&channel_sums(dy)));
            }
        }
        Ok(())
    }

    /// dx = sum over the filters of their dy convolved backwards.
    fn dgrad(&self, dys: &[Tensor]) -> Result<Tensor> {
        let shape: Shape = self.x.shape();
        let views: Vec<_> = dys.iter().filter_map(Tensor::view).collect();
        if views.is_empty() {
            return Ok(cpu::dgrad(shape, dys, &self.weights, (self.kernel, self.stride), self.operands));
        }
        let _range = range("conv3d dgrad");
        let filters: Vec<_> = self.weights.iter().map(|w| device_filter(w, None)).collect();
        Ok(Tensor::on_device(shape, cuda::dgrad(&views, &filters, shape, self.stride)?, None))
    }
}

/// See [`SelfTest`]. Each takes other kernels.
pub const SELF_TESTS: &[SelfTest] = &[
    SelfTest { name: "conv3d 3x3x3, 16 -> 16", run: |cuda| self_test(cuda, [3, 1], 16, &[16]) },
    SelfTest { name: "conv3d 3x3x3 / 2, 16 -> 32 + 32", run: |cuda| self_test(cuda, [3, 2], 16, &[32, 32]) },
    SelfTest { name: "conv3d 1x1x1, 32 -> 48", run: |cuda| self_test(cuda, [1, 1], 32, &[48]) },
    SelfTest { name: "conv3d 3x3x3 / 2, 1 -> 16 + 16", run: |cuda| self_test(cuda, [3, 2], 1, &[16, 16]) },
    SelfTest { name: "conv3d 3x3x3, 2 -> 2", run: |cuda| self_test(cuda, [3, 1], 2, &[2]) },
];

fn self_test(cuda: &Arc<Cuda>, [k, stride]: [usize; 2], i: usize, outputs: &[usize]) -> Result<String> {
    let shapes: Vec<_> = outputs.iter().map(|&o| [o, i, k, k, k]).collect();
    let weights: Vec<_> = shapes.iter().map(|shape| ("dw", &shape[..])).collect();
    taped(cuda, &[Shape::new(2, [5, 6, 7], i)], &weights, |tape, xs, ws| {
        let filters: Vec<_> = ws.iter().map(|weight| Filter { weight, bias: None }).collect();
        let ys = conv3d(tape, &xs[0].clone().into(), &filters, stride)?;
        Ok(ys.into_iter().map(Activation::from).collect())
    })
}
