//! Overlap and surface metrics of the golden masks.
//!
//! A tensor's name says what it is: `<case>.<metric>_<unit|mm>`, with the percentile (`hd95`) or tolerance (`nsd2`) in
//! the metric's name.

use spleen_hpc::infer::predict::argmax;
use spleen_hpc::metrics::overlap::{Overlap, mean_ignoring_nan};
use spleen_hpc::metrics::surface::{SurfaceDistances, edges};

use crate::Outcome;
use crate::golden::{File, Golden, numbers};
use crate::ledger::Ledger;
use crate::tensor::Tensor;
use crate::tolerance::{EXACT, MEAN_DICE, SURFACE};

pub fn run(golden: &Golden, ledger: &mut Ledger) -> Outcome<()> {
    ledger.each_file(golden, "metrics", |file, ledger| {
        let cases: Vec<&str> = file.stems(".pred").collect();
        let mut dice = vec![];
        for case in cases {
            dice.push(replay_case(file, case, ledger)?);
        }
        let (mean, count) = mean_ignoring_nan(&dice);
        ledger.compare(file, "all.mean_dice", &Tensor::new(&[1], &[f64::from(mean)]), MEAN_DICE);
        ledger.compare(file, "all.mean_dice_not_nans", &Tensor::new(&[1], &[count as f64]), EXACT);
        if let Some(want) = file.tensor("argmax_tie") {
            let equal = vec![0.5; 2 * want.data.len()];
            ledger.compare(file, "argmax_tie", &Tensor::new(&want.shape, &argmax(&equal)), EXACT);
        }
        ledger.leave_out(
            file,
            "*.nsd*_subvox*",
            "areas of sub-voxel surfaces need DeepMind's table; not computed",
        );
        Ok(())
    });
    Ok(())
}

/// Compares everything of a case; returns its Dice.
fn replay_case(file: &File, case: &str, ledger: &mut Ledger) -> Outcome<f32> {
    let (pred, truth) = (file.need(&format!("{case}.pred"))?, file.need(&format!("{case}.gt"))?);
    let shape: [usize; 3] =
        pred.shape.as_slice().try_into().map_err(|_| format!("{case}.pred is not 3-D"))?;
    let (pred, truth) = (pred.to_u8(), truth.to_u8());
    let overlap = Overlap::count(&pred, &truth)?;
    let about = file.about(&format!("{case}.hd_mm"));
    let mm = numbers(about, "spacing").unwrap_or_else(|| vec![1.5, 1.5, 2.0]);
    let mm: [f64; 3] = mm.try_into().map_err(|_| format!("{case}: no spacing in \"{about}\""))?;
    let unit = SurfaceDistances::new(&pred, &truth, shape, [1.0; 3])?;
    let mm = SurfaceDistances::new(&pred, &truth, shape, mm)?;

    let prefix = format!("{case}.");
    let names: Vec<&str> = file.base_names().into_iter().filter_map(|n| n.strip_prefix(&prefix)).collect();
    for name in names {
        let (got, tolerance) = match name {
            "dice" => (scalar(overlap.dice()), EXACT),
            "dice_ignore_empty_false" => (scalar(overlap.dice_counting_empty()), EXACT),
            "edge_pred" => (mask(&edges(&pred, shape), shape), EXACT),
            "edge_gt" => (mask(&edges(&truth, shape), shape), EXACT),
            "dist_pred_to_gt_mm" => (sorted(&mm.pred_to_truth), SURFACE),
            _ => {
                let (metric, distances) = match name.rsplit_once('_') {
                    Some((metric, "unit")) => (metric, &unit),
                    Some((metric, "mm")) => (metric, &mm),
                    _ => continue,
                };
                let Some(value) = surface_metric(distances, metric) else { continue };
                // Counts and their ratio leave no room.
                (scalar(value), if metric.starts_with("nsd") { EXACT } else { SURFACE })
            }
        };
        ledger.compare(file, &format!("{case}.{name}"), &got, tolerance);
    }
    Ok(overlap.dice())
}

/// `hd`, `hd<percent>`, `hd<percent>_directed`, `asd`, `assd`, `nsd<mm>`.
fn surface_metric(d: &SurfaceDistances, name: &str) -> Option<f32> {
    match name {
        "hd" => Some(d.hausdorff()),
        "asd" => Some(d.asd()),
        "assd" => Some(d.assd()),
        _ => {
            if let Some(tolerance) = name.strip_prefix("nsd") {
                return tolerance.parse().ok().map(|t| d.nsd(t));
            }
            let percentile = name.strip_prefix("hd")?;
            match percentile.strip_suffix("_directed") {
                Some(p) => p.parse().ok().map(|p| d.directed_percentile(p)),
                None => percentile.parse().ok().map(|p| d.hausdorff_percentile(p)),
            }
        }
    }
}

/// (batch, class) = (1, 1), as MONAI returns it.
fn scalar(value: f32) -> Tensor {
    Tensor::new(&[1, 1], &[f64::from(value)])
}

fn mask(on: &[bool], shape: [usize; 3]) -> Tensor {
    Tensor::new(&shape, &on.iter().map(|&b| u8::from(b)).collect::<Vec<_>>())
}

fn sorted(distances: &[f32]) -> Tensor {
    let mut d = distances.to_vec();
    d.sort_unstable_by(f32::total_cmp);
    Tensor::new(&[d.len()], &d)
}
