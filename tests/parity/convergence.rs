//! Training runs of MONAI, replayed batch by batch from the recorded patch corners.
//!
//! The first 40 losses of every run are compared; `SPLEEN_CONVERGENCE_STEPS=600 cargo test --release --test parity
//! convergence` replays as many steps as a run has and compares the end of its curve and its validation too.

use std::path::Path;

use serde_json::Value;
use spleen_hpc::config::{Blend, Config, Loss, Optimizer, Recipe, Window};
use spleen_hpc::data::dataset::{Case, training_cases};
use spleen_hpc::data::nifti::{self, label_from};
use spleen_hpc::data::preprocess::{Prepared, preprocess};
use spleen_hpc::metrics::overlap::{Overlap, mean_ignoring_nan};
use spleen_hpc::nn::UNet;
use spleen_hpc::train::trainer::Trainer;

use crate::Outcome;
use crate::golden::Golden;
use crate::ledger::Ledger;
use crate::sw_net::blended;
use crate::tensor::Tensor;
use crate::tolerance::{EXACT, FINAL_DICE, last_losses, replayed_losses};
use crate::{end_to_end, loss, network, optim};

/// Steps compared loss by loss.
const COMPARED: usize = 40;

/// Every `convergence/RUN.json` with recorded batches, and every trained network's masks.
pub fn run(golden: &Golden, ledger: &mut Ledger) -> Outcome<()> {
    let dir = golden.dir.join("convergence");
    let pattern = format!("{}/*.json", glob::Pattern::escape(&dir.to_string_lossy()));
    let mut cases: Vec<Prepared> = Vec::new();
    for path in glob::glob(&pattern)? {
        let path = path?;
        let run = read_json(&path)?;
        if !run["batches"].is_array() {
            continue;
        }
        if cases.is_empty() {
            cases = training_cases(dir.join("data"))?.iter().map(prepare).collect::<Outcome<_>>()?;
        }
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if let Err(e) = replay(&dir, &name, &run, &cases, ledger) {
            ledger.fail(&name, e.to_string());
        }
    }
    end_to_end::run(golden, ledger);
    Ok(())
}

/// A JSON file of Python, which writes NaN for scores that do not exist: read as null.
pub fn read_json(path: &Path) -> Outcome<Value> {
    let text = std::fs::read_to_string(path)?;
    // Every other piece between quotes is a string.
    let pieces = text.split('"').enumerate();
    let plain = pieces.map(|(i, s)| if i % 2 == 0 { s.replace("NaN", "null") } else { s.to_owned() });
    let plain = plain.collect::<Vec<_>>().join("\"");
    Ok(serde_json::from_str(&plain).map_err(|e| format!("{}: {e}", path.display()))?)
}

/// A case on the network's grid, by the bundle's preprocessing.
pub fn prepare(case: &Case) -> Outcome<Prepared> {
    let label = label_from(&nifti::read(&case.label)?.volume, None, &case.label)?;
    let settings = Config::for_recipe(Recipe::V059).preprocess;
    Ok(preprocess(&nifti::read(&case.image)?.volume, Some(&label), &settings)?)
}

fn replay(dir: &Path, name: &str, run: &Value, cases: &[Prepared], ledger: &mut Ledger) -> Outcome<()> {
    compare_shapes(name, &run["shapes_train"], cases, ledger)?;
    let batches: Vec<Vec<[usize; 4]>> = serde_json::from_value(run["batches"].clone())?;
    let curve: Vec<f64> = serde_json::from_value(run["loss_curve"].clone())?;
    let side = run["patch"].as_u64().ok_or("the run has no patch size")? as usize;
    let kind = match run["optimizer"].as_str() {
        Some("adam") => Optimizer::Adam,
        Some("novograd") => Optimizer::Novograd,
        other => return Err(format!("optimizer {other:?} is not in this program").into()),
    };
    let config = optim::config(kind, run)?;
    let seed = run["init_seed"].as_u64().ok_or("the run has no init_seed")?;
    let net = network::build(run, seed, &network::DEFAULT)?;
    let mut trainer = Trainer::with_network(net, loss_of(&run["loss_args"]), config);
    let asked = std::env::var("SPLEEN_CONVERGENCE_STEPS").ok().and_then(|n| n.parse().ok());
    let mut losses = Vec::new();
    for batch in batches.iter().take(asked.unwrap_or(COMPARED)) {
        let (mut images, mut labels) = (Vec::new(), Vec::new());
        for &[case, starts @ ..] in batch {
            let case = cases.get(case).ok_or("a batch names a case that is not there")?;
            let label = case.label.as_ref().ok_or("a training case has no label")?;
            cut(&case.image.data, case.image.shape, starts, side, &mut images)?;
            cut(&label.data, label.shape, starts, side, &mut labels)?;
        }
        losses.push(trainer.step(&images, &labels, [batch.len(), side, side, side])?);
    }
    let head = |v: &[f64]| Tensor::new(&[v.len().min(COMPARED)], &v[..v.len().min(COMPARED)]);
    let compared = head(&curve[..losses.len().min(curve.len())]);
    let what = format!("convergence/{name}: first {} losses", compared.data.len());
    ledger.compare_with(&what, &head(&losses), &compared, replayed_losses(kind, config.lr), |_| false);
    if losses.len() == curve.len() && curve.len() > COMPARED {
        compare_end(dir, name, run, &trainer.net, [&losses, &curve], kind, ledger)?;
    }
    Ok(())
}

