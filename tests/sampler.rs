//! The sampler draws MONAI's distribution, the same for the same names, and cuts what it drew.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use spleen_hpc::config::Sampling;
use spleen_hpc::data::cache::candidates;
use spleen_hpc::data::sampler::{
    Candidates, PatchSpec, correct_centre, cut, draw, pick, steps_per_epoch, unravel, warnings,
};
use spleen_hpc::rng::Philox;

fn sampling() -> Sampling {
    Sampling {
        patch: [8; 3],
        pos: 1.0,
        neg: 1.0,
        samples_per_volume: 4,
        volumes_per_step: 2,
        shift_offset: 0.1,
        shift_prob: 0.5,
    }
}

/// A golden file's bytes, or `None` (said once) where the checkout has no goldens.
fn golden(name: &str) -> Option<Vec<u8>> {
    let dir = std::env::var_os("SPLEEN_GOLDEN")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/golden"), PathBuf::from);
    let bytes = std::fs::read(dir.join(name)).ok();
    if bytes.is_none() {
        println!("skipped: no {name} in {}", dir.display());
    }
    bytes
}

fn i64s(file: &SafeTensors<'_>, name: &str) -> Vec<i64> {
    let bytes = file.tensor(name).unwrap().data();
    bytes.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect()
}

fn f64s(file: &SafeTensors<'_>, name: &str) -> Vec<f64> {
    let bytes = file.tensor(name).unwrap().data();
    bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
}

#[test]
fn centres_are_corrected_as_monai_does() {
    let Some(bytes) = golden("crop.safetensors") else { return };
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let rows = i64s(&file, "correct_crop_centers");
    assert!(rows.len() >= 15);
    for row in rows.chunks_exact(15) {
        let v = |at: usize| std::array::from_fn::<usize, 3, _>(|i| row[at + i] as usize);
        let (shape, roi) = (v(0), v(3));
        let centre = correct_centre(v(6), roi, shape);
        assert_eq!(centre, v(9), "{row:?}");
        assert_eq!(std::array::from_fn(|a| centre[a] - roi[a] / 2), v(12), "{row:?}");
    }
}

#[test]
fn recorded_draws_give_monai_s_centres() {
    let (Some(crop), Some(prep)) = (golden("crop.safetensors"), golden("prep_las_5mm.safetensors")) else {
        return;
    };
    let crop = SafeTensors::deserialize(&crop).unwrap();
    let prep = SafeTensors::deserialize(&prep).unwrap();
    let image = prep.tensor("scale.image").unwrap();
    let shape = <[usize; 3]>::try_from(&image.shape()[1..]).unwrap();
    let image: Vec<f32> = bytemuck::pod_collect_to_vec(image.data());
    let (fg, bg) = candidates(&image, prep.tensor("spacing.label").unwrap().data());
    let counts = i64s(&crop, "fg_count_bg_count");
    assert_eq!([fg.len() as i64, bg.len() as i64], [counts[0], counts[1]]);
    for (list, name) in [(&fg, "fg_indices#samples"), (&bg, "bg_indices#samples")] {
        let want = f64s(&crop, name);
        for (i, &w) in want.iter().enumerate() {
            assert_eq!(f64::from(list[i * list.len() / want.len()]), w, "{name} {i}");
        }
    }
    let case = Candidates { shape, fg: &fg, bg: &bg };
    let mut seeds = 0;
    for name in crop.names().into_iter().filter(|n| n.starts_with("draws_seed")) {
        let centres = i64s(&crop, &name.replace("draws", "centres"));
        for (draw, want) in f64s(&crop, name).chunks_exact(3).zip(centres.chunks_exact(3)) {
            let flat = pick(&case, 0.5, draw[0])[draw[1] as usize] as usize;
            assert_eq!(flat as f64, draw[2], "{name}");
            let centre = correct_centre(unravel(flat, shape), [24; 3], shape);
            assert_eq!(centre.map(|c| c as i64), *want, "{name}");
        }
        seeds += 1;
    }
    assert!(seeds > 0, "the golden holds no draws");
}

/// Sum of (seen - expected)^2 / expected: for k cells of a true distribution its mean is k - 1 and its variance
/// 2 (k - 1). Both far above (wrong frequencies) and far below (not random at all) fail: 5 sigma either way.
fn assert_chi_square(seen: &[u32], expected: &[f64]) {
    let chi: f64 = seen.iter().zip(expected).map(|(&s, &e)| (f64::from(s) - e).powi(2) / e).sum();
    let free = seen.len() as f64 - 1.0;
    let off = (chi - free) / (2.0 * free).sqrt();
    assert!(off.abs() < 5.0, "chi-square {chi:.1} with {free} degrees of freedom: {off:.1} sigma");
}

