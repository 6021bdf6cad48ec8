//! Writes NIfTI files.

use std::path::Path;

use super::nifti_header::Header;
use super::volume::Volume;
use crate::error::{Error, Result};

/// A voxel type that can be written.
pub trait Voxel: Copy + Sync {}
impl Voxel for u8 {}
impl Voxel for i16 {}
impl Voxel for f32 {}

/// Writes a u8 mask on the grid of `source` (native order, k fastest), keeping its affine, codes and units.
pub fn write_mask(path: impl AsRef<Path>, _source: &Header, _mask: &[u8]) -> Result<()> {
    Err(Error::file(path, "not yet"))
}

/// Writes the mask as the bundle's `SaveImaged` does: float32, both codes 1, no units.
pub fn write_bundle(path: impl AsRef<Path>, _source: &Header, _mask: &[u8]) -> Result<()> {
    Err(Error::file(path, "not yet"))
}

/// Writes any volume with millimetre units; gzip where the name ends in `.gz`.
pub fn write_volume<T: Voxel>(path: impl AsRef<Path>, _volume: &Volume<T>) -> Result<()> {
    Err(Error::file(path, "not yet"))
}
