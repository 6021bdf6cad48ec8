//! Dice + cross entropy of two classes, fused with the softmax (MONAI `DiceCELoss(to_onehot_y, softmax)`).
//!
//! With p = softmax(logits) and the one-hot label g, per class c over a group (the whole batch, or one sample):
//! ```text
//! I = sum p g,  D = sum p^q + sum g,  q = 2 with squared_pred, else 1
//! dice = mean over groups and classes of 1 - (2 I + s) / (D + s);   ce = mean over voxels of -ln p[label]
//! loss = lambda_dice dice + lambda_ce ce
//! ```
//! Gradient, K the number of terms averaged:
//! ```text
//! d dice / dp_c = -(1 / K) [2 g (D + s) - q p^(q-1) (2 I + s)] / (D + s)^2
//! through the softmax: dl_c = p_c (dp_c - sum_k p_k dp_k);   the cross entropy adds (p - g) / voxels
//! ```
//! Sums are f64 over fixed chunks in order. Generic over the float type of logits: f32 in the product, f64 where a
//! reference is wanted.

pub mod cuda;

use crate::config::Loss;
use crate::device::arena::Buffer;
use crate::device::cpu::vectorised;
use crate::device::cuda::{Buf, Compared, Cuda, SelfTest, agree};
use crate::device::list::List;
use crate::device::nvtx::range;
use crate::device::scratch::Scratch;
use crate::error::{Error, Result};
use crate::ops::residual::give;
use crate::ops::self_test::{SUMS, stored, uniform, upload};
use crate::tensor::{Float, Shape, Tape, Tensor, View};
use rayon::prelude::*;
use std::sync::Arc;

/// Voxels a task handles.
const CHUNK: usize = 1 << 13;

/// The value of the loss and what its gradient needs.
#[derive(Clone, Debug)]
pub struct DiceCe {
    /// lambda_dice dice + lambda_ce ce.
    pub loss: f64,
    /// The Dice term, unweighted.
    pub dice: f64,
    /// The cross entropy, unweighted.
    pub ce: f64,
    /// (I, D) of both classes, per group.
    sums: List<[(f64, f64); 2]>,
}

/// Voxels of a block: lanes of its sums.
const LANES: usize = 16;

/// What a block of voxels contributes, one lane a voxel.
#[derive(Clone, Copy)]
struct Voxels {
    /// softmax of both logits.
    p: [[f64; LANES]; 2],
    /// `-ln p[label]` is the logarithm of this number between 1 and 2 ..
    factor: [f64; LANES],
    /// .. plus this.
    summand: [f64; LANES],
}

/// Softmax and cross entropy of at most [`LANES`] voxels; the exponential rounded to the logits' own precision.
///
/// p1 = 1 / (1 + exp(-x)) of x = l1 - l0, and `-ln p[label]` = ln(1 + exp(-m)) of the label's margin m = +-x: both from e =
/// exp(-|x|), which cannot overflow.
#[inline(always)]
fn softmax<T: Float>(logits: &[[T; 2]; LANES], labels: &[u8; LANES]) -> Voxels {
    let one = T::new(1.0);
    let x: [T; LANES] = std::array::from_fn(|i| logits[i][1] - logits[i][0]);
    // No closure: it would not have the unit's instructions.
    let mut e = x;
    for e in &mut e {
        *e = e.exp_minus_abs();
    }
    let small: [f64; LANES] = std::array::from_fn(|i| (e[i] / (one + e[i])).to_f64());
    let large: [f64; LANES] = std::array::from_fn(|i| (one / (one + e[i])).to_f64());
    let positive: [bool; LANES] = std::array::from_fn(|i| x[i].to_f64() >= 0.0);
    Voxels {
        p: [
            std::array::from_fn(|i| if positive[i] { small[i] } else { large[i] }),
            std::array::from_fn(|i| if positive[i] { large[i] } else { small[i] }),
        ],
        factor: std::array::from_fn(|i| 1.0 + e[i].to_f64()),
        summand: std::array::from_fn(|i| {
            let x = x[i].to_f64();
            (if labels[i] == 1 { -x } else { x }).max(0.0)
        }),
    }
}

