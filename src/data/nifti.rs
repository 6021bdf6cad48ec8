//! Reads NIfTI files as MONAI's `LoadImaged` (nibabel, float32) does.
//!
//! read the header -> check every claim against the file's size -> read or inflate -> scale in f64 -> f32,
//! transposed from file order (i fastest) to ours (k fastest). [`super::scan`] takes voxels in file order instead, and
//! resamples them while it reads.
//!
//! The reader is our own. The `nifti` crate knows neither NIfTI-2 nor the rules by which nibabel and MONAI
//! mend contradictory headers, and trusts a header's dimensions before it looks at the file; it serves the tests
//! as an independent reader of what it can read.

use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::affine;
use super::nifti_header::{Header, Scalar};
use super::nifti_stream::{Stream, Voxels, decode};
use super::transpose::Strides;
use super::volume::{FileVoxels, Volume};
use crate::error::{Error, Result};

/// A file: what it says and what it holds.
#[derive(Clone, Debug)]
pub struct Nifti {
    /// Geometry and everything needed to write a file like it.
    pub header: Header,
    /// Voxels after scaling, in (i, j, k) order, k fastest.
    pub volume: Volume<f32>,
    /// How many of them are NaN or infinite; they are left as they are.
    pub not_finite: usize,
}

/// A file whose voxels stay in its own order, and stay integers where they are int16.
#[derive(Clone, Debug)]
pub struct StoredNifti {
    /// Geometry and everything needed to write a file like it.
    pub header: Header,
    /// The voxels.
    pub voxels: FileVoxels,
    /// How many of them are NaN or infinite; they are left as they are.
    pub not_finite: usize,
}

/// Reads a volume: `.nii`, or either file of a `.hdr`/`.img` pair, each plain or gzipped whatever its name says.
///
/// A voxel is raw · scl_slope + scl_inter in float64, rounded to float32. Refused with a sentence: anything but one
/// 3-D volume of one of the ten scalar types, and headers that contradict the file.
pub fn read(path: impl AsRef<Path>) -> Result<Nifti> {
    read_rest(open(path)?)
}

/// What [`read`] makes of a file of which only the header was read.
pub(super) fn read_rest(voxels: Voxels) -> Result<Nifti> {
    let (header, raw) = voxels.all()?;
    let [ni, nj, _] = header.shape;
    let transposed = Strides { first: 0, step: [1, ni as isize, (ni * nj) as isize] };
    let data = decode(&raw, &header, header.shape, transposed);
    let not_finite = count_not_finite(&data);
    let volume = Volume { shape: header.shape, data, affine: header.affine };
    Ok(Nifti { header, volume, not_finite })
}

/// Reads a volume as [`read`] does, but leaves to a device what a device does better: the order of the voxels, and
/// the scaling of int16.
pub fn read_stored(path: impl AsRef<Path>) -> Result<StoredNifti> {
    let (header, raw) = open(path)?.all()?;
    let (slope, inter) = header.scaling.unwrap_or((1.0, 0.0));
    let largest = f64::from(i16::MIN).abs() * slope.abs() + inter.abs();
    if header.scalar == Scalar::I16 && largest <= f64::from(f32::MAX) {
        let stored = raw.chunks_exact(2).map(|b| i16::from_le_bytes([b[0], b[1]])).collect();
        let voxels = FileVoxels::I16 { stored, slope, inter };
        return Ok(StoredNifti { header, voxels, not_finite: 0 });
    }
    let [ni, nj, nk] = header.shape;
    let as_stored = Strides { first: 0, step: [(ni * nj) as isize, ni as isize, 1] };
    let data = decode(&raw, &header, [nk, nj, ni], as_stored);
    let not_finite = count_not_finite(&data);
    Ok(StoredNifti { header, voxels: FileVoxels::F32(data), not_finite })
}

/// Reads the header, and goes to the voxels.
pub(super) fn open(path: impl AsRef<Path>) -> Result<Voxels> {
    let path = path.as_ref();
    let (header_path, data_path) = resolve(path)?;
    let mut stream = Stream::open(&header_path)?;
    let head = stream.head()?;
    let (header, storage) = Header::parse(&head).map_err(|what| Error::file(&header_path, what))?;
    if !storage.pair {
        return stream.voxels(header, storage, &head);
    }
    let data_path = data_path.ok_or_else(|| {
        Error::file(
            path,
            "it is the header of a pair, but there is no .img file beside it to hold the voxels",
        )
    })?;
    Stream::open(&data_path)?.voxels(header, storage, &[])
}

/// Reads the header alone, with the same checks of its content as [`read`], but not of the file's size.
pub fn read_header(path: impl AsRef<Path>) -> Result<Header> {
    let (header_path, _) = resolve(path.as_ref())?;
    let head = Stream::open(&header_path)?.head()?;
    let (header, _) = Header::parse(&head).map_err(|what| Error::file(&header_path, what))?;
    Ok(header)
}

fn count_not_finite(data: &[f32]) -> usize {
    data.par_iter().filter(|v| !v.is_finite()).count()
}

