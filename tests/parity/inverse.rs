//! The way back: softmax, inverse resampling, argmax, the saved NIfTI.

use std::io::Read;
use std::path::Path;

use flate2::read::MultiGzDecoder;
use spleen_hpc::data::nifti;
use spleen_hpc::data::nifti_write::write_bundle;
use spleen_hpc::data::preprocess::{Geometry, preprocess};
use spleen_hpc::infer::predict::softmax;
use spleen_hpc::ops::resample::cuda::invert_argmax;

use crate::Outcome;
use crate::case::{Case, ties};
use crate::golden::{File, Golden, fits};
use crate::ledger::Ledger;
use crate::place;
use crate::prep::settings;
use crate::tensor::Tensor;
use crate::tolerance::{DRAW, EXACT, GEOMETRY, HEADER, PROBABILITY};

pub fn run(golden: &Golden, ledger: &mut Ledger) -> Outcome<()> {
    let mut saved = saved_masks(golden)?;
    ledger.each_file(golden, "inverse_*", |file, ledger| {
        let name = file.name.trim_start_matches("inverse_");
        let case = Case::read(golden, name)?;
        let (mask, draw) = replay(file, &case, golden, name, ledger)?;
        let expected = format!("nifti/saved/{name}_img_trans.*");
        let Some(at) = saved.iter().position(|s| fits(&expected, s)) else { return Ok(()) };
        compare_saved(golden, &saved.swap_remove(at), &case, &mask, &draw, ledger)
    });
    for relative in saved {
        ledger.fail(&relative, "there is no inverse_<case> for this saved mask".into());
    }
    Ok(())
}

/// The masks that the kernels make of the same probabilities, except where the classes draw.
pub fn on_device(golden: &Golden, ledger: &mut Ledger) -> Outcome<()> {
    let cuda = place::current().ok_or("there is no device")?;
    ledger.each_file(golden, "inverse_*", |file, ledger| {
        let case = Case::read(golden, file.name.trim_start_matches("inverse_"))?;
        let name = file.name.replace("inverse_", "prep_");
        let settings = golden.file(&name).map_or_else(|| settings(file), settings);
        let geometry = preprocess(&case.image.volume, None, &settings)?.geometry;
        let p = probabilities(&file.need("pred_logits")?);
        let mut draw = Vec::new();
        geometry.invert_probabilities(p.as_chunks().0, |_, slab| {
            draw.extend(slab.iter().map(|[b, s]| (b - s).abs() < DRAW));
            Ok(())
        })?;
        let mask = invert_argmax(&cuda.upload(&p)?, &geometry)?.download()?;
        let got = Tensor::new(&[&[1][..], &case.image.volume.shape].concat(), &mask);
        ledger.compare_except(file, "argmax", &got, EXACT, |i| draw[i]);
        Ok(())
    });
    Ok(())
}

/// Softmax of logits (2, i, j, k), as (voxels, 2).
fn probabilities(logits: &Tensor) -> Vec<f32> {
    let (background, spleen) = logits.data.split_at(logits.data.len() / 2);
    let mut p: Vec<f32> = background.iter().zip(spleen).flat_map(|(&b, &s)| [b as f32, s as f32]).collect();
    softmax(&mut p);
    p
}

/// Compares the tensors of a case; returns the mask and the voxels where its classes draw.
fn replay(
    file: &File,
    case: &Case,
    golden: &Golden,
    name: &str,
    ledger: &mut Ledger,
) -> Outcome<(Vec<u8>, Vec<bool>)> {
    let settings = golden.file(&format!("prep_{name}")).map_or_else(|| settings(file), settings);
    let image = &case.image.volume;
    let prepared = preprocess(image, case.label.as_ref(), &settings)?;
    let geometry = &prepared.geometry;

    let logits = file.need("pred_logits")?;
    let shape = [&[2][..], &prepared.image.shape].concat();
    if logits.shape != shape {
        return Err(
            format!("pred_logits has shape {:?}, the preprocessed grid {shape:?}", logits.shape).into()
        );
    }
    let p = probabilities(&logits);
    ledger.compare(file, "softmax", &channels_first(&p, &prepared.image.shape), PROBABILITY);

    let p: Vec<[f32; 2]> = p.as_chunks().0.to_vec();
    let mut native = Vec::with_capacity(2 * image.len());
    geometry.invert_probabilities(&p, |_, slab| {
        native.extend_from_slice(slab.as_flattened());
        Ok(())
    })?;
    let both = channels_first(&native, &image.shape);
    let spleen = Tensor { shape: image.shape.to_vec(), data: both.data[image.len()..].to_vec(), ..both };
    ledger.compare(file, "inverted", &both, PROBABILITY);
    ledger.compare(file, "inverted_ch1", &spleen, PROBABILITY);
    ledger.compare(file, "inverted.affine", &Tensor::affine(&geometry.native_affine), GEOMETRY);

    let draw: Vec<bool> = native.as_chunks().0.iter().map(|[b, s]| (b - s).abs() < DRAW).collect();
    let mask = geometry.invert_argmax(&p)?;
    let with_channel = [&[1][..], &image.shape].concat();
    ledger.compare_except(file, "argmax", &Tensor::new(&with_channel, &mask), EXACT, |i| draw[i]);

    if let Some(label) = &prepared.label {
        let tie = round_trip_ties(geometry)?;
        let got = Tensor::new(&with_channel, &geometry.invert_label(&label.data)?);
        ledger.compare_except(file, "label_roundtrip", &got, EXACT, |i| tie[i]);
    }
    Ok((mask, draw))
}

