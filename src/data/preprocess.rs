//! read -> RAS -> spacing -> scale -> crop, and back.

use serde::{Deserialize, Serialize};

use super::orientation::Orientation;
use super::resample::Resampling;
use super::volume::{Affine, Volume};
use crate::config;
use crate::error::{Error, Result};

/// A box of voxels that may reach outside its volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CropBox {
    /// First voxel.
    pub start: [i64; 3],
    /// One past the last voxel.
    pub end: [i64; 3],
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
    /// Scaled intensities.
    pub image: Volume<f32>,
    /// 0/1 label on the same grid.
    pub label: Option<Volume<u8>>,
    /// The way back.
    pub geometry: Geometry,
}

/// The whole deterministic chain.
pub fn preprocess(
    _image: &Volume<f32>,
    _label: Option<&Volume<u8>>,
    _p: &config::Preprocess,
) -> Result<Prepared> {
    Err(Error::Internal("not yet".into()))
}

/// `ScaleIntensityRanged` to 0..1, clipped, in place.
pub fn scale_intensity(_data: &mut [f32], _hu_window: [f32; 2]) {}

/// Bounding box of `inside` grown by `margin`; `None` where nothing is inside.
pub fn foreground_box<T: Copy + Sync>(
    _volume: &Volume<T>,
    _inside: impl Fn(T) -> bool + Sync,
    _margin: usize,
    _allow_smaller: bool,
) -> Option<CropBox> {
    None
}

/// Cuts a box out, filling what lies outside with `pad`.
pub fn crop<T: Copy + Send + Sync>(volume: &Volume<T>, _to: &CropBox, _pad: T) -> Volume<T> {
    volume.clone()
}

impl Geometry {
    /// Both channels on the native grid: `sink(i, slab)` gets slab i (native j, k order), in order.
    pub fn invert_probabilities(
        &self,
        _prob: &[[f32; 2]],
        _sink: impl FnMut(usize, &[[f32; 2]]) -> Result<()>,
    ) -> Result<()> {
        Err(Error::Internal("not yet".into()))
    }

    /// The mask on the native grid: probability of channel 1 above that of channel 0.
    pub fn invert_argmax(&self, _prob: &[[f32; 2]]) -> Result<Vec<u8>> {
        Err(Error::Internal("not yet".into()))
    }

    /// A label on the native grid, nearest neighbour.
    pub fn invert_label(&self, _label: &[u8]) -> Result<Vec<u8>> {
        Err(Error::Internal("not yet".into()))
    }
}
