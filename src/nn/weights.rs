//! Weight files: safetensors both ways under MONAI's names, and reading whatever kind a file turns out to be.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::io::Write;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::Metadata as Header;
use serde_json::json;

use super::pt_read::{LEGACY_MAGIC, ZIP_MAGIC, read_pt};
use super::state_dict::{Array, StateDict, shown};
use crate::data::publish::publish;
use crate::error::{Error, Result};

/// What a safetensors file says about itself, text by text: config, recipe, commit, split.
pub type Metadata = BTreeMap<String, String>;

/// Names before which a checkpoint keeps what is not a weight.
pub(super) const OPTIMIZER_PREFIX: &str = "optim.";

/// The weights in `path`: a `torch.save` file, safetensors, or one of this program's checkpoints. The content
/// decides, not the name.
pub fn read_any(path: &Path) -> Result<StateDict> {
    Ok(read_with_metadata(path)?.0)
}

/// The same with what the file says about itself: nothing, if `torch.save` wrote it. Reads the file once, so it may be a pipe.
pub fn read_with_metadata(path: &Path) -> Result<(StateDict, Metadata)> {
    let mut file = File::open(path).map_err(Error::io(path, "read"))?;
    let mut head = Vec::new();
    Read::by_ref(&mut file)
        .take(LEGACY_MAGIC.len() as u64)
        .read_to_end(&mut head)
        .map_err(Error::io(path, "read"))?;
    // A 3 GB scan given by mistake is refused by its first bytes.
    let kind = recognise(path, &head)?;
    let len = file.metadata().map_err(Error::io(path, "read"))?.len() as usize;
    if kind == Kind::Safetensors && len > head.len() {
        return weights_of_safetensors(path, head.chain(file), len);
    }
    // Its tensors lie anywhere; or it is a pipe, of no known length.
    file.read_to_end(&mut head).map_err(Error::io(path, "read"))?;
    parse_any(path, &head)
}

/// [`read_any`] for a file that is in memory; `path` is only for messages.
pub fn from_bytes(path: &Path, bytes: &[u8]) -> Result<StateDict> {
    Ok(parse_any(path, bytes)?.0)
}

fn parse_any(path: &Path, bytes: &[u8]) -> Result<(StateDict, Metadata)> {
    match recognise(path, bytes)? {
        Kind::Torch => Ok((read_pt(path, bytes)?, Metadata::new())),
        Kind::Safetensors => weights_of_safetensors(path, bytes, bytes.len()),
    }
}

/// [`parse_safetensors`] without a checkpoint's optimizer state.
fn weights_of_safetensors(path: &Path, reader: impl Read, len: usize) -> Result<(StateDict, Metadata)> {
    let (mut weights, metadata) = parse_safetensors(path, reader, len)?;
    weights.retain(|name| !name.starts_with(OPTIMIZER_PREFIX));
    Ok((weights, metadata))
}

#[derive(PartialEq, Eq)]
enum Kind {
    Torch,
    Safetensors,
}

fn recognise(path: &Path, head: &[u8]) -> Result<Kind> {
    if head.starts_with(ZIP_MAGIC) || head.starts_with(LEGACY_MAGIC) {
        return Ok(Kind::Torch);
    }
    // Eight bytes of header length, then JSON.
    if head.get(8) == Some(&b'{') {
        return Ok(Kind::Safetensors);
    }
    let what = match head {
        [] => "the file is empty",
        [0x1f, 0x8b, ..] => "the file is compressed: gunzip it first",
        [0x80, ..] => "this pickle was not written by torch.save: save net.state_dict() with torch.save",
        _ => "this is no weight file: neither torch.save nor safetensors wrote it",
    };
    Err(Error::file(path, what))
}

/// Tensors (PyTorch's order where the names are MONAI's, else the file's) and metadata of a safetensors file.
pub fn read_safetensors(path: &Path) -> Result<(StateDict, Metadata)> {
    let bytes = std::fs::read(path).map_err(Error::io(path, "read"))?;
    parse_safetensors(path, &bytes[..], bytes.len())
}

