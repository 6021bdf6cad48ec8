//! One preprocessed case in one file that is mapped, not read.
//!
//! ```text
//! 0   magic, version        8 bytes
//! 8   length of the header  u64, little-endian as everything
//! 16  length of the file    u64
//! 24  blake3 of all that follows byte 64
//! 64  header                JSON: how it was made, grid, geometry, counts
//! ..  image                 f16 or f32, C order         2 or 4 bytes a voxel
//! ..  label                 u8, 0 or 1                  1 byte a voxel
//! ..  foreground            u32 flat C-order indices    4 bytes a voxel of label != 0
//! ..  background            u32 flat C-order indices    4 bytes a voxel of image > 0 and label = 0
//! ```
//! Header and sections begin at multiples of 64 bytes, gaps are zero. A case costs 3 bytes a voxel and 4 more a
//! voxel of the body: 4.1 to 4.9 bytes a voxel in all when cropped to the foreground (2.6 to 3.8 MB a small
//! phantom, 29 MB a 512 x 512 x 90 one), 2 more with an f32 image.
//!
//! The lists are those of the f32 image: an intensity that f16 rounds to 0 stays a candidate, as in MONAI.

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use half::f16;
use half::slice::HalfFloatSliceExt;
use memmap2::Mmap;
use serde::{Deserialize, Serialize};

use super::nifti_header;
use super::preprocess::{Geometry, Prepared};
use super::publish::publish;
use super::sampler::{self, Candidates, PatchSpec};
use super::volume::Affine;
use crate::config::{CacheDtype, Preprocess};
use crate::error::{Error, Result};

/// Magic and version of the layout above; another layout gets another number.
const MAGIC: [u8; 8] = *b"SPLHPC\x00\x01";
const PRELUDE: usize = 64;
const ALIGN: usize = 64;

/// Everything that decides what a cache file holds, besides the files themselves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CacheParams {
    /// The deterministic chain.
    pub preprocess: Preprocess,
    /// The label value that is the organ, as `nifti::label_from` takes it.
    pub label_value: Option<f32>,
    /// Precision of the stored image.
    pub dtype: CacheDtype,
}

/// How a cache file was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Made {
    /// Version of the preprocessing code.
    pub chain: u32,
    /// Parameters.
    pub params: CacheParams,
    /// Files it was made from: the image's, then the label's.
    pub sources: Vec<Source>,
}

/// A file as it was read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Source {
    /// Where it lay.
    pub path: String,
    /// Its size.
    pub bytes: u64,
    /// Its modification time: time since 1970.
    pub modified: Duration,
    /// Hash of its content, in hex.
    pub blake3: String,
}

/// The JSON header.
#[derive(Debug, Serialize, Deserialize)]
struct Header {
    name: String,
    made: Made,
    dtype: CacheDtype,
    shape: [usize; 3],
    affine: Affine,
    geometry: Geometry,
    native: nifti_header::Header,
    foreground: usize,
    background: usize,
}

/// Byte ranges of the sections.
struct Layout {
    image: Range<usize>,
    label: Range<usize>,
    fg: Range<usize>,
    bg: Range<usize>,
}

impl Layout {
    /// `None` where the numbers of a (damaged) header overflow.
    fn new(header: &Header, header_bytes: usize) -> Option<Self> {
        let voxels = header.shape.iter().try_fold(1usize, |n, &s| n.checked_mul(s))?;
        let mut end = PRELUDE.checked_add(header_bytes)?;
        let mut section = |items: usize, size: usize| {
            let start = end.checked_next_multiple_of(ALIGN)?;
            end = start.checked_add(items.checked_mul(size)?)?;
            Some(start..end)
        };
        Some(Layout {
            image: section(voxels, image_bytes(header.dtype))?,
            label: section(voxels, 1)?,
            fg: section(header.foreground, 4)?,
            bg: section(header.background, 4)?,
        })
    }
}

fn image_bytes(dtype: CacheDtype) -> usize {
    match dtype {
        CacheDtype::F16 => 2,
        CacheDtype::F32 => 4,
    }
}