/// The voxels of a chunk in blocks, with their number: the last block is filled up with zeros.
#[inline(always)]
fn blocks<'a, T: Float>(
    logits: &'a [T],
    labels: &'a [u8],
) -> impl Iterator<Item = ([[T; 2]; LANES], [u8; LANES], usize)> + 'a {
    logits.chunks(2 * LANES).zip(labels.chunks(LANES)).map(|(logits, labels)| {
        let (mut l, mut g) = ([[T::default(); 2]; LANES], [0; LANES]);
        l.as_flattened_mut()[..logits.len()].copy_from_slice(logits);
        g[..labels.len()].copy_from_slice(labels);
        (l, g, labels.len())
    })
}

/// Sums of one chunk, lane by lane: (I, D) of both classes and the cross entropy.
#[derive(Clone, Copy)]
struct Sums {
    terms: [[[f64; LANES]; 2]; 2],
    ce: [f64; LANES],
    /// Factors of which no logarithm was taken yet: of at most 2 each, and at most [`FACTORS`] of them.
    product: [f64; LANES],
}

vectorised! {
    /// The (I, D) of both classes and the cross entropy of a chunk: lanes are summed on their own, then in order.
    fn chunk_sums<T: Float>(logits: &[T], labels: &[u8], squared_pred: bool) -> ([(f64, f64); 2], f64) {
        let zero = [0.0; LANES];
        let mut s = Sums { terms: [[zero; 2]; 2], ce: zero, product: [1.0; LANES] };
        for (block, (logits, labels, len)) in blocks(logits, labels).enumerate() {
            let v = softmax(&logits, &labels);
            for i in 0..LANES {
                // Lanes past the end count nothing; a factor of 1 and a summand of 0 add nothing.
                let real = f64::from(u8::from(i < len));
                for c in 0..2 {
                    let (p, g) = (v.p[c][i], f64::from(u8::from(labels[i] == c as u8)));
                    s.terms[c][0][i] += real * (p * g);
                    s.terms[c][1][i] += real * (if squared_pred { p * p } else { p } + g);
                }
                s.product[i] *= if i < len { v.factor[i] } else { 1.0 };
                s.ce[i] += v.summand[i];
            }
            if block % FACTORS == FACTORS - 1 {
                for i in 0..LANES {
                    s.ce[i] += s.product[i].ln();
                }
                s.product = [1.0; LANES];
            }
        }
        let sum = |lanes: &[f64; LANES]| lanes.iter().sum::<f64>();
        let ce = sum(&s.ce) + s.product.iter().map(|p| p.ln()).sum::<f64>();
        (std::array::from_fn(|c| (sum(&s.terms[c][0]), sum(&s.terms[c][1]))), ce)
    }

    /// The gradient of a chunk: d dice/dp = a g + b p^(q-1) per class.
    fn chunk_gradient<T: Float>(
        out: &mut [T],
        logits: &[T],
        labels: &[u8],
        dice: [[f64; 2]; 2],
        squared_pred: bool,
        ce_scale: f64,
    ) {
        let [a, b] = dice;
        for (out, (logits, labels, _)) in out.chunks_mut(2 * LANES).zip(blocks(logits, labels)) {
            let Voxels { p, .. } = softmax(&logits, &labels);
            let mut gradient = [[T::default(); 2]; LANES];
            for i in 0..LANES {
                let g = [f64::from(u8::from(labels[i] == 0)), f64::from(u8::from(labels[i] == 1))];
                let dp: [f64; 2] =
                    std::array::from_fn(|c| a[c] * g[c] + b[c] * if squared_pred { p[c][i] } else { 1.0 });
                // With two classes p_c (dp_c - sum p dp) = p0 p1 (dp_c - dp_other).
                let through = p[0][i] * p[1][i] * (dp[0] - dp[1]);
                gradient[i] = [
                    T::new(through + ce_scale * (p[0][i] - g[0])),
                    T::new(-through + ce_scale * (p[1][i] - g[1])),
                ];
            }
            out.copy_from_slice(&gradient.as_flattened()[..out.len()]);
        }
    }
}

