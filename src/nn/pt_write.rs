//! Writes the `.pt` that `torch.load(weights_only=True)` and MONAI's CheckpointLoader take.
//!
//! The zip format of `torch.save` as [`super::pt_read`] describes it; same numbers, same bytes.

use std::io::{Cursor, Write};
use std::path::Path;

use super::publish::publish;
use super::state_dict::{Array, ArrayData, StateDict};
use crate::error::{Error, Result};

/// What the file's outermost object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrap {
    /// The state_dict itself: the bundle's `model.pt`, ignite's CheckpointSaver with one object.
    Bare,
    /// `{"model": state_dict}`.
    Model,
}

/// Writes `weights` to `path`, whole or not at all.
pub fn write_pt(path: &Path, weights: &StateDict, wrap: Wrap) -> Result<()> {
    let bytes = pt_bytes(weights, wrap)
        .map_err(|e| Error::Internal(format!("{}: cannot build the zip archive: {e}", path.display())))?;
    publish(path, &bytes)
}

/// torch maps storages into memory, so it aligns them.
const ALIGNMENT: u16 = 64;

/// The archive. Its folder is "archive" whatever the file is called, as torch has it for streams, so that a renamed
/// file has the same bytes.
fn pt_bytes(weights: &StateDict, wrap: Wrap) -> zip::result::ZipResult<Vec<u8>> {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let mut entry = |name: &str, content: &[u8]| {
        // The date of every entry is 1980-01-01: this feature set of the zip crate knows no clock.
        let options = zip::write::SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Stored)
            .last_modified_time(zip::DateTime::default())
            .large_file(content.len() > u32::MAX as usize)
            .with_alignment(ALIGNMENT);
        zip.start_file(format!("archive/{name}"), options)?;
        zip.write_all(content).map_err(zip::result::ZipError::from)
    };
    entry("data.pkl", &pickle(weights, wrap))?;
    entry(".format_version", b"1")?;
    entry(".storage_alignment", ALIGNMENT.to_string().as_bytes())?;
    entry("byteorder", b"little")?;
    for (i, (_, array)) in weights.iter().enumerate() {
        entry(&format!("data/{i}"), &array.to_le_bytes())?;
    }
    entry("version", b"3\n")?;
    Ok(zip.finish()?.into_inner())
}

/// The state_dict as a protocol 2 pickle, without memo: every object is written out.
fn pickle(weights: &StateDict, wrap: Wrap) -> Vec<u8> {
    let mut out = b"\x80\x02".to_vec();
    if wrap == Wrap::Model {
        out.push(b'}');
        text(&mut out, "model");
    }
    out.extend(ORDERED_DICT);
    out.push(b'(');
    for (key, (name, array)) in weights.iter().enumerate() {
        text(&mut out, name);
        tensor(&mut out, key, array);
    }
    out.push(b'u');
    if wrap == Wrap::Model {
        out.push(b's');
    }
    out.push(b'.');
    out
}

/// OrderedDict(): GLOBAL, EMPTY_TUPLE, REDUCE.
const ORDERED_DICT: &[u8] = b"ccollections\nOrderedDict\n)R";

/// _rebuild_tensor_v2(storage, offset 0, size, stride, requires_grad False, hooks OrderedDict()).
fn tensor(out: &mut Vec<u8>, key: usize, array: &Array) {
    let (storage, numel) = match &array.data {
        ArrayData::F32(v) => ("FloatStorage", v.len()),
        ArrayData::I64(v) => ("LongStorage", v.len()),
    };
    out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
    text(out, "storage");
    out.extend(format!("ctorch\n{storage}\n").bytes());
    text(out, &key.to_string());
    text(out, "cpu");
    int(out, numel);
    out.extend(b"tQ");
    int(out, 0);
    tuple(out, &array.shape);
    let strides: Vec<usize> = (1..=array.shape.len()).map(|i| array.shape[i..].iter().product()).collect();
    tuple(out, &strides);
    out.push(0x89);
    out.extend(ORDERED_DICT);
    out.extend(b"tR");
}

/// BINUNICODE.
fn text(out: &mut Vec<u8>, s: &str) {
    out.push(b'X');
    out.extend(u32::try_from(s.len()).expect("names are short").to_le_bytes());
    out.extend(s.bytes());
}

/// BININT where it fits, else LONG1 of eight bytes.
fn int(out: &mut Vec<u8>, v: usize) {
    match i32::try_from(v) {
        Ok(v) => {
            out.push(b'J');
            out.extend(v.to_le_bytes());
        }
        Err(_) => {
            out.extend(b"\x8a\x08");
            out.extend((v as u64).to_le_bytes());
        }
    }
}

fn tuple(out: &mut Vec<u8>, items: &[usize]) {
    out.push(b'(');
    items.iter().for_each(|&v| int(out, v));
    out.push(b't');
}
