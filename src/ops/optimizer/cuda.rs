//! Adam and Novograd with the gradient scaler of mixed precision, on a CUDA device.

use super::{Chunk, Tensors};
use crate::config::{Optim, Optimizer as Kind};
use crate::device::cuda::{Buf, Cuda, In, InOut, Kernel, Launch, Out};
use crate::device::nvtx::range;
use crate::error::{Error, Result};
use bytemuck::{Pod, Zeroable};
use std::sync::Arc;

/// `Counts` of kernels/optimizer.cu.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Counts {
    growth: u32,
    steps: u32,
    skipped: u32,
    infinite: u32,
}

/// `Step` of kernels/optimizer.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Step {
    skip: u32,
    unscale: f32,
    step_size: f32,
    root: f32,
}

/// `Check` of kernels/optimizer.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct CheckArgs {
    chunks: In<Chunk>,
    first_chunk: In<u32>,
    grads: In<f32>,
    squares: InOut<f64>,
    second: InOut<f32>,
    scale: InOut<f32>,
    counts: InOut<Counts>,
    step: Out<Step>,
    infinite: InOut<u32>,
    ticket: InOut<u32>,
    lr: f64,
    beta1: f64,
    beta2: f64,
    growth: f32,
    backoff: f32,
    interval: u32,
    tensors: u32,
}

/// `Update` of kernels/optimizer.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct UpdateArgs {
    chunks: In<Chunk>,
    step: In<Step>,
    values: InOut<f32>,
    grads: InOut<f32>,
    first: InOut<f32>,
    second: InOut<f32>,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    eps: f32,
    decay: f32,
}

/// `Finite` of kernels/optimizer.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct FiniteArgs {
    values: In<f32>,
    infinite: InOut<u32>,
    len: u64,
}

static CHECK: Kernel<CheckArgs> = Kernel::new("optimizer.cu", "optimizer_check");
static ADAM: Kernel<UpdateArgs> = Kernel::new("optimizer.cu", "optimizer_adam");
static NOVOGRAD: Kernel<UpdateArgs> = Kernel::new("optimizer.cu", "optimizer_novograd");
static FINITE: Kernel<FiniteArgs> = Kernel::new("optimizer.cu", "optimizer_finite");

/// `THREADS` of kernels/optimizer.cu.
const THREADS: u32 = 256;
/// Shared memory of the check: a double a warp and a word.
const SHARED: u32 = THREADS / 32 * 8 + 8;

/// How the loss is scaled so that fp16 gradients neither vanish nor overflow. The default is `torch.amp.GradScaler`'s.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scaling {
    /// Scale of the first step.
    pub initial: f32,
    /// The scale's factor after `interval` steps in a row that were taken.
    pub growth: f32,
    /// Its factor after a step that was not.
    pub backoff: f32,
    /// See `growth`; at least 1.
    pub interval: u32,
}

impl Default for Scaling {
    fn default() -> Self {
        Scaling { initial: 65536.0, growth: 2.0, backoff: 0.5, interval: 2000 }
    }
}

/// Where the scaler stands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scaler {
    /// What the next loss is multiplied with.
    pub scale: f32,
    /// Steps taken since the scale last changed.
    pub growth: u32,
    /// Steps taken: Adam's t.
    pub steps: u32,
    /// Steps not taken, because a gradient was inf or NaN.
    pub skipped: u32,
    /// Whether a gradient of the last step was inf or NaN.
    pub infinite: bool,
}

/// Everything a step changes besides the weights, for checkpoints.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// The scaler.
    pub scaler: Scaler,
    /// First moments of each tensor.
    pub exp_avg: Vec<Vec<f32>>,
    /// Second moments of each tensor: one an element (Adam) or one in all (Novograd).
    pub exp_avg_sq: Vec<Vec<f32>>,
}

/// All parameters of a network, their gradients and an optimizer, in flat f32 buffers of one layout ([`Tensors`]).
///
/// Backward passes add to [`DeviceOptimizer::grads`], of a loss that was multiplied with [`DeviceOptimizer::scale`];
/// [`DeviceOptimizer::step`] uses them up. Buffers keep their addresses, so a step can be captured and replayed.
#[derive(Debug)]
pub struct DeviceOptimizer {
    config: Optim,
    scaling: Option<Scaling>,
    tensors: Tensors,
    chunks: Buf<Chunk>,
    first_chunk: Buf<u32>,
    values: Buf<f32>,
    grads: Buf<f32>,
    first: Buf<f32>,
    second: Buf<f32>,
    scale: Buf<f32>,
    counts: Buf<Counts>,
    /// Whether an inf or NaN was seen, then the ticket of the check's blocks: both 0 between launches.
    words: Buf<u32>,
}