/// The same of what `reader` reads, `len` bytes in all: straight into the tensors, so that a file is in memory once.
pub(super) fn parse_safetensors(
    path: &Path,
    mut reader: impl Read,
    len: usize,
) -> Result<(StateDict, Metadata)> {
    let foreign = |what: &str| {
        let what = shown(what);
        Error::file(
            path,
            format!("this is no safetensors file, or it is damaged or cut short ({what}): make it again"),
        )
    };
    let mut header_len = [0; 8];
    reader.read_exact(&mut header_len).map_err(|e| foreign(&e.to_string()))?;
    let header_len = u64::from_le_bytes(header_len) as usize;
    let data_len = len.checked_sub(8).and_then(|rest| rest.checked_sub(header_len));
    let data_len = data_len.ok_or_else(|| foreign("its header is longer than the file"))?;
    let header = read_vec(&mut reader, header_len).map_err(|e| foreign(&e.to_string()))?;
    let header: Header = serde_json::from_slice(&header).map_err(|e| foreign(&e.to_string()))?;
    if header.data_len() != data_len {
        let text = format!("{data_len} bytes of tensors instead of {}", header.data_len());
        return Err(foreign(&text));
    }
    let mut dict = StateDict::new(path);
    // They follow each other without a gap, each as long as its shape says: the header was checked for that.
    for name in header.offset_keys() {
        let info = header.info(&name).ok_or_else(|| foreign("a tensor without a place"))?;
        let (shape, (start, end)) = (info.shape.clone(), info.data_offsets);
        fn each<const N: usize, T>(data: Vec<u8>, f: impl Fn([u8; N]) -> T) -> Vec<T> {
            data.as_chunks().0.iter().map(|&element| f(element)).collect()
        }
        let mut data = || read_vec(&mut reader, end - start).map_err(Error::io(path, "read"));
        let array = match info.dtype {
            Dtype::F32 => {
                let mut values = vec![0.0; (end - start) / size_of::<f32>()];
                let bytes = bytemuck::cast_slice_mut(&mut values);
                reader.read_exact(bytes).map_err(Error::io(path, "read"))?;
                values.iter_mut().for_each(|v: &mut f32| *v = f32::from_bits(u32::from_le(v.to_bits())));
                Array::f32(shape, values)
            }
            Dtype::F64 => Array::f32(shape, each(data()?, |b| f64::from_le_bytes(b) as f32)),
            Dtype::F16 => Array::f32(shape, each(data()?, |b| half::f16::from_le_bytes(b).to_f32())),
            Dtype::BF16 => Array::f32(shape, each(data()?, |b| half::bf16::from_le_bytes(b).to_f32())),
            Dtype::I64 => Array::i64(shape, each(data()?, i64::from_le_bytes)),
            other => {
                let text = format!("tensor {} is {other}, which no weight is", shown(&name));
                return Err(Error::file(path, text));
            }
        };
        dict.insert(name, array)?;
    }
    let metadata = header.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
    Ok((dict.in_torch_order(), metadata))
}

fn read_vec(reader: &mut impl Read, len: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    reader.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Writes `weights` and `metadata` to `path`, whole or not at all. Same content, same bytes.
pub fn write_safetensors(path: &Path, weights: &StateDict, metadata: &Metadata) -> Result<()> {
    publish(path, |file| file.write_all(&safetensors_bytes(weights, metadata)))
}

/// The crate's own writer takes metadata as a HashMap, whose order changes from run to run; this one sorts it. Eight-byte
/// elements come first, so that every tensor is aligned, then each kind in the dictionary's order.
pub(super) fn safetensors_bytes(weights: &StateDict, metadata: &Metadata) -> Vec<u8> {
    let (wide, narrow): (Vec<_>, Vec<_>) = weights.iter().partition(|(_, array)| array.dtype() == "I64");
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), json!(metadata));
    }
    let mut data = Vec::new();
    for (name, array) in wide.into_iter().chain(narrow) {
        let start = data.len();
        data.extend(array.to_le_bytes());
        let info = json!({"dtype": array.dtype(), "shape": array.shape, "data_offsets": [start, data.len()]});
        header.insert(name.into(), info);
    }
    let mut text = serde_json::Value::Object(header).to_string();
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.bytes());
    bytes.extend(data);
    bytes
}
