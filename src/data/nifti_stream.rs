//! The bytes of a NIfTI file from front to back, and the numbers that they are.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::gunzip::Gunzip;
use super::nifti_header::{Header, Scalar, Storage};
use super::transpose::{Strides, gather};
use crate::error::{Error, Result};

/// Deflate never expands more: 258 bytes from 2 bits.
const MAX_INFLATION: u64 = 1032;

/// Bytes accepted behind the voxels; they are read to verify the gzip checksum.
const MAX_TRAILING: u64 = 1 << 20;

/// Bytes that are decoded at once: they stay in the second-level cache, and inflate slows down below 100 KB.
const PART: usize = 1 << 18;

/// A file that is read from front to back, through gzip where it begins like gzip.
pub(super) struct Stream {
    path: PathBuf,
    reader: Box<dyn Read + Send>,
    gzip: bool,
    /// The most bytes that can come out.
    limit: u64,
    /// Bytes that may come out of a CT, which deflates 2- to 4-fold: memory beyond is taken as they turn up.
    usual: u64,
}

impl Stream {
    pub fn open(path: &Path) -> Result<Stream> {
        let refuse = |e| Error::io(path, "read")(e);
        // Opening a pipe would wait for somebody to write into it.
        if !std::fs::metadata(path).map_err(refuse)?.is_file() {
            return Err(Error::file(path, "is not a regular file: give a NIfTI file"));
        }
        let mut file = File::open(path).map_err(refuse)?;
        let size = file.metadata().map_err(refuse)?.len();
        let mut magic = Vec::new();
        file.by_ref().take(2).read_to_end(&mut magic).map_err(refuse)?;
        let gzip = magic == [0x1f, 0x8b];
        let whole = BufReader::with_capacity(1 << 20, std::io::Cursor::new(magic).chain(file));
        let reader: Box<dyn Read + Send> = if gzip { Box::new(Gunzip::new(whole)) } else { Box::new(whole) };
        let limit = if gzip { size.saturating_mul(MAX_INFLATION) } else { size };
        Ok(Stream { path: path.to_owned(), reader, gzip, limit, usual: size.saturating_mul(8).min(limit) })
    }

    fn fail(&self, source: std::io::Error) -> Error {
        if self.gzip {
            Error::file(
                &self.path,
                format!("its gzip stream is damaged ({source}); copy or compress it again"),
            )
        } else {
            Error::io(&self.path, "read")(source)
        }
    }

    /// The next bytes, fewer where the file ends.
    fn upto(&mut self, bytes: u64) -> Result<Vec<u8>> {
        let mut taken = Vec::with_capacity(bytes.min(self.usual) as usize);
        match self.reader.by_ref().take(bytes).read_to_end(&mut taken) {
            Ok(_) => Ok(taken),
            Err(source) => Err(self.fail(source)),
        }
    }

    /// The first 540 bytes: a header of either version.
    pub fn head(&mut self) -> Result<Vec<u8>> {
        self.upto(540)
    }

    /// Goes to the voxels of a file whose first bytes, `head`, were read before.
    pub fn voxels(mut self, header: Header, storage: Storage, head: &[u8]) -> Result<Voxels> {
        let end = storage.offset.saturating_add(storage.bytes);
        let (need, offset) = (storage.bytes, storage.offset);
        if end > self.limit {
            let there = match self.gzip {
                true => "more than a file of this size can hold compressed".into(),
                false => {
                    format!("but the file has {} bytes; it is cut off or its header is wrong", self.limit)
                }
            };
            let what = format!("its header promises {need} bytes of voxels from byte {offset} on, {there}");
            return Err(Error::file(&self.path, what));
        }
        let from_head = head.get(offset.min(head.len() as u64) as usize..).unwrap_or_default();
        let from_head = &from_head[..from_head.len().min(need as usize)];
        let gap = offset.saturating_sub(head.len() as u64);
        let skipped = std::io::copy(&mut self.reader.by_ref().take(gap), &mut std::io::sink());
        skipped.map_err(|source| self.fail(source))?;
        self.reader = Box::new(std::io::Cursor::new(from_head.to_owned()).chain(self.reader));
        Ok(Voxels { header, storage, stream: self, taken: 0, part: Vec::new() })
    }
}

/// The voxels of a file, which come next.
pub(super) struct Voxels {
    /// What the file says about them.
    pub header: Header,
    storage: Storage,
    stream: Stream,
    /// Bytes of them that were read.
    taken: u64,
    /// Those that are being decoded.
    part: Vec<u8>,
}

impl Voxels {
    /// Whether the file is as large as a CT of so many voxels is. One that is not may still hold them, but memory should
    /// be taken as they turn up.
    pub fn likely(&self) -> bool {
        self.storage.bytes <= self.stream.usual
    }

