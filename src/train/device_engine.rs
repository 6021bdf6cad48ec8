//! Training steps on a CUDA device, without the host in the loop.
//!
//! A step of one shape runs once as it comes, which compiles its kernels and fills the pool; the second one is
//! recorded, and from then on a step is one replay. What changes from step to step is in device memory: patch positions
//! or patches, weights, moments, loss scale, counts. Losses are copied to a ring in pinned memory and read when it is
//! full or somebody waits for them. Steps on patches that the host cut have two places for them in turn (see `staging`),
//! and a recording for each.

use super::optimizer::Moments;
use super::staging::Staging;
use super::trainer::Input;
use crate::config::{Loss, Optim};
use crate::data::cache::{CachedCase, Image};
use crate::data::sampler::PatchSpec;
use crate::device::cuda::driver::Event;
use crate::device::cuda::{Act, Buf, Cuda, Pinned, Precision, Recording};
use crate::device::nvtx::range;
use crate::error::{Error, Result};
use crate::nn::checkpoint::ScalerState;
use crate::nn::{Mode, UNet};
use crate::ops::dice_ce;
use crate::ops::optimizer::cuda::{DeviceOptimizer, Scaler, Scaling, State};
use crate::ops::patch::Spec;
use crate::ops::patch::cuda::{CaseTable, ResidentCase, cut};
use crate::tensor::{Grads, Shape, Tape, Tensor};
use std::sync::Arc;

/// Steps queued before the host waits for their losses.
const RING: usize = 16;

/// Everything of a training run that is on the device, beside the network's parameters.
pub struct DeviceEngine {
    cuda: Arc<Cuda>,
    optimizer: DeviceOptimizer,
    cases: Option<CaseTable>,
    steps: Vec<Step>,
    staging: Option<Staging>,
    /// Which of its two places the next step on patches of the host takes.
    place: usize,
    losses: Pinned<f32>,
    /// Scale and tracker of mixed precision, while a run goes on without it.
    kept: (f32, u32),
    /// Steps whose losses were not taken.
    queued: usize,
}

/// The steps of one shape and source of patches.
struct Step {
    shape: [usize; 4],
    images: Act,
    labels: Buf<u8>,
    source: Source,
    run: Run,
}

/// Where patches come from.
enum Source {
    /// Cut from resident cases: where, on the device and for each step under way.
    Resident { specs: Buf<Spec>, pinned: Pinned<Spec> },
    /// Brought by [`Staging`] to this of two places, which the step before that used it left at this event.
    Host { place: usize, free: Option<Event> },
}

/// How the next step of a shape runs.
enum Run {
    /// As it comes.
    First,
    /// Recorded, then replayed.
    Second,
    /// Replayed; the loss is written to this buffer.
    Recorded(Recording, Buf<f32>),
}

impl DeviceEngine {
    /// Moves the parameters of `net` to the device.
    ///
    /// # Errors
    /// When it has not enough memory.
    pub fn new(cuda: &Arc<Cuda>, net: &mut UNet, optim: Optim) -> Result<Self> {
        let _range = range("weights and optimizer");
        let lens: Vec<usize> = net.params().iter().map(|p| p.value.len()).collect();
        let amp = cuda.precision() == Precision::Half;
        let optimizer = DeviceOptimizer::new(cuda, optim, &lens, amp)?;
        net.place(|i| Ok((optimizer.value(i), Some(optimizer.grad(i)))))?;
        let losses = Pinned::new(cuda, RING)?;
        let kept = (Scaling::default().initial, 0);
        let (cuda, steps) = (cuda.clone(), Vec::new());
        Ok(DeviceEngine {
            cuda,
            optimizer,
            cases: None,
            steps,
            staging: None,
            place: 0,
            losses,
            kept,
            queued: 0,
        })
    }

    /// Copies the cases to the device.
    ///
    /// # Errors
    /// When it has not enough memory.
    pub fn make_resident(&mut self, cases: &[CachedCase]) -> Result<()> {
        let _range = range("data set");
        let resident = |case: &CachedCase| match case.image() {
            Image::F16(image) => ResidentCase::new(&self.cuda, image, case.label(), case.shape()),
            Image::F32(image) => ResidentCase::new(&self.cuda, image, case.label(), case.shape()),
        };
        let resident = cases.iter().map(resident).collect::<Result<_>>()?;
        self.cases = Some(CaseTable::new(&self.cuda, resident)?);
        Ok(())
    }

