//! The header of a NIfTI-1 or NIfTI-2 file: parsing, checking, and the affine it stands for.
//!
//! The rules are nibabel's on opening a file and MONAI's on top (`correct_nifti_header_if_necessary`), so that a
//! file means the same here as in `LoadImaged`.

use serde::{Deserialize, Serialize};

use super::affine::{self, Matrix};
use super::nifti_fields::{self as fields, Field, Fields, NIFTI1, NIFTI2};
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

impl Scalar {
    /// (type, NIfTI datatype code, bytes).
    const CODES: [(Scalar, i32, usize); 10] = [
        (Scalar::U8, 2, 1),
        (Scalar::I16, 4, 2),
        (Scalar::I32, 8, 4),
        (Scalar::F32, 16, 4),
        (Scalar::F64, 64, 8),
        (Scalar::I8, 256, 1),
        (Scalar::U16, 512, 2),
        (Scalar::U32, 768, 4),
        (Scalar::I64, 1024, 8),
        (Scalar::U64, 1280, 8),
    ];

    /// NIfTI datatype code.
    pub fn code(self) -> i32 {
        Self::CODES.iter().find(|c| c.0 == self).expect("the table lists every type").1
    }

    /// Bytes a voxel.
    pub fn bytes(self) -> usize {
        Self::CODES.iter().find(|c| c.0 == self).expect("the table lists every type").2
    }

    /// The type of a datatype code, or what else the code means.
    fn from_code(code: f64) -> Result<Scalar, String> {
        if let Some(found) = Self::CODES.iter().find(|c| f64::from(c.1) == code) {
            return Ok(found.0);
        }
        Err(match code as i64 {
            32 | 1792 | 2048 => {
                "its voxels are complex numbers; save the magnitude as a scalar volume".into()
            }
            128 | 2304 => "its voxels are colours; save a scalar (grey) volume".into(),
            1536 => "its voxels are 128 bit floats; save it as float32".into(),
            _ => format!("its datatype code {code} is not one of NIfTI's scalar types"),
        })
    }
}

/// What a file says about its voxels, in the file's own terms, and the affine that follows from it.
///
/// Numbers are widened from the file's f32 (NIfTI-1) or kept (NIfTI-2); all are finite.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// 1 or 2: the NIfTI version of the file.
    pub version: u8,
    /// Voxels along i, j, k.
    pub shape: [usize; 3],
    /// Type of the stored voxels.
    pub scalar: Scalar,
    /// (scl_slope, scl_inter), where the header asks for a scaling that changes anything.
    pub scaling: Option<(f64, f64)>,
    /// qfac (1 or -1), then the spacing along each dimension.
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
    /// Free text, at most 80 characters of Latin-1.
    pub descrip: String,
    /// Voxel to world: the sform, else the qform, else the spacing alone.
    pub affine: Affine,
}

/// Where the voxels of a parsed header are stored, and how.
#[derive(Clone, Copy, Debug)]
pub(super) struct Storage {
    /// Byte order of header and voxels.
    pub big_endian: bool,
    /// Whether the voxels are in an .img file.
    pub pair: bool,
    /// First byte of the voxels in their file.
    pub offset: u64,
    /// Bytes of all voxels.
    pub bytes: u64,
}

