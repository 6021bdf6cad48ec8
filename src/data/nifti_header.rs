//! The header of a NIfTI-1 or NIfTI-2 file: parsing, checking, and the affine it stands for.

use serde::{Deserialize, Serialize};

use super::volume::Affine;

/// Type of the stored voxels: the ten scalar types of NIfTI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scalar {
    /// Unsigned 8 bit.
    U8,
    /// Signed 8 bit.
    I8,
    /// Unsigned 16 bit.
    U16,
    /// Signed 16 bit.
    I16,
    /// Unsigned 32 bit.
    U32,
    /// Signed 32 bit.
    I32,
    /// Unsigned 64 bit.
    U64,
    /// Signed 64 bit.
    I64,
    /// IEEE single.
    F32,
    /// IEEE double.
    F64,
}

/// What a file says about its voxels, in the file's own terms, and the affine that follows from it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// 1 or 2: the NIfTI version of the file.
    pub version: u8,
    /// Voxels along i, j, k.
    pub shape: [usize; 3],
    /// Type of the stored voxels.
    pub scalar: Scalar,
    /// (scl_slope, scl_inter), where the header asks for scaling.
    pub scaling: Option<(f64, f64)>,
    /// qfac, then the spacing along each dimension.
    pub pixdim: [f64; 8],
    /// What the quaternion's space is; 0: there is none.
    pub qform_code: i32,
    /// What the affine rows' space is; 0: there are none.
    pub sform_code: i32,
    /// Quaternion b, c, d of the qform.
    pub quatern: [f64; 3],
    /// Translation of the qform.
    pub qoffset: [f64; 3],
    /// The three rows of the sform.
    pub srow: [[f64; 4]; 3],
    /// Units of space (bits 0-2) and time (bits 3-5).
    pub xyzt_units: i32,
    /// Free text of at most 80 bytes.
    pub descrip: String,
    /// Voxel to world after the rules of nibabel and MONAI: sform, else qform, else spacing alone.
    pub affine: Affine,
}
