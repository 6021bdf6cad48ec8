//! Threads that cut the batches of the coming steps while the network computes.
//!
//! Worker w of n prepares every n-th step and hands it over through a channel of its own that holds one batch;
//! the consumer asks the workers in turn, so the order is that of the steps whatever the threads do.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::cache::CachedCase;
use super::sampler::{self, PatchSpec};
use crate::config::Sampling;
use crate::error::{Error, Result};

/// The patches of one step.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// Epoch, from 0.
    pub epoch: u64,
    /// Step of the epoch, from 0.
    pub step: usize,
    /// Where the patches come from.
    pub specs: Vec<PatchSpec>,
    /// Intensities (N, D, H, W), C order; one channel, so (N, D, H, W, C) as well.
    pub image: Vec<f32>,
    /// 0/1 labels (N, D, H, W), C order.
    pub label: Vec<u8>,
}

impl Batch {
    /// Cuts the patches of one step.
    pub fn new(cases: &[CachedCase], sampling: &Sampling, seed: u64, epoch: u64, step: usize) -> Self {
        let candidates: Vec<_> = cases.iter().map(CachedCase::candidates).collect();
        let specs = sampler::draw(&candidates, sampling, seed, epoch, step);
        let voxels = sampling.patch.iter().product::<usize>();
        let mut image = vec![0.0; specs.len() * voxels];
        let mut label = vec![0; specs.len() * voxels];
        let outputs = image.chunks_mut(voxels).zip(label.chunks_mut(voxels));
        for (spec, (image, label)) in specs.iter().zip(outputs) {
            cases[spec.case].cut(spec, sampling.patch, image, label);
        }
        Batch { epoch, step, specs, image, label }
    }
}

/// An endless sequence of batches, prepared ahead. Dropping it ends its threads.
#[derive(Debug)]
pub struct Prefetcher {
    /// One a worker; emptied first when dropped, so that a waiting worker sees that nobody listens.
    batches: Vec<Receiver<Batch>>,
    workers: Vec<JoinHandle<()>>,
    next: usize,
}

impl Prefetcher {
    /// Starts at `step` of `epoch` (both from 0) with `threads` workers (at least one), each at most two batches
    /// ahead. Refuses an empty training set, and a sampling that yields no patch or no voxel.
    pub fn new(
        cases: Arc<Vec<CachedCase>>,
        sampling: &Sampling,
        seed: u64,
        (epoch, step): (u64, usize),
        threads: usize,
    ) -> Result<Self> {
        if cases.is_empty() {
            return Err(Error::Usage("there is no case to train on: add one or lower --val-cases".into()));
        }
        let empty = sampling.patch.contains(&0) || sampling.samples_per_volume == 0;
        if empty || sampling.volumes_per_step == 0 {
            return Err(Error::Usage(
                "patch size, samples a volume and volumes a step must be at least 1".into(),
            ));
        }
        let per_epoch = sampler::steps_per_epoch(cases.len(), sampling);
        let first = epoch * per_epoch as u64 + step as u64;
        let threads = threads.max(1);
        let mut prefetcher = Prefetcher { batches: Vec::new(), workers: Vec::new(), next: 0 };
        for worker in 0..threads {
            let (sender, receiver) = sync_channel(1);
            let (cases, sampling) = (Arc::clone(&cases), sampling.clone());
            let start = first + worker as u64;
            let work = move || {
                let steps = (start..).step_by(threads);
                prepare(&cases, &sampling, seed, steps, per_epoch as u64, &sender);
            };
            let handle = std::thread::Builder::new()
                .name(format!("patches-{worker}"))
                .spawn(work)
                .map_err(|e| Error::Internal(format!("cannot start a thread that cuts patches: {e}")))?;
            prefetcher.batches.push(receiver);
            prefetcher.workers.push(handle);
        }
        Ok(prefetcher)
    }

    /// The next step's batch. Fails only if a worker has died, which is a bug.
    pub fn next_batch(&mut self) -> Result<Batch> {
        let worker = self.next;
        self.next = (worker + 1) % self.batches.len();
        self.batches[worker].recv().map_err(|_| {
            Error::Internal(format!("thread patches-{worker} has died; its message stands above"))
        })
    }
}

impl Drop for Prefetcher {
    fn drop(&mut self) {
        self.batches.clear();
        for worker in self.workers.drain(..) {
            // A worker that panicked has already said so.
            let _ = worker.join();
        }
    }
}

/// Cuts the batches of `steps` (counted over all epochs) until nobody listens.
fn prepare(
    cases: &[CachedCase],
    sampling: &Sampling,
    seed: u64,
    steps: impl Iterator<Item = u64>,
    per_epoch: u64,
    sender: &SyncSender<Batch>,
) {
    for step in steps {
        let batch = Batch::new(cases, sampling, seed, step / per_epoch, (step % per_epoch) as usize);
        if sender.send(batch).is_err() {
            return;
        }
    }
}
