//! Where the voxels of a resampled grid lie, and what they hold.

use serde::{Deserialize, Serialize};

use super::volume::{Affine, Volume};
use crate::error::{Error, Result};

/// Resampling of one grid onto another (MONAI `SpatialResample`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Resampling {
    /// Shape of the source.
    pub in_shape: [usize; 3],
    /// Shape of the result.
    pub out_shape: [usize; 3],
    /// Affine of the result.
    pub out_affine: Affine,
    /// Output voxel to input voxel.
    pub xform: Affine,
    /// The same between normalised coordinates, axes reversed (k, j, i) as torch's affine_grid takes it.
    pub theta: Affine,
    /// Whether MONAI's 1e-3 rule leaves data and affine as they are.
    pub identity: bool,
}

/// Output grid of MONAI's `Spacingd`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SpacingPlan {
    /// Column norms of the input affine, mm.
    pub in_spacing: [f64; 3],
    /// Target spacing after the 1e-3 rule, mm.
    pub used_pixdim: [f64; 3],
    /// Rotation times spacing, without translation (MONAI `zoom_affine`).
    pub zoom_affine: Affine,
    /// World position of output voxel 0, mm.
    pub offset: [f64; 3],
    /// The resampling itself.
    pub resampling: Resampling,
}

impl SpacingPlan {
    /// Plans `Spacingd(pixdim = spacing_mm)` for a grid.
    pub fn new(_shape: [usize; 3], _affine: &Affine, _spacing_mm: [f64; 3]) -> Result<SpacingPlan> {
        Err(Error::Internal("not yet".into()))
    }
}

impl Resampling {
    /// Resampling from (`in_shape`, `in_affine`) to (`out_shape`, `out_affine`).
    pub fn new(
        _in_shape: [usize; 3],
        _in_affine: &Affine,
        _out_shape: [usize; 3],
        _out_affine: &Affine,
    ) -> Result<Resampling> {
        Err(Error::Internal("not yet".into()))
    }

    /// Source coordinates before the border clamp along one output axis, the other indices 0.
    pub fn src_coord_axis(&self, _axis: usize) -> Vec<f64> {
        Vec::new()
    }
}

/// Trilinear, float64 coordinates, float32 result.
pub fn resample_linear(volume: &Volume<f32>, _to: &Resampling) -> Volume<f32> {
    volume.clone()
}

/// Nearest neighbour.
pub fn resample_nearest(volume: &Volume<u8>, _to: &Resampling) -> Volume<u8> {
    volume.clone()
}
