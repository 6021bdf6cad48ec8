//! Whether the numbers make sense, alone and together; every refusal names its flag.

use super::*;
use crate::{Error, Result};

/// More than any machine has cores; starting a hundred thousand threads takes minutes.
const MAX_THREADS: usize = 4096;

/// The sentence of a refusal, unless `fine`.
fn check(fine: bool, sentence: impl FnOnce() -> String) -> Result<()> {
    if fine { Ok(()) } else { Err(Error::Usage(sentence())) }
}

/// Refuses a number of threads that would take minutes to start.
///
/// # Errors
/// [`Error::Usage`].
pub fn check_threads(threads: usize) -> Result<()> {
    check(threads <= MAX_THREADS, || format!("--threads must be at most {MAX_THREADS}, but is {threads}"))
}

impl Config {
    /// Refuses numbers no stage could work with.
    ///
    /// # Errors
    /// [`Error::Usage`]: one sentence that names the flag, its value and what it must be.
    pub fn validate(&self) -> Result<()> {
        check_threads(self.threads)?;
        // TOML integers end there, and the config must be readable again.
        check(self.seed <= i64::MAX as u64, || format!("--seed must be below 2^63, but is {}", self.seed))?;
        self.preprocess.validate()?;
        self.net.validate()?;
        self.validate_patches()?;
        self.validate_windows()?;
        self.validate_training()?;
        self.run.validate()
    }

    /// Voxels of the input that one voxel of the deepest level stands for, along each axis.
    pub fn granularity(&self) -> usize {
        1 << (self.net.channels.len() - 1)
    }

    /// Sides that the skips of the U-Net can put together again.
    fn check_sides(&self, flag: &str, sides: [usize; 3]) -> Result<()> {
        let step = self.granularity();
        check(sides.iter().all(|&s| s > 0 && s % step == 0), || {
            let levels = self.net.channels.len();
            format!("{flag} must be multiples of {step} for a network of {levels} levels, but is {sides:?}")
        })
    }

    fn validate_patches(&self) -> Result<()> {
        let s = &self.sampling;
        self.check_sides("--patch", s.patch)?;
        at_least_0("--pos", s.pos)?;
        at_least_0("--neg", s.neg)?;
        check(s.pos + s.neg > 0.0, || "--pos and --neg must not both be 0".into())?;
        at_least_1("--samples-per-volume", s.samples_per_volume)?;
        at_least_1("--volumes-per-step", s.volumes_per_step)?;
        at_least_0("--shift-offset", f64::from(s.shift_offset))?;
        check((0.0..=1.0).contains(&s.shift_prob), || {
            format!("--shift-prob must be between 0 and 1, but is {}", s.shift_prob)
        })?;
        // Statistics of a single number: variance 0, and torch refuses it too.
        let deepest = s.patch.iter().map(|side| side / self.granularity()).fold(1, usize::saturating_mul);
        let values = match self.net.norm {
            Norm::Instance => deepest,
            Norm::Batch => deepest.saturating_mul(s.samples_per_volume).saturating_mul(s.volumes_per_step),
        };
        check(values > 1, || {
            format!(
                "--patch {:?} leaves one value a channel at the deepest level, which no norm can scale",
                s.patch
            )
        })
    }

    fn validate_windows(&self) -> Result<()> {
        let w = &self.window;
        self.check_sides("--roi", w.roi)?;
        check((0.0..1.0).contains(&w.overlap), || {
            format!("--overlap must be at least 0 and below 1, but is {}", w.overlap)
        })?;
        at_least_1("--sw-batch", w.batch)
    }

    fn validate_training(&self) -> Result<()> {
        let (l, o) = (&self.loss, &self.optim);
        at_least_0("--lambda-dice", l.lambda_dice)?;
        at_least_0("--lambda-ce", l.lambda_ce)?;
        check(l.lambda_dice + l.lambda_ce > 0.0, || {
            "--lambda-dice and --lambda-ce must not both be 0".into()
        })?;
        at_least_0("--smooth", l.smooth)?;
        at_least_0("--lr", o.lr)?;
        for (flag, beta) in [("--beta1", o.beta1), ("--beta2", o.beta2)] {
            check((0.0..1.0).contains(&beta), || {
                format!("{flag} must be at least 0 and below 1, but is {beta}")
            })?;
        }
        at_least_0("--eps", o.eps)?;
        at_least_0("--weight-decay", o.weight_decay)
    }
}

impl Preprocess {
    fn validate(&self) -> Result<()> {
        check(self.spacing_mm.iter().all(|s| s.is_finite() && *s > 0.0), || {
            format!("--spacing must be above 0 mm, but is {:?}", self.spacing_mm)
        })?;
        let [low, high] = self.hu_window;
        check(low.is_finite() && high.is_finite() && low < high, || {
            format!("--hu-window must go from a lower to a higher HU, but is {low},{high}")
        })
    }
}

impl Net {
    fn validate(&self) -> Result<()> {
        check(
            (2..=8).contains(&self.channels.len()) && self.channels.iter().all(|&c| (1..=4096).contains(&c)),
            || format!("--channels must be 2 to 8 levels of 1 to 4096 channels, but is {:?}", self.channels),
        )
    }
}

impl Run {
    fn validate(&self) -> Result<()> {
        // TOML is UTF-8, and the config must be readable again.
        let data = self.data.as_deref().unwrap_or("".as_ref());
        check(data.to_str().is_some(), || format!("--data {} must be a UTF-8 name", data.display()))?;
        at_least_1("--epochs", self.epochs)?;
        at_least_1("--val-interval", self.val_interval)?;
        if let Some(folds) = self.folds {
            check(folds >= 2, || format!("--folds must be at least 2, but is {folds}"))?;
            check(self.fold < folds, || {
                format!("--fold counts from 0 to {} with --folds {folds}, but is {}", folds - 1, self.fold)
            })?;
        } else {
            check(self.fold == 0, || format!("--fold {} needs --folds", self.fold))?;
        }
        check(self.label_value.is_none_or(|v| v.is_finite() && v != 0.0), || {
            "--label-value must be a number other than 0, which is the background".into()
        })?;
        at_least_0("--nsd-tolerance", self.nsd_tolerance_mm)
    }
}

fn at_least_1(flag: &str, value: usize) -> Result<()> {
    check(value > 0, || format!("{flag} must be at least 1, but is 0"))
}

fn at_least_0(flag: &str, value: f64) -> Result<()> {
    check(value.is_finite() && value >= 0.0, || format!("{flag} must be at least 0, but is {value}"))
}