/// Factors of at most 2 whose product is far from f64's largest number: one logarithm for all of them.
const FACTORS: usize = 256;

/// The loss of logits (N, V, 2) against labels (N, V), values 0 and 1; `samples` = N.
pub fn dice_ce<T: Float>(logits: &[T], labels: &[u8], samples: usize, p: &Loss) -> DiceCe {
    let group = if p.batch { labels.len() } else { labels.len() / samples };
    let mut ce = 0.0;
    let sums: List<_> = logits
        .chunks(2 * group)
        .zip(labels.chunks(group))
        .map(|(logits, labels)| {
            let mut partials = List::of(([(0.0, 0.0); 2], 0.0), labels.len().div_ceil(CHUNK));
            let chunks = logits.par_chunks(2 * CHUNK).zip(labels.par_chunks(CHUNK));
            partials.par_iter_mut().zip(chunks).for_each(|(sums, (logits, labels))| {
                *sums = chunk_sums(logits, labels, p.squared_pred);
            });
            partials.iter().fold([(0.0, 0.0); 2], |mut total, (part, part_ce)| {
                ce += part_ce;
                total.iter_mut().zip(part).for_each(|(t, p)| *t = (t.0 + p.0, t.1 + p.1));
                total
            })
        })
        .collect();
    let first = usize::from(!p.include_background);
    let terms =
        sums.iter().flat_map(|s| &s[first..]).map(|(i, d)| 1.0 - (2.0 * i + p.smooth) / (d + p.smooth));
    let dice = terms.sum::<f64>() / (sums.len() * (2 - first)) as f64;
    let ce = ce / labels.len() as f64;
    DiceCe { loss: p.lambda_dice * dice + p.lambda_ce * ce, dice, ce, sums }
}

/// d loss / d logits, (N, V, 2).
pub fn dice_ce_backward<T: Float>(
    forward: &DiceCe,
    logits: &[T],
    labels: &[u8],
    p: &Loss,
    dlogits: &mut [T],
) {
    let group = labels.len() / forward.sums.len();
    let first = usize::from(!p.include_background);
    let terms = (forward.sums.len() * (2 - first)) as f64;
    let ce_scale = p.lambda_ce / labels.len() as f64;
    let groups = dlogits.chunks_mut(2 * group).zip(logits.chunks(2 * group)).zip(labels.chunks(group));
    for (((out, logits), labels), sums) in groups.zip(&forward.sums) {
        let [mut a, mut b] = [[0.0; 2]; 2];
        for c in first..2 {
            let (i, d) = (2.0 * sums[c].0 + p.smooth, sums[c].1 + p.smooth);
            a[c] = -p.lambda_dice / terms * 2.0 / d;
            b[c] = p.lambda_dice / terms * if p.squared_pred { 2.0 } else { 1.0 } * i / (d * d);
        }
        out.par_chunks_mut(2 * CHUNK)
            .zip(logits.par_chunks(2 * CHUNK).zip(labels.par_chunks(CHUNK)))
            .for_each(|(out, (logits, labels))| {
                chunk_gradient(out, logits, labels, [a, b], p.squared_pred, ce_scale);
            });
    }
}

