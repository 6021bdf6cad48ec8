//! Patch centres: the clamp, the candidate lists, and MONAI's recorded draws.

use spleen_hpc::data::cache_file::candidates;
use spleen_hpc::data::preprocess::preprocess;
use spleen_hpc::data::sampler::{Candidates, correct_centre, pick, unravel};

use crate::Outcome;
use crate::case::Case;
use crate::golden::{File, Golden, numbers};
use crate::ledger::Ledger;
use crate::prep::settings;
use crate::tensor::Tensor;
use crate::tolerance::EXACT;

/// RandCropByPosNegLabeld of the bundle: pos 1, neg 1.
const POS_RATIO: f64 = 0.5;

pub fn run(golden: &Golden, ledger: &mut Ledger) -> Outcome<()> {
    ledger.each_file(golden, "crop", |file, ledger| {
        clamp(file, ledger);
        draws(file, golden, ledger)
    });
    Ok(())
}

/// `correct_crop_centers`: each row is label shape, roi, centre in, centre out, start.
fn clamp(file: &File, ledger: &mut Ledger) {
    let Some(mut table) = file.tensor("correct_crop_centers") else { return };
    for row in table.data.chunks_exact_mut(15) {
        let triple = |at: usize| std::array::from_fn(|i| row[at + i] as usize);
        let roi: [usize; 3] = triple(3);
        let centre = correct_centre(triple(6), roi, triple(0));
        for a in 0..3 {
            row[9 + a] = centre[a] as f64;
            row[12 + a] = centre[a] as f64 - (roi[a] / 2) as f64;
        }
    }
    ledger.compare(file, "correct_crop_centers", &table, EXACT);
}

/// The candidates of the case that the folder names, and the centres that the recorded draws pick from them.
fn draws(file: &File, golden: &Golden, ledger: &mut Ledger) -> Outcome<()> {
    let about = file.about("fg_count_bg_count");
    let Some(name) =
        about.split_once("prep_").map(|(_, rest)| rest.split([';', ',', ' ', '.']).next().unwrap_or(rest))
    else {
        ledger.leave_out(file, "*", "the folder does not name the case that the indices belong to");
        return Ok(());
    };
    let case = Case::read(golden, name)?;
    let settings = golden.file(&format!("prep_{name}")).map_or_else(|| settings(file), settings);
    let prepared = preprocess(&case.image.volume, case.label.as_ref(), &settings)?;
    let label = prepared.label.ok_or("the case has no label")?;
    let (fg, bg) = candidates(&prepared.image.data, &label.data);
    ledger.compare(file, "fg_count_bg_count", &Tensor::ints(&[2], &[fg.len(), bg.len()]), EXACT);
    for (name, list) in [("fg_indices", &fg), ("bg_indices", &bg)] {
        let list: Vec<i64> = list.iter().map(|&i| i64::from(i)).collect();
        ledger.compare(file, name, &Tensor::new(&[list.len()], &list), EXACT);
    }

    let volume = Candidates { shape: label.shape, fg: &fg, bg: &bg };
    let seeds: Vec<&str> = file.base_names().into_iter().filter_map(|n| n.strip_prefix("draws_")).collect();
    for seed in seeds {
        let (mut table, centres) = (file.need(&format!("draws_{seed}"))?, format!("centres_{seed}"));
        let roi =
            numbers(file.about(&centres), "roi").ok_or_else(|| format!("{centres}: no roi in its text"))?;
        let roi: [usize; 3] = std::array::from_fn(|a| roi[a] as usize);
        let mut got = vec![];
        for draw in table.data.chunks_exact_mut(3) {
            let list = pick(&volume, POS_RATIO, draw[0]);
            let flat = *list.get(draw[1] as usize).ok_or("a draw beyond the list of candidates")? as usize;
            draw[2] = flat as f64;
            got.extend(correct_centre(unravel(flat, label.shape), roi, label.shape));
        }
        ledger.compare(file, &format!("draws_{seed}"), &table, EXACT);
        ledger.compare(file, &centres, &Tensor::ints(&[got.len() / 3, 3], &got), EXACT);
    }
    Ok(())
}
