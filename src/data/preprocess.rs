//! read -> RAS -> spacing -> scale -> crop to foreground, and the way back.
//!
//! RAS first, so that spacings and windows mean the same axes in every case; spacing before scaling, on HU, as the
//! bundle does it; scaling before the crop, because foreground is scaled intensity > 0 (HU above the window's floor).
//! [`Geometry`] undoes it, last first: pad with background -> resample to the native spacing -> native axes. Scaling
//! is not undone: what comes back are probabilities or labels.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::affine;
use super::interpolate::{
    Reached, Sampler, Stored, resample_linear, resample_nearest, tabulate, tabulate_rows,
};
use super::orientation::{Orientation, io_orientation, strides};
use super::resample::{Resampling, SpacingPlan};
use super::separable::{Separable, Source};
use super::volume::{Affine, Volume};
use crate::config;
use crate::error::{Error, Result};

/// Probabilities (background, spleen) of what was cropped away.
const BACKGROUND: [f32; 2] = [1.0, 0.0];

/// A box of voxels that may reach outside its volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CropBox {
    /// First voxel.
    pub start: [i64; 3],
    /// One past the last voxel.
    pub end: [i64; 3],
}

impl CropBox {
    /// Voxels along each axis.
    pub fn shape(&self) -> [usize; 3] {
        std::array::from_fn(|a| (self.end[a] - self.start[a]).max(0) as usize)
    }
}

/// Everything the way back needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Geometry {
    /// Shape of the file.
    pub native_shape: [usize; 3],
    /// Affine of the file.
    pub native_affine: Affine,
    /// How the axes became RAS.
    pub orientation: Orientation,
    /// From the RAS grid to the resampled one.
    pub resampling: Resampling,
    /// Foreground box on the resampled grid, where one was cut out.
    pub crop: Option<CropBox>,
}

/// A preprocessed case.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// Scaled intensities, 0 to 1.
    pub image: Volume<f32>,
    /// 0/1 label on the same grid.
    pub label: Option<Volume<u8>>,
    /// The way back.
    pub geometry: Geometry,
}

/// The whole deterministic chain of the bundle (LoadImaged comes before it, in [`super::nifti::read`]).
///
/// The label is taken to lie on the image's grid ([`super::nifti::check_same_grid`]) and goes the image's way with
/// nearest neighbours. An image without any foreground is not cropped, where MONAI would return a volume without
/// voxels. Fails on a label of another shape, a singular affine or an absurd spacing; the caller knows the file.
pub fn preprocess(
    image: &Volume<f32>,
    label: Option<&Volume<u8>>,
    p: &config::Preprocess,
) -> Result<Prepared> {
    if let Some(label) = label.filter(|l| l.shape != image.shape) {
        let (want, got) = (format!("a label of {:?} voxels", image.shape), format!("{:?}", label.shape));
        return Err(Error::Shape { op: "preprocess", want, got });
    }
    let geometry = Geometry::plan(image.shape, &image.affine, p.spacing_mm)?;
    let Geometry { orientation, resampling, .. } = &geometry;
    let scale = scale_intensity(p.hu_window);
    let scaled = match Separable::new(resampling) {
        Some(axes) => {
            let strides = orientation.ras_strides(image.shape, strides(image.shape));
            axes.resample(&Source { voxels: &image.data, strides, skipped: 0 }, scale)
        }
        None => {
            let mut resampled = resample_linear(&orientation.apply(image), resampling).data;
            resampled.par_iter_mut().for_each(|v| *v = scale(*v));
            resampled
        }
    };
    let label = label.map(|l| resample_nearest(&orientation.apply(l), resampling));
    Ok(prepared(scaled, label, geometry, p))
}

/// What is left once the image is resampled and scaled: the crop.
pub(super) fn prepared(
    scaled: Vec<f32>,
    label: Option<Volume<u8>>,
    geometry: Geometry,
    p: &config::Preprocess,
) -> Prepared {
    let Resampling { out_shape, out_affine, .. } = geometry.resampling;
    let image = Volume { shape: out_shape, data: scaled, affine: out_affine };
    let foreground = p.crop_foreground.then(|| foreground_box(&image, |x| x > 0.0, 0, false)).flatten();
    match foreground {
        Some(around) => Prepared {
            image: crop(&image, &around, 0.0),
            label: label.map(|l| crop(&l, &around, 0)),
            geometry: Geometry { crop: Some(around), ..geometry },
        },
        None => Prepared { image, label, geometry },
    }
}

