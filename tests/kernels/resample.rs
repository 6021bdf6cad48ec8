//! Preprocessing and its inverse: the CPU's bits. Both are float64 in one order of operations, so nothing is allowed.

use crate::harness::{on_every_device, stored};
use spleen_hpc::config::Preprocess;
use spleen_hpc::data::preprocess::{Geometry, preprocess};
use spleen_hpc::data::volume::{Affine, FileVoxels, Volume};
use spleen_hpc::device::cuda::Cuda;
use spleen_hpc::ops::resample::cuda::{invert_argmax, prepare};
use spleen_hpc::rng::Philox;
use std::sync::Arc;

const WINDOW: [f32; 2] = [-57.0, 164.0];

/// A grid and what it is to show.
struct Grid {
    name: &'static str,
    shape: [usize; 3],
    affine: Affine,
}

/// Axes of the file by column, mm.
fn affine(columns: [[f64; 3]; 3]) -> Affine {
    let row = |r: usize| [columns[0][r], columns[1][r], columns[2][r], [7.25, -31.5, 100.0][r]];
    [row(0), row(1), row(2), [0.0, 0.0, 0.0, 1.0]]
}

fn grids() -> Vec<Grid> {
    let grid = |name, shape, columns| Grid { name, shape, affine: affine(columns) };
    vec![
        grid("RAS, tails in both axes of a tile", [41, 11, 17], [[0.8, 0., 0.], [0., 0.9, 0.], [0., 0., 5.]]),
        grid("LPS", [13, 21, 9], [[-1.1, 0., 0.], [0., -0.7, 0.], [0., 0., 3.]]),
        grid("SLA", [9, 33, 21], [[0., 0., 2.5], [-1.2, 0., 0.], [0., 1.3, 0.]]),
        grid("ASR, downsampled", [30, 12, 25], [[0., 0.5, 0.], [0., 0., -0.6], [0.7, 0., 0.]]),
        grid(
            "oblique",
            [14, 15, 11],
            [[-0.77, 0.13, 0.02], [0.11, 0.79, -0.24], [-0.35, 0.9, 2.6]].map(|c| c.map(f64::from)),
        ),
        grid(
            "oblique and permuted",
            [12, 16, 10],
            [[0.1, -0.2, -2.2], [1.3, 0.2, 0.05], [-0.2, 1.1, -0.1]].map(|c| c.map(f64::from)),
        ),
        grid("skipped: the target spacing", [10, 9, 8], [[-1.5, 0., 0.], [0., 1.5, 0.], [0., 0., 2.]]),
        grid("skipped: within 1e-3 mm", [10, 9, 8], [[1.5003, 0., 0.], [0., 1.5, 0.], [0., 0., 1.9994]]),
        grid("one slice", [20, 15, 1], [[0.8, 0., 0.], [0., 0.8, 0.], [0., 0., 5.]]),
        grid("one row", [1, 40, 1], [[0.8, 0., 0.], [0., 0.8, 0.], [0., 0., 5.]]),
        grid("one voxel", [1, 1, 1], [[0.8, 0., 0.], [0., 0.8, 0.], [0., 0., 5.]]),
    ]
}

/// `voxels` of a file, from i fastest to k fastest, NaN and infinity mended.
fn as_volume(grid: &Grid, voxels: &FileVoxels) -> Volume<f32> {
    let [ni, nj, nk] = grid.shape;
    let value = |at: usize| {
        let v = match voxels {
            FileVoxels::I16 { stored, slope, inter } => (f64::from(stored[at]) * slope + inter) as f32,
            FileVoxels::F32(values) => values[at],
        };
        if v.is_finite() { v } else { WINDOW[0] }
    };
    let mut data = Vec::new();
    for i in 0..ni {
        for j in 0..nj {
            data.extend((0..nk).map(|k| value((k * nj + j) * ni + i)));
        }
    }
    Volume { shape: grid.shape, data, affine: grid.affine }
}

