//! A synthetic CT data set in the layout of the Medical Segmentation Decathlon.
//!
//! Case i of seed s is a pure function of (s, i, size): a patient ([`Anatomy`]), a scan (orientation, spacing,
//! field of view, tilt), partial volume across the slice, the scanner's blur, and noise that it correlates.
//! The small set shows miniature patients, about half size, so that a case has 110-140 x 70-140 x 66-90 voxels
//! of 1.5 x 1.5 x 2 mm; the full set has adults in 512 x 512 x 90 voxels.

use std::path::Path;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::anatomy::Anatomy;
use super::nifti_write;
use super::publish::{self, publish};
use super::volume::{Affine, Volume};
use crate::error::{Error, Result};
use crate::rng::Philox;

/// What to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhantomConfig {
    /// Cases with a label the training sees (`imagesTr`, `labelsTr`).
    pub cases: usize,
    /// Further cases (`imagesTs`; their labels in `labelsTs`, which the Decathlon keeps to itself).
    pub test_cases: usize,
    /// Everything random hangs on it.
    pub seed: u64,
    /// Adults in 512 x 512 x 90 voxels instead of miniatures.
    pub full: bool,
}

impl Default for PhantomConfig {
    fn default() -> Self {
        PhantomConfig { cases: 16, test_cases: 2, seed: 0, full: false }
    }
}

/// Raised when the generator draws other volumes for the same [`PhantomConfig`].
const GENERATOR: u32 = 1;
/// Extent in mm of the reference anatomy that fills the field of view, in plane and head to foot.
const REFERENCE_MM: [f64; 2] = [380.0, 270.0];
/// Streams of random numbers of one case.
const PATIENT: u64 = 1;
const SCAN: u64 = 2;
const NOISE: u64 = 3;
/// Axis codes by turns; `None` is RAS, tilted by up to 14 degrees about each axis.
const ORIENTATIONS: [Option<&str>; 8] =
    [Some("LAS"), Some("RAS"), Some("LPS"), None, Some("LAS"), Some("PIR"), Some("RAS"), Some("LAS")];
/// Cases in the making at once: each holds a volume, its label and its file image.
const AT_ONCE: usize = 4;

/// What a folder holds; written before the first volume, so that a half-made set is known as such.
#[derive(Serialize, Deserialize, PartialEq)]
struct Marker {
    generator: u32,
    #[serde(flatten)]
    config: PhantomConfig,
}

