//! The bytes of a NIfTI header as named numbers: one table a version, for reading and for writing.
//!
//! Offsets and types are those of nifti1.h and nifti2.h. Every field fits an f64, so there is one getter and one
//! setter; a NIfTI-2 dimension above 2^53 loses bits but stays far beyond anything a file could hold.

/// How a number is stored.
#[derive(Clone, Copy, Debug)]
enum Kind {
    U8,
    I16,
    I32,
    I64,
    F32,
    F64,
}

/// A number, or the first of several, in a header.
#[derive(Clone, Copy, Debug)]
pub struct Field(usize, Kind);

/// Where a version of NIfTI keeps what this program uses.
#[derive(Debug)]
pub struct Fields {
    /// Bytes of the header.
    pub size: usize,
    /// Offset of the magic.
    pub magic: usize,
    /// Magic of a file that holds its voxels itself.
    pub single: &'static [u8],
    /// Magic of a header whose voxels are in an .img file.
    pub pair: &'static [u8],
    /// Offset of the 80 bytes of free text.
    pub descrip: usize,
    /// Number of dimensions, then their lengths (8).
    pub dim: Field,
    /// What the voxels mean; 3000 to 3099 is CIFTI.
    pub intent_code: Field,
    /// Code of the voxels' type.
    pub datatype: Field,
    /// Bits a voxel.
    pub bitpix: Field,
    /// qfac, then spacings (8).
    pub pixdim: Field,
    /// First byte of the voxels.
    pub vox_offset: Field,
    /// Scaling factor.
    pub scl_slope: Field,
    /// Scaling offset.
    pub scl_inter: Field,
    /// Units of space and time.
    pub xyzt_units: Field,
    /// Meaning of the qform.
    pub qform_code: Field,
    /// Meaning of the sform.
    pub sform_code: Field,
    /// Quaternion b, c, d.
    pub quatern: Field,
    /// Translation of the qform (3).
    pub qoffset: Field,
    /// Rows of the sform (12).
    pub srow: Field,
}

/// NIfTI-1, 348 bytes.
pub static NIFTI1: Fields = Fields {
    size: 348,
    magic: 344,
    single: b"n+1\0",
    pair: b"ni1\0",
    descrip: 148,
    dim: Field(40, Kind::I16),
    intent_code: Field(68, Kind::I16),
    datatype: Field(70, Kind::I16),
    bitpix: Field(72, Kind::I16),
    pixdim: Field(76, Kind::F32),
    vox_offset: Field(108, Kind::F32),
    scl_slope: Field(112, Kind::F32),
    scl_inter: Field(116, Kind::F32),
    xyzt_units: Field(123, Kind::U8),
    qform_code: Field(252, Kind::I16),
    sform_code: Field(254, Kind::I16),
    quatern: Field(256, Kind::F32),
    qoffset: Field(268, Kind::F32),
    srow: Field(280, Kind::F32),
};

/// NIfTI-2, 540 bytes.
pub static NIFTI2: Fields = Fields {
    size: 540,
    magic: 4,
    single: b"n+2\0\r\n\x1a\n",
    pair: b"ni2\0\r\n\x1a\n",
    descrip: 240,
    dim: Field(16, Kind::I64),
    intent_code: Field(504, Kind::I32),
    datatype: Field(12, Kind::I16),
    bitpix: Field(14, Kind::I16),
    pixdim: Field(104, Kind::F64),
    vox_offset: Field(168, Kind::I64),
    scl_slope: Field(176, Kind::F64),
    scl_inter: Field(184, Kind::F64),
    xyzt_units: Field(500, Kind::I32),
    qform_code: Field(344, Kind::I32),
    sform_code: Field(348, Kind::I32),
    quatern: Field(352, Kind::F64),
    qoffset: Field(376, Kind::F64),
    srow: Field(400, Kind::F64),
};

/// The `index`-th number of a field. `bytes` must hold the whole header.
pub fn get(bytes: &[u8], big_endian: bool, Field(at, kind): Field, index: usize) -> f64 {
    fn load<const W: usize>(bytes: &[u8], big_endian: bool, at: usize) -> [u8; W] {
        let mut le: [u8; W] = std::array::from_fn(|i| bytes[at + i]);
        if big_endian {
            le.reverse();
        }
        le
    }
    match kind {
        Kind::U8 => f64::from(bytes[at + index]),
        Kind::I16 => f64::from(i16::from_le_bytes(load(bytes, big_endian, at + 2 * index))),
        Kind::I32 => f64::from(i32::from_le_bytes(load(bytes, big_endian, at + 4 * index))),
        Kind::I64 => i64::from_le_bytes(load(bytes, big_endian, at + 8 * index)) as f64,
        Kind::F32 => f64::from(f32::from_le_bytes(load(bytes, big_endian, at + 4 * index))),
        Kind::F64 => f64::from_le_bytes(load(bytes, big_endian, at + 8 * index)),
    }
}

/// Stores the `index`-th number of a field, little-endian.
pub fn put(bytes: &mut [u8], Field(at, kind): Field, index: usize, value: f64) {
    let mut store = |width: usize, le: &[u8]| {
        bytes[at + width * index..at + width * (index + 1)].copy_from_slice(le);
    };
    match kind {
        Kind::U8 => store(1, &[value as u8]),
        Kind::I16 => store(2, &(value as i16).to_le_bytes()),
        Kind::I32 => store(4, &(value as i32).to_le_bytes()),
        Kind::I64 => store(8, &(value as i64).to_le_bytes()),
        Kind::F32 => store(4, &(value as f32).to_le_bytes()),
        Kind::F64 => store(8, &value.to_le_bytes()),
    }
}