impl Header {
    /// Parses the first bytes of a file (540, or all there are).
    ///
    /// An error is the part of a sentence that follows the file's name.
    pub(super) fn parse(bytes: &[u8]) -> Result<(Header, Storage), String> {
        let (version, big_endian) = recognise(bytes)?;
        let table = if version == 1 { &NIFTI1 } else { &NIFTI2 };
        if bytes.len() < table.size {
            return Err(format!("it ends inside its {}-byte header", table.size));
        }
        let magic = &bytes[table.magic..table.magic + table.single.len()];
        let pair = magic == table.pair;
        if !pair && magic != table.single {
            return Err("it has an Analyze 7.5 or foreign header, which does not say how the body lies; \
                        convert it to NIfTI"
                .into());
        }
        let number = |field: Field, index: usize| fields::get(bytes, big_endian, field, index);
        if (3000.0..3100.0).contains(&number(table.intent_code, 0)) {
            return Err("it is a CIFTI file, which holds no volume".into());
        }
        let scalar = Scalar::from_code(number(table.datatype, 0))?;
        let (shape, n_dims) = shape(std::array::from_fn(|i| number(table.dim, i)))?;
        let bits = number(table.bitpix, 0);
        if bits != 8.0 * scalar.bytes() as f64 {
            return Err(format!("its header gives {bits} bits to voxels of type {scalar:?}"));
        }
        let bytes_of_voxels = shape
            .iter()
            .try_fold(scalar.bytes() as u64, |bytes, &n| bytes.checked_mul(n as u64))
            .filter(|&bytes| bytes <= isize::MAX as u64 / 16)
            .ok_or_else(|| format!("its header claims {shape:?} voxels, more than any file holds"))?;

        let xform_code = |field: Field| match number(field, 0) {
            code if (0.0..=5.0).contains(&code) => code as i32,
            _ => 0,
        };
        let text = &bytes[table.descrip..table.descrip + 80];
        let mut header = Header {
            version,
            shape,
            scalar,
            scaling: scaling(number(table.scl_slope, 0), number(table.scl_inter, 0))?,
            pixdim: pixdim(std::array::from_fn(|i| number(table.pixdim, i)))?,
            qform_code: xform_code(table.qform_code),
            sform_code: xform_code(table.sform_code),
            quatern: std::array::from_fn(|i| number(table.quatern, i)),
            qoffset: std::array::from_fn(|i| number(table.qoffset, i)),
            srow: std::array::from_fn(|r| std::array::from_fn(|c| number(table.srow, 4 * r + c))),
            xyzt_units: number(table.xyzt_units, 0) as i32,
            descrip: text.iter().take_while(|&&b| b != 0).map(|&b| char::from(b)).collect(),
            affine: affine::identity(),
        };
        header.set_affine(n_dims)?;
        let offset = vox_offset(number(table.vox_offset, 0), pair, table)?;
        Ok((header, Storage { big_endian, pair, offset, bytes: bytes_of_voxels }))
    }

    /// Chooses the affine and mends forms that contradict the spacing, as nibabel and MONAI do.
    fn set_affine(&mut self, n_dims: usize) -> Result<(), String> {
        if !self.srow.iter().flatten().all(|v| v.is_finite()) {
            if self.sform_code != 0 {
                return Err("its sform holds numbers that are not finite".into());
            }
            self.srow = [[0.0; 4]; 3];
        }
        let mut qform = self.qform();
        if qform.is_none() {
            if self.sform_code == 0 && self.qform_code != 0 {
                return Err("the quaternion of its qform is not a rotation".into());
            }
            (self.quatern, self.qoffset, self.qform_code) = ([0.0; 3], [0.0; 3], 0);
        }
        let sform = [self.srow[0], self.srow[1], self.srow[2], [0.0, 0.0, 0.0, 1.0]];
        self.affine = match (self.sform_code, self.qform_code, qform) {
            (0, 0, _) | (0, _, None) => self.base_affine(),
            (0, _, Some(qform)) => qform,
            _ => sform,
        };
        // MONAI compares as many dimensions as the header has; with a fourth nothing ever agrees.
        if n_dims == 3 && !self.fits_spacing(&self.affine) {
            let s_fits = self.fits_spacing(&sform);
            let q_fits = qform.take_if(|q| self.fits_spacing(q));
            match (self.sform_code != 0, self.qform_code != 0, q_fits) {
                (true, _, Some(qform)) => {
                    self.srow = [qform[0], qform[1], qform[2]].map(|row| row.map(|v| self.stored(v)));
                    self.affine = [self.srow[0], self.srow[1], self.srow[2], qform[3]];
                }
                (false, true, None) if s_fits => {
                    self.set_qform(&sform)?;
                    self.affine = self.qform().ok_or("its sform is not close to a rotation")?;
                }
                _ => {
                    let norms = affine::column_norms(&self.affine);
                    for (i, norm) in norms.into_iter().enumerate() {
                        self.pixdim[i + 1] = self.stored(if norm == 0.0 { 1.0 } else { norm });
                    }
                }
            }
        }
        check_invertible(&self.affine)
    }

