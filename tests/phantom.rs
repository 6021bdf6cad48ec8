//! The phantom is a task for a network: deterministic, plausible, different in every case, and no threshold.

use rayon::prelude::*;
use spleen_hpc::data::phantom::{PhantomConfig, case, generate};
use spleen_hpc::data::volume::Volume;

const SMALL: PhantomConfig = PhantomConfig { cases: 16, test_cases: 2, seed: 0, full: false };

fn voxel_ml<T>(v: &Volume<T>) -> f64 {
    let [a, b, c, _] = v.affine;
    let det = a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0])
        + a[2] * (b[0] * c[1] - b[1] * c[0]);
    det.abs() / 1000.0
}

/// Voxels of the largest 6-connected component of `mask`, and how many components there are.
fn largest_component(mask: &[bool], shape: [usize; 3]) -> (Vec<usize>, usize) {
    let strides = [shape[1] * shape[2], shape[2], 1];
    let mut seen: Vec<bool> = mask.iter().map(|&m| !m).collect();
    let (mut largest, mut count) = (Vec::new(), 0);
    for seed in 0..mask.len() {
        if seen[seed] {
            continue;
        }
        seen[seed] = true;
        count += 1;
        let mut component = vec![seed];
        let mut next = 0;
        while next < component.len() {
            let v = component[next];
            next += 1;
            for a in 0..3 {
                let at = v / strides[a] % shape[a];
                for (ok, n) in [(at > 0, v.wrapping_sub(strides[a])), (at + 1 < shape[a], v + strides[a])] {
                    if ok && !seen[n] {
                        seen[n] = true;
                        component.push(n);
                    }
                }
            }
        }
        if component.len() > largest.len() {
            largest = component;
        }
    }
    (largest, count)
}

/// Binomial smoothing 1-2-1 along every axis, `times` times.
fn smooth(image: &[i16], shape: [usize; 3], times: usize) -> Vec<f32> {
    let mut now: Vec<f32> = image.iter().map(|&v| f32::from(v)).collect();
    let strides = [shape[1] * shape[2], shape[2], 1];
    for a in (0..3).cycle().take(3 * times) {
        now = (0..now.len())
            .map(|v| {
                let at = v / strides[a] % shape[a];
                let left = if at > 0 { now[v - strides[a]] } else { now[v] };
                let right = if at + 1 < shape[a] { now[v + strides[a]] } else { now[v] };
                0.25 * (left + right) + 0.5 * now[v]
            })
            .collect();
    }
    now
}

/// Dice of every HU window's largest component, the thing a thresholding user would try.
///
/// Where the window and the label share so little that no component can reach 0.15, that bound stands in for the
/// Dice: it is never below it, so the search only errs towards the threshold.
fn window_scores(image: &[f32], label: &Volume<u8>, windows: &[(f32, f32)]) -> Vec<f64> {
    let organ = label.data.iter().filter(|&&l| l != 0).count();
    windows
        .iter()
        .map(|&(low, high)| {
            let mask: Vec<bool> = image.iter().map(|&v| v >= low && v < high).collect();
            let shared = mask.iter().zip(&label.data).filter(|&(&m, &l)| m && l != 0).count();
            let bound = 2.0 * shared as f64 / (shared + organ) as f64;
            if bound < 0.15 {
                return bound;
            }
            let (component, _) = largest_component(&mask, label.shape);
            let hit = component.iter().filter(|&&v| label.data[v] != 0).count();
            2.0 * hit as f64 / (component.len() + organ) as f64
        })
        .collect()
}

