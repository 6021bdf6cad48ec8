//! `torch.save` files: the zip format (torch 1.6 on) and the older one. Nothing in them is executed.
//!
//! zip: stored entries under one folder: `data.pkl` (the object, tensors as views of storages), `data/KEY` (one
//! storage each, little-endian), `byteorder`. Older: five pickles in a row (magic, protocol, system, object, keys),
//! then for each key the number of elements and the elements. Both come out of `torch/serialization.py`.

use std::collections::HashMap;
use std::path::Path;

use super::archive::Archive;
use super::pickle::{self, Id, Pickle, Tensor, Value};
use super::pickle_class::{Dtype, Refusal};
use super::state_dict::{Array, StateDict, shown};
use crate::error::{Error, Result};

/// Where a state_dict may lie in a dictionary that holds more: ignite's and MONAI's CheckpointSaver ("model", "net",
/// "network"), Lightning, PyTorch's tutorials.
const WRAPPERS: [&str; 5] = ["model", "state_dict", "model_state_dict", "net", "network"];
/// What DistributedDataParallel and torch.compile put before every name.
const PREFIXES: [&str; 2] = ["module.", "_orig_mod."];
/// First bytes of every zip archive that is not empty.
pub(super) const ZIP_MAGIC: &[u8] = b"PK\x03\x04";
/// The first pickle of the old format: PROTO 2, LONG1 of ten bytes.
pub(super) const LEGACY_MAGIC: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";

/// The state_dict in the bytes of a `torch.save` file: bare, or under one of a few well-known keys of a dictionary
/// whose other entries are ignored. Floats become f32. `path` is only for messages.
pub fn read_pt(path: &Path, bytes: &[u8]) -> Result<StateDict> {
    let read = if bytes.starts_with(LEGACY_MAGIC) { read_legacy } else { read_zip };
    let entries = read(bytes).map_err(|what| Error::file(path, what))?;
    let mut weights = StateDict::new(path);
    for (name, array) in entries {
        weights.insert(name, array)?;
    }
    Ok(weights)
}

const BIG_ENDIAN: &str =
    "it was written on a big-endian machine: load and save it again on a little-endian one";

type Entries = Vec<(String, Array)>;

fn read_zip(bytes: &[u8]) -> Result<Entries, Refusal> {
    let archive = Archive::open(bytes)?;
    let folder = archive
        .names()
        .filter_map(|name| name.strip_suffix("data.pkl"))
        .min_by_key(|stem| (stem.len(), *stem));
    let folder = folder.ok_or("the archive holds no data.pkl: torch.save did not write it")?;
    let content = |name: &str| archive.content(&format!("{folder}{name}"));
    if archive.names().any(|name| name.strip_prefix(folder) == Some("constants.pkl")) {
        return Err("this is a TorchScript archive, which holds code: save its weights with \
                    torch.save(torch.jit.load(FILE).state_dict(), \"weights.pt\")"
            .into());
    }
    if content("byteorder")?.is_some_and(|order| order != b"little") {
        return Err(BIG_ENDIAN.into());
    }
    let pickle = pickle::load(content("data.pkl")?.ok_or("the archive holds no data.pkl")?)?;
    state_dict(&pickle, bytes.len(), |key| {
        content(&format!("data/{key}"))?.ok_or_else(|| "its storage is not in the archive".into())
    })
}

fn read_legacy(bytes: &[u8]) -> Result<Entries, Refusal> {
    let mut at = LEGACY_MAGIC.len();
    let mut next = || {
        let pickle = pickle::load(&bytes[at..])?;
        at += pickle.length;
        Ok::<_, Refusal>(pickle)
    };
    let (protocol, system, object, keys) = (next()?, next()?, next()?, next()?);
    if !matches!(protocol.root(), Value::Int(1001)) {
        return Err("it has another protocol of torch's old format than 1001".into());
    }
    if !matches!(find(&system, system.root(), "little_endian"), Some(Value::Bool(true))) {
        return Err(BIG_ENDIAN.into());
    }
    let Value::List(keys_in_order) = keys.root() else {
        return Err("its list of storages is missing".into());
    };
    let sizes: HashMap<&str, usize> =
        object.storages().filter_map(|s| Some((object.str(s.key)?, s.dtype.size()))).collect();
    let mut storages = HashMap::new();
    for &id in keys_in_order {
        let (key, size) = keys
            .str(id)
            .and_then(|key| Some((key, *sizes.get(key)?)))
            .ok_or("its list of storages names one that no tensor uses")?;
        let (numel, rest) = bytes[at..].split_first_chunk().ok_or("it is cut short")?;
        let length = usize::try_from(u64::from_le_bytes(*numel)).ok().and_then(|n| n.checked_mul(size));
        let content = length.and_then(|length| rest.get(..length)).ok_or("it is cut short")?;
        at += numel.len() + content.len();
        storages.insert(key, content);
    }
    state_dict(&object, bytes.len(), |key| {
        storages.get(key).copied().ok_or_else(|| "its storage is not in the file".into())
    })
}

/// The value of the text key `key`, if `dict` is a dictionary that has it.
fn find<'p>(pickle: &'p Pickle, dict: &Value, key: &str) -> Option<&'p Value> {
    let Value::Dict(items) = dict else { return None };
    items.iter().find(|(k, _)| pickle.str(*k) == Some(key)).map(|(_, v)| pickle.get(*v))
}

