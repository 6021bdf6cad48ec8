//! Writes NIfTI files: a temporary neighbour, whole and synced, then renamed into place.

use std::io::{BufWriter, Write};
use std::path::Path;

use flate2::{Compression, GzBuilder};

use super::nifti_header::{Header, Scalar};
use super::publish::publish;
use super::transpose::{Strides, gather};
use super::volume::{Affine, Volume};
use crate::error::{Error, Result};

/// Masks deflate 100-fold at any level and CT hardly better at a higher one.
const LEVEL: Compression = Compression::new(3);

const _: () = assert!(cfg!(target_endian = "little"), "voxels are written as they lie in memory");

/// Units code of millimetres.
const MILLIMETRES: i32 = 2;

/// A voxel type that can be written.
pub trait Voxel: bytemuck::Pod + Default + Send + Sync {
    /// How NIfTI calls it.
    const SCALAR: Scalar;
}

impl Voxel for u8 {
    const SCALAR: Scalar = Scalar::U8;
}

impl Voxel for i16 {
    const SCALAR: Scalar = Scalar::I16;
}

impl Voxel for f32 {
    const SCALAR: Scalar = Scalar::F32;
}

/// Writes a u8 mask on the grid of `source` (native order, k fastest).
///
/// Affine, form codes, units, description and NIfTI version are the source's, so that the mask lies on its image
/// in every viewer. gzip where the name ends in `.gz`.
pub fn write_mask(path: impl AsRef<Path>, source: &Header, mask: &[u8]) -> Result<()> {
    write(path.as_ref(), source, mask)
}

/// Writes the mask as the bundle's `SaveImaged` does, header byte for byte: NIfTI-1 float32, sform and qform of the
/// affine with codes 1, no scaling, no units, no description.
pub fn write_bundle(path: impl AsRef<Path>, source: &Header, mask: &[u8]) -> Result<()> {
    let path = path.as_ref();
    let header = fresh_header(path, source.shape, &source.affine, 0)?;
    let voxels: Vec<f32> = mask.iter().map(|&v| f32::from(v)).collect();
    write(path, &header, &voxels)
}

/// Writes any volume as NIfTI-1 with millimetre units; gzip where the name ends in `.gz`.
pub fn write_volume<T: Voxel>(path: impl AsRef<Path>, volume: &Volume<T>) -> Result<()> {
    let path = path.as_ref();
    let header = fresh_header(path, volume.shape, &volume.affine, MILLIMETRES)?;
    write(path, &header, &volume.data)
}

/// A header that says nothing but where the voxels lie.
fn fresh_header(path: &Path, shape: [usize; 3], at: &Affine, units: i32) -> Result<Header> {
    let single = |v: f64| f64::from(v as f32);
    let mut header = Header {
        version: 1,
        shape,
        scalar: Scalar::U8,
        scaling: None,
        pixdim: [1.0; 8],
        qform_code: 1,
        sform_code: 1,
        quatern: [0.0; 3],
        qoffset: [0.0; 3],
        srow: [at[0].map(single), at[1].map(single), at[2].map(single)],
        xyzt_units: units,
        descrip: String::new(),
        affine: *at,
    };
    header.set_qform(at).map_err(|what| Error::file(path, format!("cannot be written: {what}")))?;
    Ok(header)
}

fn write<T: Voxel>(path: &Path, header: &Header, voxels: &[T]) -> Result<()> {
    let [ni, nj, nk] = header.shape;
    if voxels.len() != ni * nj * nk {
        let (want, got) = (format!("{:?} voxels", header.shape), format!("{}", voxels.len()));
        return Err(Error::Shape { op: "nifti_write", want, got });
    }
    let head =
        header.encode(T::SCALAR).map_err(|what| Error::file(path, format!("cannot be written: {what}")))?;
    // The file's fastest axis is i: its (k, j, i) order gathered from ours.
    let order = Strides { first: 0, step: [1, nk as isize, (nj * nk) as isize] };
    let body = gather([nk, nj, ni], order, |at| voxels[at]);
    publish(path, |file| {
        let mut file = BufWriter::with_capacity(1 << 20, file);
        if path.extension().is_some_and(|e| e == "gz") {
            let mut gz = GzBuilder::new().mtime(0).write(file, LEVEL);
            gz.write_all(&head)?;
            gz.write_all(bytemuck::cast_slice(&body))?;
            gz.finish()?.flush()
        } else {
            file.write_all(&head)?;
            file.write_all(bytemuck::cast_slice(&body))?;
            file.flush()
        }
    })
}