/// The loss of a batch, on the tape: its backward pass starts here.
///
/// # Errors
/// [`Error::Shape`] when logits have not two channels or labels another number of voxels.
pub fn loss(tape: &mut Tape, logits: &Tensor, labels: &[u8], p: &Loss) -> Result<DiceCe> {
    let shape = logits.shape();
    check(shape, labels.len())?;
    let forward = dice_ce(logits.data(), labels, shape.n, p);
    if tape.is_recording() {
        let mut kept = Scratch::<Vec<u8>>::take();
        kept.clear();
        kept.extend_from_slice(labels);
        let (forward, logits, p) = (forward.clone(), logits.clone(), *p);
        tape.record(move |grads| {
            let mut dlogits = Buffer::dirty(shape.len());
            dice_ce_backward(&forward, logits.data(), &kept, &p, &mut dlogits);
            give(grads, logits.id(), Tensor::new(shape, dlogits))
        });
    }
    Ok(forward)
}

/// The loss of a batch on a device, on the tape. Gradients carry the factor `scale`, one float in device memory: fp16
/// holds them only scaled. The value is in device memory too, so nothing waits for it.
///
/// # Errors
/// [`Error::Shape`] as [`loss`], and those of the device.
pub fn loss_on_device(
    tape: &mut Tape,
    logits: &Tensor,
    labels: &Buf<u8>,
    p: &Loss,
    scale: &Buf<f32>,
) -> Result<cuda::DeviceDiceCe> {
    let shape = logits.shape();
    check(shape, labels.len())?;
    let view =
        logits.view().ok_or_else(|| Error::Internal("dice_ce: logits are not on the device".into()))?;
    let _range = range("dice_ce");
    let forward = cuda::forward(&view, labels, p)?;
    if tape.is_recording() {
        let (forward, id, labels, p, scale) =
            (forward.clone(), logits.id(), labels.clone(), *p, scale.clone());
        tape.record(move |grads| {
            let _range = range("dice_ce backward");
            let dlogits = cuda::backward(&forward, &view, &labels, &p, &scale)?;
            give(grads, id, Tensor::on_device(shape, dlogits, None))
        });
    }
    Ok(forward)
}

fn check(shape: Shape, labels: usize) -> Result<()> {
    if shape.c != 2 || shape.n * shape.voxels() != labels || labels == 0 {
        return Err(Error::Shape {
            op: "dice_ce",
            want: format!("[N, D, H, W, 2] logits for {labels} labels"),
            got: shape.to_string(),
        });
    }
    Ok(())
}

/// See [`SelfTest`].
pub const SELF_TESTS: &[SelfTest] = &[SelfTest { name: "dice_ce", run: self_test }];

fn self_test(cuda: &Arc<Cuda>) -> Result<String> {
    // Keeps gradients of 1e-3 out of fp16's denormal numbers; a power of two.
    const SCALE: f32 = 1024.0;
    let p = Loss {
        lambda_dice: 1.0,
        lambda_ce: 1.0,
        include_background: true,
        squared_pred: true,
        batch: false,
        smooth: 1e-5,
    };
    let shape = Shape::new(2, [5, 6, 8], 2);
    let logits = uniform(1, shape.len());
    let labels: Vec<u8> = uniform(2, shape.len() / 2).iter().map(|&v| u8::from(v > 0.5)).collect();
    let want = dice_ce(&logits, &labels, shape.n, &p);
    let mut dlogits = vec![0.0; logits.len()];
    dice_ce_backward(&want, &logits, &labels, &p, &mut dlogits);
    dlogits.iter_mut().for_each(|d| *d *= SCALE);

    let (view, labels) = (View::plain(upload(cuda, &logits)?, shape), cuda.upload(&labels)?);
    let got = cuda::forward(&view, &labels, &p)?;
    let gradient = cuda::backward(&got, &view, &labels, &p, &cuda.upload(&[SCALE])?)?;
    let want = [want.loss, want.dice, want.ce].map(|v| v as f32).to_vec();
    agree(&[
        Compared { name: "loss", got: got.values.download()?, want, allowed: SUMS },
        Compared { name: "dlogits", got: gradient.download()?, want: dlogits, allowed: stored(cuda) },
    ])
}