    /// numpy's `allclose` of an affine's voxel sizes (0 counts as 1) and the header's.
    fn fits_spacing(&self, affine: &Affine) -> bool {
        let norms = affine::column_norms(affine).map(|n| if n == 0.0 { 1.0 } else { n });
        (0..3).all(|i| (self.pixdim[i + 1] - norms[i]).abs() <= 1e-8 + 1e-5 * norms[i])
    }

    /// A number as the file would store it.
    fn stored(&self, value: f64) -> f64 {
        if self.version == 1 { f64::from(value as f32) } else { value }
    }

    /// Spacing alone: x flipped, world 0 in the image centre (nibabel `get_base_affine`).
    fn base_affine(&self) -> Affine {
        let zooms = [-self.pixdim[1], self.pixdim[2], self.pixdim[3]];
        let centre = std::array::from_fn(|i| -(self.shape[i] as f64 - 1.0) / 2.0 * zooms[i]);
        affine::with_translation(&affine::diagonal(zooms), centre)
    }

    /// The affine of the qform; `None` where its numbers describe no rotation (nibabel `get_qform`).
    fn qform(&self) -> Option<Affine> {
        let [b, c, d] = self.quatern;
        if !self.quatern.iter().chain(&self.qoffset).all(|v| v.is_finite()) {
            return None;
        }
        let w2 = 1.0 - (b * b + c * c + d * d);
        // Three units in the last place of what the quaternion was stored in.
        let threshold = 3.0 * if self.version == 1 { f64::from(f32::EPSILON) } else { f64::EPSILON };
        let a = match w2 {
            w2 if w2.abs() < threshold => 0.0,
            w2 if w2 < 0.0 => return None,
            w2 => w2.sqrt(),
        };
        let s = 2.0 / (a * a + b * b + c * c + d * d);
        let (x, y, z) = (b * s, c * s, d * s);
        let rotation = [
            [1.0 - (c * y + d * z), b * y - a * z, b * z + a * y],
            [b * y + a * z, 1.0 - (b * x + d * z), c * z - a * x],
            [b * z - a * y, c * z + a * x, 1.0 - (b * x + c * y)],
        ];
        let zooms = [self.pixdim[1], self.pixdim[2], self.pixdim[3] * self.pixdim[0]];
        Some(affine::with_translation(&affine::mul(&rotation, &affine::diagonal(zooms)), self.qoffset))
    }

    /// Writes an affine into qfac, spacing, quaternion and offset, dropping shear (nibabel `set_qform`).
    ///
    /// Fails with half a sentence where the affine is singular.
    pub(super) fn set_qform(&mut self, affine: &Affine) -> Result<(), String> {
        let zooms = affine::column_norms(affine);
        let mut r: Matrix<3> = std::array::from_fn(|i| std::array::from_fn(|j| affine[i][j] / zooms[j]));
        let qfac = if determinant(&r) > 0.0 { 1.0 } else { -1.0 };
        r.iter_mut().for_each(|row| row[2] *= qfac);
        let rotation = affine::polar_factor(&r).ok_or("its affine is singular")?;
        self.pixdim[0] = qfac;
        for i in 0..3 {
            self.pixdim[i + 1] = self.stored(zooms[i]);
            self.qoffset[i] = self.stored(affine[i][3]);
        }
        self.quatern = quaternion(&rotation).map(|v| self.stored(v));
        Ok(())
    }

