//! Where the voxels of a resampled grid lie: MONAI's `Spacingd` and `SpatialResample`. What they hold is
//! [`interpolate`](super::interpolate)'s.
//!
//! MONAI calls torch's affine_grid and grid_sample (align_corners False, border padding) in float64. The same
//! operations in the same order, without fused multiply-add, give the same float32 images and, off exact
//! half-way ties, the same labels:
//!
//! ```text
//! base_a(o) = linspace(-1, 1, m_a)[o] · (m_a - 1) / m_a           per output axis a of m_a voxels
//! g = theta · (base_k, base_j, base_i, 1)                          torch counts axes from the last
//! x_a = ((g_a + 1) · n_a - 1) / 2, clamped to [0, n_a - 1]         source voxel on an axis of n_a voxels
//! ```

use serde::{Deserialize, Serialize};

use super::affine::{self, Matrix};
use super::volume::Affine;
use crate::error::{Error, Result};

/// MONAI's AFFINE_TOL, in mm for spacings and in voxels for transforms.
const AFFINE_TOL: f64 = 1e-3;

/// A resampled volume above this many voxels (8 GiB of float32) is a wrong header, not a CT.
const MAX_VOXELS: f64 = (1u64 << 31) as f64;

/// So is one of more than this many voxels (256 MiB) that has this many times its source's: a header of a few bytes
/// must not claim gigabytes. 64 is spacings of 6 x 6 x 8 mm made 1.5 x 1.5 x 2.
const FREE_VOXELS: f64 = (1u64 << 26) as f64;
const MAX_GROWTH: f64 = 64.0;

/// Resampling of one grid onto another (MONAI `SpatialResample`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Resampling {
    /// Shape of the source.
    pub in_shape: [usize; 3],
    /// Shape of the result.
    pub out_shape: [usize; 3],
    /// Affine of the source.
    pub in_affine: Affine,
    /// Affine of the result: in_affine · xform as MONAI tracks it, or in_affine where nothing is resampled.
    pub out_affine: Affine,
    /// Output voxel to input voxel.
    pub xform: Affine,
    /// The same between normalised coordinates, axes reversed (k, j, i) as torch's affine_grid takes it.
    pub theta: Affine,
    /// Whether MONAI's 1e-3 rule leaves data and affine as they are.
    pub identity: bool,
}

/// Output grid of MONAI's `Spacingd` (diagonal False, scale_extent False).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SpacingPlan {
    /// Column norms of the input affine, mm.
    pub in_spacing: [f64; 3],
    /// Target spacing, or the input's where that is within 1e-3 mm of it.
    pub used_pixdim: [f64; 3],
    /// Rotation times spacing, without shear and translation (MONAI `zoom_affine`).
    pub zoom_affine: Affine,
    /// World position of output voxel 0, mm.
    pub offset: [f64; 3],
    /// The resampling itself.
    pub resampling: Resampling,
}

impl SpacingPlan {
    /// Plans `Spacingd(pixdim = spacing_mm)` for a grid of `shape` voxels at `affine`.
    ///
    /// Fails where the affine is singular or the result would be absurdly large.
    pub fn new(shape: [usize; 3], affine: &Affine, spacing_mm: [f64; 3]) -> Result<SpacingPlan> {
        let in_spacing = affine::column_norms(affine);
        let used_pixdim = std::array::from_fn(|i| {
            let (d, target) = (in_spacing[i], spacing_mm[i]);
            if target - AFFINE_TOL <= d && d <= target + AFFINE_TOL { d } else { target }
        });
        let zoom_affine = zoom_affine(affine, used_pixdim).ok_or_else(|| singular(affine))?;
        let (out_shape, offset) = shape_and_offset(shape, affine, &zoom_affine)?;
        let target = affine::with_translation(&affine::linear_part(&zoom_affine), offset);
        let resampling = Resampling::new(shape, affine, out_shape, &target)?;
        Ok(SpacingPlan { in_spacing, used_pixdim, zoom_affine, offset, resampling })
    }
}

fn singular(affine: &Affine) -> Error {
    Error::Usage(format!("the affine {affine:?} is singular, so the volume cannot be resampled"))
}