/// A preprocessed case, mapped; its pages are shared with every process that maps it too.
#[derive(Debug)]
pub struct CachedCase {
    map: Mmap,
    path: PathBuf,
    header: Header,
    header_bytes: usize,
}

/// The image as it is stored.
#[derive(Clone, Copy, Debug)]
pub enum Image<'a> {
    /// Half precision.
    F16(&'a [f16]),
    /// Single precision.
    F32(&'a [f32]),
}

impl CachedCase {
    /// Maps a file and checks it whole: magic, length, checksum, header. One read of the file, which warms the
    /// page cache that training reads from.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let refuse = |what: &str| Error::file(path, format!("{what}; `spleen-hpc cache` makes it again"));
        let file = File::open(path).map_err(Error::io(path, "read"))?;
        // SAFETY: nothing here writes into a published cache file: a new one is renamed over it and the mapped
        // inode stays as it is. A foreign program that shortens it in place ends the process with SIGBUS, as it
        // would any that maps files; it cannot be guarded against from inside.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path, "map"))?;
        if map.len() < PRELUDE || map[..8] != MAGIC {
            return Err(refuse("is not a cache file of this version"));
        }
        let number = |at: usize| {
            let bytes = map[at..at + 8].try_into().expect("eight bytes");
            usize::try_from(u64::from_le_bytes(bytes)).unwrap_or(usize::MAX)
        };
        let (header_bytes, file_bytes) = (number(8), number(16));
        if file_bytes != map.len() {
            return Err(refuse("is cut off or has grown"));
        }
        if blake3::hash(&map[PRELUDE..]) != map[24..56] {
            return Err(refuse("is damaged (its checksum differs)"));
        }
        let header = PRELUDE
            .checked_add(header_bytes)
            .and_then(|end| map.get(PRELUDE..end))
            .and_then(|text| serde_json::from_slice::<Header>(text).ok())
            .ok_or_else(|| refuse("has an unreadable header"))?;
        if Layout::new(&header, header_bytes).is_none_or(|l| l.bg.end != map.len()) {
            return Err(refuse("has a header that does not fit its length"));
        }
        Ok(CachedCase { map, path: path.to_owned(), header, header_bytes })
    }

    /// Writes a case and maps it. Refuses a volume without voxels or with more than u32 can number.
    pub(super) fn write(
        path: &Path,
        name: &str,
        made: Made,
        native: nifti_header::Header,
        case: &Prepared,
    ) -> Result<Self> {
        let image = &case.image;
        let label =
            case.label.as_ref().ok_or_else(|| Error::Internal(format!("{name}: cached without a label")))?;
        if label.shape != image.shape {
            let shapes = (format!("a label of {:?}", image.shape), format!("{:?}", label.shape));
            return Err(Error::Shape { op: "cache", want: shapes.0, got: shapes.1 });
        }
        if image.is_empty() || u32::try_from(image.len()).is_err() {
            let what =
                format!("has {} voxels after preprocessing; between 1 and 2^32 can be cached", image.len());
            return Err(Error::file(&made.sources[0].path, what));
        }
        let (fg, bg) = candidates(&image.data, &label.data);
        let header = Header {
            name: name.to_owned(),
            dtype: made.params.dtype,
            made,
            shape: image.shape,
            affine: image.affine,
            geometry: case.geometry.clone(),
            native,
            foreground: fg.len(),
            background: bg.len(),
        };
        let text = serde_json::to_vec(&header).map_err(|e| Error::Internal(format!("{name}: {e}")))?;
        let mut half = Vec::new();
        let image: &[u8] = match header.dtype {
            CacheDtype::F32 => bytemuck::cast_slice(&image.data),
            CacheDtype::F16 => {
                half.resize(image.len(), f16::ZERO);
                half.convert_from_f32_slice(&image.data);
                bytemuck::cast_slice(&half)
            }
        };
        let sections = [&text[..], image, &label.data, bytemuck::cast_slice(&fg), bytemuck::cast_slice(&bg)];
        // Every section but the last is followed by zeros up to the next multiple of ALIGN.
        let gaps = [0, 1, 2, 3, 4].map(|i| match i {
            4 => 0,
            _ => sections[i].len().next_multiple_of(ALIGN) - sections[i].len(),
        });
        let zeros = [0u8; ALIGN];
        let mut hash = blake3::Hasher::new();
        let mut bytes = PRELUDE;
        for (section, gap) in sections.iter().zip(gaps) {
            hash.update(section).update(&zeros[..gap]);
            bytes += section.len() + gap;
        }
        publish(path, |file| {
            let mut prelude = [0u8; PRELUDE];
            prelude[..8].copy_from_slice(&MAGIC);
            prelude[8..16].copy_from_slice(&(text.len() as u64).to_le_bytes());
            prelude[16..24].copy_from_slice(&(bytes as u64).to_le_bytes());
            prelude[24..56].copy_from_slice(hash.finalize().as_bytes());
            file.write_all(&prelude)?;
            sections.iter().zip(gaps).try_for_each(|(section, gap)| {
                file.write_all(section)?;
                file.write_all(&zeros[..gap])
            })
        })?;
        Self::open(path)
    }

    fn section<T: bytemuck::AnyBitPattern>(&self, of: impl Fn(Layout) -> Range<usize>) -> &[T] {
        let layout = Layout::new(&self.header, self.header_bytes).expect("checked when it was opened");
        bytemuck::cast_slice(&self.map[of(layout)])
    }

    /// The image's file name without folder and ending.
    pub fn name(&self) -> &str {
        &self.header.name
    }

    /// The cache file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How it was made: parameters, files and their content.
    pub fn made(&self) -> &Made {
        &self.header.made
    }

    /// Voxels (D, H, W) of the preprocessed grid.
    pub fn shape(&self) -> [usize; 3] {
        self.header.shape
    }

    /// Voxel to world of the preprocessed grid.
    pub fn affine(&self) -> &Affine {
        &self.header.affine
    }

    /// The way back to the scan's own grid.
    pub fn geometry(&self) -> &Geometry {
        &self.header.geometry
    }

    /// The header of the scan.
    pub fn native(&self) -> &nifti_header::Header {
        &self.header.native
    }

    /// Scaled intensities, C order.
    pub fn image(&self) -> Image<'_> {
        match self.header.dtype {
            CacheDtype::F16 => Image::F16(self.section(|l| l.image)),
            CacheDtype::F32 => Image::F32(self.section(|l| l.image)),
        }
    }

    /// Scaled intensities in single precision, C order: a copy.
    pub fn image_f32(&self) -> Vec<f32> {
        match self.image() {
            Image::F16(v) => v.to_f32_vec(),
            Image::F32(v) => v.to_vec(),
        }
    }

    /// 0/1 label, C order.
    pub fn label(&self) -> &[u8] {
        self.section(|l| l.label)
    }

    /// Where patches may be centred.
    pub fn candidates(&self) -> Candidates<'_> {
        Candidates { shape: self.shape(), fg: self.section(|l| l.fg), bg: self.section(|l| l.bg) }
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> usize {
        self.map.len()
    }

    /// Cuts the patch `spec` (of this case) of size `patch` into `image_out` and `label_out`, C order, each of
    /// `patch.iter().product()` values.
    pub fn cut(&self, spec: &PatchSpec, patch: [usize; 3], image_out: &mut [f32], label_out: &mut [u8]) {
        let (label, at) = (self.label(), (spec.start, patch));
        match self.image() {
            Image::F16(v) => {
                sampler::cut((v, label), self.shape(), at, spec.shift, image_out, label_out);
            }
            Image::F32(v) => {
                sampler::cut((v, label), self.shape(), at, spec.shift, image_out, label_out);
            }
        }
    }
}

/// Flat indices of MONAI's `map_binary_to_indices` with image threshold 0: (label != 0, image > 0 elsewhere).
pub fn candidates(image: &[f32], label: &[u8]) -> (Vec<u32>, Vec<u32>) {
    let (mut fg, mut bg) = (Vec::new(), Vec::new());
    for (i, (&v, &l)) in image.iter().zip(label).enumerate() {
        match l {
            0 if v > 0.0 => bg.push(i as u32),
            0 => {}
            _ => fg.push(i as u32),
        }
    }
    (fg, bg)
}
