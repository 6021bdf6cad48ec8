//! DiceCE: value, Dice term and logit gradient of every case and variant, in float64 and float32.

use std::sync::Arc;

use spleen_hpc::config::Loss;
use spleen_hpc::device::cuda::Cuda;
use spleen_hpc::ops::dice_ce::{cuda, dice_ce, dice_ce_backward};
use spleen_hpc::tensor::{Float, Shape, Tensor as Engine};

use crate::Outcome;
use crate::golden::Golden;
use crate::layout::{channels_first, channels_last, shape};
use crate::ledger::Ledger;
use crate::place;
use crate::tensor::{Elem, Tensor};
use crate::tolerance::{DLOGITS_F64, FLOAT32, LOSS_F32, LOSS_F64};

/// MANIFEST's words for the variants, for an index.json without them.
const VARIANTS: &str = "b059 = bundle 0.5.9 (include_background True, lambda .5/.5); seed = bundle of the seed README \
    (lambda 1/1); nobg = include_background False, lambda .5/.5; nobatch = b059 with batch=False; nosq = b059 with \
    squared_pred=False.";

/// MONAI's defaults with the bundle's `squared_pred` and `batch`.
pub const DEFAULT: Loss = Loss {
    lambda_dice: 1.0,
    lambda_ce: 1.0,
    include_background: true,
    squared_pred: true,
    batch: true,
    smooth: 1e-5,
};

/// Every `CASE.VARIANT.*` of `loss`.
pub fn run(golden: &Golden, ledger: &mut Ledger) -> Outcome<()> {
    ledger.each_file(golden, "loss", |file, ledger| {
        for case in file.stems(".logits") {
            let logits = file.need(&format!("{case}.logits"))?;
            let (shape, values) = (shape(&logits)?, channels_last(&logits)?);
            let labels = file.need(&format!("{case}.label"))?.to_u8();
            let rounded: Vec<f32> = values.iter().map(|&v| v as f32).collect();
            let variants = file.stems(".loss").filter_map(|n| n.strip_prefix(case)?.strip_prefix('.'));
            for variant in variants {
                let p = parse(&file.text, variant)
                    .or_else(|| parse(VARIANTS, variant))
                    .ok_or_else(|| format!("index.json does not say what the variant `{variant}` is"))?;
                let name = |part: &str| format!("{case}.{variant}.{part}");
                if let Some(cuda) = place::current() {
                    let single = compute_on_device(&cuda, &rounded, &labels, shape, &p)?;
                    let loss = Tensor::new(&[1], &[single.loss as f32]);
                    ledger.compare(file, &name("loss_f32"), &loss, LOSS_F32);
                    ledger.compare(file, &name("dlogits_f32"), &single.dlogits, FLOAT32);
                    continue;
                }
                let double = compute(&values, &labels, shape, &p);
                ledger.compare(file, &name("loss"), &Tensor::new(&[1], &[double.loss]), LOSS_F64);
                ledger.compare(file, &name("dice_only"), &Tensor::new(&[1], &[double.dice]), LOSS_F64);
                ledger.compare(file, &name("dlogits"), &double.dlogits, DLOGITS_F64);
                let single = compute(&rounded, &labels, shape, &p);
                let loss = Tensor::new(&[1], &[single.loss as f32]);
                ledger.compare(file, &name("loss_f32"), &loss, LOSS_F32);
                ledger.compare(file, &name("dlogits_f32"), &single.dlogits, FLOAT32);
            }
        }
        Ok(())
    });
    Ok(())
}

struct Computed {
    loss: f64,
    dice: f64,
    dlogits: Tensor,
}

fn compute<T: Float + Elem>(logits: &[T], labels: &[u8], shape: Shape, p: &Loss) -> Computed {
    let forward = dice_ce(logits, labels, shape.n, p);
    let mut dlogits = vec![T::new(0.0); logits.len()];
    dice_ce_backward(&forward, logits, labels, p, &mut dlogits);
    Computed { loss: forward.loss, dice: forward.dice, dlogits: channels_first(shape, &dlogits) }
}

fn compute_on_device(
    cuda: &Arc<Cuda>,
    logits: &[f32],
    labels: &[u8],
    shape: Shape,
    p: &Loss,
) -> Outcome<Computed> {
    let logits = Engine::from_slice(shape, logits).to_device(cuda)?;
    let (view, labels) = (logits.view().ok_or("not on the device")?, cuda.upload(labels)?);
    let forward = cuda::forward(&view, &labels, p)?;
    let dlogits = cuda::backward(&forward, &view, &labels, p, &cuda.upload(&[1.0f32])?)?;
    let values = forward.values.download()?;
    let dlogits = channels_first(shape, &dlogits.download()?);
    Ok(Computed { loss: values[0].into(), dice: values[1].into(), dlogits })
}

/// The loss that `text` defines as `NAME = [BASE with] SETTING, ...`, where a setting is `lambda DICE/CE` or an
/// argument of DiceCELoss with True or False.
fn parse(text: &str, name: &str) -> Option<Loss> {
    let (_, definition) = text
        .split([';', ':'])
        .flat_map(|s| s.split(". "))
        .filter_map(|s| s.split_once(" = "))
        .find(|(n, _)| n.trim() == name)?;
    let base = definition.split_once(" with ").and_then(|(base, _)| parse(text, base.trim()));
    let mut loss = base.unwrap_or(DEFAULT);
    let words: Vec<&str> = definition.split([' ', '=', ',', '(', ')']).filter(|w| !w.is_empty()).collect();
    for pair in words.windows(2) {
        let flag = match pair[0] {
            "lambda" => {
                let (dice, ce) = pair[1].split_once('/')?;
                (loss.lambda_dice, loss.lambda_ce) = (dice.parse().ok()?, ce.parse().ok()?);
                continue;
            }
            "include_background" => &mut loss.include_background,
            "squared_pred" => &mut loss.squared_pred,
            "batch" => &mut loss.batch,
            _ => continue,
        };
        *flag = pair[1].starts_with("True");
    }
    Some(loss)
}
