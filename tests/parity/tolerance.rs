//! Every tolerance of the replay, with its reason. Nothing is compared against a number that does not stand here.

use spleen_hpc::config::Optimizer;

/// How far a recomputed tensor may lie from the golden one.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// Shown in the table.
    pub name: &'static str,
    /// Largest deviation of an element, in the tensor's unit...
    pub max: f64,
    /// ...plus this times the largest golden magnitude.
    pub rel: f64,
    /// Largest mean deviation of the elements.
    pub mean: f64,
    /// Largest L2 norm of the deviation, as a fraction of the golden norm.
    pub norm: f64,
    /// Largest deviation of a digest's dot products, as a fraction of the golden norm...
    pub dot: f64,
    /// ...or this times sqrt(elements), if larger: what independent deviations of that size add up to.
    pub spread: f64,
}

/// MANIFEST: "Compare the two dot products against a tolerance of 1e-5 * sqrt(sum x^2) for float32 work".
const DOT_F32: f64 = 1e-5;

/// Sums of a digest are taken in another order than numpy's: n terms, each rounded at 1.1e-16 of the running
/// sum, give about 1.6e-13 of the norm for 8 million terms. 1e-11 covers it and sees one wrong voxel.
pub const SUM_ORDER: f64 = 1e-11;

impl Tolerance {
    /// Elements within `max`; digests as float32 work.
    pub const fn abs(name: &'static str, max: f64) -> Self {
        Tolerance { name, max, rel: 0.0, mean: f64::INFINITY, norm: f64::INFINITY, dot: DOT_F32, spread: 0.0 }
    }

    /// Elements within `rel` times the largest golden magnitude; digests as float32 work.
    pub const fn rel(name: &'static str, rel: f64) -> Self {
        Tolerance { rel, ..Tolerance::abs(name, 0.0) }
    }

    /// The L2 norm of the deviation within `norm` of the golden norm; digests as float32 work.
    pub const fn norm(name: &'static str, norm: f64) -> Self {
        Tolerance { norm, ..Tolerance::abs(name, f64::INFINITY) }
    }

    /// Additionally a bound on the mean deviation: for trajectories, where single elements go their own way.
    pub const fn and_mean(self, mean: f64) -> Self {
        Tolerance { mean, spread: mean, ..self }
    }

    /// Digests follow from deviations of this size.
    pub const fn spread(self, spread: f64) -> Self {
        Tolerance { spread, ..self }
    }

    /// Digests as tight as the order of summation allows.
    pub const fn tight_digest(self) -> Self {
        Tolerance { dot: SUM_ORDER, ..self }
    }
}

/// Integers, masks, copies and everything that only moves values: no arithmetic, no tolerance.
pub const EXACT: Tolerance = Tolerance::abs("exact", 0.0).tight_digest();

/// Importance maps: torch's vectorised expf and ours may each be one unit (6e-8) beside the true value.
pub const IMPORTANCE: Tolerance = Tolerance::rel("1.2e-7 of max", 1.2e-7);

/// Blended windows: importance maps off by 1.2e-7 in numerator and denominator, and a dozen float32 sums.
pub const BLEND: Tolerance = Tolerance::rel("1e-6 of max", 1e-6);

/// MANIFEST: whole float32 activations within 1.4e-6 of their norm. Single operations and their gradients are sums
/// of the same length over inputs rounded from float64, so the same holds for them.
pub const FLOAT32: Tolerance = Tolerance::norm("1.4e-6 of the norm", 1.4e-6);

/// Gradients of an operation's parameters: sums of x dy over all voxels, or of dy alone. Terms of both signs may
/// cancel, while their rounding does not: it is measured by rms(x) |dy|, not by what is left of the sum.
pub fn parameter_gradient(rms_x: f64, norm_dy: f64) -> Tolerance {
    let bound = 1.4e-6 * (1.0 + rms_x) * norm_dy;
    Tolerance::abs("1.4e-6 of the summed terms", bound).spread(bound)
}

/// MANIFEST: MONAI squares a float32 one-hot, which moves its float64 loss by up to 5e-8.
pub const LOSS_F64: Tolerance = Tolerance::abs("loss, 5e-8", 5e-8);

/// MANIFEST: float64 gradients of the loss.
pub const DLOGITS_F64: Tolerance = Tolerance::abs("dlogits, 1e-9", 1e-9);

/// A float32 loss: torch sums each term in float32, ours in float64.
pub const LOSS_F32: Tolerance = Tolerance::rel("float32 loss, 1e-6 of it", 1e-6);

