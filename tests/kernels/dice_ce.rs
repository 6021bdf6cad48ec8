//! Dice + cross entropy: loss and gradient against the formulas written out, and against the CPU's code in f64.

use crate::harness::{assert_close, on_every_device, stored, uniform};
use crate::same_bits::SameBits;
use spleen_hpc::config::Loss;
use spleen_hpc::device::cuda::{Cuda, Precision};
use spleen_hpc::error::Error;
use spleen_hpc::ops::dice_ce;
use spleen_hpc::ops::dice_ce::cuda::{backward, forward};
use spleen_hpc::tensor::{Shape, View};
use std::sync::Arc;

/// Softmax of a voxel, by the definition.
fn softmax(l: &[f64]) -> [f64; 2] {
    let top = l[0].max(l[1]);
    let e = [(l[0] - top).exp(), (l[1] - top).exp()];
    e.map(|v| v / (e[0] + e[1]))
}

fn one_hot(label: u8) -> [f64; 2] {
    [f64::from(label == 0), f64::from(label == 1)]
}

/// Voxels of each group.
fn groups(shape: Shape, p: &Loss) -> Vec<std::ops::Range<usize>> {
    let voxels = if p.batch { shape.n * shape.voxels() } else { shape.voxels() };
    (0..shape.n * shape.voxels() / voxels).map(|g| g * voxels..(g + 1) * voxels).collect()
}

fn power(p: &Loss, v: f64) -> f64 {
    if p.squared_pred { v * v } else { v }
}

/// 2 I + s and D + s of a class of a group.
fn ratio(logits: &[f64], labels: &[u8], p: &Loss, group: &std::ops::Range<usize>, c: usize) -> (f64, f64) {
    let of = |v: usize| (softmax(&logits[2 * v..2 * v + 2])[c], one_hot(labels[v])[c]);
    let overlap: f64 = group.clone().map(|v| of(v).0 * of(v).1).sum();
    let size: f64 = group.clone().map(|v| power(p, of(v).0) + of(v).1).sum();
    (2.0 * overlap + p.smooth, size + p.smooth)
}

/// (loss, dice, cross entropy).
fn reference(shape: Shape, logits: &[f64], labels: &[u8], p: &Loss) -> [f64; 3] {
    let classes = if p.include_background { 0..2 } else { 1..2 };
    let mut terms = Vec::new();
    for group in groups(shape, p) {
        for c in classes.clone() {
            let (overlap, size) = ratio(logits, labels, p, &group, c);
            terms.push(1.0 - overlap / size);
        }
    }
    let dice = terms.iter().sum::<f64>() / terms.len() as f64;
    // -ln p[label] = ln(sum of exp) - l[label], from the larger logit.
    let nll = |v: usize| {
        let l = &logits[2 * v..2 * v + 2];
        let top = l[0].max(l[1]);
        ((l[0] - top).exp() + (l[1] - top).exp()).ln() + top - l[usize::from(labels[v])]
    };
    let ce = (0..labels.len()).map(nll).sum::<f64>() / labels.len() as f64;
    [p.lambda_dice * dice + p.lambda_ce * ce, dice, ce]
}

/// d loss / d logits.
fn reference_gradient(shape: Shape, logits: &[f64], labels: &[u8], p: &Loss) -> Vec<f64> {
    let mut grad = vec![0.0; logits.len()];
    let first = usize::from(!p.include_background);
    let groups = groups(shape, p);
    let terms = (groups.len() * (2 - first)) as f64;
    for group in groups {
        let ratios = [0, 1].map(|c| ratio(logits, labels, p, &group, c));
        for v in group {
            let (prob, g) = (softmax(&logits[2 * v..2 * v + 2]), one_hot(labels[v]));
            let mut dp = [0.0; 2];
            for c in first..2 {
                let (overlap, size) = ratios[c];
                let dsize = if p.squared_pred { 2.0 * prob[c] } else { 1.0 };
                dp[c] = -p.lambda_dice / terms * (2.0 * g[c] * size - dsize * overlap) / (size * size);
            }
            let mean = prob[0] * dp[0] + prob[1] * dp[1];
            for c in 0..2 {
                grad[2 * v + c] =
                    prob[c] * (dp[c] - mean) + p.lambda_ce * (prob[c] - g[c]) / labels.len() as f64;
            }
        }
    }
    grad
}

