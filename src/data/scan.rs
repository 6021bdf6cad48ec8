//! From files to what the network takes: read -> mend -> preprocess. Every error and warning names its file.
//!
//! Voxels that are NaN or infinite become the floor of the HU window, which is air: before anything interpolates,
//! or each would take its neighbours along.

use std::path::Path;

use rayon::prelude::*;

use super::dataset::Case;
use super::nifti::{self, Nifti};
use super::nifti_header::Header;
use super::preprocess::{Geometry, Prepared, preprocess};
use super::volume::{FileVoxels, Volume};
use crate::config::Preprocess;
use crate::error::Result;

/// A preprocessed scan.
#[derive(Clone, Debug)]
pub struct Scan {
    /// The image's header.
    pub header: Header,
    /// Image and, for a labelled case, label on the network's grid.
    pub prepared: Prepared,
    /// One sentence on everything that was mended.
    pub warnings: Vec<String>,
}

/// A scan as its file holds it, for a device that preprocesses.
#[derive(Clone, Debug)]
pub struct StoredScan {
    /// The image's header.
    pub header: Header,
    /// Its voxels; those that are NaN or infinite still are.
    pub voxels: FileVoxels,
    /// Where they go, before any crop.
    pub geometry: Geometry,
    /// One sentence on everything that is to be mended.
    pub warnings: Vec<String>,
}

/// Reads an image and plans its preprocessing.
///
/// # Errors
/// As [`read`].
pub fn read_stored(image: &Path, p: &Preprocess) -> Result<StoredScan> {
    let file = nifti::read_stored(image)?;
    let geometry = Geometry::plan(file.header.shape, &file.header.affine, p.spacing_mm)
        .map_err(|err| err.in_file(image))?;
    let warnings = warnings(image, file.not_finite, file.voxels.len(), p);
    Ok(StoredScan { header: file.header, voxels: file.voxels, geometry, warnings })
}

/// Reads and preprocesses an image.
///
/// # Errors
/// Those of [`nifti::read`], and a geometry that cannot be resampled.
pub fn read(image: &Path, p: &Preprocess) -> Result<Scan> {
    prepare(nifti::read(image)?, image, None, p)
}

/// Reads and preprocesses an image with its label; also returns the 0/1 label on the file's own grid.
///
/// # Errors
/// As [`read`], and for a label on another grid or with other values than [`nifti::label_from`] takes.
pub fn read_labelled(case: &Case, label_value: Option<f32>, p: &Preprocess) -> Result<(Scan, Volume<u8>)> {
    let image = nifti::read(&case.image)?;
    let label = nifti::read(&case.label)?;
    nifti::check_same_grid((&image.header, &case.image), (&label.header, &case.label))?;
    let truth = nifti::label_from(&label.volume, label_value, &case.label)?;
    Ok((prepare(image, &case.image, Some(&truth), p)?, truth))
}

fn prepare(mut file: Nifti, path: &Path, label: Option<&Volume<u8>>, p: &Preprocess) -> Result<Scan> {
    if file.not_finite > 0 {
        let floor = p.hu_window[0];
        file.volume.data.par_iter_mut().filter(|v| !v.is_finite()).for_each(|v| *v = floor);
    }
    let warnings = warnings(path, file.not_finite, file.volume.len(), p);
    let prepared = preprocess(&file.volume, label, p).map_err(|err| err.in_file(path))?;
    Ok(Scan { header: file.header, prepared, warnings })
}

fn warnings(path: &Path, not_finite: usize, voxels: usize, p: &Preprocess) -> Vec<String> {
    if not_finite == 0 {
        return Vec::new();
    }
    vec![format!(
        "{}: {not_finite} of its {voxels} voxels are NaN or infinite and count as {} HU, the floor of the window",
        path.display(),
        p.hu_window[0]
    )]
}
