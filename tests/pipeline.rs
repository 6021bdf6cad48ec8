//! Scans through inference and evaluation with a network whose answer is known: HU above a threshold.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use spleen_hpc::config::{Config, Recipe, Window};
use spleen_hpc::data::dataset::Case;
use spleen_hpc::data::volume::{Affine, Volume};
use spleen_hpc::data::{nifti, nifti_write};
use spleen_hpc::infer::evaluate::evaluate;
use spleen_hpc::infer::jobs::{Style, jobs};
use spleen_hpc::infer::pipeline::{Statistics, segment};
use spleen_hpc::infer::predict::{Network, Predictor};
use spleen_hpc::rng::Philox;
use spleen_hpc::tensor::{Shape, Tensor};

/// 53.5 HU: half way between -57 and 164.
fn bright(x: &[f32], shape: [usize; 4]) -> spleen_hpc::Result<Tensor> {
    assert_eq!(x.len(), shape.iter().product::<usize>());
    let logits: Vec<f32> = x.iter().flat_map(|v| [0.5, *v]).collect();
    let [n, d, h, w] = shape;
    Ok(Tensor::from_slice(Shape::new(n, [d, h, w], 2), &logits))
}

/// Integer HU, so that no voxel lies near the threshold of 53.5.
fn scan(seed: u64, shape: [usize; 3], affine: Affine) -> Volume<i16> {
    let mut rng = Philox::new(seed, 0);
    let data = (0..shape.iter().product()).map(|_| rng.below(400) as i16 - 100).collect();
    Volume { shape, data, affine }
}

fn masks(
    inputs: &[PathBuf],
    out: &Path,
    style: Style,
    stop: &AtomicBool,
) -> Vec<spleen_hpc::Result<Statistics>> {
    let mut config = Config::for_recipe(Recipe::V036);
    config.window = Window { roi: [16, 16, 16], ..config.window };
    let jobs = jobs(inputs, out, style).unwrap();
    let mut told = 0;
    let outcomes = segment(
        &jobs,
        &Network::Function(&bright),
        (&config.preprocess, &config.window),
        style,
        stop,
        |_, _| told += 1,
    );
    assert_eq!(told, outcomes.len());
    outcomes
}

/// The bundle's spacing, so that nothing is interpolated and the mask is the threshold of the file's own voxels,
/// whichever way its axes run.
const LPS: Affine =
    [[-1.5, 0.0, 0.0, 90.0], [0.0, -1.5, 0.0, 70.0], [0.0, 0.0, 2.0, -300.0], [0.0, 0.0, 0.0, 1.0]];
/// Axes of the file: superior, left, anterior.
const SLA: Affine =
    [[0.0, -1.5, 0.0, 10.0], [0.0, 0.0, 1.5, -20.0], [2.0, 0.0, 0.0, 5.0], [0.0, 0.0, 0.0, 1.0]];

#[test]
fn masks_are_written_in_the_geometry_of_their_scans() {
    let dir = tempfile::tempdir().unwrap();
    let stop = AtomicBool::new(false);
    let scans = [("one", scan(1, [20, 25, 18], LPS)), ("two", scan(2, [9, 33, 21], SLA))];
    let mut inputs = Vec::new();
    for (name, volume) in &scans {
        inputs.push(dir.path().join(format!("{name}.nii.gz")));
        nifti_write::write_volume(inputs.last().unwrap(), volume).unwrap();
    }
    for style in [Style::Mask, Style::Bundle] {
        let out = dir.path().join(format!("{style:?}"));
        for (found, (_, volume)) in masks(&inputs, &out, style, &stop).iter().zip(&scans) {
            let found = found.as_ref().unwrap();
            let mask = nifti::read(&found.output).unwrap();
            let want: Vec<f32> = volume.data.iter().map(|&hu| if hu >= 54 { 1.0 } else { 0.0 }).collect();
            assert_eq!(mask.volume.data, want, "{}", found.output.display());
            assert_eq!(mask.header.affine, volume.affine);
            let voxels = want.iter().filter(|&&v| v == 1.0).count();
            assert_eq!((found.voxels, found.shape), (voxels, volume.shape));
            // 1.5 mm x 1.5 mm x 2 mm = 0.0045 ml; float64.
            assert!((found.volume_ml - voxels as f64 * 0.0045).abs() < 1e-9);
        }
    }
}

