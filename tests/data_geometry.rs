//! The geometric data path against what must hold whatever the numbers: round trips, world positions, references
//! that take another road.

use spleen_hpc::config::Preprocess;
use spleen_hpc::data::interpolate::resample_linear;
use spleen_hpc::data::nifti::{check_same_grid, label_from, read, read_header};
use spleen_hpc::data::nifti_write::{write_bundle, write_mask, write_volume};
use spleen_hpc::data::orientation::to_ras;
use spleen_hpc::data::preprocess::{CropBox, Geometry, crop, foreground_box, preprocess};
use spleen_hpc::data::resample::SpacingPlan;
use spleen_hpc::data::volume::{Affine, Volume};
use spleen_hpc::rng::Philox;

const CHAIN: Preprocess =
    Preprocess { spacing_mm: [1.5, 1.5, 2.0], hu_window: [-57.0, 164.0], crop_foreground: false };

/// The 48 ways to name the axes: permutations times flips.
fn signed_permutations() -> Vec<[[f64; 3]; 3]> {
    let axes = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
    let matrix = |p: [usize; 3], flips: usize| {
        let mut m = [[0.0; 3]; 3];
        (0..3).for_each(|c| m[p[c]][c] = if flips >> c & 1 == 1 { -1.0 } else { 1.0 });
        m
    };
    axes.into_iter().flat_map(|p| (0..8).map(move |flips| matrix(p, flips))).collect()
}

fn affine(axes: [[f64; 3]; 3], spacing_mm: [f64; 3], origin_mm: [f64; 3]) -> Affine {
    let row = |r: usize| {
        let m = axes[r];
        [m[0] * spacing_mm[0], m[1] * spacing_mm[1], m[2] * spacing_mm[2], origin_mm[r]]
    };
    [row(0), row(1), row(2), [0.0, 0.0, 0.0, 1.0]]
}

/// Rotation about z then x, degrees of a tilted gantry.
fn tilt(m: [[f64; 3]; 3], degrees: f64) -> [[f64; 3]; 3] {
    let (s, c) = degrees.to_radians().sin_cos();
    let z = [[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]];
    let x = [[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]];
    let mul = |a: [[f64; 3]; 3], b: [[f64; 3]; 3]| -> [[f64; 3]; 3] {
        std::array::from_fn(|r| std::array::from_fn(|k| (0..3).map(|i| a[r][i] * b[i][k]).sum()))
    };
    mul(x, mul(z, m))
}

fn world(affine: &Affine, voxel: [f64; 3]) -> [f64; 3] {
    std::array::from_fn(|r| (0..3).map(|c| affine[r][c] * voxel[c]).sum::<f64>() + affine[r][3])
}

fn filled<T>(shape: [usize; 3], affine: Affine, value: impl Fn([f64; 3]) -> T) -> Volume<T> {
    let [ni, nj, nk] = shape;
    let at = |n: usize| world(&affine, [(n / (nj * nk)) as f64, (n / nk % nj) as f64, (n % nk) as f64]);
    Volume { shape, data: (0..ni * nj * nk).map(|n| value(at(n))).collect(), affine }
}