impl DeviceOptimizer {
    /// Tensors of `lens` floats; values, gradients and moments 0. `amp` scales the loss as torch does by default;
    /// without it the scale is 1. A gradient that is inf or NaN makes a step void either way.
    ///
    /// # Errors
    /// When the device has not enough memory.
    pub fn new(cuda: &Arc<Cuda>, config: Optim, lens: &[usize], amp: bool) -> Result<Self> {
        Self::with_scaling(cuda, config, lens, amp.then(Scaling::default))
    }

    /// The same with another scaling of the loss, or none.
    ///
    /// # Errors
    /// As [`DeviceOptimizer::new`].
    pub fn with_scaling(
        cuda: &Arc<Cuda>,
        config: Optim,
        lens: &[usize],
        scaling: Option<Scaling>,
    ) -> Result<Self> {
        let tensors = Tensors::new(lens);
        if u32::try_from(tensors.total()).is_err() {
            let text = format!(
                "{} parameters are more than this program numbers: lower --channels",
                tensors.total()
            );
            return Err(Error::Usage(text));
        }
        let zeros = |len: usize| -> Result<Buf<f32>> {
            let buf = cuda.buffer(len)?;
            buf.fill(0)?;
            Ok(buf)
        };
        let second = match config.optimizer {
            Kind::Adam => tensors.total(),
            Kind::Novograd => tensors.count(),
        };
        let (chunks, first_chunk) = tensors.chunks();
        Ok(DeviceOptimizer {
            config,
            scaling,
            chunks: cuda.upload(&chunks)?,
            first_chunk: cuda.upload(&first_chunk)?,
            values: zeros(tensors.total())?,
            grads: zeros(tensors.total())?,
            first: zeros(tensors.total())?,
            second: zeros(second)?,
            scale: cuda.upload(&[scaling.map_or(1.0, |s| s.initial)])?,
            counts: cuda.upload(&[Counts::zeroed()])?,
            words: cuda.upload(&[0, 0])?,
            tensors,
        })
    }

    /// Where each tensor lies in the flat buffers.
    pub fn tensors(&self) -> &Tensors {
        &self.tensors
    }

    /// All values, flat.
    pub fn values(&self) -> &Buf<f32> {
        &self.values
    }

    /// All gradients, flat: 0 after a step.
    pub fn grads(&self) -> &Buf<f32> {
        &self.grads
    }

    /// The values of tensor `i`.
    pub fn value(&self, i: usize) -> Buf<f32> {
        self.part(&self.values, i)
    }

    /// The gradient of tensor `i`.
    pub fn grad(&self, i: usize) -> Buf<f32> {
        self.part(&self.grads, i)
    }

    /// One float: what the loss is multiplied with before its backward pass.
    pub fn scale(&self) -> Buf<f32> {
        self.scale.clone()
    }

    /// Queues one step: looks for infinities, moves values and moments against the gradients divided by the scale,
    /// moves the scale, zeroes the gradients. Two launches; nothing is read by the host.
    ///
    /// # Errors
    /// Those of the device.
    pub fn step(&self) -> Result<()> {
        let cuda = self.values.cuda();
        let blocks = self.chunks.len() as u32;
        if blocks == 0 {
            return Ok(());
        }
        let _range = range("optimizer");
        let c = self.config;
        let step: Buf<Step> = cuda.buffer(1)?;
        let squares: Buf<f64> = cuda.buffer(self.chunks.len())?;
        let scaling = self.scaling.unwrap_or(Scaling { interval: 0, ..Scaling::default() });
        let (kernel, second) = match c.optimizer {
            Kind::Adam => (&ADAM, InOut::NULL),
            Kind::Novograd => (&NOVOGRAD, self.second.both()),
        };
        let check = CheckArgs {
            chunks: self.chunks.read(),
            first_chunk: self.first_chunk.read(),
            grads: self.grads.read(),
            squares: squares.both(),
            second,
            scale: self.scale.both(),
            counts: self.counts.both(),
            step: step.write(),
            infinite: self.words.slice(0, 1).both(),
            ticket: self.words.slice(1, 1).both(),
            lr: c.lr,
            beta1: c.beta1,
            beta2: c.beta2,
            growth: scaling.growth,
            backoff: scaling.backoff,
            interval: scaling.interval,
            tensors: self.tensors.count() as u32,
        };
        cuda.launch(&CHECK, Launch { grid: [blocks, 1, 1], threads: THREADS, shared: SHARED }, &check)?;
        let update = UpdateArgs {
            chunks: self.chunks.read(),
            step: step.read(),
            values: self.values.both(),
            grads: self.grads.both(),
            first: self.first.both(),
            second: self.second.both(),
            beta1: c.beta1 as f32,
            one_minus_beta1: (1.0 - c.beta1) as f32,
            beta2: c.beta2 as f32,
            one_minus_beta2: (1.0 - c.beta2) as f32,
            eps: c.eps as f32,
            decay: c.weight_decay as f32,
        };
        cuda.launch(kernel, Launch { grid: [blocks, 1, 1], threads: THREADS, shared: 0 }, &update)
    }