/// Every combination of flags, with changing weights and smoothing; then the cross entropy alone.
fn losses() -> Vec<Loss> {
    let of = |flags: usize| Loss {
        lambda_dice: [0.5, 1.0, 1.0][flags % 3],
        lambda_ce: [0.5, 1.0, 0.0][flags % 3],
        include_background: flags & 1 == 0,
        squared_pred: flags & 2 == 0,
        batch: flags & 4 == 0,
        smooth: [1e-5, 1.0][flags / 3 % 2],
    };
    (0..8).map(of).chain([Loss { lambda_dice: 0.0, ..of(1) }]).collect()
}

fn wide(v: &[f32]) -> Vec<f64> {
    v.iter().map(|&v| v.into()).collect()
}

#[derive(Clone, Copy, Debug)]
enum Labels {
    Random,
    Empty,
    Full,
}

fn labels(kind: Labels, len: usize) -> Vec<u8> {
    let random = |v: f32| u8::from(v > 0.4);
    uniform(Precision::Single, 3, len)
        .into_iter()
        .map(|v| match kind {
            Labels::Random => random(v),
            Labels::Empty => 0,
            Labels::Full => 1,
        })
        .collect()
}

#[test]
fn the_reference_agrees_with_finite_differences() {
    let shape = Shape::new(2, [1, 3, 2], 2);
    let logits: Vec<f64> = wide(&uniform(Precision::Single, 1, shape.len()));
    let labels = labels(Labels::Random, 12);
    for p in losses() {
        let grad = reference_gradient(shape, &logits, &labels, &p);
        for i in 0..logits.len() {
            let loss = |by: f64| {
                let mut moved = logits.clone();
                moved[i] += by;
                reference(shape, &moved, &labels, &p)[0]
            };
            let slope = (loss(1e-6) - loss(-1e-6)) / 2e-6;
            assert!((slope - grad[i]).abs() < 1e-8, "{p:?} {i}: {slope} {}", grad[i]);
        }
    }
}

/// Runs loss and gradient on the device: (values, dlogits).
fn run(cuda: &Arc<Cuda>, shape: Shape, logits: &[f32], labels: &[u8], p: &Loss, scale: f32) -> [Vec<f32>; 2] {
    let act = cuda.act(shape.len()).unwrap();
    act.upload(logits).unwrap();
    let view = View::plain(act, shape);
    let labels = cuda.upload(labels).unwrap();
    let loss = forward(&view, &labels, p).unwrap();
    let scale = cuda.upload(&[scale]).unwrap();
    let dlogits = backward(&loss, &view, &labels, p, &scale).unwrap();
    [loss.values.download().unwrap(), dlogits.download().unwrap()]
}

/// Compares a run with the reference and with the CPU's code.
fn check(
    name: &str,
    cuda: &Arc<Cuda>,
    shape: Shape,
    logits: &[f32],
    labels: &[u8],
    p: &Loss,
) -> [Vec<f32>; 2] {
    let scale = 1024.0;
    let [values, dlogits] = run(cuda, shape, logits, labels, p, scale);
    let name = format!("{name} {shape} {p:?} {:?}", cuda.precision());
    let logits = wide(logits);

    let why = "f32 softmax: 2e-7 each, squared";
    let cpu = dice_ce::dice_ce(&logits, labels, shape.n, p);
    assert_close(&name, &values, &[cpu.loss, cpu.dice, cpu.ce], 1e-12, why);
    assert_close(&name, &values, &reference(shape, &logits, labels, p), 1e-12, why);

    let (allowed, why) = match cuda.precision() {
        Precision::Half => (2.5e-7, "one rounding to fp16: 2^-11 at worst, squared"),
        Precision::Single => (1e-12, why),
    };
    let mut cpu_gradient = vec![0.0; logits.len()];
    dice_ce::dice_ce_backward(&cpu, &logits, labels, p, &mut cpu_gradient);
    let scaled = |v: Vec<f64>| v.iter().map(|v| v * f64::from(scale)).collect::<Vec<f64>>();
    assert_close(&name, &dlogits, &scaled(cpu_gradient), allowed, why);
    let want = reference_gradient(shape, &logits, labels, p);
    assert_close(&name, &dlogits, &scaled(want), allowed, why);
    [values, dlogits]
}