    /// Whether losses must be taken before the next step.
    pub fn is_full(&self) -> bool {
        self.queued == RING
    }

    /// Waits for all steps and returns their losses, oldest first.
    ///
    /// # Errors
    /// What went wrong on the device.
    pub fn take_losses(&mut self) -> Result<Vec<f64>> {
        self.cuda.synchronize()?;
        let losses = self.losses.values()[..self.queued].iter().map(|&loss| loss.into()).collect();
        self.queued = 0;
        Ok(losses)
    }

    /// Queues a step; [`DeviceEngine::is_full`] must be false.
    ///
    /// # Errors
    /// Those of the ops and the device.
    pub fn queue(&mut self, net: &mut UNet, loss: &Loss, input: Input) -> Result<()> {
        let _step = range("step");
        let shape = match input {
            Input::Patches { shape, .. } => shape,
            Input::Resident { specs, patch: [d, h, w] } => [specs.len(), d, h, w],
        };
        let (slot, place) = (self.queued, self.place);
        let same = |step: &Step| match (&step.source, input) {
            (Source::Resident { .. }, Input::Resident { .. }) => step.shape == shape,
            (Source::Host { place: at, .. }, Input::Patches { .. }) => *at == place && step.shape == shape,
            _ => false,
        };
        let index = match self.steps.iter().position(same) {
            Some(index) => index,
            None => {
                self.steps.push(Step::new(&self.cuda, shape, input, place)?);
                self.steps.len() - 1
            }
        };
        let step = &mut self.steps[index];
        let resident = match input {
            Input::Resident { specs, .. } => {
                let missing = || Error::Internal("device_engine: there are no resident cases".into());
                let cases = self.cases.as_ref().ok_or_else(missing)?;
                step.choose(specs, slot, cases.len())?;
                Some(cases)
            }
            Input::Patches { images, labels, .. } => {
                let room = |s: &Staging| s.voxels() >= labels.len();
                let staging = match self.staging.take().filter(room) {
                    Some(staging) => staging,
                    None => Staging::new(&self.cuda, labels.len())?,
                };
                step.bring(self.staging.insert(staging), images, labels)?;
                self.place = 1 - place;
                None
            }
        };
        let (cuda, optimizer) = (&self.cuda, &self.optimizer);
        // What validation packed is of older weights.
        net.forget_packed();
        match &step.run {
            Run::First => {
                let work = Work { net: &mut *net, loss, optimizer, resident, step };
                let value = cuda.step(|| work.run())?;
                self.losses.queue_from(slot, &value)?;
                step.run = Run::Second;
            }
            Run::Second => {
                let work = Work { net: &mut *net, loss, optimizer, resident, step };
                let (value, recording) = cuda.record(|| work.run())?;
                cuda.replay(&recording)?;
                self.losses.queue_from(slot, &value)?;
                step.run = Run::Recorded(recording, value);
            }
            Run::Recorded(recording, value) => {
                cuda.replay(recording)?;
                self.losses.queue_from(slot, value)?;
            }
        }
        step.leave(cuda)?;
        net.count_batch();
        self.queued += 1;
        Ok(())
    }

    /// Moments of every parameter and the scaler; waits for the device.
    ///
    /// # Errors
    /// What went wrong on the device.
    pub fn optimizer_state(&self) -> Result<(Vec<Moments<f32>>, ScalerState)> {
        let State { scaler, exp_avg, exp_avg_sq } = self.optimizer.state()?;
        let pairs = exp_avg.into_iter().zip(exp_avg_sq);
        let moments = pairs.map(|(exp_avg, exp_avg_sq)| Moments { exp_avg, exp_avg_sq }).collect();
        let (scale, growth_tracker) = if self.amp() { (scaler.scale, scaler.growth) } else { self.kept };
        let scaler =
            ScalerState { scale, growth_tracker, steps: scaler.steps.into(), skipped: scaler.skipped.into() };
        Ok((moments, scaler))
    }

    /// Whether every weight and moment is a number; waits for the device.
    ///
    /// # Errors
    /// What went wrong on the device.
    pub fn is_finite(&self) -> Result<bool> {
        self.optimizer.is_finite()
    }