/// A float64 optimizer's parameters (MANIFEST: novograd64, lr 2e-3). MONAI keeps Novograd's second moment in float32
/// even then, which moves a step by 6e-8 of lr; the momentum adds up several.
pub fn float64_parameters(lr: f64) -> Tolerance {
    Tolerance::abs("float64 parameters, 1e-9 at 2e-3", (5e-7 * lr).max(1e-9))
}

/// A float32 optimizer: each step rounds a parameter once (6e-8 of it) and torch orders the products otherwise.
pub const OPTIM_F32: Tolerance = Tolerance::rel("float32 parameters, 3e-7", 3e-7);

/// MANIFEST: loss of a float32 network against float64.
pub const LOSS_NET: Tolerance = Tolerance::abs("loss of a net, 1e-5", 1e-5);

/// Gradients (MANIFEST): four times torch's own float32 deviation from float64, or 2e-4 of the largest element. The
/// bias of a convolution before a norm has gradient 0, of which float32 makes noise: anything below 1e-6.
pub fn gradient(cancelled: bool, torch_deviation: f64, max: f64) -> Tolerance {
    if cancelled {
        Tolerance::abs("zero gradients, 1e-6", 1e-6).spread(1e-6)
    } else {
        let bound = (4.0 * torch_deviation).max(2e-4 * max);
        Tolerance::abs("4 yardsticks or 2e-4 of max", bound).spread(bound)
    }
}

/// Networks of a million weights and more, whose trajectories drift further (below).
const LARGE: usize = 1_000_000;

/// One parameter of `elements` values after steps of Adam (MANIFEST): a step is at most lr, in a direction that
/// float32 noise decides where the true gradient is nearly 0, so that single elements go their own way while the mean
/// stays. A tensor of one element has no mean but itself: after 20 steps torch 2.11 in float64 moved such a slope by
/// 8.2e-5, with one thread by 5.1e-5. Dot products of digests follow from that: torch's own deviate by up to
/// 1.2e-5 sqrt(n) after 5 steps and 9.4e-5 sqrt(n) after 20; twice that is allowed. The first step is
/// lr g / (|g| + 1e-8): where |g| is of the order of 1e-8 and so mostly float32 noise, torch's own parameters deviate
/// from its float64 run by up to `torch_deviation`, and as of gradients four times that is allowed.
pub fn parameters(steps: usize, elements: usize, torch_deviation: f64) -> Tolerance {
    match steps {
        0..=1 => {
            let bound = (4.0 * torch_deviation).max(5e-6);
            Tolerance { mean: 5e-6, ..Tolerance::abs("parameters, 1 step: 4 yardsticks or 5e-6", bound) }
        }
        2..=5 => Tolerance::abs("parameters, 5 steps: 1e-4", 1e-4).spread(2.5e-5),
        _ if elements == 1 => Tolerance::abs("one parameter, 20 steps: 5e-4", 5e-4).spread(5e-4),
        _ => Tolerance::abs("parameters, 20 steps: 5e-4, mean 5e-5", 5e-4).and_mean(5e-5).spread(2e-4),
    }
}

/// Running statistics after one forward pass: float32 sums of activations, whose mean may be a fraction of their size.
pub const STATISTICS: Tolerance = Tolerance::norm("statistics, 5e-6 of the norm", 5e-6);

/// Running statistics after 20 steps. A bias that a norm cancels walks by up to lr = 1e-4 a step in torch, in the
/// direction of rounding noise, and the running mean holds it: 2e-3. In large networks the statistics over the few
/// voxels of the bottom drift as well: torch itself by 5.8e-3 and 7.5e-3 with 2 and 1 threads and 1.8e-2 in float64.
pub fn trained_statistics(weights: usize) -> Tolerance {
    if weights < LARGE {
        Tolerance::abs("statistics after steps, 2e-3", 2e-3)
    } else {
        Tolerance::abs("statistics after steps, 3e-2, mean 7e-3", 3e-2).and_mean(7e-3)
    }
}

/// Losses of steps of Adam: 1e-5 (MANIFEST) for small networks. Millions of weights that go their own way move the
/// loss further: torch 2.11 itself, run again with 1 or 2 threads and in float64 against losses that it had recorded
/// for the 16..256 network, deviated by 1.3e-5, 2.0e-5 and 3.6e-5.
pub fn step_losses(weights: usize) -> Tolerance {
    if weights < LARGE {
        Tolerance::abs("losses of steps, 1e-5", 1e-5)
    } else {
        Tolerance::abs("losses of steps, large net, 4e-5", 4e-5)
    }
}

/// Blended logits are float32 numbers of magnitude 1 that differ by up to 1e-5 in single voxels: closer to the
/// decision than that, a mask's voxel may fall to either side, and the smallest margin itself moves by as much.
pub const MASK_TIE: f64 = 1e-5;

