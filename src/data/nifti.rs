//! Reads NIfTI files.

use std::path::Path;

use super::nifti_header::Header;
use super::volume::Volume;
use crate::error::{Error, Result};

/// A file: what it says and what it holds.
#[derive(Clone, Debug)]
pub struct Nifti {
    /// Geometry and everything needed to write a file like it.
    pub header: Header,
    /// Voxels after scaling, in (i, j, k) order, k fastest.
    pub volume: Volume<f32>,
}

/// Reads a volume as MONAI's `LoadImaged` does.
pub fn read(path: impl AsRef<Path>) -> Result<Nifti> {
    Err(Error::file(path, "not yet"))
}

/// Reads the header alone.
pub fn read_header(path: impl AsRef<Path>) -> Result<Header> {
    Err(Error::file(path, "not yet"))
}

/// A 0/1 label from a volume: `None` wants voxels that are exactly 0 or 1, `Some(v)` makes `voxel == v` 1.
pub fn label_from(_volume: &Volume<f32>, _value: Option<f32>, path: impl AsRef<Path>) -> Result<Volume<u8>> {
    Err(Error::file(path, "not yet"))
}

/// Refuses an image and a label that do not lie on the same grid; the paths are for the sentence.
pub fn check_same_grid(_image: (&Header, &Path), label: (&Header, &Path)) -> Result<()> {
    Err(Error::file(label.1, "not yet"))
}