/// Makes the data set in `out_dir`: `imagesTr labelsTr imagesTs labelsTs` with `spleen_NN.nii.gz` (i16 HU, u8
/// label), and `dataset.json` last. `progress` is told (cases done, cases in all).
///
/// A folder that already holds the whole of this very set is left as it is; one that holds part of it is made
/// anew; any other folder that is not empty is refused.
pub fn generate(
    out_dir: &Path,
    config: &PhantomConfig,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<()> {
    let total = config.cases.saturating_add(config.test_cases);
    if total == 0 {
        return Err(Error::Usage("a phantom set needs at least one case: raise the number of cases".into()));
    }
    if claim(out_dir, config)? {
        progress(total, total);
        return Ok(());
    }
    for folder in ["imagesTr", "labelsTr", "imagesTs", "labelsTs"] {
        let path = out_dir.join(folder);
        publish::folder(&path)?;
    }
    let done = std::sync::atomic::AtomicUsize::new(0);
    for first in (0..total).step_by(AT_ONCE) {
        (first..total.min(first + AT_ONCE)).into_par_iter().try_for_each(|index| {
            let (image, label) = case(config, index);
            let set = if index < config.cases { "Tr" } else { "Ts" };
            let name = file_name(index, total);
            nifti_write::write_volume(out_dir.join(format!("images{set}")).join(&name), &image)?;
            nifti_write::write_volume(out_dir.join(format!("labels{set}")).join(&name), &label)?;
            progress(done.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1, total);
            Ok(())
        })?;
    }
    write_json(&out_dir.join("dataset.json"), &dataset_json(config))
}

/// Case number `index`: CT numbers in HU and the label (0 or 1), on the same grid.
pub fn case(config: &PhantomConfig, index: usize) -> (Volume<i16>, Volume<u8>) {
    let scan = Scan::new(config, index);
    let anatomy = Anatomy::new(&mut Philox::keyed(config.seed, &[PATIENT, index as u64]));
    let slices: Vec<(Vec<i16>, Vec<u8>)> = (0..scan.shape[scan.slice_axis])
        .into_par_iter()
        .map(|s| {
            let mut noise = Philox::keyed(config.seed, &[NOISE, index as u64, s as u64]);
            scan.slice(&anatomy, &mut noise, s)
        })
        .collect();
    (scan.stack(&slices, |s| &s.0), scan.stack(&slices, |s| &s.1))
}

/// True if `out_dir` holds all of this set; else marks it as ours, or refuses.
fn claim(out_dir: &Path, config: &PhantomConfig) -> Result<bool> {
    let marker = Marker { generator: GENERATOR, config: *config };
    let path = out_dir.join("phantom.json");
    match std::fs::read(&path) {
        Ok(text) if serde_json::from_slice::<Marker>(&text).is_ok_and(|m| m == marker) => {
            return Ok(out_dir.join("dataset.json").is_file());
        }
        Ok(_) => {
            return Err(Error::file(out_dir, "holds another phantom set; remove it or name another folder"));
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(Error::io(&path, "read")(e)),
    }
    publish::folder(out_dir)?;
    // What a killed process was writing, the marker above all, is no reason to refuse.
    let mut entries = std::fs::read_dir(out_dir).map_err(Error::io(out_dir, "read"))?.flatten();
    if entries.any(|entry| !publish::is_unfinished(&entry.file_name())) {
        return Err(Error::file(out_dir, "is not empty and holds no phantom set; name a new folder"));
    }
    write_json(&path, &marker)?;
    Ok(false)
}

fn file_name(index: usize, total: usize) -> String {
    let width = total.to_string().len().max(2);
    format!("spleen_{:0width$}.nii.gz", index + 1)
}

/// The Decathlon's table of contents.
fn dataset_json(config: &PhantomConfig) -> serde_json::Value {
    let total = config.cases + config.test_cases;
    let pair = |i| {
        let name = file_name(i, total);
        serde_json::json!({"image": format!("./imagesTr/{name}"), "label": format!("./labelsTr/{name}")})
    };
    let test = |i| format!("./imagesTs/{}", file_name(i, total));
    serde_json::json!({
        "name": "Spleen",
        "description": "Synthetic abdominal CT made by spleen-hpc phantom; no patient data",
        "licence": "CC0",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "spleen"},
        "numTraining": config.cases,
        "numTest": config.test_cases,
        "training": (0..config.cases).map(pair).collect::<Vec<_>>(),
        "test": (config.cases..total).map(test).collect::<Vec<_>>(),
    })
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    publish(path, |file| Ok(serde_json::to_writer_pretty(file, value)?))
}

/// Where and how a patient is sampled.
struct Scan {
    shape: [usize; 3],
    /// The axis along which slices are stacked: the one that runs head to foot.
    slice_axis: usize,
    /// Voxel to world.
    affine: Affine,
    /// Voxel to reference mm of the anatomy, 3 x 4.
    to_reference: [[f32; 4]; 3],
    /// Odd number of samples across a slice.
    samples: usize,
    /// Standard deviation in HU of the noise before the blur.
    noise: f32,
}

/// The scanner's in-plane point spread, one axis: f, 1 - 2 f, f.
const BLUR: f32 = 0.2;

impl Scan {
    fn new(config: &PhantomConfig, index: usize) -> Self {
        let mut rng = Philox::keyed(config.seed, &[SCAN, index as u64]);
        // Decimals as scanners write them.
        let round = |v: f64| (v * 1e4).round() / 1e4;
        let mut pick = |from: &[f64]| from[rng.below(from.len() as u64) as usize];
        let thickness = if config.full {
            pick(&[2.5, 3.0, 3.5])
        } else {
            pick(&[1.5, 2.0, 2.5, 2.5, 3.0, 3.0, 4.0, 5.0])
        };
        let (pixel, width, slices) = if config.full {
            (round(rng.range(0.68, 0.88)), 512, 90)
        } else {
            let pixel = round(rng.range(1.2, 1.8));
            let width = (rng.range(182.0, 212.0) / pixel).round() as usize;
            (pixel, width, (rng.range(134.0, 172.0) / thickness).ceil() as usize + 1)
        };
        let code = ORIENTATIONS[index % ORIENTATIONS.len()];
        let axes: Vec<(usize, f64)> = code.unwrap_or("RAS").chars().map(axis).collect();
        let slice_axis = axes.iter().position(|a| a.0 == 2).expect("every code has S or I");
        let size = |a: usize| if a == slice_axis { (slices, thickness) } else { (width, pixel) };
        let tilt = match code {
            Some(_) => [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
            None => rotation([0; 3].map(|_| rng.range(-14.0, 14.0).to_radians())),
        };
        let mut affine = [[0.0, 0.0, 0.0, 0.0], [0.0; 4], [0.0; 4], [0.0, 0.0, 0.0, 1.0]];
        for (a, &(row, sign)) in axes.iter().enumerate() {
            for r in 0..3 {
                affine[r][a] = tilt[r][row] * sign * size(a).1;
            }
        }
        let shape = std::array::from_fn(|a| size(a).0);
        // The field of view is centred on the patient, give or take 6 mm, and shows all of its width.
        let (plane, height) = (pixel * width as f64, thickness * slices as f64);
        let in_plane = REFERENCE_MM[0] / plane * rng.range(0.94, 1.0);
        let scale = [in_plane, in_plane, REFERENCE_MM[1] / height * rng.range(0.85, 1.0)];
        let mut to_reference = [[0f32; 4]; 3];
        for r in 0..3 {
            let centre: f64 = (0..3).map(|a| affine[r][a] * (shape[a] as f64 - 1.0) / 2.0).sum();
            let offset = rng.range(-6.0, 6.0) - centre * scale[r];
            to_reference[r] =
                std::array::from_fn(|a| if a < 3 { affine[r][a] * scale[r] } else { offset } as f32);
            // The world's origin is the scanner's business, not the patient's.
            affine[r][3] = round(rng.range(-150.0, 150.0) - centre);
        }
        // The blur leaves a white noise the root of this share of its variance, on each of two axes.
        let kept = f64::from((1.0 - 2.0 * BLUR).powi(2) + 2.0 * BLUR * BLUR);
        let noise = (rng.range(8.0, 16.0) / kept) as f32;
        let samples = if thickness < 2.2 { 1 } else { 3 };
        Scan { shape, slice_axis, affine, to_reference, samples, noise }
    }

    /// The two in-plane axes, slower first.
    fn plane(&self) -> [usize; 2] {
        match self.slice_axis {
            0 => [1, 2],
            1 => [0, 2],
            _ => [0, 1],
        }
    }

    /// HU and label of slice `s`, rows along the slower in-plane axis.
    fn slice(&self, anatomy: &Anatomy, noise: &mut Philox, s: usize) -> (Vec<i16>, Vec<u8>) {
        let [slow, fast] = self.plane();
        let (rows, columns) = (self.shape[slow], self.shape[fast]);
        let m = &self.to_reference;
        let mut hu = Vec::with_capacity(rows * columns);
        let mut label = Vec::with_capacity(rows * columns);
        for row in 0..rows {
            for column in 0..columns {
                let (mut sum, mut spleen) = (0.0, 0);
                for sample in 0..self.samples {
                    let across = s as f32 + (sample as f32 + 0.5) / self.samples as f32 - 0.5;
                    let p = std::array::from_fn(|r| {
                        m[r][slow] * row as f32
                            + m[r][fast] * column as f32
                            + m[r][self.slice_axis] * across
                            + m[r][3]
                    });
                    let tissue = anatomy.at(p);
                    sum += tissue.hu;
                    spleen += usize::from(tissue.spleen);
                }
                hu.push(sum / self.samples as f32 + self.noise * near_normal(noise));
                label.push(u8::from(2 * spleen > self.samples));
            }
        }
        blur(&mut hu, rows, columns);
        (hu.into_iter().map(|v| v.round().clamp(-1024.0, 3071.0) as i16).collect(), label)
    }

    /// Puts slices into one volume in C order.
    fn stack<T: Copy + Default, S>(&self, slices: &[S], of: impl Fn(&S) -> &Vec<T>) -> Volume<T> {
        let mut data = vec![T::default(); self.shape.iter().product()];
        let strides = [self.shape[1] * self.shape[2], self.shape[2], 1];
        let [slow, fast] = self.plane();
        for (s, slice) in slices.iter().enumerate() {
            for (row, values) in of(slice).chunks(self.shape[fast]).enumerate() {
                let first = s * strides[self.slice_axis] + row * strides[slow];
                for (column, &value) in values.iter().enumerate() {
                    data[first + column * strides[fast]] = value;
                }
            }
        }
        Volume { shape: self.shape, data, affine: self.affine }
    }
}

/// World axis and direction of an axis letter.
fn axis(letter: char) -> (usize, f64) {
    match letter {
        'R' => (0, 1.0),
        'L' => (0, -1.0),
        'A' => (1, 1.0),
        'P' => (1, -1.0),
        'S' => (2, 1.0),
        _ => (2, -1.0),
    }
}

/// Rz Ry Rx of three angles in radians.
fn rotation([x, y, z]: [f64; 3]) -> [[f64; 3]; 3] {
    let ((sx, cx), (sy, cy), (sz, cz)) = (x.sin_cos(), y.sin_cos(), z.sin_cos());
    [
        [cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx],
        [sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx],
        [-sy, cy * sx, cy * cx],
    ]
}

/// Mean 0, variance 1: the sum of four uniform 16-bit numbers, near enough to a normal once it is blurred.
fn near_normal(rng: &mut Philox) -> f32 {
    let (a, b) = (rng.next_u32(), rng.next_u32());
    let sum = (a & 0xffff) + (a >> 16) + (b & 0xffff) + (b >> 16);
    // Four times 0..=65535: mean 131070, variance 4 (2^32 - 1) / 12.
    (sum as f32 - 131_070.0) / 37_837.23
}

/// The point spread on both axes; edges repeat.
fn blur(image: &mut [f32], rows: usize, columns: usize) {
    let mut line = vec![0.0; rows.max(columns)];
    let mut along = |first: usize, stride: usize, n: usize| {
        for (i, v) in line[..n].iter_mut().enumerate() {
            *v = image[first + i * stride];
        }
        for i in 0..n {
            let (left, right) = (line[i.saturating_sub(1)], line[(i + 1).min(n - 1)]);
            image[first + i * stride] = BLUR * (left + right) + (1.0 - 2.0 * BLUR) * line[i];
        }
    };
    (0..rows).for_each(|r| along(r * columns, 1, columns));
    (0..columns).for_each(|c| along(c, columns, rows));
}
