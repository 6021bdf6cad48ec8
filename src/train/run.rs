//! A whole training run: epochs, validation, checkpoints, and stopping at any step.
//!
//! A stopped run that is resumed leaves the same bytes as one that never stopped: every random draw is a function of
//! (seed, epoch, place), and the checkpoint holds weights, moments, step and the losses of the unfinished epoch.

use super::feed::Feed;
use super::optimizer::Moments;
use super::trainer::Trainer;
use crate::config::Config;
use crate::data::cache_file::CachedCase;
use crate::data::publish::publish;
use crate::data::sampler::steps_per_epoch;
use crate::device::bf16::Operands;
use crate::device::cuda::Cuda;
use crate::device::nvtx::range;
use crate::error::{Error, Result};
use crate::infer::evaluate::grid_dice;
use crate::infer::predict::{Network, Predictor};
use crate::metrics::overlap::mean_ignoring_nan;
use crate::nn::UNet;
use crate::nn::checkpoint::{self, Checkpoint, CheckpointMeta, EpochRecord, Split};
use crate::nn::weights::{Metadata, write_safetensors};
use crate::tensor::View;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What a run works on.
pub struct Run<'a> {
    /// Every number.
    pub config: &'a Config,
    /// Folder of the results; exists.
    pub dir: &'a Path,
    /// Training cases.
    pub train: Arc<Vec<CachedCase>>,
    /// Validation cases; without any, the last weights are the best.
    pub val: &'a [CachedCase],
    /// Where to go on from.
    pub resume: Option<Checkpoint>,
    /// Becomes true when the run is to save and end.
    pub stop: &'a AtomicBool,
    /// What trains.
    pub place: Place,
    /// An epoch that ends sooner after the last checkpoint writes none; the last one and one that is stopped always do. A
    /// fast device's epochs are shorter than the writing of one, which holds three times the weights and is waited for
    /// until the disk has it.
    pub between_checkpoints: Duration,
}

/// What trains.
#[derive(Clone, Debug)]
pub enum Place {
    /// The CPU, whose convolutions multiply these.
    Cpu(Operands),
    /// A CUDA device.
    Cuda {
        /// The device.
        cuda: Arc<Cuda>,
        /// Whether the training cases are to be kept in its memory, or patches cut on the host for every step.
        resident: bool,
    },
}

/// What happened, for whoever watches.
#[derive(Clone, Debug)]
pub enum Event {
    /// An optimizer step ended.
    Step {
        /// 1-based epoch.
        epoch: usize,
        /// Steps done, over all epochs.
        done: usize,
        /// Steps of the whole run.
        total: usize,
        /// Its loss.
        loss: f64,
    },
    /// The steps of an epoch are done and its validation begins.
    Validation {
        /// 1-based epoch.
        epoch: usize,
    },
    /// An epoch ended.
    Epoch {
        /// 1-based epoch.
        epoch: usize,
        /// Mean loss of its steps.
        loss: f64,
        /// Mean Dice of the validation cases on the resampled grid, where the epoch was validated.
        dice: Option<f64>,
        /// Whether that is the best one so far.
        best: bool,
        /// Training patches a second, without validation.
        patches_per_s: f64,
    },
}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Whether all epochs are done, or `stop` ended it.
    pub finished: bool,
    /// Optimizer steps done.
    pub step: u64,
    /// Best validation Dice and its epoch.
    pub best: Option<(f64, u64)>,
    /// Weights of the best epoch, or the last ones without validation.
    pub weights: PathBuf,
}

/// Name of the weights with the best validation Dice.
pub const BEST: &str = "best.safetensors";
/// Name of the checkpoint to resume from.
pub const LAST: &str = "last.safetensors";
/// Name of the resolved numbers: a file for `--config`.
pub const CONFIG: &str = "config.toml";
/// Name of the table of epochs.
pub const HISTORY: &str = "history.csv";

