//! Scans through the inference pipeline with a network whose answer is known: HU above a threshold.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use spleen_hpc::config::{Config, Recipe, Window};
use spleen_hpc::data::volume::{Affine, Volume};
use spleen_hpc::data::{nifti, nifti_write};
use spleen_hpc::infer::jobs::{Style, jobs};
use spleen_hpc::infer::pipeline::{Outcome, run};
use spleen_hpc::rng::Philox;

/// 53.5 HU: half way between -57 and 164.
fn bright(x: &[f32], shape: [usize; 4]) -> spleen_hpc::Result<Vec<f32>> {
    assert_eq!(x.len(), shape.iter().product::<usize>());
    Ok(x.iter().flat_map(|v| [0.5, *v]).collect())
}

/// Integer HU, so that no voxel lies near the threshold of 53.5.
fn scan(seed: u64, shape: [usize; 3], affine: Affine) -> Volume<i16> {
    let mut rng = Philox::new(seed, 0);
    let data = (0..shape.iter().product()).map(|_| rng.below(400) as i16 - 100).collect();
    Volume { shape, data, affine }
}

fn segment(inputs: &[PathBuf], out: &Path, style: Style, stop: &AtomicBool) -> Vec<Outcome> {
    let mut config = Config::for_recipe(Recipe::V036);
    config.window = Window { roi: [16, 16, 16], ..config.window };
    let jobs = jobs(inputs, out, style).unwrap();
    let mut told = 0;
    let outcomes = run(&jobs, &bright, (&config.preprocess, &config.window), style, stop, |_| told += 1);
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
        for (outcome, (_, volume)) in segment(&inputs, &out, style, &stop).iter().zip(&scans) {
            let found = outcome.result.as_ref().unwrap();
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
    let outcomes = segment(&inputs, &out, Style::Mask, &AtomicBool::new(false));
    let names: Vec<_> = outcomes.iter().map(|o| (o.input.clone(), o.result.is_ok())).collect();
    assert_eq!(names, [(inputs[0].clone(), true), (inputs[1].clone(), false), (inputs[2].clone(), true)]);
    assert!(outcomes[1].result.as_ref().unwrap_err().to_string().contains("b.nii"));
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
    let outcomes = run(&jobs, &network, (&config.preprocess, &config.window), Style::Mask, &stop, |_| ());
    // The first was predicted; at most one more was read and one was being read.
    assert!((1..=3).contains(&outcomes.len()), "{}", outcomes.len());
    assert!(outcomes.iter().all(|o| o.result.as_ref().is_ok_and(|found| found.output.exists())));
}