    /// The header as bytes of its version, little-endian, for voxels of `scalar` stored unscaled in the same file.
    ///
    /// Fails with half a sentence where NIfTI-1 cannot say the shape.
    pub(super) fn encode(&self, scalar: Scalar) -> Result<Vec<u8>, String> {
        let table = if self.version == 1 { &NIFTI1 } else { &NIFTI2 };
        if self.version == 1 && self.shape.iter().any(|&n| n > i16::MAX as usize) {
            return Err(format!("{:?} voxels are more than a NIfTI-1 file can say", self.shape));
        }
        // Four bytes after the header say that there are no extensions; voxels start 16-byte aligned.
        let mut bytes = vec![0u8; (table.size + 4).next_multiple_of(16)];
        bytes[..4].copy_from_slice(&(table.size as u32).to_le_bytes());
        bytes[table.magic..table.magic + table.single.len()].copy_from_slice(table.single);
        let text = self.descrip.chars().take(80).map(|c| u8::try_from(c).unwrap_or(b'?'));
        bytes[table.descrip..].iter_mut().zip(text).for_each(|(to, from)| *to = from);

        let offset = bytes.len() as f64;
        let mut put = |field: Field, values: &[f64]| {
            for (index, &value) in values.iter().enumerate() {
                fields::put(&mut bytes, field, index, value);
            }
        };
        let [ni, nj, nk] = self.shape.map(|n| n as f64);
        put(table.dim, &[3.0, ni, nj, nk, 1.0, 1.0, 1.0, 1.0]);
        put(table.datatype, &[f64::from(scalar.code())]);
        put(table.bitpix, &[8.0 * scalar.bytes() as f64]);
        put(table.pixdim, &self.pixdim);
        put(table.vox_offset, &[offset]);
        put(table.scl_slope, &[1.0]);
        put(table.xyzt_units, &[f64::from(self.xyzt_units)]);
        put(table.qform_code, &[f64::from(self.qform_code)]);
        put(table.sform_code, &[f64::from(self.sform_code)]);
        put(table.quatern, &self.quatern);
        put(table.qoffset, &self.qoffset);
        put(table.srow, self.srow.as_flattened());
        Ok(bytes)
    }
}

/// Version and byte order from the size of the header, which every NIfTI file begins with.
fn recognise(bytes: &[u8]) -> Result<(u8, bool), String> {
    let not_nifti = |what: &str| Err(format!("it is {what}, not NIfTI; convert it to .nii.gz"));
    let Some(&first) = bytes.first_chunk::<4>() else {
        return Err("it is too short to be a NIfTI file".into());
    };
    match (u32::from_le_bytes(first), u32::from_be_bytes(first)) {
        (348, _) => Ok((1, false)),
        (_, 348) => Ok((1, true)),
        (540, _) => Ok((2, false)),
        (_, 540) => Ok((2, true)),
        (_, 1) => not_nifti("a FreeSurfer MGH volume"),
        _ if bytes.starts_with(b"NRRD") => not_nifti("an NRRD volume"),
        _ if bytes.get(128..132) == Some(b"DICM") => not_nifti("a DICOM file"),
        (size, _) => Err(format!("it is not a NIfTI file: it begins with {size}, not with 348 or 540")),
    }
}

/// Three dimensions of eight header numbers, and how many the header counts; trailing ones of length 1 go.
fn shape(dim: [f64; 8]) -> Result<([usize; 3], usize), String> {
    if !(1.0..=7.0).contains(&dim[0]) {
        return Err(format!("its header counts {} dimensions, not 1 to 7", dim[0]));
    }
    let dims = &dim[1..=dim[0] as usize];
    let listed = dims.iter().map(f64::to_string).collect::<Vec<_>>().join("x");
    if dims.iter().any(|&n| n < 1.0) {
        return Err(format!("its header claims {listed} voxels; every dimension must be at least 1"));
    }
    let used = dims.iter().rposition(|&n| n > 1.0).map_or(0, |last| last + 1);
    match dims.len() {
        3.. if used <= 3 => Ok(([dims[0] as usize, dims[1] as usize, dims[2] as usize], dims.len())),
        3.. => Err(format!("it holds {used}-dimensional data ({listed}); extract one 3-D volume")),
        _ => Err(format!("it holds an image ({listed}) and not a 3-D volume")),
    }
}