#[test]
fn a_bad_scan_does_not_keep_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let inputs: Vec<PathBuf> = ["a", "b", "c"].map(|name| dir.path().join(format!("{name}.nii"))).into();
    nifti_write::write_volume(&inputs[0], &scan(3, [16; 3], LPS)).unwrap();
    std::fs::write(&inputs[1], b"no scan at all").unwrap();
    nifti_write::write_volume(&inputs[2], &scan(4, [17; 3], LPS)).unwrap();
    let out = dir.path().join("out");
    let outcomes = masks(&inputs, &out, Style::Mask, &AtomicBool::new(false));
    assert_eq!(outcomes[0].as_ref().unwrap().input, inputs[0]);
    assert!(outcomes[1].as_ref().unwrap_err().to_string().contains("b.nii"));
    assert_eq!(outcomes[2].as_ref().unwrap().input, inputs[2]);
    let mut written: Vec<_> = std::fs::read_dir(&out).unwrap().map(|f| f.unwrap().file_name()).collect();
    written.sort();
    assert_eq!(written, ["a.nii.gz", "c.nii.gz"], "and nothing half-written");
}

#[test]
fn stopping_finishes_what_is_under_way_and_begins_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let inputs: Vec<PathBuf> = (0..6).map(|i| dir.path().join(format!("{i}.nii"))).collect();
    inputs.iter().for_each(|path| nifti_write::write_volume(path, &scan(5, [16; 3], LPS)).unwrap());
    let jobs = jobs(&inputs, &dir.path().join("out"), Style::Mask).unwrap();
    let mut config = Config::for_recipe(Recipe::V036);
    config.window.roi = [16; 3];
    let stop = AtomicBool::new(false);
    let network = |x: &[f32], shape: [usize; 4]| {
        stop.store(true, Ordering::Relaxed);
        bright(x, shape)
    };
    let outcomes = segment(
        &jobs,
        &Network::Function(&network),
        (&config.preprocess, &config.window),
        Style::Mask,
        &stop,
        |_, _| (),
    );
    // The first was predicted; at most one more was read and one was being read.
    assert!((1..=3).contains(&outcomes.len()), "{}", outcomes.len());
    assert!(outcomes.iter().all(|o| o.as_ref().is_ok_and(|found| found.output.exists())));
}

/// The label lacks every tenth bright voxel: the prediction covers it and has those too many. A second case has an
/// empty label, which no Dice exists for, and a third one lies on another grid than its image.
#[test]
fn scores_follow_from_the_counts() {
    let dir = tempfile::tempdir().unwrap();
    let case = |name: &str, image: &Volume<i16>, label: &Volume<u8>| {
        let path = |kind: &str| dir.path().join(format!("{name}_{kind}.nii.gz"));
        nifti_write::write_volume(path("image"), image).unwrap();
        nifti_write::write_volume(path("label"), label).unwrap();
        Case { name: name.into(), image: path("image"), label: path("label") }
    };
    let image = scan(6, [20, 25, 18], LPS);
    let bright: Vec<usize> = (0..image.data.len()).filter(|&i| image.data[i] >= 54).collect();
    let mut label = Volume { shape: image.shape, data: vec![0u8; image.data.len()], affine: LPS };
    let empty = label.clone();
    let moved = Volume { affine: SLA, ..label.clone() };
    bright.iter().enumerate().filter(|(n, _)| n % 10 != 0).for_each(|(_, &i)| label.data[i] = 1);
    let cases = [case("a", &image, &label), case("b", &image, &empty), case("c", &image, &moved)];

    let mut config = Config::for_recipe(Recipe::V036);
    config.window = Window { roi: [16, 16, 16], ..config.window };
    let stop = AtomicBool::new(false);
    let results =
        evaluate(&cases, &Predictor::Host(Network::Function(&self::bright)), &config, None, &stop, |_, _| ());
    let a = results[0].as_ref().unwrap();
    let (pred, truth) = (bright.len() as f64, label.data.iter().map(|&v| f64::from(v)).sum::<f64>());
    let dice = (2.0 * truth / (pred + truth)) as f32;
    // Nothing is interpolated, so all three grids hold the same masks.
    assert_eq!([a.dice_grid, a.dice_bundle, a.native.dice], [dice; 3]);
    assert!(
        (a.native.pred_ml - pred * 0.0045).abs() < 1e-9 && (a.native.truth_ml - truth * 0.0045).abs() < 1e-9
    );
    let b = results[1].as_ref().unwrap();
    assert!(b.dice_grid.is_nan() && b.dice_bundle.is_nan() && b.native.dice.is_nan());
    let err = results[2].as_ref().unwrap_err().to_string();
    assert!(err.contains("c_label.nii.gz") && err.contains("c_image.nii.gz"), "{err}");
}
