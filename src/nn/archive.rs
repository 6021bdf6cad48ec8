//! The stored entries of a zip archive, as ranges of its bytes.
//!
//! Only what `torch.save` writes: no compression, no encryption, less than 4 GiB (below which torch's zip64 record
//! repeats what the plain one says). Format: PKWARE's APPNOTE 4.3. The zip crate's reader is not used because it
//! refuses one of torch's own files and would copy every entry; its writer is, in [`super::pt_write`].

use std::collections::HashMap;
use std::ops::Range;

use super::pickle_class::Refusal;
use super::state_dict::shown;

/// An archive in memory.
pub(super) struct Archive<'a> {
    bytes: &'a [u8],
    entries: HashMap<String, Entry>,
}

struct Entry {
    range: Range<usize>,
    crc: u32,
    /// Neither compressed nor encrypted.
    plain: bool,
}

/// Bytes of a central directory entry, a local header and the end record, without their names and comments.
const CENTRAL: usize = 46;
const LOCAL: usize = 30;
const END: usize = 22;

impl<'a> Archive<'a> {
    /// Reads the directory. Entries may not overlap: a small file could claim any amount of data.
    pub(super) fn open(bytes: &'a [u8]) -> Result<Self, Refusal> {
        let cut = "the zip archive is damaged or cut short";
        let end = end_record(bytes).ok_or(cut)?;
        let count = u16_at(end, 10).ok_or(cut)?;
        let mut at = size_at(end, 16).ok_or(cut)?;
        if count == u16::MAX || at == u32::MAX as usize {
            return Err("the zip archive is larger than 4 GiB, which no such network is".into());
        }
        let mut entries = HashMap::new();
        let mut total = 0usize;
        for _ in 0..count {
            let head = bytes.get(at..).filter(|head| head.starts_with(b"PK\x01\x02")).ok_or(cut)?;
            let name_length = usize::from(u16_at(head, 28).ok_or(cut)?);
            let name = head.get(CENTRAL..CENTRAL + name_length).ok_or(cut)?;
            let name = String::from_utf8_lossy(name).into_owned();
            // Refused when it is read: a TorchScript archive, to be named as such, compresses its code.
            let plain = u16_at(head, 8).ok_or(cut)? & 1 == 0 && u16_at(head, 10) == Some(0);
            let crc = u32_at(head, 16).ok_or(cut)?;
            let size =
                size_at(head, 20).filter(|&size| !plain || size_at(head, 24) == Some(size)).ok_or(cut)?;
            let start = content_start(bytes, size_at(head, 42).ok_or(cut)?).ok_or(cut)?;
            let range = start..start.checked_add(size).filter(|&end| end <= bytes.len()).ok_or(cut)?;
            total += size;
            if total > bytes.len() {
                return Err("entries of the zip archive overlap".into());
            }
            entries.insert(name, Entry { range, crc, plain });
            let tail = usize::from(u16_at(head, 30).ok_or(cut)?) + usize::from(u16_at(head, 32).ok_or(cut)?);
            at += CENTRAL + name_length + tail;
        }
        Ok(Archive { bytes, entries })
    }

    /// Names of the entries, in no order.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The content of the entry called `name`, if there is one. torch can be told not to compute checksums; it writes
    /// 0 then.
    pub(super) fn content(&self, name: &str) -> Result<Option<&'a [u8]>, Refusal> {
        let Some(entry) = self.entries.get(name) else { return Ok(None) };
        if !entry.plain {
            return Err(format!(
                "its entry {} is compressed or encrypted, which torch.save never does: store it plainly (unzip, then \
                 zip -0 -r)",
                shown(name)
            ));
        }
        let content = &self.bytes[entry.range.clone()];
        let mut crc = flate2::Crc::new();
        crc.update(content);
        if entry.crc != 0 && crc.sum() != entry.crc {
            return Err(format!(
                "the checksum of its entry {} does not match: the file is damaged",
                shown(name)
            ));
        }
        Ok(Some(content))
    }
}

/// The end record: it lies before a comment whose length it states.
fn end_record(bytes: &[u8]) -> Option<&[u8]> {
    let last = bytes.len().checked_sub(END)?;
    (last.saturating_sub(u16::MAX.into())..=last).rev().map(|at| &bytes[at..]).find(|tail| {
        tail.starts_with(b"PK\x05\x06")
            && u16_at(tail, 20).is_some_and(|n| tail.len() == END + usize::from(n))
    })
}

/// Where the content of the entry with the local header at `at` begins.
fn content_start(bytes: &[u8], at: usize) -> Option<usize> {
    let head = bytes.get(at..).filter(|head| head.starts_with(b"PK\x03\x04"))?;
    Some(at + LOCAL + usize::from(u16_at(head, 26)?) + usize::from(u16_at(head, 28)?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes[at.min(bytes.len())..].first_chunk().map(|b| u16::from_le_bytes(*b))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes[at.min(bytes.len())..].first_chunk().map(|b| u32::from_le_bytes(*b))
}

fn size_at(bytes: &[u8], at: usize) -> Option<usize> {
    u32_at(bytes, at).and_then(|v| usize::try_from(v).ok())
}