#[test]
fn no_hu_window_finds_the_spleen() {
    let windows: Vec<(f32, f32)> = (0..16)
        .flat_map(|low| (low + 1..=16).map(move |high| (10.0 * low as f32, 10.0 * high as f32)))
        .collect();
    let cases: Vec<_> = (0..8).map(|i| case(&SMALL, i)).collect();
    // 2 passes of 1-2-1: a Gaussian of sigma 1 voxel.
    for times in [0, 2] {
        let scores: Vec<Vec<f64>> = cases
            .par_iter()
            .map(|(image, label)| window_scores(&smooth(&image.data, image.shape, times), label, &windows))
            .collect();
        let best = |s: &Vec<f64>| s.iter().copied().fold(0.0, f64::max);
        let per_case: Vec<f64> = scores.iter().map(best).collect();
        let mean = |w: usize| scores.iter().map(|s| s[w]).sum::<f64>() / scores.len() as f64;
        let shared = (0..windows.len()).map(mean).fold(0.0, f64::max);
        println!(
            "smoothed {times}x: one window for all {shared:.3}; best window of each case {per_case:.3?}"
        );
        assert!(shared < 0.6, "one window for all cases reaches Dice {shared}");
        // Even told each case's best window by an oracle.
        assert!(per_case.iter().all(|&d| d < 0.6), "a case's own best window reaches {per_case:?}");
    }
}

#[test]
fn every_label_is_one_plausible_organ() {
    for seed in [0, 1, 2] {
        let config = PhantomConfig { seed, ..SMALL };
        (0..config.cases + config.test_cases).into_par_iter().for_each(|i| {
            let (image, label) = case(&config, i);
            assert_eq!((image.shape, image.affine), (label.shape, label.affine));
            let mask: Vec<bool> = label.data.iter().map(|&l| l != 0).collect();
            assert!(label.data.iter().all(|&l| l <= 1), "a label other than 0 and 1");
            let organ = mask.iter().filter(|&&m| m).count();
            let (_, components) = largest_component(&mask, label.shape);
            assert_eq!(components, 1, "seed {seed} case {i}: the spleen is in pieces");
            // Half an adult in each direction has an eighth of the volume: 100-600 ml become 13-75, and the
            // stretch along z of up to 1.3 is the rest.
            let ml = organ as f64 * voxel_ml(&label);
            assert!((13.0..100.0).contains(&ml), "seed {seed} case {i}: {ml} ml");
            // Mean HU of an enhanced spleen; lung, fat or bone would be far outside.
            let mean: f64 =
                image.data.iter().zip(&mask).filter(|(_, m)| **m).map(|(&v, _)| f64::from(v)).sum();
            let mean = mean / organ as f64;
            assert!((45.0..125.0).contains(&mean), "seed {seed} case {i}: {mean} HU");
        });
    }
}

#[test]
fn every_case_differs_and_fits_the_patch() {
    let cases: Vec<_> = (0..18).into_par_iter().map(|i| case(&SMALL, i)).collect();
    for (i, (image, label)) in cases.iter().enumerate() {
        for (other, _) in &cases[..i] {
            assert_ne!(image.data, other.data);
            assert_ne!(image.affine, other.affine);
        }
        // What the chain will make of it: at least 64 voxels of 1.5 x 1.5 x 2 mm a side. The slice axis is the
        // one of another spacing.
        let spacing = image.spacing_mm();
        for (a, spacing) in spacing.into_iter().enumerate() {
            let row = (0..3).max_by(|&r, &s| image.affine[r][a].abs().total_cmp(&image.affine[s][a].abs()));
            let target = if row == Some(2) { 2.0 } else { 1.5 };
            let voxels = (image.shape[a] as f64 - 1.0) * spacing / target + 1.0;
            assert!((64.0..=150.0).contains(&voxels), "case {i} axis {a}: {voxels} voxels");
        }
        // Fat, muscle and bone of the body, air of the lungs and around it.
        let share = |low: i16, high: i16| {
            image.data.iter().filter(|&&v| v >= low && v < high).count() as f64 / image.len() as f64
        };
        assert!(share(-1025, -700) > 0.3 && share(-200, -50) > 0.02 && share(150, 3072) > 0.005, "case {i}");
        assert!(label.data.iter().filter(|&&l| l != 0).count() > 1500, "case {i}");
    }
    let oblique = |v: &Volume<i16>| (0..3).all(|a| (0..3).filter(|&r| v.affine[r][a] != 0.0).count() == 3);
    assert!(cases.iter().any(|c| oblique(&c.0)), "no oblique case");
    let mirrored = |v: &Volume<i16>| v.affine[0][0] < 0.0;
    assert!(cases.iter().any(|c| mirrored(&c.0)) && cases.iter().any(|c| !mirrored(&c.0)));
    assert!(cases.iter().any(|c| c.0.affine[2][1].abs() > 1.0), "no case with slices along another axis");
}