fn far_apart(a: &Affine, b: &Affine) -> f64 {
    a.as_flattened().iter().zip(b.as_flattened()).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn what_is_written_is_read_back() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut rng = Philox::keyed(1, &[]);
    for (n, axes) in signed_permutations().into_iter().enumerate() {
        let at =
            affine(tilt(axes, if n % 3 == 0 { 7.0 } else { 0.0 }), [0.75, 1.25, 3.5], [-120.5, 33.25, 1.0]);
        let shape = [3 + n % 5, 20, 1 + n % 37];
        let size = shape.iter().product::<usize>();
        let path = folder.path().join(if n % 2 == 0 { "v.nii" } else { "v.nii.gz" });
        let volume =
            Volume { shape, data: (0..size).map(|_| rng.next_u32() as i16).collect::<Vec<_>>(), affine: at };
        write_volume(&path, &volume).expect("written");
        let back = read(&path).expect("readable");
        assert_eq!(back.volume.shape, shape);
        assert!(back.volume.data.iter().zip(&volume.data).all(|(&b, &v)| b == f32::from(v)));
        // A float32 header holds 24 bits of at most 120 mm.
        assert!(far_apart(&back.volume.affine, &at) < 1e-5, "{:?}", back.header);
        assert_eq!((back.header.xyzt_units, back.header.sform_code, back.header.qform_code), (2, 1, 1));

        // The qform must say the same as the sform: drop the sform and read again.
        let mut header = back.header.clone();
        header.sform_code = 0;
        let mask: Vec<u8> = (0..size).map(|_| rng.below(2) as u8).collect();
        write_mask(&path, &header, &mask).expect("written");
        let masked = read(&path).expect("readable");
        assert!(masked.volume.data.iter().zip(&mask).all(|(&b, &v)| b == f32::from(v)));
        assert!(far_apart(&masked.volume.affine, &at) < 1e-4, "{:?}", masked.header);
        // NIfTI-2 keeps every bit of the affine.
        (header.version, header.sform_code) = (2, 3);
        header.srow = [at[0], at[1], at[2]];
        header.descrip = "caf\u{e9}".into();
        write_mask(&path, &header, &mask).expect("written");
        let second = read_header(&path).expect("readable");
        assert_eq!((second.affine, second.version, second.sform_code), (at, 2, 3));
        assert_eq!((second.descrip, second.xyzt_units), ("caf\u{e9}".to_owned(), 2));
    }
}

#[test]
fn files_are_deterministic_and_readable_by_others() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = affine(signed_permutations()[0], [1.0, 1.0, 2.0], [0.0; 3]);
    let volume = filled([9, 8, 7], at, |w| (w[0] + w[1]) as f32);
    let (a, b) = (folder.path().join("a.nii.gz"), folder.path().join("b.nii.gz"));
    write_volume(&a, &volume).expect("written");
    write_volume(&b, &volume).expect("written");
    let bytes = |p| std::fs::read(p).expect("own file");
    assert_eq!(bytes(&a), bytes(&b));
    let header = read_header(&a).expect("own file");
    write_bundle(&b, &header, &[1; 504]).expect("written");
    let bundle = read(&b).expect("own file");
    assert!(bundle.volume.data.iter().all(|&v| v == 1.0));
    assert_eq!((bundle.header.xyzt_units, bundle.header.affine), (0, at));
    assert_eq!(std::fs::read_dir(folder.path()).expect("own folder").count(), 2, "a temporary file stayed");

    // A mask of the wrong size and a folder that does not exist leave nothing behind.
    assert!(write_mask(folder.path().join("c.nii"), &header, &[1; 503]).is_err());
    assert!(write_mask(folder.path().join("none/c.nii"), &header, &[1; 504]).is_err());
    assert_eq!(std::fs::read_dir(folder.path()).expect("own folder").count(), 2);
    #[cfg(unix)]
    {
        let mode = std::os::unix::fs::PermissionsExt::mode(&a.metadata().expect("own file").permissions());
        assert_ne!(mode & 0o077, 0, "mode {mode:o}: private under any usual umask");
    }
}

#[test]
fn orientation_moves_no_voxel_in_the_world() {
    for (n, axes) in signed_permutations().into_iter().enumerate() {
        for degrees in [0.0, 20.0] {
            let at = affine(tilt(axes, degrees), [0.7, 0.9, 2.5], [-100.0, 50.0, 700.0]);
            // Odd sizes, one larger than a tile of the transposition.
            let volume = filled([19, 4, 35], at, |w| w);
            let coordinates = Volume { shape: volume.shape, data: volume.data.clone(), affine: at };
            let (ras, orientation) = to_ras(&coordinates).expect("invertible");
            let again = filled(ras.shape, ras.affine, |w| w);
            let apart =
                |(a, b): (&[f64; 3], &[f64; 3])| (0..3).map(|i| (a[i] - b[i]).abs()).fold(0.0, f64::max);
            // 1000 mm in double precision.
            assert!(ras.data.iter().zip(&again.data).map(apart).fold(0.0, f64::max) < 1e-11, "case {n}");
            for c in 0..3 {
                let column = [0, 1, 2].map(|r| ras.affine[r][c]);
                assert!(column.iter().all(|v| v.abs() <= column[c]), "axis {c} of {:?}", ras.affine);
            }
            let back = orientation.undo(&ras);
            assert_eq!(back.data, volume.data);
            assert!(far_apart(&back.affine, &at) < 1e-11);
        }
    }
}

