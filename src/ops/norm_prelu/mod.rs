//! Batch or instance norm followed by PReLU (MONAI's "NDA" block, dropout 0), left pending for the consumer.
//!
//! Over the M voxels of a group (all samples for batch norm, one for instance norm), per channel:
//! ```text
//! forward   xhat = (x - mean) rstd, rstd = 1 / sqrt(var + 1e-5), var biased
//!           z = gamma xhat + beta;   y = z > 0 ? z : slope z
//! backward  dz = dy (z > 0 ? 1 : slope); dslope = sum of dy z over z <= 0; dbeta = sum dz; dgamma = sum dz xhat
//!           dx = gamma rstd (dz - mean(dz) - xhat mean(dz xhat)), or gamma rstd dz where statistics are constants
//! ```
//! Statistics are merged from per-chunk (count, mean, M2) by Chan's rule in chunk order, never as a mean of squares
//! less the square of the mean.

mod cpu;
pub mod cuda;

use crate::device::arena::Buffer;
use crate::device::cuda::{Buf, Cuda, SelfTest};
use crate::device::list::List;
use crate::device::nvtx::range;
use crate::error::{Error, Result};
use crate::ops::residual::{give, single};
use crate::ops::self_test::taped;
use crate::tensor::{Activation, Grads, Param, Pending, Shape, Tape, Tensor};
use std::sync::Arc;

/// Added to the variance (torch's default for both norms).
const EPS: f64 = 1e-5;

/// Weight of the newest batch in the running statistics (torch's momentum).
const MOMENTUM: f64 = 0.1;

/// Where mean and variance come from.
#[derive(Clone, Copy, Debug)]
pub enum Statistics<'a> {
    /// This batch, all samples together: batch norm in training.
    Batch,
    /// Each sample for itself: instance norm.
    Instance,
    /// Running ones, one a channel: batch norm in evaluation.
    Fixed {
        /// Statistics of the convolution's output with its bias.
        running: &'a Running,
        /// That bias (C), where the convolution left it out: the mean is then less by it.
        bias: Option<&'a Param>,
    },
    /// Mean 0, variance 1 - eps: PReLU alone.
    Identity,
}

/// The parameters of the block; without `slope` there is no PReLU.
#[derive(Clone, Copy, Debug, Default)]
pub struct Affine<'a> {
    /// Scale (C).
    pub gamma: Option<&'a Param>,
    /// Shift (C).
    pub beta: Option<&'a Param>,
    /// PReLU's one slope (1).
    pub slope: Option<&'a Param>,
}

/// Per-channel mean and biased variance of each group, groups outermost, where they were computed.
#[derive(Clone, Debug)]
pub enum Moments {
    /// In host memory.
    Host(HostMoments),
    /// On a device.
    Device(cuda::DeviceMoments),
}

/// Per-channel mean and biased variance of each group, groups outermost.
#[derive(Clone, Debug)]
pub struct HostMoments {
    /// Means.
    pub mean: List<f64>,
    /// Biased variances.
    pub var: List<f64>,
    /// Voxels a group.
    pub count: f64,
}

/// Running statistics of one batch norm (torch `BatchNorm3d`): `mean` includes the bias of the convolution before it.
///
/// While they are on a device the vectors are what they were at the last [`Running::refresh`].
#[derive(Clone, Debug)]
pub struct Running {
    /// Means (C).
    pub mean: Vec<f32>,
    /// Unbiased variances (C).
    pub var: Vec<f32>,
    device: Option<(Buf<f32>, Buf<f32>)>,
}

impl Running {
    /// Statistics in host memory.
    pub fn new(mean: Vec<f32>, var: Vec<f32>) -> Self {
        Running { mean, var, device: None }
    }

    /// Moves them to a device.
    ///
    /// # Errors
    /// When it has not enough memory.
    pub fn place(&mut self, cuda: &Arc<Cuda>) -> Result<()> {
        self.device = Some((cuda.upload(&self.mean)?, cuda.upload(&self.var)?));
        Ok(())
    }

    /// Makes the vectors what the device has; waits for it.
    ///
    /// # Errors
    /// What went wrong on the device.
    pub fn refresh(&mut self) -> Result<()> {
        if let Some((mean, var)) = &self.device {
            (self.mean, self.var) = (mean.download()?, var.download()?);
        }
        Ok(())
    }

