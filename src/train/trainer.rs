//! Optimizer steps on any device, and the state that a checkpoint holds.

use super::device_engine::DeviceEngine;
use super::optimizer::{Moments, Optimizer};
use crate::config::{Loss, Net, Optim};
use crate::data::cache::CachedCase;
use crate::data::sampler::PatchSpec;
use crate::device::cuda::Cuda;
use crate::device::list::List;
use crate::error::{Error, Result};
use crate::nn::checkpoint::ScalerState;
use crate::nn::{Mode, UNet};
use crate::ops::dice_ce;
use crate::tensor::{ParamId, Shape, Tape, Tensor};
use std::sync::Arc;

/// A network being trained.
pub struct Trainer {
    /// The network. On a device its values in host memory are those of the last [`Trainer::refresh`]; its running statistics
    /// may be newer.
    pub net: UNet,
    loss: Loss,
    optim: Optim,
    engine: Engine,
    steps: u64,
    /// Losses that nobody has taken yet, oldest first.
    losses: List<f64>,
}

enum Engine {
    /// The CPU, and the gradient scaler of a run that began on a device, kept for when it goes back there.
    Host(Optimizer<f32>, Option<ScalerState>),
    Device(Box<DeviceEngine>),
}

/// The patches of one step.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// Cut on the host.
    Patches {
        /// Intensities (N, D, H, W).
        images: &'a [f32],
        /// Labels 0 and 1 (N, D, H, W).
        labels: &'a [u8],
        /// N, D, H, W.
        shape: [usize; 4],
    },
    /// To be cut on the device from the cases of [`Trainer::make_resident`].
    Resident {
        /// Where from.
        specs: &'a [PatchSpec],
        /// D, H, W.
        patch: [usize; 3],
    },
}

impl Trainer {
    /// A fresh network, every weight a function of `seed`, trained on the CPU.
    ///
    /// # Errors
    /// As [`UNet::new`].
    pub fn new(net: &Net, loss: Loss, optim: Optim, seed: u64) -> Result<Self> {
        Ok(Self::with_network(UNet::new(net, seed)?, loss, optim))
    }

    /// Training on the CPU that starts from the values of `net`.
    pub fn with_network(net: UNet, loss: Loss, optim: Optim) -> Self {
        let optimizer = Optimizer::new(optim, net.params().iter().map(|p| p.value.len()));
        Trainer { net, loss, optim, engine: Engine::Host(optimizer, None), steps: 0, losses: List::default() }
    }

    /// The same training on a device.
    ///
    /// # Errors
    /// When it has not enough memory.
    pub fn on_device(mut self, cuda: &Arc<Cuda>) -> Result<Self> {
        let engine = DeviceEngine::new(cuda, &mut self.net, self.optim)?;
        self.engine = Engine::Device(Box::new(engine));
        Ok(self)
    }

    /// Keeps the cases in device memory, so that patches are cut there.
    ///
    /// # Errors
    /// When the device has not enough memory, or training is not on one.
    pub fn make_resident(&mut self, cases: &[CachedCase]) -> Result<()> {
        match &mut self.engine {
            Engine::Device(engine) => engine.make_resident(cases),
            Engine::Host(..) => Err(Error::Internal("trainer: only a device has resident cases".into())),
        }
    }

    /// Steps taken, those that an overflow made void included.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// First and second moments of every parameter, in `named_parameters()` order, and the gradient scaler's state
    /// where there is one; waits for the device.
    ///
    /// # Errors
    /// What went wrong on the device.
    pub fn optimizer_state(&self) -> Result<(Vec<Moments<f32>>, Option<ScalerState>)> {
        match &self.engine {
            Engine::Host(optimizer, scaler) => {
                let scaler = scaler.map(|s| ScalerState { steps: optimizer.step, ..s });
                Ok((optimizer.moments.clone(), scaler))
            }
            Engine::Device(engine) => {
                engine.optimizer_state().map(|(moments, scaler)| (moments, Some(scaler)))
            }
        }
    }

    /// Makes the network's values in host memory what the device has; waits for it.
    ///
    /// # Errors
    /// What went wrong on the device.
    pub fn refresh(&mut self) -> Result<()> {
        match &self.engine {
            Engine::Host(..) => Ok(()),
            Engine::Device(_) => self.net.refresh(),
        }
    }

    /// Whether every weight, running statistic and moment is a number; waits for the device, which looks at weights and moments
    /// itself.
    ///
    /// # Errors
    /// What went wrong on the device.
    pub fn is_finite(&mut self) -> Result<bool> {
        let optimized = match &self.engine {
            Engine::Host(optimizer, _) => {
                let moments = optimizer.moments.iter().flat_map(|m| [&m.exp_avg, &m.exp_avg_sq]);
                let mut all = moments.chain(self.net.params().iter().map(|p| p.value.as_ref()));
                all.all(|values| values.iter().all(|v| v.is_finite()))
            }
            Engine::Device(engine) => {
                self.net.refresh_statistics()?;
                engine.is_finite()?
            }
        };
        Ok(optimized && self.net.statistics_are_finite())
    }

