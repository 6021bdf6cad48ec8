//! From files to what the network takes: read -> mend -> preprocess. Every error and warning names its file.
//!
//! Voxels that are NaN or infinite become the floor of the HU window, which is air: before anything interpolates,
//! or each would take its neighbours along.

use std::path::Path;

use super::dataset::Case;
use super::nifti::{self, Nifti};
use super::nifti_header::Header;
use super::nifti_stream::Voxels;
use super::preprocess::{Geometry, Prepared, prepared, preprocess, scale_intensity};
use super::separable::{Separable, Source};
use super::volume::{FileVoxels, Volume};
use crate::config::Preprocess;
use crate::error::{Error, Result};

/// Planes of a file that are resampled while as many are read.
const PLANES: usize = 8;

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
    let file = nifti::open(image)?;
    let refuse = |err: Error| err.in_file(image);
    let geometry = Geometry::plan(file.header.shape, &file.header.affine, p.spacing_mm).map_err(refuse)?;
    match Separable::new(&geometry.resampling) {
        Some(axes) if file.likely() => {
            let (header, scaled, not_finite) = resample_while_reading(file, &geometry, &axes, p)?;
            let warnings = warnings(image, not_finite, header.shape.iter().product(), p);
            Ok(Scan { header, prepared: prepared(scaled, None, geometry, p), warnings })
        }
        _ => prepare(nifti::read_rest(file)?, image, None, p),
    }
}

/// Resamples the planes of a file while the next ones are read, which is mostly inflating and has one thread; so the
/// voxels of a file of more than nine planes are never in memory all at once. Returns the scaled image and how many voxels
/// were not finite.
fn resample_while_reading(
    mut file: Voxels,
    geometry: &Geometry,
    axes: &Separable,
    p: &Preprocess,
) -> Result<(Header, Vec<f32>, usize)> {
    let Geometry { orientation, native_shape, .. } = geometry;
    let [ni, nj, planes] = *native_shape;
    let plane = ni * nj;
    let strides = orientation.ras_strides(*native_shape, [1, ni as isize, plane as isize]);
    // The RAS axis across the planes, and the planes' numbers along it.
    let across = orientation.axis[2];
    let number = |ras: usize| if orientation.flip[2] { planes - 1 - ras } else { ras };
    let scale = scale_intensity(p.hu_window);

    let mut image = vec![0.0; axes.shape().iter().product()];
    let mut not_finite = 0;
    let mut read = |into: &mut [f32]| -> Result<()> {
        file.next(into)?;
        not_finite += mend(into, p.hu_window[0]);
        Ok(())
    };
    // Cells reach from one plane to the next: the last one of a window is the first one of the next.
    let [mut held, mut coming] = [(); 2].map(|()| vec![0.0; planes.min(PLANES + 1) * plane]);
    let mut window = 0..planes.min(PLANES + 1);
    // Planes up to which every voxel of the result is written.
    let mut ended = 0;
    read(&mut held[..window.len() * plane])?;
    while ended < planes {
        let next = window.end - 1..planes.min(window.end + PLANES);
        coming[..plane].copy_from_slice(&held[(window.len() - 1) * plane..][..plane]);
        let mut of = axes.shape().map(|n| 0..n);
        of[across] = axes.along(across, |cell| {
            let [a, b] = cell.map(number);
            (ended..window.end).contains(&a.max(b))
        });
        let source = Source { voxels: &held, strides, skipped: window.start * plane };
        let mut fill = || axes.fill(&mut image, &of, &source, scale);
        let mut read = || read(&mut coming[plane..][..(next.len() - 1) * plane]);
        if rayon::current_num_threads() == 1 {
            fill();
            read()?;
        } else {
            // Reading stays on this thread: one of the pool's that waits for a disk would compute nothing meanwhile.
            rayon::in_place_scope(|pool| {
                pool.spawn(|_| fill());
                read()
            })?;
        }
        ended = window.end;
        window = next;
        std::mem::swap(&mut held, &mut coming);
    }
    Ok((file.end()?, image, not_finite))
}

/// Replaces what is no number; says how many there were.
fn mend(voxels: &mut [f32], floor: f32) -> usize {
    let not_finite = voxels.iter().filter(|v| !v.is_finite()).count();
    if not_finite > 0 {
        voxels.iter_mut().filter(|v| !v.is_finite()).for_each(|v| *v = floor);
    }
    not_finite
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
        mend(&mut file.volume.data, p.hu_window[0]);
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