/// The named tensors of a dictionary; whatever else is in it is no weight.
fn tensors<'p>(pickle: &'p Pickle, dict: &'p Value) -> Vec<(&'p str, &'p Tensor)> {
    let Value::Dict(items) = dict else { return Vec::new() };
    let tensor = |(key, value): &(Id, Id)| match pickle.get(*value) {
        Value::Tensor(tensor) => Some((pickle.str(*key)?, tensor.as_ref())),
        _ => None,
    };
    items.iter().filter_map(tensor).collect()
}

/// Finds the state_dict and copies its tensors out of their storages.
fn state_dict<'a>(
    pickle: &Pickle,
    file_bytes: usize,
    storage: impl Fn(&str) -> Result<&'a [u8], Refusal>,
) -> Result<Entries, Refusal> {
    let wrapped = WRAPPERS.iter().filter_map(|key| find(pickle, pickle.root(), key));
    let found = wrapped.chain([pickle.root()]).map(|dict| tensors(pickle, dict)).find(|t| !t.is_empty());
    let mut named = found.ok_or_else(|| {
        format!("it holds no state_dict, neither bare nor under one of the keys {}", WRAPPERS.join(", "))
    })?;
    while let Some(prefix) = PREFIXES.iter().find(|p| named.iter().all(|(name, _)| name.starts_with(**p))) {
        named.iter_mut().for_each(|(name, _)| *name = &name[prefix.len()..]);
    }
    // Views may share a storage or repeat its elements: as many numbers as the file has bytes are allowed, four
    // times what f32 weights that share nothing need.
    let mut budget = file_bytes;
    let mut contents: HashMap<&str, &[u8]> = HashMap::new();
    let mut entries = Vec::with_capacity(named.len());
    for (name, tensor) in named {
        let refuse = |what: &str| format!("tensor {}: {what}", shown(name));
        let key = pickle.str(tensor.storage.key).ok_or_else(|| refuse("its storage has no name"))?;
        let content = match contents.get(key) {
            Some(content) => content,
            None => *contents.entry(key).or_insert(storage(key).map_err(|what| refuse(&what))?),
        };
        let numel = extent(tensor, content.len()).map_err(|what| refuse(&what))?;
        budget = budget.checked_sub(numel).ok_or_else(|| {
            refuse("the tensors claim more numbers than the file has bytes: clone() them before saving")
        })?;
        entries.push((name.to_owned(), gather(tensor, content, numel).map_err(|what| refuse(&what))?));
    }
    Ok(entries)
}

/// Number of elements of a view, after checking that each lies inside its storage of `bytes` bytes.
fn extent(tensor: &Tensor, bytes: usize) -> Result<usize, Refusal> {
    let cut = "its storage is shorter than it claims: the file is damaged";
    let storage = tensor.storage.numel;
    if storage.checked_mul(tensor.storage.dtype.size()).is_none_or(|need| need > bytes) {
        return Err(cut.into());
    }
    let numel = tensor.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).ok_or(cut)?;
    let last = tensor.shape.iter().zip(&tensor.stride).try_fold(tensor.offset, |at, (&d, &stride)| {
        at.checked_add(d.saturating_sub(1).checked_mul(stride)?)
    });
    if numel > 0 && last.is_none_or(|last| last >= storage) {
        return Err("it reaches beyond its storage".into());
    }
    Ok(numel)
}

/// Copies the `numel` elements of a checked view in C order, floats as f32.
fn gather(tensor: &Tensor, content: &[u8], numel: usize) -> Result<Array, Refusal> {
    let shape = tensor.shape.clone();
    let size = tensor.storage.dtype.size();
    let elements = elements(tensor, numel).map(|at| &content[at * size..(at + 1) * size]);
    // Each arm reads exactly `size` bytes.
    fn le<const N: usize>(bytes: &[u8]) -> [u8; N] {
        bytes.try_into().expect("an element has its type's size")
    }
    Ok(match tensor.storage.dtype {
        Dtype::F32 => Array::f32(shape, elements.map(|b| f32::from_le_bytes(le(b))).collect::<Vec<_>>()),
        Dtype::F64 => {
            Array::f32(shape, elements.map(|b| f64::from_le_bytes(le(b)) as f32).collect::<Vec<_>>())
        }
        Dtype::F16 => {
            Array::f32(shape, elements.map(|b| half::f16::from_le_bytes(le(b)).to_f32()).collect::<Vec<_>>())
        }
        Dtype::Bf16 => {
            Array::f32(shape, elements.map(|b| half::bf16::from_le_bytes(le(b)).to_f32()).collect::<Vec<_>>())
        }
        Dtype::I64 => Array::i64(shape, elements.map(|b| i64::from_le_bytes(le(b))).collect::<Vec<_>>()),
        Dtype::Other { name, .. } => return Err(format!("it is a {name}, which no weight is")),
    })
}

/// Storage indices of a view in C order: an odometer, the last axis fastest. It wraps because an axis of one element
/// may have any stride: the odometer steps over it and back.
fn elements(tensor: &Tensor, numel: usize) -> impl Iterator<Item = usize> {
    let mut index = vec![0usize; tensor.shape.len()];
    let mut at = tensor.offset;
    (0..numel).map(move |_| {
        let here = at;
        for axis in (0..index.len()).rev() {
            index[axis] += 1;
            at = at.wrapping_add(tensor.stride[axis]);
            if index[axis] < tensor.shape[axis] {
                break;
            }
            at = at.wrapping_sub(index[axis].wrapping_mul(tensor.stride[axis]));
            index[axis] = 0;
        }
        here
    })
}
