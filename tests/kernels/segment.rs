//! From files to masks on the device against the same on the CPU, with a network whose answer is known.

use crate::harness::{on_every_device, stored};
use spleen_hpc::config::{Blend, Config, Preprocess, Recipe, Window};
use spleen_hpc::data::nifti_write::write_volume;
use spleen_hpc::data::volume::{Affine, Volume};
use spleen_hpc::data::{nifti, scan};
use spleen_hpc::device::cuda::Precision;
use spleen_hpc::infer::jobs::{Style, jobs};
use spleen_hpc::infer::predict::{Network, argmax, probabilities};
use spleen_hpc::infer::{cuda as device, pipeline};
use spleen_hpc::rng::Philox;
use spleen_hpc::tensor::{Shape, Tensor, View};
use spleen_hpc::{Error, Result};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// Means over three voxels along each axis against a threshold, zeros outside the window: like a convolution, it does
/// not see the same at a window's edge as in its middle. Input and output are rounded to what the device stores.
fn network(p: Precision, x: &[f32], [n, d, h, w]: [usize; 4]) -> Vec<f32> {
    let x: Vec<f32> = x.iter().map(|&v| stored(p, v)).collect();
    let mut logits = Vec::new();
    for at in 0..n * d * h * w {
        let (window, z, y, x0) = (at / (d * h * w), at / (h * w) % d, at / w % h, at % w);
        let mut sum = 0.0;
        for dz in z.saturating_sub(1)..d.min(z + 2) {
            for dy in y.saturating_sub(1)..h.min(y + 2) {
                let row = ((window * d + dz) * h + dy) * w;
                sum += x[row + x0.saturating_sub(1)..row + w.min(x0 + 2)].iter().sum::<f32>();
            }
        }
        logits.extend([stored(p, 1.5), stored(p, sum / 9.0)]);
    }
    logits
}

fn on_cpu(p: Precision) -> impl Fn(&[f32], [usize; 4]) -> Result<Tensor> + Sync {
    move |x, shape| {
        let [n, d, h, w] = shape;
        Ok(Tensor::from_slice(Shape::new(n, [d, h, w], 2), &network(p, x, shape)))
    }
}

fn on_device(x: &View) -> Result<View> {
    let Shape { n, d, h, w, .. } = x.shape;
    let logits = network(x.data.precision(), &x.data.download()?, [n, d, h, w]);
    let y = x.data.cuda().act(logits.len())?;
    y.upload(&logits)?;
    Ok(View::plain(y, x.shape.with_channels(2)))
}

/// A bright ball in noise with air around the body, axes of the file left, superior, posterior and slightly oblique
/// where `tilt` is not 0.
fn ct(seed: u64, shape: [usize; 3], tilt: f64) -> Volume<i16> {
    let mut rng = Philox::new(seed, 0);
    let affine: Affine = [
        [-0.9, tilt, 0.0, 40.0],
        [tilt / 2.0, 0.0, -1.1, 30.0],
        [0.0, 2.4, tilt, -10.0],
        [0.0, 0.0, 0.0, 1.0],
    ];
    let mut data = Vec::new();
    for at in 0..shape.iter().product::<usize>() {
        let voxel = [at / (shape[1] * shape[2]), at / shape[2] % shape[1], at % shape[2]];
        let centred = |a: usize| (voxel[a] as f64 + 0.5) / shape[a] as f64 - 0.5;
        let r = (0..3).map(|a| centred(a).powi(2)).sum::<f64>().sqrt();
        let noise = rng.below(60) as i16;
        data.push(if r < 0.22 {
            100 + noise
        } else if r < 0.42 {
            noise - 40
        } else {
            noise - 1000
        });
    }
    Volume { shape, data, affine }
}