/// The smallest margin of a volume.
pub const MARGIN: Tolerance = Tolerance::abs("smallest margin, 1e-5", MASK_TIE);

/// Blended logits: the golden is itself float32, and on the zero padding all voxels share one rounding. Against
/// torch in float64, torch's float32 deviates by up to 1.25e-6 of the norm and ours by up to 1.42e-6; both together
/// by up to 1.7e-6 where each alone is within the 1.4e-6 of activations.
pub const BLENDED_LOGITS: Tolerance = Tolerance::norm("blended logits, 2e-6 of the norm", 2e-6);

/// Affines, coordinates and grid parameters: float64 products and solves of 4x4 matrices with entries up to a few
/// hundred mm, each off by a few 1e-14, in another order than LAPACK's.
pub const GEOMETRY: Tolerance = Tolerance::abs("1e-10 (float64 geometry)", 1e-10).tight_digest();

/// Resampled intensities: MONAI's float64 sums rounded to float32. Where the float64 values differ by their last bits,
/// the rounding may fall to the neighbouring float32: one unit, 1.2e-7 of the largest magnitude.
pub const RESAMPLED: Tolerance = Tolerance::rel("1.2e-7 of max (one float32)", 1.2e-7);

/// Scaled intensities: one float32 unit of the resampled HU (1.2e-4 at 1024 to 2048 HU), divided by a window of
/// a few hundred HU.
pub const SCALED: Tolerance = Tolerance::abs("6e-7 (one float32 of the HU)", 6e-7);

/// Probabilities: exp, sum and quotient in float32, each within one unit (6e-8 below 1) of torch's.
pub const PROBABILITY: Tolerance = Tolerance::abs("2.5e-7 (float32 softmax)", 2.5e-7);

/// Voxels whose two probabilities are closer than the error of both are a draw that rounding decides.
pub const DRAW: f32 = 5e-7;

/// Surface distances and their quantiles: float64 square roots rounded to float32, at most one unit apart; means are
/// summed by torch in float32, where a few thousand terms leave some 1e-7.
pub const SURFACE: Tolerance = Tolerance::rel("1e-6 of value (float32 means)", 1e-6);

/// The mean of a dozen float32 Dice values, summed by torch in float32.
pub const MEAN_DICE: Tolerance = Tolerance::abs("2e-7 (float32 mean)", 2e-7);

/// A saved header's float fields: float32 roundings of geometry that agrees to 1e-10.
pub const HEADER: Tolerance = Tolerance::rel("1.2e-7 of max (float32 header)", 1.2e-7);

/// A coordinate this close to half a voxel (unit: voxels) goes either way: MANIFEST, "labels and masks".
pub const TIE: f64 = 1e-9;

/// Losses of replayed batches: about twice what torch itself deviates by, with one thread or in float64, over 40
/// steps (convergence/README.md).
pub fn replayed_losses(optimizer: Optimizer, lr: f64) -> Tolerance {
    match optimizer {
        Optimizer::Novograd => Tolerance::abs("replayed losses, Novograd 1.5e-3", 1.5e-3),
        Optimizer::Adam if lr > 1e-4 => Tolerance::abs("replayed losses, Adam 1e-3", 1e-3),
        Optimizer::Adam => Tolerance::abs("replayed losses, Adam 1.5e-4", 1.5e-4),
    }
}

/// The end of a whole run, where trajectories have parted: the level of the loss.
pub fn last_losses(optimizer: Optimizer) -> Tolerance {
    match optimizer {
        Optimizer::Adam => Tolerance::rel("last losses, Adam 20 %", 0.2),
        Optimizer::Novograd => Tolerance::rel("last losses, Novograd 30 %", 0.3),
    }
}

/// Validation Dice after a whole run: two seeds of one setting differ by as much (convergence/README.md).
pub const FINAL_DICE: Tolerance = Tolerance::abs("final Dice, 0.06", 0.06);

/// Logits of a trained network on a volume preprocessed here: as [`BLENDED_LOGITS`].
pub const TRAINED_LOGITS: Tolerance = Tolerance::norm("trained logits, 2e-6 of the norm", 2e-6);

/// Its probabilities: a logit difference that is off by 1e-5 moves a probability by a quarter of that.
pub const TRAINED_PROBABILITY: Tolerance = Tolerance::abs("trained probabilities, 2.5e-6", 2.5e-6);

/// Scores of a mask: those of MONAI, rounded to float32, where the mask is MONAI's.
pub const SCORE: Tolerance = Tolerance::rel("scores, float32", 1.2e-7);