/// Maps `hu_window` to 0..1 and clips (MONAI `ScaleIntensityRanged` with clip, in float32).
pub(super) fn scale_intensity([floor, ceiling]: [f32; 2]) -> impl Fn(f32) -> f32 + Sync + Copy {
    let width = ceiling - floor;
    move |x| ((x - floor) / width).clamp(0.0, 1.0)
}

/// Bounding box of the voxels that are `inside`, grown by `margin`; `None` where there are none.
///
/// With `allow_smaller` the box stays within the volume, else it may reach out (MONAI `CropForegroundd`).
pub fn foreground_box<T: Copy + Sync>(
    volume: &Volume<T>,
    inside: impl Fn(T) -> bool + Sync,
    margin: usize,
    allow_smaller: bool,
) -> Option<CropBox> {
    let [_, nj, nk] = volume.shape;
    let join = |a: Option<CropBox>, b: Option<CropBox>| match (a, b) {
        (Some(a), Some(b)) => Some(CropBox {
            start: std::array::from_fn(|x| a.start[x].min(b.start[x])),
            end: std::array::from_fn(|x| a.end[x].max(b.end[x])),
        }),
        (a, b) => a.or(b),
    };
    let row_box = |(row, voxels): (usize, &[T])| {
        let first = voxels.iter().position(|&v| inside(v))?;
        let last = voxels.iter().rposition(|&v| inside(v))?;
        let (i, j) = ((row / nj) as i64, (row % nj) as i64);
        Some(CropBox { start: [i, j, first as i64], end: [i + 1, j + 1, last as i64 + 1] })
    };
    let rows = volume.data.par_chunks(nk.max(1)).enumerate();
    let mut found = rows.map(row_box).reduce(|| None, join)?;
    for a in 0..3 {
        let (least, most) = if allow_smaller { (0, volume.shape[a] as i64) } else { (i64::MIN, i64::MAX) };
        found.start[a] = (found.start[a] - margin as i64).max(least);
        found.end[a] = (found.end[a] + margin as i64).min(most);
    }
    Some(found)
}

/// Cuts a box out, filling what lies outside the volume with `pad`; the affine follows.
pub fn crop<T: Copy + Default + Send + Sync>(volume: &Volume<T>, to: &CropBox, pad: T) -> Volume<T> {
    let n = volume.shape;
    let data = tabulate(to.shape(), |voxel| {
        let at: [i64; 3] = std::array::from_fn(|a| to.start[a] + voxel[a] as i64);
        if (0..3).all(|a| (0..n[a] as i64).contains(&at[a])) {
            volume.data[(at[0] as usize * n[1] + at[1] as usize) * n[2] + at[2] as usize]
        } else {
            pad
        }
    });
    let origin = affine::position(&volume.affine, to.start.map(|v| v as f64));
    let affine = affine::with_translation(&affine::linear_part(&volume.affine), origin);
    Volume { shape: to.shape(), data, affine }
}

impl Geometry {
    /// The way of a file of `shape` voxels at `affine` to RAS and `spacing_mm`, nothing cropped.
    ///
    /// Fails on a singular affine or an absurd spacing.
    pub fn plan(shape: [usize; 3], affine: &Affine, spacing_mm: [f64; 3]) -> Result<Self> {
        let orientation = io_orientation(affine)?;
        let ras_affine = orientation.ras_affine(affine, shape);
        let resampling = SpacingPlan::new(orientation.ras_shape(shape), &ras_affine, spacing_mm)?.resampling;
        Ok(Geometry { native_shape: shape, native_affine: *affine, orientation, resampling, crop: None })
    }

    /// Shape of the preprocessed volumes.
    pub fn prepared_shape(&self) -> [usize; 3] {
        self.crop.map_or(self.resampling.out_shape, |c| c.shape())
    }