    /// Goes on with the parameters that `net` has in host memory and these moments. Without a scaler's state, as of a
    /// run on a CPU, the scaler is at its start and has `counted` steps.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn restore(
        &mut self,
        net: &mut UNet,
        moments: Vec<Moments<f32>>,
        scaler: Option<ScalerState>,
        counted: u64,
    ) -> Result<()> {
        net.place(|i| Ok((self.optimizer.value(i), Some(self.optimizer.grad(i)))))?;
        // Recordings name the running statistics that were.
        self.steps.clear();
        let (exp_avg, exp_avg_sq) = moments.into_iter().map(|m| (m.exp_avg, m.exp_avg_sq)).unzip();
        let fresh = self.optimizer.scaler()?;
        if let Some(s) = scaler {
            self.kept = (s.scale, s.growth_tracker);
        }
        let count = |steps: u64| {
            u32::try_from(steps).map_err(|_| Error::Internal("device_engine: too many steps to count".into()))
        };
        let scaler = match scaler {
            None => Scaler { steps: count(counted)?, ..fresh },
            Some(s) => Scaler {
                scale: if self.amp() { s.scale } else { fresh.scale },
                growth: if self.amp() { s.growth_tracker } else { 0 },
                steps: count(s.steps)?,
                skipped: count(s.skipped)?,
                ..fresh
            },
        };
        self.optimizer.restore(&State { scaler, exp_avg, exp_avg_sq })
    }

    fn amp(&self) -> bool {
        self.cuda.precision() == Precision::Half
    }
}

impl Step {
    fn new(cuda: &Arc<Cuda>, shape: [usize; 4], input: Input, place: usize) -> Result<Self> {
        let [n, d, h, w] = shape;
        let voxels = n * d * h * w;
        let source = match input {
            Input::Resident { .. } => {
                Source::Resident { specs: cuda.buffer(n)?, pinned: Pinned::new(cuda, RING * n)? }
            }
            Input::Patches { .. } => Source::Host { place, free: None },
        };
        Ok(Step { shape, images: cuda.act(voxels)?, labels: cuda.buffer(voxels)?, source, run: Run::First })
    }

    /// Queues the copy of where in `cases` resident cases the patches are.
    fn choose(&mut self, from: &[PatchSpec], slot: usize, cases: usize) -> Result<()> {
        let Source::Resident { specs, pinned } = &mut self.source else { return Ok(()) };
        let at = slot * from.len();
        for (to, spec) in pinned.values_mut()[at..].iter_mut().zip(from) {
            *to = Spec::new(spec, cases)?;
        }
        pinned.queue_to(specs.cuda().stream(), at, specs)
    }

    /// Queues the copies of patches.
    fn bring(&mut self, staging: &mut Staging, images: &[f32], labels: &[u8]) -> Result<()> {
        let Source::Host { free, .. } = &self.source else { return Ok(()) };
        staging.bring((images, labels), (&self.images, &self.labels), *free)
    }

    /// The step's work is queued: after it, its place is free.
    fn leave(&mut self, cuda: &Cuda) -> Result<()> {
        if let Source::Host { free, .. } = &mut self.source {
            *free = Some(cuda.driver().record(cuda.stream())?);
        }
        Ok(())
    }
}

/// What a step computes.
struct Work<'a> {
    net: &'a mut UNet,
    loss: &'a Loss,
    optimizer: &'a DeviceOptimizer,
    resident: Option<&'a CaseTable>,
    step: &'a Step,
}

impl Work<'_> {
    /// Queues everything from the crop to the update; where the loss will be.
    fn run(self) -> Result<Buf<f32>> {
        let Work { net, loss, optimizer, resident, step } = self;
        let [n, d, h, w] = step.shape;
        if let (Some(cases), Source::Resident { specs, .. }) = (resident, &step.source) {
            cut(cases, specs, n, [d, h, w], &step.images, &step.labels)?;
        }
        let mut tape = Tape::recording();
        let x = Tensor::on_device(Shape::new(n, [d, h, w], 1), step.images.clone(), None);
        let (logits, statistics) = net.forward(&mut tape, x, Mode::Train, None)?;
        let value = dice_ce::loss_on_device(&mut tape, &logits, &step.labels, loss, &optimizer.scale())?;
        drop(logits);
        let mut grads = Grads::default();
        tape.backward(&mut grads)?;
        net.update_running(&statistics)?;
        optimizer.step()?;
        net.forget_packed();
        Ok(value.values.slice(0, 1))
    }
}