/// What a file must say to mean the same when a voxel is stored · 0.5 - 24: the fields of NIfTI-1.
fn rescale(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[112..116].copy_from_slice(&0.5f32.to_le_bytes());
    bytes[116..120].copy_from_slice(&(-24f32).to_le_bytes());
    for voxel in bytes[352..].chunks_exact_mut(2) {
        let hu = i16::from_le_bytes([voxel[0], voxel[1]]);
        voxel.copy_from_slice(&((hu + 24) * 2).to_le_bytes());
    }
    std::fs::write(path, bytes).unwrap();
}

/// A float32 file, which the product never writes: an i16 one with another type and other voxels.
fn as_floats(path: &Path, odd: f32) {
    let mut bytes = std::fs::read(path).unwrap();
    let voxels: Vec<f32> =
        bytes[352..].chunks_exact(2).map(|b| f32::from(i16::from_le_bytes([b[0], b[1]])) + 0.3).collect();
    bytes.truncate(352);
    bytes[70..74].copy_from_slice(&[16i16, 32].map(i16::to_le_bytes).concat());
    for (i, voxel) in voxels.iter().enumerate() {
        bytes.extend(if i % 97 == 5 { odd } else { *voxel }.to_le_bytes());
    }
    std::fs::write(path, bytes).unwrap();
}

/// One scan of each kind that the device reads in its own way.
fn scans(folder: &Path) -> Vec<PathBuf> {
    let write = |name: &str, volume: &Volume<i16>| {
        let path = folder.join(name);
        write_volume(&path, volume).unwrap();
        path
    };
    let (plain, scaled, floats) = (
        write("plain.nii.gz", &ct(1, [38, 17, 40], 0.0)),
        write("scaled.nii", &ct(2, [30, 12, 33], 0.15)),
        write("floats.nii", &ct(3, [25, 14, 31], 0.0)),
    );
    rescale(&scaled);
    as_floats(&floats, f32::NAN);
    vec![plain, scaled, floats]
}

fn config(recipe: Recipe) -> (Preprocess, Window) {
    let overlap = if recipe == Recipe::Seed { 0.25 } else { 0.5 };
    let blend = if recipe == Recipe::Seed { Blend::Gaussian } else { Blend::Constant };
    (Config::for_recipe(recipe).preprocess, Window { roi: [16, 16, 24], overlap, batch: 3, blend })
}

/// Voxels whose probabilities are this close may fall to either side: nothing but expf differs.
const TIE: f32 = 1e-6;

#[test]
fn masks_are_those_of_the_cpu() {
    let dir = tempfile::tempdir().unwrap();
    let inputs = scans(dir.path());
    on_every_device(|cuda| {
        for recipe in [Recipe::V036, Recipe::Seed] {
            let (p, window) = config(recipe);
            for input in &inputs {
                let scan = scan::read(input, &p).unwrap();
                let image = &scan.prepared.image;
                let net = on_cpu(cuda.precision());
                let want =
                    probabilities(&Network::Function(&net), &image.data, image.shape, &window).unwrap();

                let read = scan::read_stored(input, &p).unwrap();
                assert_eq!(read.warnings, scan.warnings);
                assert_eq!(read.header, scan.header);
                let (mask, geometry) =
                    device::segment_on_device(cuda, &on_device, &read, &p, &window).unwrap();
                assert_eq!(geometry, scan.prepared.geometry);
                let case = format!("{} {recipe:?}", input.display());
                let voxels = mask.iter().filter(|&&v| v == 1).count();
                assert!(voxels > 100 && voxels < mask.len() / 2, "{case}: {voxels} voxels");
                compare(&case, &mask, geometry.native_shape, |sink| {
                    geometry.invert_probabilities(bytemuck::cast_slice(&want), sink).unwrap()
                });

                let act = cuda.act(image.len()).unwrap();
                act.upload(&image.data).unwrap();
                let grid = device::grid_mask(cuda, &on_device, &act, image.shape, &window).unwrap();
                let wrong = |i: &usize| grid[*i] != argmax(&want[2 * i..2 * i + 2])[0];
                let wrong =
                    (0..grid.len()).filter(wrong).find(|i| (want[2 * i] - want[2 * i + 1]).abs() > TIE);
                assert_eq!(wrong, None, "{case}: voxel of the grid");
                let both = device::both_masks(cuda, &on_device, (image, &geometry), &window).unwrap();
                assert_eq!(both, (grid, mask), "{case}");
            }
        }
    });
}