/// The affine's rotation with new voxel sizes (MONAI `zoom_affine`): RZS = R · ZS by Cholesky, ZS replaced.
fn zoom_affine(affine: &Affine, spacing: [f64; 3]) -> Option<Affine> {
    let rzs = affine::linear_part(affine);
    let zs = affine::transpose(&affine::cholesky(&affine::mul(&affine::transpose(&rzs), &rzs))?);
    let rotation = affine::mul(&rzs, &affine::solve(&zs, &affine::identity())?);
    Some(affine::with_translation(&affine::mul(&rotation, &affine::diagonal(spacing)), [0.0; 3]))
}

/// Output shape and world position of its voxel 0 (MONAI `compute_shape_offset`).
fn shape_and_offset(shape: [usize; 3], from: &Affine, to: &Affine) -> Result<([usize; 3], [f64; 3])> {
    let map = affine::solve(to, from).ok_or_else(|| singular(to))?;
    let corners = affine::corners(shape);
    let mapped = corners.map(|c| affine::position(&map, c));
    let low: [f64; 3] = std::array::from_fn(|a| mapped.iter().map(|m| m[a]).fold(f64::INFINITY, f64::min));
    let high: [f64; 3] =
        std::array::from_fn(|a| mapped.iter().map(|m| m[a]).fold(f64::NEG_INFINITY, f64::max));
    let size: [f64; 3] = std::array::from_fn(|a| (high[a] - low[a] + 1.0).round_ties_even());
    let voxels = size.iter().product::<f64>();
    let source = shape.iter().map(|&n| n as f64).product::<f64>();
    let most = (MAX_GROWTH * source).clamp(FREE_VOXELS, MAX_VOXELS);
    if !(1.0..=most).contains(&voxels) {
        return Err(Error::Usage(format!(
            "resampling {shape:?} voxels of {:?} mm to {:?} mm makes {voxels:e} voxels; check the spacing in the \
             header and --spacing",
            affine::column_norms(from),
            affine::column_norms(to)
        )));
    }
    // The first corner that lies lowest on all axes becomes voxel 0; a shear of 1e-8 voxels already leaves none.
    let lowest = |m: &[f64; 3]| (0..3).all(|a| (low[a] - m[a]).abs() <= 1e-8);
    let offset = match mapped.iter().position(lowest) {
        Some(corner) => affine::position(from, corners[corner]),
        None => {
            let centre = |affine: &Affine, size: [f64; 3]| {
                let half = size.map(|n| n / 2.0);
                let at = |r: usize| (0..3).fold(0.0, |sum, c| sum + affine[r][c] * half[c]);
                [at(0), at(1), at(2)]
            };
            let (a, b) = (centre(from, shape.map(|n| n as f64)), centre(to, size));
            std::array::from_fn(|r| a[r] + from[r][3] - b[r])
        }
    };
    Ok((size.map(|n| n as usize), offset))
}

impl Resampling {
    /// Resampling from (`in_shape`, `in_affine`) to (`out_shape`, `out_affine`). Fails where an affine is singular.
    pub fn new(
        in_shape: [usize; 3],
        in_affine: &Affine,
        out_shape: [usize; 3],
        out_affine: &Affine,
    ) -> Result<Resampling> {
        let xform = affine::solve(in_affine, out_affine).ok_or_else(|| singular(in_affine))?;
        let identity = in_shape == out_shape
            && (all_close(in_affine, out_affine) || all_close(&xform, &affine::identity()));
        let back = affine::solve(&normaliser(out_shape), &affine::identity())
            .ok_or_else(|| Error::Internal("an empty grid cannot be resampled".into()))?;
        let norm = affine::mul(&affine::mul(&normaliser(in_shape), &xform), &back);
        let reversed = |a: usize| if a < 3 { 2 - a } else { a };
        let theta = std::array::from_fn(|r| std::array::from_fn(|c| norm[reversed(r)][reversed(c)]));
        let tracked = if identity { *in_affine } else { affine::mul(in_affine, &xform) };
        Ok(Resampling {
            in_shape,
            out_shape,
            in_affine: *in_affine,
            out_affine: tracked,
            xform,
            theta,
            identity,
        })
    }