impl Run<'_> {
    /// Trains until all epochs are done or `stop` is set.
    ///
    /// # Errors
    /// [`Error::Diverged`] when the loss is not a number (the last good checkpoint is named), file errors, and those
    /// of the network.
    pub fn train(mut self, watch: &mut dyn FnMut(&Event)) -> Result<Summary> {
        let c = self.config;
        let mut trainer = Trainer::new(&c.net, c.loss, c.optim, c.seed)?;
        match &self.place {
            Place::Cpu(operands) => trainer.net.set_operands(*operands),
            Place::Cuda { cuda, resident } => {
                trainer = trainer.on_device(cuda)?;
                if *resident {
                    trainer.make_resident(&self.train)?;
                }
            }
        }
        let mut meta = CheckpointMeta {
            step: 0,
            epoch: 0,
            best_dice: None,
            best_epoch: None,
            config: c.record(),
            split: Split { train: names(&self.train), val: names(self.val) },
            commit: crate::COMMIT.into(),
            history: Vec::new(),
            epoch_losses: Vec::new(),
            scaler: None,
        };
        if let Some(from) = self.resume.take() {
            self.restore(&mut trainer, &mut meta, from)?;
        }
        let per_epoch = steps_per_epoch(self.train.len(), &c.sampling);
        // Adam's bias correction raises to an i32 power.
        let total = c.run.epochs.checked_mul(per_epoch).filter(|&total| total <= i32::MAX as usize);
        let total = total.ok_or_else(|| {
            Error::Usage(format!(
                "--epochs {} makes more than {} steps, which cannot be counted: lower it",
                c.run.epochs,
                i32::MAX
            ))
        })?;
        // Only now: numbers that do not fit the checkpoint must not replace those that do.
        let begun = meta.epoch as usize + usize::from(!meta.epoch_losses.is_empty());
        if c.run.epochs < begun || meta.epoch_losses.len() > per_epoch {
            let what = format!(
                "has begun epoch {begun} with {per_epoch} steps each: resume with at least as many --epochs and the \
                 same --volumes-per-step"
            );
            return Err(Error::file(self.dir.join(LAST), what));
        }
        publish(&self.dir.join(CONFIG), |file| file.write_all(c.to_toml().as_bytes()))?;
        if meta.step == 0 {
            // From the first step on there is something to resume from.
            self.save(&mut trainer, &mut meta)?;
        }
        let mut saved = Instant::now();
        let start = (meta.epoch, meta.epoch_losses.len());
        let resident = matches!(self.place, Place::Cuda { resident: true, .. });
        let mut feed = Feed::new(&self.train, &c.sampling, c.seed, start, resident)?;
        while (meta.epoch as usize) < c.run.epochs {
            let _epoch = range("epoch");
            let epoch = meta.epoch as usize + 1;
            let before = Instant::now();
            let (mut patches, mut queued) = (0, meta.epoch_losses.len());
            while queued < per_epoch && !self.stop.load(Ordering::Relaxed) {
                let input = feed.next_input(&c.sampling)?;
                patches += input.patches();
                trainer.queue(input).map_err(|e| self.diverged(e, &meta))?;
                queued += 1;
                self.collect(&mut trainer, &mut meta, false, total, watch)?;
            }
            self.collect(&mut trainer, &mut meta, true, total, watch)?;
            let seconds = before.elapsed().as_secs_f64();
            let (stopped, ended) = (queued < per_epoch, epoch == c.run.epochs);
            let due = !self.val.is_empty() && (epoch.is_multiple_of(c.run.val_interval) || ended);
            let long_ago = |saved: Instant| saved.elapsed() >= self.between_checkpoints;
            let mut save = ended || long_ago(saved);
            // Whatever is saved or validated is checked first.
            if stopped || due || save {
                self.refuse_infinities(&mut trainer, &meta)?;
            }
            if stopped {
                self.save(&mut trainer, &mut meta)?;
                return Ok(self.summary(&trainer, &meta, false));
            }
            let loss = meta.epoch_losses.iter().sum::<f64>() / per_epoch as f64;
            let mut dice = None;
            if due {
                watch(&Event::Validation { epoch });
                dice = match validate(&trainer.net, self.val, c, self.stop) {
                    // Saved with every step of the epoch done: resuming begins with its validation.
                    Err(Error::Interrupted) => {
                        self.save(&mut trainer, &mut meta)?;
                        return Ok(self.summary(&trainer, &meta, false));
                    }
                    dice => Some(dice?),
                };
            }
            save |= due && long_ago(saved);
            // MONAI's CheckpointSaver: strictly better only.
            let best = dice.is_some_and(|d| meta.best_dice.is_none_or(|b| d > b));
            meta.epoch = epoch as u64;
            meta.epoch_losses.clear();
            meta.history.push(EpochRecord { epoch: meta.epoch, loss, dice });
            if best {
                (meta.best_dice, meta.best_epoch) = (dice, Some(meta.epoch));
            }
            if best || (self.val.is_empty() && ended) {
                trainer.refresh()?;
                self.save_best(&trainer.net, &meta)?;
            }
            if save {
                self.save(&mut trainer, &mut meta)?;
                saved = Instant::now();
            }
            let patches_per_s = patches as f64 / seconds.max(1e-9);
            watch(&Event::Epoch { epoch, loss, dice, best, patches_per_s });
        }
        Ok(self.summary(&trainer, &meta, true))
    }

    /// Takes the losses that are there, or with `wait` all, and tells of their steps.
    fn collect(
        &self,
        trainer: &mut Trainer,
        meta: &mut CheckpointMeta,
        wait: bool,
        total: usize,
        watch: &mut dyn FnMut(&Event),
    ) -> Result<()> {
        let losses = trainer.take_losses(wait).map_err(|e| self.diverged(e, meta))?;
        let epoch = meta.epoch as usize + 1;
        for loss in losses {
            meta.step += 1;
            meta.epoch_losses.push(loss);
            watch(&Event::Step { epoch, done: meta.step as usize, total, loss });
        }
        Ok(())
    }

    fn summary(&self, trainer: &Trainer, meta: &CheckpointMeta, finished: bool) -> Summary {
        let best = meta.best_dice.zip(meta.best_epoch);
        Summary { finished, step: trainer.steps(), best, weights: self.dir.join(BEST) }
    }

    fn restore(&self, trainer: &mut Trainer, meta: &mut CheckpointMeta, from: Checkpoint) -> Result<()> {
        if from.meta.split != meta.split {
            let what = "was trained on another split of the cases: resume with the same --data, --val-cases, --folds";
            return Err(Error::file(self.dir.join(LAST), what));
        }
        trainer.net.load(&from.weights)?;
        let pairs = from.moments.exp_avg.into_iter().zip(from.moments.exp_avg_sq);
        let moments = pairs.map(|((_, exp_avg), (_, exp_avg_sq))| Moments { exp_avg, exp_avg_sq }).collect();
        trainer.restore(from.meta.step, moments, from.meta.scaler)?;
        *meta = CheckpointMeta { config: meta.config.take(), commit: crate::COMMIT.into(), ..from.meta };
        Ok(())
    }

    /// The loss looks at the weights before a step; what the last step made of them must not replace good ones.
    fn refuse_infinities(&self, trainer: &mut Trainer, meta: &CheckpointMeta) -> Result<()> {
        if trainer.is_finite()? {
            return Ok(());
        }
        let cure = "lower --lr or look at the input images".into();
        Err(self.diverged(Error::Diverged { step: trainer.steps(), loss: f32::NAN, cure }, meta))
    }

    fn save(&self, trainer: &mut Trainer, meta: &mut CheckpointMeta) -> Result<()> {
        trainer.refresh()?;
        let (moments, scaler) = trainer.optimizer_state()?;
        (meta.step, meta.scaler) = (trainer.steps(), scaler);
        let named = |pick: fn(&Moments<f32>) -> &Vec<f32>| {
            let values = moments.iter().map(|m| pick(m).clone());
            trainer.net.param_names().iter().cloned().zip(values).collect()
        };
        let moments =
            checkpoint::Moments { exp_avg: named(|m| &m.exp_avg), exp_avg_sq: named(|m| &m.exp_avg_sq) };
        self.write_history(meta)?;
        // Last of all files: a run killed before this line does again whatever they are ahead of it.
        checkpoint::save(&self.dir.join(LAST), &trainer.net.state_dict(), &moments, meta)
    }

    fn write_history(&self, meta: &CheckpointMeta) -> Result<()> {
        publish(&self.dir.join(HISTORY), |file| {
            writeln!(file, "epoch,train_loss,val_mean_dice")?;
            for r in &meta.history {
                writeln!(file, "{},{},{}", r.epoch, r.loss, r.dice.map_or(String::new(), |d| d.to_string()))?;
            }
            Ok(())
        })
    }

    fn save_best(&self, net: &UNet, meta: &CheckpointMeta) -> Result<()> {
        let text = |value: serde_json::Result<String>| value.map_err(|e| Error::Internal(e.to_string()));
        let metadata = Metadata::from([
            ("config".into(), meta.config.to_string()),
            ("split".into(), text(serde_json::to_string(&meta.split))?),
            ("epoch".into(), meta.epoch.to_string()),
            ("val_mean_dice".into(), meta.best_dice.map_or(String::new(), |d| d.to_string())),
            ("commit".into(), meta.commit.clone()),
        ]);
        write_safetensors(&self.dir.join(BEST), &net.state_dict(), &metadata)
    }

    /// Tells where the last good weights are, and leaves the losses until then.
    fn diverged(&self, e: Error, meta: &CheckpointMeta) -> Error {
        match e {
            Error::Diverged { step, loss, cure } => {
                // That they cannot be written must not hide what happened.
                let _ = self.write_history(meta);
                let last = self.dir.join(LAST);
                let kept = if last.exists() {
                    format!("the last good checkpoint is {}", last.display())
                } else {
                    "no checkpoint was saved yet".into()
                };
                Error::Diverged { step, loss, cure: format!("{kept}; {cure}") }
            }
            other => other,
        }
    }
}

fn names(cases: &[CachedCase]) -> Vec<String> {
    cases.iter().map(|c| c.name().to_owned()).collect()
}

/// Mean Dice over `cases` on the resampled grid, as the bundle validates: cases without the organ are left out, and
/// 0 when all are (MONAI MeanDice).
///
/// # Errors
/// [`Error::Interrupted`] when `stop` becomes true before the last window, and those of the network.
pub fn validate(net: &UNet, cases: &[CachedCase], config: &Config, stop: &AtomicBool) -> Result<f64> {
    let go_on = || match stop.load(Ordering::Relaxed) {
        true => Err(Error::Interrupted),
        false => Ok(()),
    };
    let told = |_| go_on();
    let on_device = |x: &View| {
        go_on()?;
        net.infer_on_device(x)
    };
    let predictor = match net.params()[0].cuda() {
        None => Predictor::Host(Network::UNet(net, &told)),
        Some(cuda) => Predictor::Device(cuda, &on_device),
    };
    let dice = |case: &CachedCase| grid_dice(&predictor, case, &config.window);
    let dice: Vec<f32> = cases.iter().map(dice).collect::<Result<_>>()?;
    Ok(mean_ignoring_nan(&dice).0.into())
}