/// A 0/1 label from a volume: `None` wants voxels that are exactly 0 or 1, `Some(v)` makes `voxel == v` 1.
///
/// `path` is for the sentence that refuses other values, and NaN or infinity in either case.
pub fn label_from(volume: &Volume<f32>, value: Option<f32>, path: impl AsRef<Path>) -> Result<Volume<u8>> {
    let wanted = value.unwrap_or(1.0);
    let not_finite = count_not_finite(&volume.data);
    if not_finite > 0 {
        let what = format!(
            "{not_finite} of its {} voxels are NaN or infinite, which no label is; write 0 there",
            volume.len()
        );
        return Err(Error::file(path, what));
    }
    if value.is_none() && !volume.data.par_iter().all(|&v| v == 0.0 || v == 1.0) {
        return Err(Error::file(path, foreign_values(&volume.data)));
    }
    let data = volume.data.par_iter().map(|&v| u8::from(v == wanted)).collect();
    Ok(Volume { shape: volume.shape, data, affine: volume.affine })
}

/// Half a sentence on what a label holds besides 0 and 1.
fn foreign_values(data: &[f32]) -> String {
    const LISTED: usize = 10;
    /// A label map has hundreds of values, an image taken for one has any number.
    const COUNTED: usize = 1000;
    let mut found: Vec<f32> = Vec::new();
    for runs in data.chunk_by(|a, b| a == b) {
        if let Err(place) = found.binary_search_by(|v| v.total_cmp(&runs[0])) {
            found.insert(place, runs[0]);
        }
        if found.len() > COUNTED {
            break;
        }
    }
    let list = found.iter().take(LISTED).map(f32::to_string).collect::<Vec<_>>().join(", ");
    let more = match found.len() {
        n if n <= LISTED => String::new(),
        n if n <= COUNTED => format!(", ... ({n} values)"),
        _ => format!(", ... (over {COUNTED} values)"),
    };
    format!(
        "a label must hold 0 and 1 only, this one holds {list}{more}; name the spleen with --label-value N"
    )
}

/// Refuses an image and a label that do not lie on the same grid; the paths are for the sentence.
///
/// Shapes must be equal, and no corner of the volume may be more than a tenth of the smallest voxel edge apart:
/// below that, both name the same voxels, and float32 headers of one scan agree far better.
pub fn check_same_grid(image: (&Header, &Path), label: (&Header, &Path)) -> Result<()> {
    let ((a, image_path), (b, label_path)) = (image, label);
    let beside = image_path.display();
    if a.shape != b.shape {
        let what = format!("the label has {:?} voxels, its image {beside} has {:?}", b.shape, a.shape);
        return Err(Error::file(label_path, what));
    }
    let apart = |corner: [f64; 3]| {
        let (p, q) = (affine::position(&a.affine, corner), affine::position(&b.affine, corner));
        (0..3).map(|i| (p[i] - q[i]).powi(2)).sum::<f64>().sqrt()
    };
    let worst = affine::corners(a.shape).into_iter().map(apart).fold(0.0, f64::max);
    let edge = affine::column_norms(&a.affine).into_iter().fold(f64::INFINITY, f64::min);
    if worst > 0.1 * edge {
        let what = format!(
            "the label lies up to {worst:.3} mm beside its image {beside}, more than a tenth of a voxel; \
             resample it onto the image's grid"
        );
        return Err(Error::file(label_path, what));
    }
    Ok(())
}

/// The files behind a volume: itself, or header and voxels where its name is one of a pair.
pub fn files_of(path: impl AsRef<Path>) -> Vec<PathBuf> {
    match resolve(path.as_ref()) {
        Ok((header, voxels)) => std::iter::once(header).chain(voxels).collect(),
        Err(_) => vec![path.as_ref().to_owned()],
    }
}

/// The file with the header and, where the name is one of a pair, the file with the voxels if there is one.
///
/// Endings may be in capitals; the partner's is looked for in those of the given file first.
fn resolve(path: &Path) -> Result<(PathBuf, Option<PathBuf>)> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let lower = name.to_ascii_lowercase();
    let plain = lower.strip_suffix(".gz").unwrap_or(&lower);
    let is_header = plain.ends_with(".hdr");
    if !is_header && !plain.ends_with(".img") {
        return Ok((path.to_owned(), None));
    }
    let (stem, ending) = name[..plain.len()].split_at(plain.len() - ".hdr".len());
    let small = if is_header { ".img" } else { ".hdr" };
    let capital = small.to_ascii_uppercase();
    let endings = if ending == ending.to_ascii_uppercase() { [&capital, small] } else { [small, &capital] };
    let beside = endings.into_iter().flat_map(|end| ["", ".gz", ".GZ"].map(|gz| format!("{stem}{end}{gz}")));
    let found = beside.map(|name| path.with_file_name(name)).find(|p| p.is_file());
    match (is_header, found) {
        (true, data) => Ok((path.to_owned(), data)),
        (false, Some(header)) => Ok((header, Some(path.to_owned()))),
        (false, None) => Err(Error::file(path, format!("there is no {stem}.hdr beside it to describe it"))),
    }
}
