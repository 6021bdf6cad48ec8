//! How good a mask is: overlap and surface distance, number for number with MONAI 1.6.

pub mod distance_transform;
pub mod overlap;
pub mod surface;

use crate::data::volume::Volume;
use crate::error::{Error, Result};
use overlap::Overlap;
use surface::SurfaceDistances;

/// All scores of one case on one grid. Distances that do not exist (an empty mask) are NaN or infinite as MONAI's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scores {
    /// Voxel counts.
    pub overlap: Overlap,
    /// Dice; NaN if the truth is empty (MONAI `DiceMetric`).
    pub dice: f32,
    /// Larger of the two directed 95th percentiles of surface distance, mm.
    pub hd95_mm: f32,
    /// Largest surface distance, mm.
    pub hd_mm: f32,
    /// Mean of the surface distances of both directions, mm.
    pub assd_mm: f32,
    /// Share of both surfaces that lies within the tolerance of the other one.
    pub nsd: f32,
    /// Predicted volume, ml.
    pub pred_ml: f64,
    /// True volume, ml.
    pub truth_ml: f64,
}

/// Scores a predicted against a true mask (foreground: not 0) on the same grid; `nsd_tolerance_mm` as MONAI's
/// `class_thresholds`. Spacing and volume come from the truth's affine.
///
/// # Errors
/// Different shapes.
pub fn score(pred: &Volume<u8>, truth: &Volume<u8>, nsd_tolerance_mm: f64) -> Result<Scores> {
    if pred.shape != truth.shape {
        return Err(Error::Shape {
            op: "score",
            want: format!("a mask of {:?} voxels like the truth", truth.shape),
            got: format!("{:?}", pred.shape),
        });
    }
    let overlap = Overlap::count(&pred.data, &truth.data)?;
    let surfaces = SurfaceDistances::new(&pred.data, &truth.data, truth.shape, truth.spacing_mm())?;
    let voxel_ml = overlap::voxel_ml(&truth.affine);
    Ok(Scores {
        overlap,
        dice: overlap.dice(),
        hd95_mm: surfaces.hausdorff_percentile(95.0),
        hd_mm: surfaces.hausdorff(),
        assd_mm: surfaces.assd(),
        nsd: surfaces.nsd(nsd_tolerance_mm),
        pred_ml: overlap.pred as f64 * voxel_ml,
        truth_ml: overlap.truth as f64 * voxel_ml,
    })
}