/// `mask` against the CPU's probabilities, which `slabs` hands out.
fn compare(
    case: &str,
    mask: &[u8],
    [_, nj, nk]: [usize; 3],
    slabs: impl FnOnce(&mut dyn FnMut(usize, &[[f32; 2]]) -> Result<()>),
) {
    let mut seen = 0;
    slabs(&mut |i, slab| {
        for (at, [background, organ]) in slab.iter().enumerate() {
            let got = mask[i * nj * nk + at];
            assert!(
                got == u8::from(organ > background) || (organ - background).abs() <= TIE,
                "{case}: voxel {at} of slab {i} is {got}, probabilities {background} and {organ}"
            );
        }
        seen += slab.len();
        Ok(())
    });
    assert_eq!(seen, mask.len(), "{case}");
}

#[test]
fn the_pipeline_writes_the_files_that_the_cpu_writes() {
    let dir = tempfile::tempdir().unwrap();
    let mut inputs = scans(dir.path());
    inputs.insert(1, dir.path().join("broken.nii"));
    std::fs::write(&inputs[1], b"no scan at all").unwrap();
    let (p, window) = config(Recipe::V036);
    on_every_device(|cuda| {
        let stop = AtomicBool::new(false);
        let jobs = |out: &str| jobs(&inputs, &dir.path().join(out), Style::Mask).unwrap();
        let mut told = 0;
        let got = device::segment(
            &jobs("device"),
            (cuda, &on_device),
            (&p, &window),
            Style::Mask,
            &stop,
            |_, _| told += 1,
        );
        let net = on_cpu(cuda.precision());
        let want = pipeline::segment(
            &jobs("cpu"),
            &Network::Function(&net),
            (&p, &window),
            Style::Mask,
            &stop,
            |_, _| (),
        );
        assert_eq!((got.len(), told), (4, 4));
        for (got, want) in got.iter().zip(&want) {
            match (got, want) {
                (Ok(got), Ok(want)) => {
                    assert_eq!((got.shape, &got.warnings), (want.shape, &want.warnings));
                    let [ours, theirs] = [got, want].map(|s| nifti::read(&s.output).unwrap());
                    assert_eq!(ours.header, theirs.header);
                    let pairs = ours.volume.data.iter().zip(&theirs.volume.data);
                    // A draw that expf decides, where it does not round as the CPU's; see the test above.
                    assert!(pairs.filter(|(a, b)| a != b).count() <= 1, "{}", got.output.display());
                }
                (Err(got), Err(want)) => assert_eq!(got.to_string(), want.to_string()),
                _ => panic!("{got:?} and {want:?}"),
            }
        }
    });
}

#[test]
fn what_does_not_fit_or_is_not_the_network_s_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let input = &scans(dir.path())[0];
    on_every_device(|cuda| {
        let (p, window) = config(Recipe::V036);
        let scan = scan::read_stored(input, &p).unwrap();
        let three = |x: &View| {
            let shape = x.shape.with_channels(3);
            Ok(View::plain(x.data.cuda().act(shape.len())?, shape))
        };
        let err = device::segment_on_device(cuda, &three, &scan, &p, &window).unwrap_err();
        assert_eq!(err.to_string(), "sliding_window: expected [3, 16, 16, 24, 2], got [3, 16, 16, 24, 3]");
        // A batch of windows that no memory holds.
        let huge = Window { roi: [1 << 12; 3], batch: 1, ..window };
        let err = device::segment_on_device(cuda, &on_device, &scan, &p, &huge).unwrap_err();
        assert!(matches!(err, Error::Usage(_)), "{err}");
        assert!(err.to_string().contains("--sw-batch"), "{err}");
    });
}