    /// Continues from the moments of an earlier run, on this device or another.
    ///
    /// # Errors
    /// [`Error::Shape`] when they are those of another network or optimizer.
    pub fn restore(
        &mut self,
        step: u64,
        moments: Vec<Moments<f32>>,
        scaler: Option<ScalerState>,
    ) -> Result<()> {
        let sizes = |m: &[Moments<f32>]| -> Vec<_> {
            m.iter().map(|m| (m.exp_avg.len(), m.exp_avg_sq.len())).collect()
        };
        let own = Optimizer::<f32>::new(self.optim, self.net.params().iter().map(|p| p.value.len()));
        if sizes(&moments) != sizes(&own.moments) {
            return Err(Error::Shape {
                op: "optimizer",
                want: format!(
                    "moments of {} parameters of this network and optimizer",
                    self.net.params().len()
                ),
                got: format!("moments of {} others", moments.len()),
            });
        }
        self.steps = step;
        // A run that never was on a device has no void steps: its count is Adam's.
        let counted = scaler.map_or(step, |s| s.steps);
        match &mut self.engine {
            Engine::Host(optimizer, kept) => {
                *kept = scaler;
                optimizer.step = counted;
                optimizer.moments = moments;
                Ok(())
            }
            Engine::Device(engine) => engine.restore(&mut self.net, moments, scaler, counted),
        }
    }

    /// Queues one step: forward, DiceCE, backward, update of weights and running statistics. On the CPU it is done
    /// when this returns. A loss that is not a number changes nothing: weights and running statistics stay those of the
    /// step before. On a device it is seen when losses are taken; steps that were queued meanwhile have run.
    ///
    /// # Errors
    /// [`Error::Diverged`] when the loss is not finite, and those of the ops.
    pub fn queue(&mut self, input: Input) -> Result<()> {
        let losses = match &mut self.engine {
            Engine::Device(engine) if engine.is_full() => engine.take_losses()?,
            _ => Vec::new(),
        };
        self.keep(&losses)?;
        self.steps += 1;
        match (&mut self.engine, input) {
            (Engine::Device(engine), input) => engine.queue(&mut self.net, &self.loss, input),
            (Engine::Host(optimizer, _), Input::Patches { images, labels, shape }) => {
                let (net, loss) = (&mut self.net, &self.loss);
                // On a thread of the pool: to any other every op would be handed over, and back.
                let loss = rayon::scope(|_| host_step(net, loss, optimizer, images, labels, shape))?;
                self.keep(&[loss])
            }
            (Engine::Host(..), Input::Resident { .. }) => {
                Err(Error::Internal("trainer: only a device has resident cases".into()))
            }
        }
    }

    /// Losses of queued steps that were not taken yet, oldest first: with `wait` all of them, else those that are
    /// there.
    ///
    /// # Errors
    /// [`Error::Diverged`] when one is not finite, and what went wrong on the device.
    pub fn take_losses(&mut self, wait: bool) -> Result<List<f64>> {
        if let (true, Engine::Device(engine)) = (wait, &mut self.engine) {
            let losses = engine.take_losses()?;
            self.keep(&losses)?;
        }
        Ok(std::mem::take(&mut self.losses))
    }

    /// One step on `images` (N, D, H, W) with `labels` of the same size, and its loss.
    ///
    /// # Errors
    /// As [`Trainer::queue`] and [`Trainer::take_losses`].
    pub fn step(&mut self, images: &[f32], labels: &[u8], shape: [usize; 4]) -> Result<f64> {
        self.queue(Input::Patches { images, labels, shape })?;
        let losses = self.take_losses(true)?;
        losses.last().copied().ok_or_else(|| Error::Internal("trainer: a step has no loss".into()))
    }

    /// Keeps losses for whoever asks; refuses those that are no numbers.
    fn keep(&mut self, losses: &[f64]) -> Result<()> {
        if let Some(i) = losses.iter().position(|loss| !loss.is_finite()) {
            let step = self.steps + 1 - (losses.len() - i) as u64;
            let cure = "lower --lr or look at the input images".into();
            return Err(Error::Diverged { step, loss: losses[i] as f32, cure });
        }
        self.losses.extend(losses.iter().copied());
        Ok(())
    }
}

impl Input<'_> {
    /// Patches in it.
    pub fn patches(&self) -> usize {
        match self {
            Input::Patches { shape, .. } => shape[0],
            Input::Resident { specs, .. } => specs.len(),
        }
    }
}

/// A step on the CPU; its loss. One that is not finite is returned before anything changes.
fn host_step(
    net: &mut UNet,
    loss: &Loss,
    optimizer: &mut Optimizer<f32>,
    images: &[f32],
    labels: &[u8],
    [n, d, h, w]: [usize; 4],
) -> Result<f64> {
    let mut tape = Tape::recording();
    let x = Tensor::from_slice(Shape::new(n, [d, h, w], 1), images);
    let (logits, statistics) = net.forward(&mut tape, x, Mode::Train, None)?;
    let loss = dice_ce::loss(&mut tape, &logits, labels, loss)?.loss;
    drop(logits);
    if !loss.is_finite() {
        return Ok(loss);
    }
    let mut grads = net.grads();
    tape.backward(&mut grads)?;
    net.update_running(&statistics)?;
    net.count_batch();
    let gradients: List<&[f32]> = (0..net.params().len()).map(|i| grads.param(ParamId(i))).collect();
    optimizer.step(net.params_mut().iter_mut().map(|p| p.make_mut()), &gradients);
    Ok(loss)
}