    /// The next voxels in the file's order, scaled.
    pub fn next(&mut self, into: &mut [f32]) -> Result<()> {
        let width = self.header.scalar.bytes();
        for voxels in into.chunks_mut(PART / width) {
            self.part.resize(voxels.len() * width, 0);
            let mut filled = 0;
            while filled < self.part.len() {
                match self.stream.reader.read(&mut self.part[filled..]) {
                    Ok(0) => return Err(self.cut_off()),
                    Ok(bytes) => (filled, self.taken) = (filled + bytes, self.taken + bytes as u64),
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(self.stream.fail(error)),
                }
            }
            self.make_little_endian();
            decode_in_order(&self.part, &self.header, voxels);
        }
        Ok(())
    }

    /// Reads to the end, once all voxels have come: there is the checksum of gzip.
    pub fn end(mut self) -> Result<Header> {
        if self.stream.gzip {
            self.stream.upto(MAX_TRAILING)?;
        }
        Ok(self.header)
    }

    /// All of them as they are stored, but little-endian.
    pub fn all(mut self) -> Result<(Header, Vec<u8>)> {
        let need = self.storage.bytes;
        self.part = self.stream.upto(need)?;
        self.taken = self.part.len() as u64;
        if self.taken < need {
            return Err(self.cut_off());
        }
        self.make_little_endian();
        let raw = std::mem::take(&mut self.part);
        Ok((self.end()?, raw))
    }

    fn cut_off(&self) -> Error {
        let Storage { bytes, offset, .. } = self.storage;
        let what =
            format!("its header promises {bytes} bytes of voxels from byte {offset} on, but there are");
        Error::file(&self.stream.path, format!("{what} {}; it is cut off", self.taken))
    }

    fn make_little_endian(&mut self) {
        let width = self.header.scalar.bytes();
        if self.storage.big_endian && width > 1 {
            let parts = self.part.par_chunks_mut(width << 16);
            parts.for_each(|part| part.chunks_mut(width).for_each(<[u8]>::reverse));
        }
    }
}

/// Does `$body` with `$stored` the voxels of `$raw` as the bytes that they are, and `$voxel` a function from those to a
/// value: stored · slope + inter in float64, rounded to float32.
macro_rules! with_decoder {
    ($raw:expr, $header:expr, |$stored:ident, $voxel:ident| $body:expr) => {
        match $header.scalar {
            Scalar::U8 => with_decoder!(u8, $raw, $header, |$stored, $voxel| $body),
            Scalar::I8 => with_decoder!(i8, $raw, $header, |$stored, $voxel| $body),
            Scalar::U16 => with_decoder!(u16, $raw, $header, |$stored, $voxel| $body),
            Scalar::I16 => with_decoder!(i16, $raw, $header, |$stored, $voxel| $body),
            Scalar::U32 => with_decoder!(u32, $raw, $header, |$stored, $voxel| $body),
            Scalar::I32 => with_decoder!(i32, $raw, $header, |$stored, $voxel| $body),
            Scalar::U64 => with_decoder!(u64, $raw, $header, |$stored, $voxel| $body),
            Scalar::I64 => with_decoder!(i64, $raw, $header, |$stored, $voxel| $body),
            Scalar::F32 => with_decoder!(f32, $raw, $header, |$stored, $voxel| $body),
            Scalar::F64 => with_decoder!(f64, $raw, $header, |$stored, $voxel| $body),
        }
    };
    ($scalar:ty, $raw:expr, $header:expr, |$stored:ident, $voxel:ident| $body:expr) => {{
        let $stored = $raw.as_chunks::<{ size_of::<$scalar>() }>().0;
        match $header.scaling {
            Some((slope, inter)) => {
                let $voxel = |bytes| (<$scalar>::from_le_bytes(bytes) as f64 * slope + inter) as f32;
                $body
            }
            None => {
                let $voxel = |bytes| <$scalar>::from_le_bytes(bytes) as f32;
                $body
            }
        }
    }};
}

/// File bytes to scaled f32, gathered to `shape` in `order`.
pub(super) fn decode(raw: &[u8], header: &Header, shape: [usize; 3], order: Strides) -> Vec<f32> {
    with_decoder!(raw, header, |stored, voxel| gather(shape, order, |at| voxel(stored[at])))
}

/// File bytes to as many scaled f32.
fn decode_in_order(raw: &[u8], header: &Header, into: &mut [f32]) {
    with_decoder!(raw, header, |stored, voxel| {
        into.iter_mut().zip(stored).for_each(|(into, &bytes)| *into = voxel(bytes));
    });
}