/// Patch of `side`^3 voxels from `starts` on.
fn cut<T: Copy>(
    from: &[T],
    shape: [usize; 3],
    starts: [usize; 3],
    side: usize,
    to: &mut Vec<T>,
) -> Outcome<()> {
    if (0..3).any(|a| starts[a] + side > shape[a]) {
        return Err(format!("a patch at {starts:?} leaves a volume of {shape:?}").into());
    }
    for (i, j) in (0..side).flat_map(|i| (0..side).map(move |j| (i, j))) {
        let row = ((starts[0] + i) * shape[1] + starts[1] + j) * shape[2] + starts[2];
        to.extend_from_slice(&from[row..row + side]);
    }
    Ok(())
}

/// DiceCELoss arguments, absent ones as MONAI's defaults.
fn loss_of(args: &Value) -> Loss {
    let flag = |name: &str, default| args[name].as_bool().unwrap_or(default);
    let number = |name: &str, default| args[name].as_f64().unwrap_or(default);
    Loss {
        lambda_dice: number("lambda_dice", 1.0),
        lambda_ce: number("lambda_ce", 1.0),
        include_background: flag("include_background", true),
        squared_pred: flag("squared_pred", false),
        batch: flag("batch", false),
        smooth: number("smooth_nr", loss::DEFAULT.smooth),
    }
}

fn compare_shapes(name: &str, want: &Value, cases: &[Prepared], ledger: &mut Ledger) -> Outcome<()> {
    let want: Vec<[usize; 3]> = serde_json::from_value(want.clone())?;
    let got: Vec<[usize; 3]> = cases.iter().map(|c| c.image.shape).collect();
    let [got, want] = [got, want].map(|v| Tensor::ints(&[v.len(), 3], v.as_flattened()));
    ledger.compare_with(&format!("convergence/{name}: shapes"), &got, &want, EXACT, |_| false);
    Ok(())
}

/// The mean of the last losses, and the validation Dice on the training grid.
fn compare_end(
    dir: &Path,
    name: &str,
    run: &Value,
    net: &UNet,
    [losses, curve]: [&Vec<f64>; 2],
    kind: Optimizer,
    ledger: &mut Ledger,
) -> Outcome<()> {
    let last = |v: &[f64]| Tensor::new(&[1], &[v[v.len() - 25..].iter().sum::<f64>() / 25.0]);
    let what = format!("convergence/{name}: mean of the last 25 losses");
    ledger.compare_with(&what, &last(losses), &last(curve), last_losses(kind), |_| false);
    let roi = run["val_roi"].as_u64().ok_or("the run has no val_roi")? as usize;
    let window = window(run, roi)?;
    let mut dice = Vec::new();
    for case in end_to_end::validation_cases(dir)? {
        let prepared = prepare(&case)?;
        let label = prepared.label.as_ref().ok_or("a validation case has no label")?;
        let [d, h, w] = prepared.image.shape;
        let logits = blended(net, &Tensor::new(&[1, 1, d, h, w], &prepared.image.data), &window)?;
        let (background, organ) = logits.data.split_at(logits.data.len() / 2);
        let mask: Vec<u8> = organ.iter().zip(background).map(|(o, b)| u8::from(o > b)).collect();
        dice.push(Overlap::count(&mask, &label.data)?.dice());
    }
    println!("{name}: validation Dice {dice:?}, last losses {:?}", last(losses).data);
    let got = Tensor::new(&[1], &[mean_ignoring_nan(&dice).0]);
    let end = run["validation"].as_array().and_then(|v| v.last()).and_then(|v| v["mean_dice"].as_f64());
    let want = Tensor::new(&[1], &[end.ok_or("the run has no validation")?]);
    let what = format!("convergence/{name}: final validation Dice");
    ledger.compare_with(&what, &got, &want, FINAL_DICE, |_| false);
    Ok(())
}

/// The run's sliding window with cubes of `roi` voxels a side.
pub fn window(run: &Value, roi: usize) -> Outcome<Window> {
    let overlap = run["val_overlap"].as_f64().ok_or("the run has no val_overlap")?;
    Ok(Window { roi: [roi; 3], overlap, batch: 4, blend: Blend::Constant })
}