/// Slope and offset, unless they are absent (slope 0 or not finite) or change nothing.
fn scaling(slope: f64, inter: f64) -> Result<Option<(f64, f64)>, String> {
    if slope == 0.0 || !slope.is_finite() {
        return Ok(None);
    }
    if !inter.is_finite() {
        return Err(format!("its scl_inter is {inter} beside a scl_slope of {slope}"));
    }
    Ok(((slope, inter) != (1.0, 0.0)).then_some((slope, inter)))
}

/// qfac and spacings with nibabel's repairs: qfac is 1 unless -1, a spacing of 0 is 1, a negative one positive.
fn pixdim(mut pixdim: [f64; 8]) -> Result<[f64; 8], String> {
    if pixdim[0] != -1.0 {
        pixdim[0] = 1.0;
    }
    for spacing in &mut pixdim[1..4] {
        if !spacing.is_finite() {
            return Err(format!("its pixdim holds the spacing {spacing}"));
        }
        *spacing = if *spacing == 0.0 { 1.0 } else { spacing.abs() };
    }
    pixdim[4..].iter_mut().filter(|v| !v.is_finite()).for_each(|v| *v = 1.0);
    Ok(pixdim)
}

/// First byte of the voxels; 0 in a single file means right behind the header (nibabel would read the header).
fn vox_offset(offset: f64, pair: bool, table: &Fields) -> Result<u64, String> {
    let least = if pair { 0 } else { (table.size + 4) as u64 };
    if offset == 0.0 {
        return Ok(least);
    }
    if offset.fract() != 0.0 || !(least as f64..=i64::MAX as f64).contains(&offset) {
        return Err(format!("its vox_offset is {offset}; voxels cannot start before byte {least}"));
    }
    Ok(offset as u64)
}

/// Refuses affines that squash the volume: a determinant below 1e-6 of the product of the voxel edges.
fn check_invertible(affine: &Affine) -> Result<(), String> {
    let norms = affine::column_norms(affine);
    let finite = affine.iter().flatten().all(|v| v.is_finite());
    let unit = std::array::from_fn(|r| std::array::from_fn(|c| affine[r][c] / norms[c]));
    let flatness = determinant(&unit).abs();
    if finite && norms.iter().all(|n| (1e-9..1e9).contains(n)) && flatness > 1e-6 {
        return Ok(());
    }
    Err(format!("its affine {affine:?} is singular, so its voxels have no place in the world"))
}

fn determinant(m: &Matrix<3>) -> f64 {
    m[0][0] * (m[1][1] * m[2][2] - m[1][2] * m[2][1]) - m[0][1] * (m[1][0] * m[2][2] - m[1][2] * m[2][0])
        + m[0][2] * (m[1][0] * m[2][1] - m[1][1] * m[2][0])
}

/// b, c, d of the unit quaternion of a rotation whose a is not negative (Shepperd's choice of the largest part).
fn quaternion(m: &Matrix<3>) -> [f64; 3] {
    let squares = [
        1.0 + m[0][0] + m[1][1] + m[2][2],
        1.0 + m[0][0] - m[1][1] - m[2][2],
        1.0 - m[0][0] + m[1][1] - m[2][2],
        1.0 - m[0][0] - m[1][1] + m[2][2],
    ];
    let largest = (1..4).fold(0, |best, i| if squares[i] > squares[best] { i } else { best });
    // Row `largest` of 4·q·qᵀ, q = (a, b, c, d).
    let row = match largest {
        0 => [squares[0], m[2][1] - m[1][2], m[0][2] - m[2][0], m[1][0] - m[0][1]],
        1 => [m[2][1] - m[1][2], squares[1], m[1][0] + m[0][1], m[0][2] + m[2][0]],
        2 => [m[0][2] - m[2][0], m[1][0] + m[0][1], squares[2], m[2][1] + m[1][2]],
        _ => [m[1][0] - m[0][1], m[0][2] + m[2][0], m[2][1] + m[1][2], squares[3]],
    };
    let scale = (0.5 / squares[largest].sqrt()).copysign(if row[0] < 0.0 { -1.0 } else { 1.0 });
    [row[1] * scale, row[2] * scale, row[3] * scale]
}