/// numpy's and MONAI's own results (monai 1.6.1, `compute_shape_offset`) where exact halves are decided by the last
/// bit of t / p: (voxels, spacing, origin, target, output voxels). Division instead of LAPACK's reciprocals gives one
/// voxel more in each.
#[test]
fn output_shapes_at_exact_halves_are_those_of_numpy() {
    for (n, spacing, origin, target, want) in [
        (94, 0.75, 38.93000030517578, 1.5, 47),
        (136, 0.75, 329.79998779296875, 1.5, 68),
        (214, 0.75, 85.4800033569336, 1.5, 107),
        (96, 0.75, 65.75, 1.5, 48),
        (124, 0.75, 383.1300048828125, 1.5, 62),
        (76, 0.75, 367.6400146484375, 1.5, 38),
    ] {
        let at = affine(signed_permutations()[0], [spacing, 1.0, 1.0], [origin, 0.0, 0.0]);
        let plan = SpacingPlan::new([n, 2, 2], &at, [target, 1.0, 1.0]).expect("invertible");
        assert_eq!(plan.resampling.out_shape, [want, 2, 2], "{n} voxels of {spacing} at {origin}");
    }
}

/// Trilinear interpolation reproduces a function that is linear in the world, in every orientation and tilt.
#[test]
fn a_ramp_stays_a_ramp() {
    let ramp = |w: [f64; 3]| (0.3 * w[0] - 0.2 * w[1] + 0.5 * w[2] + 40.0) as f32;
    for axes in signed_permutations().into_iter().step_by(5) {
        for degrees in [0.0, 12.0] {
            let at = affine(tilt(axes, degrees), [0.8, 1.1, 3.0], [20.0, -30.0, 10.0]);
            let (ras, _) = to_ras(&filled([24, 22, 15], at, ramp)).expect("invertible");
            let plan = SpacingPlan::new(ras.shape, &ras.affine, CHAIN.spacing_mm).expect("invertible");
            let out = resample_linear(&ras, &plan.resampling);
            let want = filled(out.shape, out.affine, ramp);
            let [_, nj, nk] = out.shape;
            let inverse = |at: usize| {
                // Output voxels that lie inside the source see no border.
                let o = [(at / (nj * nk)) as f64, (at / nk % nj) as f64, (at % nk) as f64];
                world(&plan.resampling.xform, o)
            };
            let inside = |at: usize| {
                let x = inverse(at);
                (0..3).all(|a| x[a] >= 0.0 && x[a] <= ras.shape[a] as f64 - 1.0)
            };
            let seen: Vec<usize> = (0..out.len()).filter(|&at| inside(at)).collect();
            assert!(seen.len() * 2 > out.len());
            for at in seen {
                // Source and result are rounded to float32 near 60.
                assert!((out.data[at] - want.data[at]).abs() < 1e-5, "voxel {at}");
            }
        }
    }
}

#[test]
fn spacings_within_a_thousandth_are_left_alone() {
    let at = affine(signed_permutations()[0], [1.5003, 1.5, 2.0008], [1.0, 2.0, 3.0]);
    let volume = filled([10, 11, 12], at, |w| (w[0] * w[1]) as f32);
    let plan = SpacingPlan::new(volume.shape, &at, CHAIN.spacing_mm).expect("invertible");
    assert!(plan.resampling.identity);
    assert_eq!(resample_linear(&volume, &plan.resampling), volume);
    let at = affine(signed_permutations()[0], [1.502, 1.5, 2.0], [1.0, 2.0, 3.0]);
    assert!(!SpacingPlan::new([10, 11, 12], &at, CHAIN.spacing_mm).expect("invertible").resampling.identity);
}

