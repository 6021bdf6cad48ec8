//! Writes NIfTI files: a temporary neighbour, whole and synced, then renamed into place.

use std::io::{BufWriter, Write};
use std::path::Path;

use flate2::{Compression, GzBuilder};
use rayon::prelude::*;

use super::nifti_header::{Header, Scalar};
use super::publish::publish;
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

/// Voxels along k that are looked at together, and along i that fill a cache line of bytes.
const RUN: usize = 32;
const LINE: usize = 64;

/// Voxels of `shape` = (I, J, K), k fastest, with i fastest. Nearly all of a mask is 0, as a new volume is: runs of zeros are
/// passed over.
fn in_file_order<T: Voxel>(voxels: &[T], [ni, nj, nk]: [usize; 3]) -> Vec<T> {
    let mut body = vec![T::default(); voxels.len()];
    body.par_chunks_mut((RUN * nj * ni).max(1)).enumerate().for_each(|(block, planes)| {
        let k = block * RUN..nk.min((block + 1) * RUN);
        for (first, j) in (0..ni).step_by(LINE).flat_map(|first| (0..nj).map(move |j| (first, j))) {
            for i in first..ni.min(first + LINE) {
                let run = &voxels[(i * nj + j) * nk..][k.clone()];
                // Of bits, so that no -0 is lost.
                if bytemuck::cast_slice::<T, u8>(run).iter().fold(0, |any, byte| any | byte) == 0 {
                    continue;
                }
                for (k, &voxel) in run.iter().enumerate() {
                    planes[(k * nj + j) * ni + i] = voxel;
                }
            }
        }
    });
    body
}

fn write<T: Voxel>(path: &Path, header: &Header, voxels: &[T]) -> Result<()> {
    let [ni, nj, nk] = header.shape;
    if voxels.len() != ni * nj * nk {
        let (want, got) = (format!("{:?} voxels", header.shape), format!("{}", voxels.len()));
        return Err(Error::Shape { op: "nifti_write", want, got });
    }
    let head =
        header.encode(T::SCALAR).map_err(|what| Error::file(path, format!("cannot be written: {what}")))?;
    let body = in_file_order(voxels, [ni, nj, nk]);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_voxel_is_where_the_file_has_it() {
        for [ni, nj, nk] in [[1, 1, 1], [LINE + 3, 2, RUN + 5], [3, 5, 2 * RUN], [2, 3, 1]] {
            // A run of zeros, one with a single voxel, and one whose only voxel is -0.
            let value = |i: usize, j: usize, k: usize| match (i + j) % 4 {
                0 => 0.0,
                1 => f32::from(u8::from(k + 1 == nk)),
                2 => {
                    if k == 0 {
                        -0.0
                    } else {
                        0.0
                    }
                }
                _ => (1 + (i * nj + j) * nk + k) as f32,
            };
            let voxels: Vec<f32> =
                (0..ni * nj * nk).map(|at| value(at / (nj * nk), at / nk % nj, at % nk)).collect();
            let body = in_file_order(&voxels, [ni, nj, nk]);
            for (at, got) in body.iter().enumerate() {
                let want = value(at % ni, at / ni % nj, at / (ni * nj));
                assert_eq!(got.to_bits(), want.to_bits(), "{ni} {nj} {nk}, {at}");
            }
        }
    }
}