#[test]
fn centres_follow_monai_s_distribution() {
    // Every candidate lies where no correction moves it, so its patch tells which one was drawn.
    let shape = [32, 33, 34];
    let flat = |d: usize, h: usize, w: usize| ((d * shape[1] + h) * shape[2] + w) as u32;
    let fg: Vec<u32> = (0..7).map(|i| flat(10, 10 + i, 12)).collect();
    let bg: Vec<u32> = (0..40).map(|i| flat(20, 8 + i % 8, 10 + i / 8)).collect();
    let case = Candidates { shape, fg: &fg, bg: &bg };
    for (pos, neg) in [(1.0, 1.0), (1.0, 3.0)] {
        let sampling = Sampling { pos, neg, ..sampling() };
        let mut seen = vec![0u32; fg.len() + bg.len()];
        let epochs = 20_000;
        for epoch in 0..epochs {
            for spec in draw(&[case], &sampling, 3, epoch, 0) {
                let centre = spec.start.map(|s| s as usize + 4);
                let at = flat(centre[0], centre[1], centre[2]);
                let place = fg.iter().chain(&bg).position(|&v| v == at).expect("a voxel of neither list");
                seen[place] += 1;
            }
        }
        let draws = (epochs * 4) as f64;
        let expected: Vec<f64> = (0..seen.len())
            .map(|i| match i < fg.len() {
                true => draws * pos / (pos + neg) / fg.len() as f64,
                false => draws * neg / (pos + neg) / bg.len() as f64,
            })
            .collect();
        assert_chi_square(&seen, &expected);
        let foreground: u32 = seen[..fg.len()].iter().sum();
        assert_chi_square(
            &[foreground, draws as u32 - foreground],
            &[draws * pos / (pos + neg), draws * neg / (pos + neg)],
        );
    }
}

#[test]
fn shifts_are_uniform_and_as_frequent_as_asked() {
    let case = Candidates { shape: [16; 3], fg: &[2000], bg: &[2001] };
    let epochs = 10_000;
    let mut bins = [0u32; 20];
    let mut shifted = 0u32;
    for epoch in 0..epochs {
        for spec in draw(&[case], &sampling(), 5, epoch, 0) {
            if spec.shift != 0.0 {
                shifted += 1;
                bins[((f64::from(spec.shift) + 0.1) / 0.01) as usize] += 1;
            }
        }
    }
    let draws = (epochs * 4) as f64;
    assert_chi_square(&[shifted, draws as u32 - shifted], &[draws / 2.0; 2]);
    assert_chi_square(&bins, &[f64::from(shifted) / 20.0; 20]);
    // The recipes without a shift cut the same patches.
    let still = Sampling { shift_offset: 0.0, ..sampling() };
    for (moved, still) in draw(&[case], &sampling(), 5, 1, 0).iter().zip(draw(&[case], &still, 5, 1, 0)) {
        assert_eq!((moved.start, 0.0), (still.start, still.shift));
    }
}

#[test]
fn an_epoch_visits_every_case_once_in_a_new_order() {
    let case = Candidates { shape: [16; 3], fg: &[2000], bg: &[2001] };
    let cases = [case; 5];
    assert_eq!(steps_per_epoch(5, &sampling()), 3);
    let order = |epoch: u64| -> Vec<usize> {
        (0..3)
            .flat_map(|step| {
                let specs = draw(&cases, &sampling(), 1, epoch, step);
                // drop_last False: two volumes, two, one; four patches of one volume stand together.
                assert_eq!(specs.len(), if step < 2 { 8 } else { 4 });
                specs
                    .chunks(4)
                    .map(|c| {
                        assert!(c.iter().all(|s| s.case == c[0].case));
                        c[0].case
                    })
                    .collect::<Vec<_>>()
            })
            .collect()
    };
    let mut place = [0u32; 25];
    for epoch in 0..5_000 {
        let order = order(epoch);
        let mut sorted = order.clone();
        sorted.sort();
        assert_eq!(sorted, [0, 1, 2, 3, 4]);
        order.iter().enumerate().for_each(|(p, c)| place[5 * p + c] += 1);
    }
    // Every case in every place equally often. A cell has variance 1000 (1 - 1/5), so the sum's mean is 20: that is
    // 5/4 of a chi-square with the 16 degrees of freedom of a table with fixed margins.
    let chi: f64 = place.iter().map(|&n| (f64::from(n) - 1000.0).powi(2) / 1000.0).sum();
    assert!((0.8 * chi - 16.0).abs() < 5.0 * 32f64.sqrt(), "{chi}");
    assert!(draw(&cases, &sampling(), 1, 0, 3).is_empty(), "a step beyond the epoch");
}

