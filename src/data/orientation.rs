//! Axis permutation and flips to RAS+ and back (MONAI `Orientationd`): no interpolation, no voxel changes.

use serde::{Deserialize, Serialize};

use super::affine::{self, Matrix};
use super::transpose::{Strides, gather};
use super::volume::{Affine, Volume};
use crate::error::{Error, Result};

/// How native axes became RAS axes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Orientation {
    /// RAS axis of each native axis: a permutation of 0, 1, 2.
    pub axis: [usize; 3],
    /// Whether a native axis runs against its RAS axis.
    pub flip: [bool; 3],
}

/// The RAS axis closest to each voxel axis and its sense (nibabel `io_orientation`).
///
/// Fails where the affine is singular.
pub fn io_orientation(affine: &Affine) -> Result<Orientation> {
    let singular =
        || Error::Usage(format!("the affine {affine:?} is singular, so its axes have no direction"));
    let norms = affine::column_norms(affine);
    if !norms.iter().all(|n| n.is_finite() && *n > 0.0) {
        return Err(singular());
    }
    let unit: Matrix<3> = std::array::from_fn(|r| std::array::from_fn(|c| affine[r][c] / norms[c]));
    let mut rotation = affine::polar_factor(&unit).ok_or_else(singular)?;
    // The axis with the clearest direction chooses first; sorting is stable, so the first wins a draw.
    let clearest =
        |c: usize| (0..3).map(|r| -(rotation[r][c] * rotation[r][c])).fold(f64::INFINITY, f64::min);
    let rank = [0, 1, 2].map(clearest);
    let mut order = [0, 1, 2];
    order.sort_by(|&a, &b| rank[a].total_cmp(&rank[b]));

    let mut found = Orientation { axis: [0; 3], flip: [false; 3] };
    for input in order {
        let column = |r: usize| rotation[r][input];
        let output = (1..3).fold(0, |best, r| if column(r).abs() > column(best).abs() { r } else { best });
        if column(output).abs() <= 1e-8 {
            return Err(singular());
        }
        found.axis[input] = output;
        found.flip[input] = column(output) < 0.0;
        rotation[output] = [0.0; 3];
    }
    Ok(found)
}

/// Flips, then permutes to RAS+; the affine follows, so that no voxel moves in the world.
///
/// Fails where the affine is singular.
pub fn to_ras<T: Copy + Default + Send + Sync>(volume: &Volume<T>) -> Result<(Volume<T>, Orientation)> {
    let orientation = io_orientation(&volume.affine)?;
    let ras = orientation.apply(volume);
    Ok((ras, orientation))
}

impl Orientation {
    /// Native order to RAS+.
    pub fn apply<T: Copy + Default + Send + Sync>(&self, native: &Volume<T>) -> Volume<T> {
        let shape = self.ras_shape(native.shape);
        let from = self.ras_strides(native.shape, strides(native.shape));
        let data = gather(shape, from, |at| native.data[at]);
        Volume { shape, data, affine: self.ras_affine(&native.affine, native.shape) }
    }

    /// Where RAS+ voxels lie in memory that has the native axes `step` elements apart.
    pub(crate) fn ras_strides(&self, native_shape: [usize; 3], step: [isize; 3]) -> Strides {
        let mut ras = Strides { first: 0, step: [0; 3] };
        for a in 0..3 {
            ras.step[self.axis[a]] = if self.flip[a] { -step[a] } else { step[a] };
            ras.first += if self.flip[a] { step[a] as usize * (native_shape[a] - 1) } else { 0 };
        }
        ras
    }

    /// Affine of the RAS+ volume of a native one.
    pub fn ras_affine(&self, native: &Affine, native_shape: [usize; 3]) -> Affine {
        affine::mul(native, &self.ras_to_native(native_shape))
    }

    /// Back from RAS+ to native order.
    pub fn undo<T: Copy + Default + Send + Sync>(&self, ras: &Volume<T>) -> Volume<T> {
        let shape = self.axis.map(|r| ras.shape[r]);
        let stride = strides(ras.shape);
        let mut from = Strides { first: 0, step: [0; 3] };
        for a in 0..3 {
            let step = stride[self.axis[a]];
            from.step[a] = if self.flip[a] { -step } else { step };
            from.first += if self.flip[a] { step as usize * (shape[a] - 1) } else { 0 };
        }
        let data = gather(shape, from, |at| ras.data[at]);
        Volume { shape, data, affine: affine::mul(&ras.affine, &self.native_to_ras(shape)) }
    }

    /// Shape in RAS+ order of a native shape.
    pub fn ras_shape(&self, native: [usize; 3]) -> [usize; 3] {
        let mut shape = [0; 3];
        (0..3).for_each(|a| shape[self.axis[a]] = native[a]);
        shape
    }

    /// RAS+ index of a native voxel of a volume of `native_shape`.
    pub fn ras_index(&self, voxel: [usize; 3], native_shape: [usize; 3]) -> [usize; 3] {
        let mut index = [0; 3];
        for a in 0..3 {
            index[self.axis[a]] = if self.flip[a] { native_shape[a] - 1 - voxel[a] } else { voxel[a] };
        }
        index
    }

    /// Voxel map RAS+ to native (nibabel `inv_ornt_aff`).
    fn ras_to_native(&self, native_shape: [usize; 3]) -> Affine {
        let mut map = [[0.0; 4]; 4];
        map[3][3] = 1.0;
        for a in 0..3 {
            map[a][self.axis[a]] = if self.flip[a] { -1.0 } else { 1.0 };
            map[a][3] = if self.flip[a] { native_shape[a] as f64 - 1.0 } else { 0.0 };
        }
        map
    }

    /// Voxel map native to RAS+.
    fn native_to_ras(&self, native_shape: [usize; 3]) -> Affine {
        let mut map = [[0.0; 4]; 4];
        map[3][3] = 1.0;
        for a in 0..3 {
            map[self.axis[a]][a] = if self.flip[a] { -1.0 } else { 1.0 };
            map[self.axis[a]][3] = if self.flip[a] { native_shape[a] as f64 - 1.0 } else { 0.0 };
        }
        map
    }
}

/// Voxels from one index to the next along each axis, the last one fastest.
pub(super) fn strides([_, n1, n2]: [usize; 3]) -> [isize; 3] {
    [(n1 * n2) as isize, n2 as isize, 1]
}