    /// Moves them towards those of a training batch: mean plus the `bias` (C) that the normalised values are without,
    /// variance unbiased.
    ///
    /// # Errors
    /// Those of the device.
    pub fn update(&mut self, moments: &Moments, bias: &Param) -> Result<()> {
        match (moments, &self.device) {
            (Moments::Device(moments), Some((mean, var))) => {
                cuda::update_running(moments, mean, var, &bias.device().value)
            }
            (Moments::Host(moments), _) => {
                let mix = |old: f32, new: f64| (f64::from(old) * (1.0 - MOMENTUM) + new * MOMENTUM) as f32;
                for c in 0..self.mean.len() {
                    self.mean[c] = mix(self.mean[c], moments.mean[c] + f64::from(bias.value[c]));
                    let unbiased = moments.var[c] * moments.count / (moments.count - 1.0).max(1.0);
                    self.var[c] = mix(self.var[c], unbiased);
                }
                Ok(())
            }
            (Moments::Device(_), None) => {
                Err(Error::Internal("norm_prelu: running statistics are not on the device".into()))
            }
        }
    }
}

/// Normalises and activates `x`, lazily; on the CPU it must be f32. Also returns the statistics used, for running averages. The
/// gradient of `x` is for the convolution that made it: on a tape of bfloat16 operands it is stored as bfloat16.
///
/// # Errors
/// [`Error::Shape`] when a parameter does not fit the channels, and those of the device.
pub fn norm_prelu(
    tape: &mut Tape,
    x: &Tensor,
    statistics: Statistics,
    affine: Affine,
) -> Result<(Activation, Moments)> {
    affine.check(x.shape())?;
    match x.view() {
        Some(_) => norm_prelu_on_device(tape, x, statistics, affine),
        None => Ok(norm_prelu_on_host(tape, x, statistics, affine)),
    }
}

/// What batch norm in evaluation and PReLU do to a tensor of `c` channels in host memory: for the epilogue of the
/// convolution that makes it, which has left `bias` out.
///
/// # Errors
/// [`Error::Shape`] when a parameter does not fit the channels.
pub fn fixed(c: usize, running: &Running, bias: &Param, affine: Affine) -> Result<Pending> {
    affine.check(Shape::new(1, [1; 3], c))?;
    let moments = cpu::fixed_moments(running, Some(bias));
    Ok(cpu::pending_of(&moments, &cpu::rstd_of(&moments), affine, c))
}

fn norm_prelu_on_host(
    tape: &mut Tape,
    x: &Tensor,
    statistics: Statistics,
    affine: Affine,
) -> (Activation, Moments) {
    let c = x.shape().c;
    let moments = cpu::moments_of(x, statistics);
    let rstd = cpu::rstd_of(&moments);
    let y = Activation::lazy(x.clone(), cpu::pending_of(&moments, &rstd, affine, c));
    if tape.is_recording() {
        let (y, x_id, stored) = (y.clone(), x.id(), tape.operands);
        let to_f32 = |v: &[f64]| v.iter().map(|&v| v as f32).collect::<List<_>>();
        let (mean, rstd) = (to_f32(&moments.mean), to_f32(&rstd));
        let count = matches!(statistics, Statistics::Batch | Statistics::Instance).then_some(moments.count);
        let [gamma, beta, slope] = [affine.gamma, affine.beta, affine.slope].map(|p| p.map(|p| p.id));
        tape.record(move |grads| {
            let dy = single(&taken(grads, &y)?);
            let (sums, dx) = cpu::backward(&y, &dy, (&mean, &rstd), count, stored);
            let fold = |v: &[f64]| {
                let sums: List<f32> =
                    (0..c).map(|i| v.iter().skip(i).step_by(c).sum::<f64>() as f32).collect();
                Buffer::from_slice(&sums)
            };
            if let Some(gamma) = gamma {
                grads.add_param(gamma, fold(&sums.dz_xhat));
            }
            if let Some(beta) = beta {
                grads.add_param(beta, fold(&sums.dz));
            }
            if let Some(slope) = slope {
                grads.add_param(slope, Buffer::from_slice(&[sums.slope.iter().sum::<f64>() as f32]));
            }
            give(grads, x_id, dx)
        });
    }
    (y, Moments::Host(moments))
}