    /// The way back: from the result's grid to the source's, by MONAI's inverse of `SpatialResample`.
    pub fn inverse(&self) -> Result<Resampling> {
        Resampling::new(self.out_shape, &self.out_affine, self.in_shape, &self.in_affine)
    }

    /// Source coordinates before the border clamp along one output axis, the other indices 0.
    pub fn src_coord_axis(&self, axis: usize) -> Vec<f64> {
        let bases = self.out_shape.map(base);
        let along = |o: usize| {
            let mut b = bases.each_ref().map(|b| b[0]);
            b[axis] = bases[axis][o];
            self.source(b)[axis]
        };
        (0..self.out_shape[axis]).map(along).collect()
    }

    /// Where output voxels take their values from, as far as one axis alone decides it.
    pub fn positions(&self) -> Positions {
        let diagonal = (0..3).all(|r| (0..3).all(|c| r == c || self.theta[r][c] == 0.0));
        if self.identity {
            Positions::Source(self.out_shape.map(|m| (0..m).map(|o| o as f64).collect()))
        } else if diagonal {
            Positions::Source(std::array::from_fn(|axis| self.src_coord_axis(axis)))
        } else {
            Positions::Normalised(self.out_shape.map(base))
        }
    }

    /// Positions on the three lines of [`src_coord_axis`](Self::src_coord_axis) within 1e-9 of a half voxel, where
    /// rounding noise decides the nearest neighbour.
    pub fn near_ties(&self) -> usize {
        let tie = |x: &f64| ((x - x.floor()) - 0.5).abs() < 1e-9;
        (0..3).map(|axis| self.src_coord_axis(axis).iter().filter(|x| tie(x)).count()).sum()
    }

    /// Source coordinates (i, j, k), not clamped, of normalised output coordinates (i, j, k).
    #[inline]
    pub(super) fn source(&self, base: [f64; 3]) -> [f64; 3] {
        std::array::from_fn(|axis| {
            let t = &self.theta[2 - axis];
            let g = t[0] * base[2] + t[1] * base[1] + t[2] * base[0] + t[3];
            unnormalise(g, self.in_shape[axis])
        })
    }
}

/// Positions of output voxels along the three axes.
#[derive(Clone, Debug, PartialEq)]
pub enum Positions {
    /// Source coordinates before the border clamp, where each source axis depends on one output axis only.
    Source([Vec<f64>; 3]),
    /// Normalised output coordinates, which theta takes to the source together.
    Normalised([Vec<f64>; 3]),
}

/// Source voxel of a normalised coordinate on an axis of n voxels.
fn unnormalise(g: f64, n: usize) -> f64 {
    ((g + 1.0) * n as f64 - 1.0) / 2.0
}

/// numpy's allclose(a, b, rtol 1e-5, atol AFFINE_TOL).
fn all_close(a: &Affine, b: &Affine) -> bool {
    let close = |(a, b): (&f64, &f64)| (a - b).abs() <= AFFINE_TOL + 1e-5 * b.abs();
    a.as_flattened().iter().zip(b.as_flattened()).all(close)
}

/// Voxels -0.5..n-0.5 to -1..1 (MONAI `normalize_transform`).
fn normaliser(shape: [usize; 3]) -> Matrix<4> {
    let n = shape.map(|n| n as f64);
    affine::with_translation(&affine::diagonal(n.map(|n| 2.0 / n)), n.map(|n| 1.0 / n - 1.0))
}

/// torch's normalised voxel centres of an axis of m voxels: linspace(-1, 1, m) · (m - 1) / m, scalar path.
fn base(m: usize) -> Vec<f64> {
    if m == 1 {
        return vec![0.0];
    }
    let step = 2.0 / (m as f64 - 1.0);
    let line = |o: usize| if o < m / 2 { -1.0 + step * o as f64 } else { 1.0 - step * (m - 1 - o) as f64 };
    (0..m).map(|o| line(o) * (m as f64 - 1.0) / m as f64).collect()
}
