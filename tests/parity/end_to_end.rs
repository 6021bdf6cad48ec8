//! A trained network of MONAI on its validation cases: from the file to logits, probabilities, mask and scores.

use std::path::{Path, PathBuf};

use serde_json::Value;
use spleen_hpc::data::dataset::Case;
use spleen_hpc::data::nifti::{self, label_from};
use spleen_hpc::data::volume::Volume;
use spleen_hpc::infer::predict::softmax;
use spleen_hpc::metrics;
use spleen_hpc::nn::{UNet, weights};

use crate::Outcome;
use crate::convergence::{prepare, read_json, window};
use crate::golden::{File, Golden};
use crate::ledger::Ledger;
use crate::sw_net::blended;
use crate::tensor::Tensor;
use crate::tolerance::{SCORE, TRAINED_LOGITS, TRAINED_PROBABILITY, Tolerance};

/// `convergence/RUN_e2e/e2e` with the network `convergence/RUN_model.pt`.
pub fn run(golden: &Golden, ledger: &mut Ledger) {
    ledger.each_file(golden, "convergence/*_e2e/e2e", |file, ledger| {
        let dir = golden.dir.join(&file.name);
        let dir = dir.parent().ok_or("no folder")?;
        let folder = dir.file_name().unwrap_or_default().to_string_lossy();
        let root = dir.parent().ok_or("no folder")?;
        let run = folder.trim_end_matches("_e2e");
        let settings = read_json(&root.join(format!("{run}.json")))?;
        let net = UNet::from_state_dict(&weights::read_any(&root.join(format!("{run}_model.pt")))?)?;
        let expected = read_json(&dir.join("e2e.json"))?;
        for expected in expected.as_array().into_iter().flatten() {
            replay(file, dir, &net, &settings, expected, ledger)?;
        }
        Ok(())
    });
}

/// The cases of `data/imagesTs`, in order of their names.
pub fn validation_cases(convergence: &Path) -> Outcome<Vec<Case>> {
    let data = convergence.join("data");
    let images = glob::glob(&format!("{}/imagesTs/*.nii*", glob::Pattern::escape(&data.to_string_lossy())))?;
    let case = |image: PathBuf| {
        let file = image.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let name = file.split(".nii").next().unwrap_or_default().to_owned();
        Case { name, label: data.join("labelsTs").join(file), image }
    };
    images.map(|path| Ok(case(path?))).collect()
}

/// One case with one window: tensors `caseN_roiR.*`, the mask `*N_trans_roiR.nii.gz` and its native scores.
fn replay(
    file: &File,
    dir: &Path,
    net: &UNet,
    settings: &Value,
    expected: &Value,
    ledger: &mut Ledger,
) -> Outcome<()> {
    let number = |key: &str| expected[key].as_u64().ok_or_else(|| format!("e2e.json has no {key}"));
    let (number_of_case, roi) = (number("case")?, number("roi")?);
    let root = dir.parent().ok_or("no folder")?;
    let ends = |c: &Case| c.name.rsplit('_').next().and_then(|n| n.parse().ok()) == Some(number_of_case);
    let case =
        validation_cases(root)?.into_iter().find(ends).ok_or_else(|| format!("no case {number_of_case}"))?;
    let prepared = prepare(&case)?;
    let [d, h, w] = prepared.image.shape;
    let image = Tensor::new(&[1, 1, d, h, w], &prepared.image.data);
    let logits = blended(net, &image, &window(settings, roi as usize)?)?;
    let name = |part: &str| format!("case{number_of_case}_roi{roi}.{part}");
    ledger.compare(file, &name("logits"), &logits, TRAINED_LOGITS);

    let (background, organ) = logits.data.split_at(logits.data.len() / 2);
    let mut p: Vec<f32> = background.iter().zip(organ).flat_map(|(&b, &o)| [b as f32, o as f32]).collect();
    softmax(&mut p);
    let p = p.as_chunks::<2>().0;
    let mut native: Vec<f32> = Vec::new();
    prepared.geometry.invert_probabilities(p, |_, slab| {
        native.extend_from_slice(slab.as_flattened());
        Ok(())
    })?;
    let truth = nifti::read(&case.label)?.volume;
    let planes: Vec<f32> = (0..2).flat_map(|c| native.iter().skip(c).step_by(2).copied()).collect();
    let shape = [&[2][..], &truth.shape].concat();
    ledger.compare(file, &name("prob"), &Tensor::new(&shape, &planes), TRAINED_PROBABILITY);

    let mask = prepared.geometry.invert_argmax(p)?;
    let pattern = format!("{}/*_trans_roi{roi}.nii*", glob::Pattern::escape(&dir.to_string_lossy()));
    let saved = glob::glob(&pattern)?.collect::<Result<Vec<_>, _>>()?;
    let stem = format!("{}_trans_", case.name);
    let saved = saved.iter().find(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&stem)));
    let saved = nifti::read(saved.ok_or_else(|| format!("no {stem}roi{roi}"))?)?.volume;
    let differing = mask.iter().zip(&saved.data).filter(|(a, b)| f32::from(**a) != **b).count();
    let border = number("border_voxels_p_within_1e_3_of_half")?;
    let bound = Tolerance::abs("voxels of a mask: the ambiguous", border as f64);
    let compare = |ledger: &mut Ledger, part, got: f64, want: f64, tolerance| {
        let [got, want] = [got, want].map(|v| Tensor::new(&[1], &[v]));
        ledger.compare_with(&format!("{}: {}", file.name, name(part)), &got, &want, tolerance, |_| false);
    };
    compare(ledger, "differing voxels", differing as f64, 0.0, bound);
    let voxels = mask.iter().filter(|&&v| v != 0).count() as f64;
    compare(ledger, "voxels", voxels, number("voxels")? as f64, bound);

    let truth = label_from(&truth, None, &case.label)?;
    let pred = Volume { shape: truth.shape, data: mask, affine: truth.affine };
    let got = metrics::score(&pred, &truth, 1.0)?;
    let want = |key: &str| expected[key].as_f64().ok_or_else(|| format!("e2e.json has no {key}"));
    compare(ledger, "native Dice", got.dice.into(), want("native_dice")?, SCORE);
    compare(ledger, "native HD95", got.hd95_mm.into(), want("native_hd95_mm")?, SCORE);
    Ok(())
}