#[test]
fn full_size_is_that_of_a_clinical_scan() {
    let (image, label) = case(&PhantomConfig { full: true, ..SMALL }, 0);
    assert_eq!(image.shape, [512, 512, 90]);
    let ml = label.data.iter().filter(|&&l| l != 0).count() as f64 * voxel_ml(&label);
    // An adult's spleen: 100-350 ml is normal, up to 600 enlarged.
    assert!((100.0..600.0).contains(&ml), "{ml} ml");
}

/// Files of a folder tree and their content, sorted.
fn tree(dir: &std::path::Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = ["imagesTr", "labelsTr", "imagesTs", "labelsTs"]
        .iter()
        .flat_map(|f| std::fs::read_dir(dir.join(f)).unwrap())
        .map(|e| e.unwrap().path())
        .chain([dir.join("dataset.json")])
        .map(|p| (p.strip_prefix(dir).unwrap().display().to_string(), std::fs::read(&p).unwrap()))
        .collect();
    files.sort();
    files
}

#[test]
fn same_seed_same_bytes_for_any_number_of_threads() {
    let config = PhantomConfig { cases: 2, test_cases: 1, ..SMALL };
    let made = |threads: usize, config: PhantomConfig| {
        let dir = tempfile::tempdir().unwrap();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| generate(dir.path(), &config, &|_, _| {})).unwrap();
        tree(dir.path())
    };
    let one = made(1, config);
    assert_eq!(one.len(), 7);
    assert!(one == made(5, config), "the number of threads shows");
    assert!(one != made(1, PhantomConfig { seed: 1, ..config }), "the seed does not show");
}

#[test]
fn a_folder_is_reused_finished_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let config = PhantomConfig { cases: 1, test_cases: 0, ..SMALL };
    let out = dir.path().join("new/set");
    generate(&out, &config, &|_, _| {}).unwrap();
    let image = out.join("imagesTr/spleen_01.nii.gz");
    let first = std::fs::metadata(&image).unwrap().modified().unwrap();
    // Whole: left alone.
    generate(&out, &config, &|_, _| {}).unwrap();
    assert_eq!(std::fs::metadata(&image).unwrap().modified().unwrap(), first);
    // Interrupted: dataset.json, which comes last, is missing.
    let whole = tree(&out);
    std::fs::remove_file(out.join("dataset.json")).unwrap();
    std::fs::write(&image, b"half").unwrap();
    generate(&out, &config, &|_, _| {}).unwrap();
    assert!(tree(&out) == whole);
    // Another set, and somebody else's folder.
    let other = PhantomConfig { seed: 9, ..config };
    let message = generate(&out, &other, &|_, _| {}).unwrap_err().to_string();
    assert!(message.contains("another phantom set"), "{message}");
    let foreign = dir.path().join("foreign");
    std::fs::create_dir(&foreign).unwrap();
    std::fs::write(foreign.join("thesis.tex"), b"...").unwrap();
    let message = generate(&foreign, &config, &|_, _| {}).unwrap_err().to_string();
    assert!(message.contains("not empty"), "{message}");
    assert_eq!(std::fs::read_dir(&foreign).unwrap().count(), 1, "a refused folder was written to");
}

/// A process killed before the first file was whole must not leave a folder that nothing can be made in.
#[test]
fn what_a_killed_process_was_writing_is_no_reason_to_refuse() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(".writing-Xq3f"), "{\"gener").unwrap();
    let config = PhantomConfig { cases: 1, test_cases: 0, ..SMALL };
    generate(dir.path(), &config, &|_, _| {}).expect("a set");
    assert!(dir.path().join("dataset.json").is_file());
}