    /// Probabilities (background, spleen) on the native grid, MONAI's `Invertd` with trilinear interpolation.
    ///
    /// `prob` holds the preprocessed grid, k fastest. `sink(i, slab)` gets native slab i, its rows j and voxels k, in
    /// order of i: no native-size float volume ever exists.
    pub fn invert_probabilities(
        &self,
        prob: &[[f32; 2]],
        mut sink: impl FnMut(usize, &[[f32; 2]]) -> Result<()>,
    ) -> Result<()> {
        let back = self.way_back(prob.len())?;
        let sampler = Sampler::new(&back, self.stored());
        let [ni, nj, nk] = self.native_shape;
        for i in 0..ni {
            let slab =
                tabulate([nj, nk, 1], |[j, k, _]| sampler.linear(prob, BACKGROUND, self.ras([i, j, k])));
            sink(i, &slab)?;
        }
        Ok(())
    }

    /// The mask on the native grid: 1 where the interpolated spleen probability is above the background's.
    ///
    /// [`invert_probabilities`](Self::invert_probabilities) and argmax in one pass, byte for byte; a draw is 0.
    ///
    /// Only voxels near spleen voxels are interpolated. Elsewhere the spleen is nowhere above the background in the cell
    /// around them, and as rounded sums of products with weights >= 0 never decrease when a value grows, it is not above
    /// it after interpolation either.
    pub fn invert_argmax(&self, prob: &[[f32; 2]]) -> Result<Vec<u8>> {
        let back = self.way_back(prob.len())?;
        let sampler = Sampler::new(&back, self.stored());
        let reached = sampler.reached(prob, |[background, spleen]| spleen > background);
        let argmax = |native: [usize; 3]| {
            let [background, spleen] = sampler.linear(prob, BACKGROUND, self.ras(native));
            u8::from(spleen > background)
        };
        let Some([along_i, along_j, along_k]) = self.native_bricks(&reached) else {
            return Ok(tabulate(self.native_shape, |voxel| {
                if reached.voxel(self.ras(voxel)) { argmax(voxel) } else { 0 }
            }));
        };
        // Voxels along k of one brick stand together.
        let mut k = 0;
        let runs = along_k.chunk_by(|a, b| a == b).map(|run| {
            k += run.len();
            (k - run.len()..k, run[0])
        });
        let runs: Vec<_> = runs.filter_map(|(run, brick)| Some((run, brick?))).collect();
        Ok(tabulate_rows(self.native_shape, |[i, j], row| {
            let Some((bi, bj)) = along_i[i].zip(along_j[j]) else { return };
            for (run, _) in runs.iter().filter(|(_, bk)| reached.brick_is(bi + bj + bk)) {
                run.clone().for_each(|k| row[k] = argmax([i, j, k]));
            }
        }))
    }

    /// [`Reached::along`] the native axes.
    fn native_bricks(&self, reached: &Reached) -> Option<[Vec<Option<usize>>; 3]> {
        let mut along = [Vec::new(), Vec::new(), Vec::new()];
        for (native, along) in along.iter_mut().enumerate() {
            *along = reached.along(self.orientation.axis[native])?;
            if self.orientation.flip[native] {
                along.reverse();
            }
        }
        Some(along)
    }

    /// A preprocessed label on the native grid, nearest neighbour: the round trip of the bundle's evaluate.json.
    pub fn invert_label(&self, label: &[u8]) -> Result<Vec<u8>> {
        let back = self.way_back(label.len())?;
        let sampler = Sampler::new(&back, self.stored());
        Ok(tabulate(self.native_shape, |voxel| sampler.nearest(label, 0, self.ras(voxel))))
    }

    fn way_back(&self, voxels: usize) -> Result<Resampling> {
        let shape = self.prepared_shape();
        if voxels != shape.iter().product::<usize>() {
            let (want, got) = (format!("{shape:?} voxels"), format!("{voxels}"));
            return Err(Error::Shape { op: "invert", want, got });
        }
        self.resampling.inverse()
    }

    fn stored(&self) -> Stored {
        Stored { start: self.crop.map_or([0; 3], |c| c.start), shape: self.prepared_shape() }
    }

    #[inline]
    fn ras(&self, native: [usize; 3]) -> [usize; 3] {
        self.orientation.ras_index(native, self.native_shape)
    }
}