#[test]
fn absurd_geometry_is_refused() {
    let kilometres = affine(signed_permutations()[0], [1000.0, 1000.0, 5000.0], [0.0; 3]);
    let error = SpacingPlan::new([512, 512, 100], &kilometres, CHAIN.spacing_mm).expect_err("8e15 voxels");
    assert!(error.to_string().contains("check the spacing"), "{error}");
    let flat = affine([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [1.0; 3], [0.0; 3]);
    assert!(SpacingPlan::new([4, 4, 4], &flat, CHAIN.spacing_mm).is_err());
    assert!(SpacingPlan::new([4, 4, 4], &[[f64::NAN; 4]; 4], CHAIN.spacing_mm).is_err());
    assert!(to_ras(&filled([2, 2, 2], [[0.0; 4]; 4], |_| 0u8)).is_err());
}

/// A ball in HU, its label, and how sure a perfect network would be of it.
fn ball(w: [f64; 3]) -> f64 {
    let r = ((w[0] - 30.0).powi(2) + (w[1] + 10.0).powi(2) + (w[2] - 25.0).powi(2)).sqrt();
    1.0 / (1.0 + (r - 15.0).exp())
}

/// Trilinear value with clamped border at fractional voxel `x`: eight neighbours, float64, the plain formula.
fn trilinear(shape: [usize; 3], x: [f64; 3], value: impl Fn([usize; 3]) -> f64) -> f64 {
    let x: [f64; 3] = std::array::from_fn(|a| x[a].clamp(0.0, shape[a] as f64 - 1.0));
    (0..8).fold(0.0, |sum, corner| {
        let mut weight = 1.0;
        let at = std::array::from_fn(|a| {
            let (low, high) = (x[a].floor(), corner >> a & 1);
            weight *= if high == 1 { x[a] - low } else { 1.0 - (x[a] - low) };
            (low as usize + high).min(shape[a] - 1)
        });
        if weight == 0.0 { sum } else { sum + weight * value(at) }
    })
}

fn dice(a: &[u8], b: &[u8]) -> f64 {
    let sum = |x: &[u8]| x.iter().map(|&v| f64::from(v)).sum::<f64>();
    2.0 * a.iter().zip(b).map(|(&a, &b)| f64::from(a * b)).sum::<f64>() / (sum(a) + sum(b))
}

/// Preprocess a ball, invert a perfect prediction: it must land where the ball is, whatever the axes, and equal a
/// reference that goes through world coordinates and a padded copy instead of normalised ones and virtual padding.
#[test]
fn predictions_return_to_the_native_grid() {
    for (n, axes) in signed_permutations().into_iter().enumerate().step_by(3) {
        let axes = tilt(axes, if n % 2 == 0 { 9.0 } else { 0.0 });
        // The middle of the volume is the middle of the ball.
        let (shape, spacing) = ([41, 37, 25], [1.2, 1.3, 2.4]);
        let centre = [30.0, -10.0, 25.0];
        let origin = std::array::from_fn(|r| {
            centre[r] - (0..3).map(|c| axes[r][c] * spacing[c] * (shape[c] / 2) as f64).sum::<f64>()
        });
        let at = affine(axes, spacing, origin);
        let image = filled(shape, at, |w| (300.0 * ball(w) - 100.0) as f32);
        let truth = filled(shape, at, |w| u8::from(ball(w) > 0.5));
        for crop_foreground in [false, true] {
            let chain = Preprocess { crop_foreground, ..CHAIN };
            let prepared = preprocess(&image, Some(&truth), &chain).expect("preprocessed");
            let geometry: &Geometry = &prepared.geometry;
            assert_eq!(geometry.crop.is_some(), crop_foreground);
            assert_eq!(prepared.image.shape, geometry.prepared_shape());
            let whole = geometry.resampling.out_shape;
            assert!(!crop_foreground || prepared.image.len() < whole.iter().product());

            let spleen = filled(prepared.image.shape, prepared.image.affine, ball);
            let prob: Vec<[f32; 2]> = spleen.data.iter().map(|&p| [(1.0 - p) as f32, p as f32]).collect();
            let mut native = Vec::new();
            geometry
                .invert_probabilities(&prob, |i, slab| {
                    assert_eq!((i * slab.len(), slab.len()), (native.len(), shape[1] * shape[2]));
                    native.extend_from_slice(slab);
                    Ok(())
                })
                .expect("inverted");
            let mask = geometry.invert_argmax(&prob).expect("inverted");
            assert!(mask.iter().zip(&native).all(|(&m, p)| m == u8::from(p[1] > p[0])));
            // A 15 mm ball on 1.2-2.4 mm voxels: interpolation moves only voxels at its surface.
            assert!(dice(&mask, &truth.data) > 0.97, "case {n}: {}", dice(&mask, &truth.data));
            // Draws and near draws, in part of the grid only: the mask is the argmax, whatever it need not interpolate.
            let scattered = |(at, p): (usize, &[f32; 2])| match at.wrapping_mul(2_654_435_761) >> 7 & 7 {
                _ if p[1] < 0.3 => [0.5, 0.5],
                0 => [0.5 - f32::EPSILON / 4.0, 0.5 + f32::EPSILON / 2.0],
                1 | 2 => [0.5, 0.5],
                3 => [0.1, 0.9],
                _ => [0.5 + f32::EPSILON / 2.0, 0.5],
            };
            let prob_of_draws: Vec<[f32; 2]> = prob.iter().enumerate().map(scattered).collect();
            let mut argmax = Vec::new();
            geometry
                .invert_probabilities(&prob_of_draws, |_, slab| {
                    argmax.extend(slab.iter().map(|p| u8::from(p[1] > p[0])));
                    Ok(())
                })
                .expect("inverted");
            assert!(
                argmax.contains(&1) && geometry.invert_argmax(&prob_of_draws).expect("inverted") == argmax
            );
            let label =
                geometry.invert_label(&prepared.label.as_ref().expect("given").data).expect("inverted");
            assert!(dice(&label, &truth.data) > 0.9, "case {n}: {}", dice(&label, &truth.data));

            let inside = geometry.crop.unwrap_or(CropBox { start: [0; 3], end: whole.map(|n| n as i64) });
            let value = |voxel: [usize; 3]| {
                let at: [i64; 3] = std::array::from_fn(|a| voxel[a] as i64 - inside.start[a]);
                let n = prepared.image.shape;
                let stored = (0..3).all(|a| (0..n[a] as i64).contains(&at[a]));
                let flat = (at[0] * n[1] as i64 + at[1]) * n[2] as i64 + at[2];
                if stored { f64::from(prob[flat as usize][1]) } else { 0.0 }
            };
            let to_grid = invert(&geometry.resampling.out_affine);
            let places = filled(shape, at, |w| world(&to_grid, w));
            for (got, x) in native.iter().zip(&places.data) {
                // float32 rounding of a probability, and 1e-13 voxels of coordinate noise.
                assert!((f64::from(got[1]) - trilinear(whole, *x, value)).abs() < 1e-7, "case {n} at {x:?}");
            }
        }
    }
}

/// Inverse of an affine by cofactors.
fn invert(m: &Affine) -> Affine {
    let c = |r: usize, k: usize| {
        let (a, b) = ((r + 1) % 3, (r + 2) % 3);
        let (p, q) = ((k + 1) % 3, (k + 2) % 3);
        m[a][p] * m[b][q] - m[a][q] * m[b][p]
    };
    let det: f64 = (0..3).map(|k| m[0][k] * c(0, k)).sum();
    let linear: [[f64; 3]; 3] = std::array::from_fn(|r| std::array::from_fn(|k| c(k, r) / det));
    let shift = |r: usize| -(0..3).map(|k| linear[r][k] * m[k][3]).sum::<f64>();
    let row = |r: usize| [linear[r][0], linear[r][1], linear[r][2], shift(r)];
    [row(0), row(1), row(2), [0.0, 0.0, 0.0, 1.0]]
}

#[test]
fn thread_counts_change_no_byte() {
    let at = affine(tilt(signed_permutations()[21], 5.0), [0.9, 1.2, 3.1], [1.0, 2.0, 3.0]);
    let image = filled([40, 33, 29], at, |w| (200.0 * (0.1 * w[0]).sin() * (0.07 * w[2]).cos()) as f32);
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| {
            let prepared =
                preprocess(&image, None, &Preprocess { crop_foreground: true, ..CHAIN }).expect("fits");
            let prob: Vec<[f32; 2]> = prepared.image.data.iter().map(|&p| [1.0 - p, p]).collect();
            let mask = prepared.geometry.invert_argmax(&prob).expect("fits");
            (prepared.image.data, prepared.geometry, mask)
        })
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn an_image_without_foreground_is_not_cropped() {
    let at = affine(signed_permutations()[0], [1.5, 1.5, 2.0], [0.0; 3]);
    let air = filled([12, 13, 14], at, |_| -1000f32);
    let prepared = preprocess(&air, None, &Preprocess { crop_foreground: true, ..CHAIN }).expect("fits");
    assert_eq!((prepared.image.shape, prepared.geometry.crop), ([12, 13, 14], None));
    assert!(prepared.image.data.iter().all(|&v| v == 0.0));
}

#[test]
fn foreground_boxes_reach_out_only_where_allowed() {
    let at = affine(signed_permutations()[0], [2.0, 2.0, 2.0], [0.0; 3]);
    let mut volume = filled([6, 7, 8], at, |_| 0u8);
    volume.data[(7 + 2) * 8 + 3] = 5;
    volume.data[(3 * 7 + 6) * 8 + 4] = 5;
    let around = foreground_box(&volume, |v| v > 0, 0, false).expect("two voxels");
    assert_eq!(around, CropBox { start: [1, 2, 3], end: [4, 7, 5] });
    let inner = foreground_box(&volume, |v| v > 0, 3, true).expect("two voxels");
    assert_eq!(inner, CropBox { start: [0, 0, 0], end: [6, 7, 8] });
    let outer = foreground_box(&volume, |v| v > 0, 3, false).expect("two voxels");
    assert_eq!(outer, CropBox { start: [-2, -1, 0], end: [7, 10, 8] });
    let cut = crop(&volume, &outer, 9);
    assert_eq!(cut.shape, [9, 11, 8]);
    assert_eq!(world(&cut.affine, [2.0, 1.0, 0.0]), [0.0; 3]);
    assert_eq!(cut.data[((1 + 2) * 11 + 2 + 1) * 8 + 3], 5);
    assert_eq!(cut.data.iter().filter(|&&v| v == 9).count(), 9 * 11 * 8 - 6 * 7 * 8);
    assert_eq!(foreground_box(&volume, |v| v > 5, 3, false), None);
}

#[test]
fn labels_are_checked() {
    let at = affine(signed_permutations()[0], [2.0, 2.0, 2.0], [0.0; 3]);
    let multi = Volume { shape: [1, 2, 2], data: vec![0.0, 3.0, 1.0, 3.0], affine: at };
    let error = label_from(&multi, None, "multi.nii.gz").expect_err("three values").to_string();
    assert!(
        error.contains("multi.nii.gz") && error.contains("0, 1, 3") && error.contains("--label-value N"),
        "{error}"
    );
    assert_eq!(label_from(&multi, Some(3.0), "multi.nii.gz").expect("chosen").data, [0, 1, 0, 1]);

    let folder = tempfile::tempdir().expect("a temporary folder");
    let header = |name: &str, shape: [usize; 3], shift_mm: f64| {
        let path = folder.path().join(name);
        let mut at = at;
        at[1][3] += shift_mm;
        write_volume(&path, &filled(shape, at, |_| 0u8)).expect("written");
        (read_header(&path).expect("own file"), path)
    };
    let (image, image_path) = header("image.nii", [4, 5, 6], 0.0);
    for (shape, shift, part) in [
        ([4, 5, 6], 0.19, None),
        ([4, 5, 6], 0.21, Some("more than a tenth")),
        ([4, 6, 5], 0.0, Some("[4, 6, 5]")),
    ] {
        let (label, label_path) = header("label.nii", shape, shift);
        let error =
            check_same_grid((&image, &image_path), (&label, &label_path)).err().map(|e| e.to_string());
        assert_eq!(error.is_some(), part.is_some(), "{error:?}");
        if let (Some(error), Some(part)) = (error, part) {
            assert!(
                error.contains(part) && error.contains("image.nii") && error.contains("label.nii"),
                "{error}"
            );
        }
    }
    let image = filled([4, 5, 6], at, |_| 0f32);
    assert!(preprocess(&image, Some(&filled([4, 6, 5], at, |_| 0u8)), &CHAIN).is_err());
}
