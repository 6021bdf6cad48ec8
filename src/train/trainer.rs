//! One optimizer step, and the state that a checkpoint holds.

use super::optimizer::{Moments, Optimizer};
use crate::config::{Loss, Net, Optim};
use crate::error::{Error, Result};
use crate::nn::{Mode, UNet};
use crate::ops::dice_ce;
use crate::tensor::{ParamId, Shape, Tape, Tensor};

/// A network being trained.
pub struct Trainer {
    /// The network.
    pub net: UNet,
    optimizer: Optimizer<f32>,
    loss: Loss,
}

impl Trainer {
    /// A fresh network, every weight a function of `seed`.
    ///
    /// # Errors
    /// As [`UNet::new`].
    pub fn new(net: &Net, loss: Loss, optim: Optim, seed: u64) -> Result<Self> {
        Ok(Self::with_network(UNet::new(net, seed)?, loss, optim))
    }

    /// Training that starts from the values of `net`.
    pub fn with_network(net: UNet, loss: Loss, optim: Optim) -> Self {
        let optimizer = Optimizer::new(optim, net.params().iter().map(|p| p.value.len()));
        Trainer { net, optimizer, loss }
    }

    /// Optimizer steps taken.
    pub fn steps(&self) -> u64 {
        self.optimizer.step
    }

    /// First and second moments of every parameter, in `named_parameters()` order.
    pub fn moments(&self) -> &[Moments<f32>] {
        &self.optimizer.moments
    }

    /// Whether every weight, running statistic and moment is a number.
    pub fn is_finite(&self) -> bool {
        let finite = |v: &[f32]| v.iter().all(|v| v.is_finite());
        self.net.is_finite()
            && self.optimizer.moments.iter().all(|m| finite(&m.exp_avg) && finite(&m.exp_avg_sq))
    }

    /// Continues from the moments of an earlier run.
    ///
    /// # Errors
    /// [`Error::Shape`] when they are those of another network or optimizer.
    pub fn restore(&mut self, step: u64, moments: Vec<Moments<f32>>) -> Result<()> {
        let sizes = |m: &[Moments<f32>]| -> Vec<_> {
            m.iter().map(|m| (m.exp_avg.len(), m.exp_avg_sq.len())).collect()
        };
        if sizes(&moments) != sizes(&self.optimizer.moments) {
            return Err(Error::Shape {
                op: "optimizer",
                want: format!(
                    "moments of {} parameters of this network and optimizer",
                    self.net.params().len()
                ),
                got: format!("moments of {} others", moments.len()),
            });
        }
        self.optimizer.step = step;
        self.optimizer.moments = moments;
        Ok(())
    }

    /// One step on `images` (N, D, H, W) with `labels` of the same size: forward, DiceCE, backward, update of weights
    /// and running statistics. Returns the loss before the step.
    ///
    /// A loss that is not a number changes nothing: the weights stay those of the step before.
    ///
    /// # Errors
    /// [`Error::Diverged`] when the loss is not finite, and those of the ops.
    pub fn step(&mut self, images: &[f32], labels: &[u8], [n, d, h, w]: [usize; 4]) -> Result<f64> {
        let mut tape = Tape::recording();
        let x = Tensor::from_slice(Shape::new(n, [d, h, w], 1), images);
        let (logits, statistics) = self.net.forward(&mut tape, x, Mode::Train, None)?;
        let loss = dice_ce::loss(&mut tape, &logits, labels, &self.loss)?.loss;
        drop(logits);
        if !loss.is_finite() {
            let (step, loss) = (self.steps() + 1, loss as f32);
            return Err(Error::Diverged {
                step,
                loss,
                cure: "lower --lr or look at the input images".into(),
            });
        }
        let mut grads = self.net.grads();
        tape.backward(&mut grads)?;
        self.net.update_running(&statistics);
        let gradients: Vec<&[f32]> = (0..self.net.params().len()).map(|i| grads.param(ParamId(i))).collect();
        self.optimizer.step(self.net.params_mut().iter_mut().map(|p| p.make_mut()), &gradients);
        Ok(loss)
    }
}