    /// Where the scaler stands. Waits for all queued work.
    ///
    /// # Errors
    /// What went wrong in that work.
    pub fn scaler(&self) -> Result<Scaler> {
        let counts = self.counts.download()?[0];
        Ok(Scaler {
            scale: self.scale.download()?[0],
            growth: counts.growth,
            steps: counts.steps,
            skipped: counts.skipped,
            infinite: counts.infinite != 0,
        })
    }

    /// Whether every value and moment is a number. Waits for all queued work.
    ///
    /// # Errors
    /// What went wrong in that work.
    pub fn is_finite(&self) -> Result<bool> {
        let cuda = self.values.cuda();
        let infinite: Buf<u32> = cuda.upload(&[0])?;
        for values in
            [&self.values, &self.first, &self.second].into_iter().filter(|values| !values.is_empty())
        {
            let args =
                FiniteArgs { values: values.read(), infinite: infinite.both(), len: values.len() as u64 };
            cuda.launch(&FINITE, Launch::over(values.len(), THREADS), &args)?;
        }
        Ok(infinite.download()?[0] == 0)
    }

    /// Everything but the values. Waits for all queued work.
    ///
    /// # Errors
    /// What went wrong in that work.
    pub fn state(&self) -> Result<State> {
        let (first, second) = (self.first.download()?, self.second.download()?);
        let tensors = 0..self.tensors.count();
        Ok(State {
            scaler: self.scaler()?,
            exp_avg: tensors.clone().map(|i| first[self.tensors.slice(i)].to_vec()).collect(),
            exp_avg_sq: tensors.map(|i| second[self.second_slice(i)].to_vec()).collect(),
        })
    }

    /// Continues from `state`; gradients become 0.
    ///
    /// # Errors
    /// [`Error::Shape`] when it is that of other tensors or another optimizer, and those of the device.
    pub fn restore(&self, state: &State) -> Result<()> {
        let flat = |len: usize, parts: &[Vec<f32>], slice: &dyn Fn(usize) -> std::ops::Range<usize>| {
            let lens: Vec<usize> = (0..self.tensors.count()).map(|i| slice(i).len()).collect();
            if parts.iter().map(Vec::len).ne(lens.iter().copied()) {
                return Err(Error::Shape {
                    op: "optimizer",
                    want: format!("moments of {} parameters of this network and optimizer", lens.len()),
                    got: format!("moments of {} others", parts.len()),
                });
            }
            let mut flat = vec![0.0; len];
            parts.iter().enumerate().for_each(|(i, part)| flat[slice(i)].copy_from_slice(part));
            Ok(flat)
        };
        let first = flat(self.first.len(), &state.exp_avg, &|i| self.tensors.slice(i))?;
        let second = flat(self.second.len(), &state.exp_avg_sq, &|i| self.second_slice(i))?;
        self.first.upload(&first)?;
        self.second.upload(&second)?;
        let s = &state.scaler;
        self.scale.upload(&[self.scaling.map_or(1.0, |_| s.scale)])?;
        self.counts.upload(&[Counts {
            growth: s.growth,
            steps: s.steps,
            skipped: s.skipped,
            infinite: s.infinite.into(),
        }])?;
        self.grads.fill(0)
    }

    fn part(&self, flat: &Buf<f32>, i: usize) -> Buf<f32> {
        let range = self.tensors.slice(i);
        flat.slice(range.start, range.len())
    }

    fn second_slice(&self, i: usize) -> std::ops::Range<usize> {
        match self.config.optimizer {
            Kind::Adam => self.tensors.slice(i),
            Kind::Novograd => i..i + 1,
        }
    }
}