/// The image on the device and the mask of random probabilities against the CPU's.
fn check(cuda: &Arc<Cuda>, grid: &Grid, voxels: &FileVoxels, crop_foreground: bool) {
    let p = Preprocess { spacing_mm: [1.5, 1.5, 2.0], hu_window: WINDOW, crop_foreground };
    let want = preprocess(&as_volume(grid, voxels), None, &p).unwrap();
    let case = format!("{} {:?} -> {:?}", grid.name, grid.shape, want.image.shape);

    let planned = Geometry::plan(grid.shape, &grid.affine, p.spacing_mm).unwrap();
    let got = prepare(cuda, voxels, planned, &p).unwrap();
    assert_eq!(got.geometry, want.geometry, "{case}");
    let [_, h, w] = got.geometry.resampling.out_shape;
    let start = got.geometry.crop.map_or([0; 3], |c| c.start.map(|v| v as usize));
    let image = got.image.download().unwrap();
    let [nd, nh, nw] = want.image.shape;
    for (at, want) in want.image.data.iter().enumerate() {
        let voxel = [at / (nh * nw), at / nw % nh, at % nw];
        let [d, y, x]: [usize; 3] = std::array::from_fn(|a| start[a] + voxel[a]);
        let (got, want) = (image[(d * h + y) * w + x], stored(cuda.precision(), *want));
        assert_eq!(got.to_bits(), want.to_bits(), "{case} at {voxel:?}: {got} instead of {want}");
    }

    let mut rng = Philox::new(11, 0);
    let mut probabilities = Vec::new();
    for voxel in 0..nd * nh * nw {
        // A draw now and then, and regions of it, so that interpolation can keep it.
        let organ = if voxel / 64 % 3 == 0 { 0.5 } else { rng.range(0.0, 1.0) as f32 };
        probabilities.push([1.0 - organ, organ]);
    }
    let flat = cuda.upload(probabilities.as_flattened()).unwrap();
    let mask = invert_argmax(&flat, &got.geometry).unwrap().download().unwrap();
    let want = want.geometry.invert_argmax(&probabilities).unwrap();
    let wrong = mask.iter().zip(&want).filter(|(a, b)| a != b).count();
    assert_eq!(mask.len(), want.len(), "{case}");
    assert_eq!(wrong, 0, "{case}: voxels of the mask that differ, of {}", want.len());
}

fn integers(seed: u64, grid: &Grid, slope: f64, inter: f64) -> FileVoxels {
    let mut rng = Philox::new(seed, 0);
    let stored = (0..grid.shape.iter().product()).map(|_| rng.below(400) as i16 - 100).collect();
    FileVoxels::I16 { stored, slope, inter }
}

#[test]
fn every_geometry_gives_the_bits_of_the_cpu() {
    on_every_device(|cuda| {
        for (i, grid) in grids().iter().enumerate() {
            check(cuda, grid, &integers(i as u64, grid, 1.0, 0.0), false);
        }
    });
}

#[test]
fn scaled_integers_and_floats_that_are_no_numbers() {
    on_every_device(|cuda| {
        for grid in &grids()[..3] {
            for (slope, inter) in [(0.37, -11.3), (1.0, -150.0), (-1.0, 0.0)] {
                check(cuda, grid, &integers(1, grid, slope, inter), false);
            }
            let mut rng = Philox::new(2, 0);
            let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX];
            let voxels = (0..grid.shape.iter().product())
                .map(|i| if i % 50 == 7 { odd[i / 50 % 4] } else { rng.range(-100.0, 300.0) as f32 })
                .collect();
            check(cuda, grid, &FileVoxels::F32(voxels), false);
        }
    });
}

/// Foreground in a box of the file that leaves out something on every side; in one voxel; everywhere; nowhere.
#[test]
fn the_crop_is_the_box_of_the_foreground() {
    on_every_device(|cuda| {
        for grid in &grids()[..5] {
            let n = grid.shape;
            let boxes = [
                [[2, 3, 3], [n[0] - 4, n[1] - 3, n[2] - 2]],
                [[n[0] / 2, n[1] / 2, n[2] - 1], [n[0] / 2 + 1, n[1] / 2 + 1, n[2]]],
                [[0; 3], n],
                [[0; 3]; 2],
            ];
            for [start, end] in boxes {
                let mut voxels = Vec::new();
                for at in 0..n.iter().product() {
                    let voxel = [at % n[0], at / n[0] % n[1], at / (n[0] * n[1])];
                    let inside = (0..3).all(|a| (start[a]..end[a]).contains(&voxel[a]));
                    voxels.push(if inside { 40 + (at % 7) as i16 } else { -1000 });
                }
                check(cuda, grid, &FileVoxels::I16 { stored: voxels, slope: 1.0, inter: 0.0 }, true);
            }
        }
    });
}

/// The float32 next to the floor is foreground, though fp16 stores it as 0.
#[test]
fn the_crop_looks_at_the_intensities_before_they_are_rounded() {
    on_every_device(|cuda| {
        let grid = grids().into_iter().find(|g| g.name.starts_with("skipped: the target")).unwrap();
        let mut voxels = vec![WINDOW[0]; grid.shape.iter().product()];
        for at in [200, 340] {
            voxels[at] = WINDOW[0].next_up();
        }
        check(cuda, &grid, &FileVoxels::F32(voxels), true);
    });
}

#[test]
fn other_numbers_of_voxels_than_planned_are_refused() {
    on_every_device(|cuda| {
        let grid = &grids()[0];
        let p = Preprocess { spacing_mm: [1.5, 1.5, 2.0], hu_window: WINDOW, crop_foreground: false };
        let geometry = Geometry::plan(grid.shape, &grid.affine, p.spacing_mm).unwrap();
        let err = prepare(cuda, &FileVoxels::F32(vec![0.0; 7]), geometry.clone(), &p).unwrap_err();
        assert_eq!(err.to_string(), "prepare: expected [41, 11, 17] voxels, got 7");
        let short = cuda.upload(&[0f32; 8]).unwrap();
        assert!(invert_argmax(&short, &geometry).is_err());
    });
}