#[test]
fn loss_and_gradient_follow_the_formulas_on_every_schedule() {
    let bits = SameBits::default();
    on_every_device(|cuda| {
        // Voxels in fours and not, in each sample and in all.
        for (n, space) in [(1, [1, 1, 1]), (1, [3, 3, 3]), (3, [3, 5, 3]), (3, [4, 3, 2]), (4, [3, 3, 1])] {
            let shape = Shape::new(n, space, 2);
            let logits: Vec<f32> = uniform(cuda.precision(), 1, shape.len())
                .iter()
                .map(|v| stored(cuda.precision(), 8.0 * v))
                .collect();
            for (number, p) in losses().iter().enumerate() {
                for kind in [Labels::Random, Labels::Empty, Labels::Full] {
                    let labels = labels(kind, n * shape.voxels());
                    let got = check(&format!("{kind:?}"), cuda, shape, &logits, &labels, p);
                    let name = format!("{shape} loss {number} {kind:?}");
                    bits.check(cuda.precision(), &name, &got.concat());
                }
            }
        }
    });
}

#[test]
fn many_blocks_and_their_tails_add_up() {
    let bits = SameBits::default();
    on_every_device(|cuda| {
        // 4096 voxels a block: 3 blocks a sample with a short last one; in fours, and odd.
        for space in [[20, 22, 21], [21, 21, 21]] {
            let shape = Shape::new(2, space, 2);
            let logits = uniform(cuda.precision(), 1, shape.len());
            let labels = labels(Labels::Random, 2 * shape.voxels());
            for p in [losses()[0], losses()[4]] {
                let got = check("blocks", cuda, shape, &logits, &labels, &p);
                bits.check(cuda.precision(), &format!("{shape} {}", p.batch), &got.concat());
            }
        }
    });
}

#[test]
fn huge_logits_stay_numbers() {
    on_every_device(|cuda| {
        let big = match cuda.precision() {
            Precision::Half => 6e4,
            Precision::Single => 1e4,
        };
        let shape = Shape::new(2, [3, 4, 6], 2);
        let levels = [-big, -90.0, -1.0, 0.0, 0.5, 17.0, 104.0, big];
        let pick = |v: &f32| stored(cuda.precision(), levels[((v + 1.0) * 4.0) as usize]);
        let logits: Vec<f32> = uniform(Precision::Single, 2, shape.len()).iter().map(pick).collect();
        for p in losses() {
            for kind in [Labels::Random, Labels::Empty, Labels::Full] {
                check(&format!("huge {kind:?}"), cuda, shape, &logits, &labels(kind, 144), &p);
            }
        }
    });
}

#[test]
fn the_loss_scale_is_a_factor() {
    on_every_device(|cuda| {
        let shape = Shape::new(1, [4, 4, 4], 2);
        let logits = uniform(cuda.precision(), 1, shape.len());
        let labels = labels(Labels::Random, 64);
        let p = losses()[0];
        let of = |scale| run(cuda, shape, &logits, &labels, &p, scale);
        let ([loss, grad], [scaled_loss, scaled]) = (of(1.0), of(4096.0));
        assert_eq!(loss, scaled_loss, "the loss carries no scale");
        let want: Vec<f64> = grad.iter().map(|v| 4096.0 * f64::from(*v)).collect();
        // A power of two is exact, apart from fp16 numbers below 2^-14, which the unscaled gradient has.
        let allowed = if cuda.precision() == Precision::Half { 1e-7 } else { 0.0 };
        assert_close("scaled", &scaled, &want, allowed, "subnormal fp16 numbers");
    });
}

#[test]
fn labels_need_not_be_words() {
    on_every_device(|cuda| {
        let shape = Shape::new(1, [4, 4, 4], 2);
        let act = cuda.act(shape.len()).unwrap();
        let logits = uniform(cuda.precision(), 1, shape.len());
        act.upload(&logits).unwrap();
        let view = View::plain(act, shape);
        let labels = labels(Labels::Random, 65);
        let part = cuda.upload(&labels).unwrap().slice(1, 64);
        let values = forward(&view, &part, &losses()[0]).unwrap().values.download().unwrap();
        let want = reference(shape, &wide(&logits), &labels[1..], &losses()[0]);
        assert_close("slice", &values, &want, 1e-12, "f32 softmax");
    });
}

#[test]
fn what_does_not_fit_is_refused() {
    on_every_device(|cuda| {
        let view = |c| {
            let shape = Shape::new(1, [2, 2, 2], c);
            View::plain(cuda.act(shape.len()).unwrap(), shape)
        };
        let labels = |len: usize| cuda.upload(&vec![0u8; len]).unwrap();
        let p = losses()[0];
        let refused = |c, len| matches!(forward(&view(c), &labels(len), &p), Err(Error::Shape { .. }));
        assert!(refused(3, 8) && refused(2, 7) && refused(2, 16));
    });
}