#[test]
fn draws_are_a_function_of_their_names_alone() {
    let lists: Vec<u32> = (0..4096).collect();
    let cases = [Candidates { shape: [16; 3], fg: &lists[..50], bg: &lists[50..] }; 6];
    let all = |seed| -> Vec<Vec<PatchSpec>> {
        (0..9).map(|s| draw(&cases, &sampling(), seed, s / 3, (s % 3) as usize)).collect()
    };
    assert_eq!(all(1), all(1));
    assert_ne!(all(1), all(2));
    // Steps, and patches of a step, are not copies of each other.
    let mut starts: Vec<_> = all(1).concat().iter().map(|s| (s.case, s.start, s.shift.to_bits())).collect();
    let drawn = starts.len();
    starts.sort();
    starts.dedup();
    assert!(starts.len() > drawn * 9 / 10, "{} of {drawn} patches differ", starts.len());
}

#[test]
fn empty_lists_fall_back_and_are_told() {
    let shape = [16; 3];
    let (none, some): ([u32; 0], Vec<u32>) = ([], (2000..2010).collect());
    let no_spleen = Candidates { shape, fg: &none, bg: &some };
    let all_spleen = Candidates { shape, fg: &some, bg: &none };
    let nothing = Candidates { shape: [8, 16, 4], fg: &none, bg: &none };
    for case in [no_spleen, all_spleen] {
        assert_eq!(pick(&case, 0.5, 0.1), some);
        assert_eq!(pick(&case, 0.5, 0.9), some);
    }
    for epoch in 0..200 {
        for spec in draw(&[nothing], &sampling(), 0, epoch, 0) {
            // Patch 8: as deep as the volume, free along the height, wider than it (padded by 2 in front).
            assert_eq!((spec.start[0], spec.start[2]), (0, -2));
            assert!((0..=8).contains(&spec.start[1]));
        }
    }
    let named = [("a", no_spleen), ("b", all_spleen), ("c", nothing)];
    let said = warnings(named, &sampling()).join("\n");
    for part in ["a: has no spleen", "b: is all spleen", "c: 8x16x4", "c: is empty"] {
        assert!(said.contains(part), "{said}");
    }
    let fine = Candidates { shape, fg: &some, bg: &some };
    assert!(warnings([("d", fine)], &sampling()).is_empty());
}

#[test]
fn cutting_equals_indexing() {
    let mut rng = Philox::keyed(11, &[]);
    for _ in 0..300 {
        let shape: [usize; 3] = std::array::from_fn(|_| 1 + rng.below(12) as usize);
        let patch: [usize; 3] = std::array::from_fn(|_| 1 + rng.below(12) as usize);
        // From wholly in front of the volume to wholly behind it.
        let start: [i64; 3] = std::array::from_fn(|a| {
            rng.below((shape[a] + 2 * patch[a] + 2) as u64) as i64 - patch[a] as i64 - 1
        });
        let n = shape.iter().product();
        let image: Vec<f32> = (0..n).map(|_| rng.uniform() as f32).collect();
        let label: Vec<u8> = (0..n).map(|_| rng.below(2) as u8).collect();
        let half: Vec<half::f16> = image.iter().map(|&v| half::f16::from_f32(v)).collect();
        let voxels = patch.iter().product();
        let (mut image_out, mut label_out) = (vec![9.0; voxels], vec![9; voxels]);
        let mut half_out = vec![9.0; voxels];
        cut((&image[..], &label), shape, (start, patch), 0.25, &mut image_out, &mut label_out);
        cut((&half[..], &label), shape, (start, patch), 0.25, &mut half_out, &mut label_out);
        for p in 0..voxels {
            let at = unravel(p, patch);
            let v: [i64; 3] = std::array::from_fn(|a| start[a] + at[a] as i64);
            let inside = (0..3).all(|a| v[a] >= 0 && v[a] < shape[a] as i64);
            let flat = || ((v[0] * shape[1] as i64 + v[1]) * shape[2] as i64 + v[2]) as usize;
            let want =
                if inside { (image[flat()], half[flat()].to_f32(), label[flat()]) } else { (0.0, 0.0, 0) };
            assert_eq!((image_out[p], half_out[p], label_out[p]), (want.0 + 0.25, want.1 + 0.25, want.2));
        }
    }
}