/// Native voxels whose value a tie decides on the way there (seen through the way back) or on the way back.
fn round_trip_ties(geometry: &Geometry) -> Outcome<Vec<bool>> {
    let there = geometry.invert_label(&ties(&geometry.resampling))?;
    let back = ties(&geometry.resampling.inverse()?);
    let [n0, n1, n2] = geometry.native_shape;
    let [_, r1, r2] = geometry.orientation.ras_shape(geometry.native_shape);
    let at_ras = |at: usize| {
        let voxel = [at / (n1 * n2), at / n2 % n1, at % n2];
        let [i, j, k] = geometry.orientation.ras_index(voxel, geometry.native_shape);
        (i * r1 + j) * r2 + k
    };
    Ok((0..n0 * n1 * n2).map(|at| there[at] != 0 || back[at_ras(at)] != 0).collect())
}

/// Writes the mask as the bundle does and compares the file with MONAI's: every header byte, every voxel.
fn compare_saved(
    golden: &Golden,
    relative: &str,
    case: &Case,
    mask: &[u8],
    draw: &[bool],
    ledger: &mut Ledger,
) -> Outcome<()> {
    let temporary = tempfile::tempdir()?;
    let path = match ledger.output.path(relative)? {
        Some(path) => path,
        None => temporary.path().join(Path::new(relative).file_name().ok_or("a file without a name")?),
    };
    write_bundle(&path, &case.image.header, mask)?;
    let (got, want) = (header(&path)?, header(&golden.dir.join(relative))?);
    let compare = |ledger: &mut Ledger, part, of: fn(&[u8]) -> Tensor, tolerance| {
        ledger.compare_with(&format!("{relative}: {part}"), &of(&got), &of(&want), tolerance, |_| false);
    };
    compare(ledger, "header bytes", integers, EXACT);
    compare(ledger, "header floats", floats, HEADER);
    let (got, want) = (nifti::read(&path)?.volume, nifti::read(golden.dir.join(relative))?.volume);
    let what = format!("{relative}: voxels");
    let [got, want] = [got, want].map(|v| Tensor::new(&v.shape, &v.data));
    ledger.compare_with(&what, &got, &want, EXACT, |i| draw[i]);
    Ok(())
}

/// Float32 fields of a NIfTI-1 header: pixdim to scl_inter, cal_max to toffset, the quaternion to the sform.
const FLOATS: [std::ops::Range<usize>; 3] = [76..120, 124..140, 256..328];

/// Where the quaternion's b, c, d stand among those floats.
const QUATERNION: std::ops::Range<usize> = 15..18;

fn floats(header: &[u8]) -> Tensor {
    let bytes: Vec<u8> = FLOATS.into_iter().flat_map(|r| &header[r]).copied().collect();
    let mut values: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    // Of a half turn, q and -q are the same rotation; which one nibabel writes is LAPACK's choice.
    let quaternion = &mut values[QUATERNION];
    let half_turn = quaternion.iter().map(|q| q * q).sum::<f32>() > 1.0 - 1e-6;
    if half_turn && quaternion.iter().find(|q| q.abs() > 1e-3).is_some_and(|&q| q < 0.0) {
        quaternion.iter_mut().for_each(|q| *q = -*q);
    }
    Tensor::new(&[values.len()], &values)
}

/// All other bytes, with zeros in the place of floats so that an index is an offset in the header.
fn integers(header: &[u8]) -> Tensor {
    let mut bytes = header.to_vec();
    FLOATS.into_iter().for_each(|r| bytes[r].fill(0));
    Tensor::new(&[bytes.len()], &bytes)
}

/// The first 352 bytes: header and extension flag.
fn header(path: &Path) -> Outcome<Vec<u8>> {
    let mut header = vec![0; 352];
    let file = std::fs::File::open(path)?;
    match path.extension().is_some_and(|e| e == "gz") {
        true => MultiGzDecoder::new(file).read_exact(&mut header)?,
        false => std::io::BufReader::new(file).read_exact(&mut header)?,
    }
    Ok(header)
}

fn saved_masks(golden: &Golden) -> Outcome<Vec<String>> {
    let dir = glob::Pattern::escape(&golden.dir.to_string_lossy());
    let mut found = vec![];
    for path in glob::glob(&format!("{dir}/nifti/saved/*"))? {
        found.push(path?.strip_prefix(&golden.dir)?.to_string_lossy().replace('\\', "/"));
    }
    Ok(found)
}

/// (voxels, 2) to (2, i, j, k).
fn channels_first(p: &[f32], shape: &[usize; 3]) -> Tensor {
    let planes: Vec<f32> = (0..2).flat_map(|c| p.iter().skip(c).step_by(2).copied()).collect();
    Tensor::new(&[&[2][..], shape].concat(), &planes)
}