fn norm_prelu_on_device(
    tape: &mut Tape,
    x: &Tensor,
    statistics: Statistics,
    affine: Affine,
) -> Result<(Activation, Moments)> {
    let _range = range("norm_prelu");
    let view = x.view().expect("called for tensors on a device");
    let partials = || x.partials().map_or_else(|| cuda::partials(&view), |p| Ok(p.clone()));
    let tiles;
    let statistics = match statistics {
        Statistics::Batch => {
            tiles = partials()?;
            cuda::DeviceStatistics::Batch(&tiles)
        }
        Statistics::Instance => {
            tiles = partials()?;
            cuda::DeviceStatistics::Instance(&tiles)
        }
        Statistics::Identity => cuda::DeviceStatistics::Identity,
        Statistics::Fixed { running, bias } => {
            let (mean, var) = running.device.as_ref().ok_or_else(|| {
                Error::Internal("norm_prelu: running statistics are not on the device".into())
            })?;
            cuda::DeviceStatistics::Fixed { mean, var, bias: bias.map(|b| &b.device().value) }
        }
    };
    let (pending, saved, moments) = cuda::forward(&view, statistics, affine.on_device())?;
    let y = Activation::lazy_on_device(x.clone(), pending);
    if tape.is_recording() {
        let (y, x_id, shape) = (y.clone(), x.id(), x.shape());
        let owned = [affine.gamma, affine.beta, affine.slope].map(|p| p.cloned());
        tape.record(move |grads| {
            let _range = range("norm_prelu backward");
            let dy = taken(grads, &y)?;
            let [gamma, beta, slope] = owned.each_ref().map(Option::as_ref);
            let affine = Affine { gamma, beta, slope }.on_device();
            let view = y.view().expect("made on a device");
            let dy =
                dy.device().ok_or_else(|| Error::Internal("norm_prelu: dy is not on the device".into()))?;
            let dx = cuda::backward(&view, dy, &saved, affine)?;
            give(grads, x_id, Tensor::on_device(shape, dx, None))
        });
    }
    Ok((y, Moments::Device(moments)))
}

impl<'a> Affine<'a> {
    /// Whether every parameter fits a tensor of this shape.
    fn check(self, shape: Shape) -> Result<()> {
        let lens = [(self.gamma, shape.c), (self.beta, shape.c), (self.slope, 1)];
        match lens.iter().find_map(|(p, len)| p.filter(|p| p.value.len() != *len).map(|p| (p, len))) {
            None => Ok(()),
            Some((p, len)) => Err(Error::Shape {
                op: "norm_prelu",
                want: format!("{len} values for {shape}"),
                got: format!("{:?}", p.shape),
            }),
        }
    }

    fn on_device(self) -> cuda::DeviceAffine<'a> {
        let [gamma, beta, slope] = [self.gamma, self.beta, self.slope].map(|p| p.map(|p| &**p.device()));
        cuda::DeviceAffine { gamma, beta, slope }
    }
}

/// The gradient of `y`, which must have arrived.
fn taken(grads: &mut Grads, y: &Activation) -> Result<Tensor> {
    grads.take(y.id()).ok_or_else(|| Error::Internal("norm_prelu: no gradient arrived".into()))
}

/// See [`SelfTest`].
pub const SELF_TESTS: &[SelfTest] = &[
    SelfTest { name: "norm_prelu, batch", run: |cuda| self_test(cuda, Statistics::Batch) },
    SelfTest { name: "norm_prelu, instance", run: |cuda| self_test(cuda, Statistics::Instance) },
];

fn self_test(cuda: &Arc<Cuda>, statistics: Statistics) -> Result<String> {
    let c = [16];
    let params = [("dgamma", &c[..]), ("dbeta", &c), ("dslope", &[1])];
    taped(cuda, &[Shape::new(2, [9, 8, 10], c[0])], &params, |tape, xs, ws| {
        let affine = Affine { gamma: Some(&ws[0]), beta: Some(&ws[1]), slope: Some(&ws[2]) };
        Ok(vec![norm_prelu(tape, &xs[0], statistics, affine)?.0])
    })
}
