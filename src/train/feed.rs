//! The patches of the coming steps: cut ahead on the host, or only drawn where the cases are on the device.

use super::trainer::Input;
use crate::config::Sampling;
use crate::data::cache::CachedCase;
use crate::data::prefetch::{Batch, Prefetcher};
use crate::data::sampler::{PatchSpec, draw, steps_per_epoch};
use crate::error::Result;
use std::sync::Arc;

/// An endless sequence of steps.
pub enum Feed {
    /// Patches that threads cut ahead.
    Cut(Prefetcher, Option<Batch>),
    /// Positions of patches.
    Drawn(Draw),
}

/// Draws where patches are: a pure function of the seed and the step.
pub struct Draw {
    cases: Arc<Vec<CachedCase>>,
    seed: u64,
    next: u64,
    specs: Vec<PatchSpec>,
}

impl Feed {
    /// Starts at `step` of `epoch`, both from 0. `resident` cases need no cutting.
    ///
    /// # Errors
    /// As [`Prefetcher::new`].
    pub fn new(
        cases: &Arc<Vec<CachedCase>>,
        sampling: &Sampling,
        seed: u64,
        (epoch, step): (u64, usize),
        resident: bool,
    ) -> Result<Self> {
        if resident {
            let next = epoch * steps_per_epoch(cases.len(), sampling) as u64 + step as u64;
            return Ok(Feed::Drawn(Draw { cases: Arc::clone(cases), seed, next, specs: Vec::new() }));
        }
        let prefetcher = Prefetcher::new(Arc::clone(cases), sampling, seed, (epoch, step), 1)?;
        Ok(Feed::Cut(prefetcher, None))
    }

    /// The next step's input.
    ///
    /// # Errors
    /// As [`Prefetcher::next_batch`].
    pub fn next_input(&mut self, sampling: &Sampling) -> Result<Input<'_>> {
        match self {
            Feed::Cut(prefetcher, current) => {
                let [d, h, w] = sampling.patch;
                let batch = current.insert(prefetcher.next_batch()?);
                let shape = [batch.specs.len(), d, h, w];
                Ok(Input::Patches { images: &batch.image, labels: &batch.label, shape })
            }
            Feed::Drawn(feed) => {
                let per_epoch = steps_per_epoch(feed.cases.len(), sampling) as u64;
                let candidates: Vec<_> = feed.cases.iter().map(CachedCase::candidates).collect();
                let (epoch, step) = (feed.next / per_epoch, (feed.next % per_epoch) as usize);
                feed.specs = draw(&candidates, sampling, feed.seed, epoch, step);
                feed.next += 1;
                Ok(Input::Resident { specs: &feed.specs, patch: sampling.patch })
            }
        }
    }
}
