//! Axis permutation and flips to RAS+ and back.

use serde::{Deserialize, Serialize};

use super::volume::{Affine, Volume};
use crate::error::{Error, Result};

/// How native axes became RAS axes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Orientation {
    /// RAS axis of each native axis.
    pub axis: [usize; 3],
    /// Whether a native axis runs against its RAS axis.
    pub flip: [bool; 3],
}

/// nibabel's `io_orientation`.
pub fn io_orientation(_affine: &Affine) -> Result<Orientation> {
    Err(Error::Internal("not yet".into()))
}

/// Flips, then permutes to RAS+ (MONAI `Orientationd`).
pub fn to_ras<T: Copy + Send + Sync>(_volume: &Volume<T>) -> Result<(Volume<T>, Orientation)> {
    Err(Error::Internal("not yet".into()))
}

impl Orientation {
    /// Back from RAS+ to native order.
    pub fn undo<T: Copy + Send + Sync>(&self, volume: &Volume<T>) -> Volume<T> {
        volume.clone()
    }
}
