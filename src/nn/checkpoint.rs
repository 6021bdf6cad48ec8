//! The file a run resumes from: weights, optimizer moments and a JSON header in one safetensors file.
//!
//! Weights stand under MONAI's names, so the file is also a weight file; moments under `optim.exp_avg.NAME` and
//! `optim.exp_avg_sq.NAME`. The metadata has `checkpoint` (the format's number), `meta` (a [`CheckpointMeta`] as
//! JSON) and `blake3` (of every tensor and of `meta`): a file that is half of one or was changed is not used.

use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::state_dict::{Array, ArrayData, StateDict};
use super::weights::{Metadata, OPTIMIZER_PREFIX, parse_safetensors, safetensors_bytes};
use crate::data::publish::publish;
use crate::error::{Error, Result};

/// Which cases a run learns from and which it validates on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Split {
    /// Names of the training cases.
    pub train: Vec<String>,
    /// Names of the validation cases.
    pub val: Vec<String>,
}

/// One finished epoch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// 1-based epoch.
    pub epoch: u64,
    /// Mean loss of its steps.
    pub loss: f64,
    /// Mean validation Dice, if it was validated and had a finite value.
    pub dice: Option<f64>,
}

/// The gradient scaler of mixed precision (torch.amp.GradScaler).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScalerState {
    /// Factor of the loss.
    pub scale: f32,
    /// Steps without an overflow since the factor last changed.
    pub growth_tracker: u32,
    /// Steps that changed the weights: what Adam counts.
    pub steps: u64,
    /// Steps that an overflow made void.
    pub skipped: u64,
}

/// Everything about a run but its numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointMeta {
    /// Optimizer steps done.
    pub step: u64,
    /// Epochs done.
    pub epoch: u64,
    /// Best validation Dice so far.
    pub best_dice: Option<f64>,
    /// The epoch it belongs to.
    pub best_epoch: Option<u64>,
    /// The resolved configuration.
    pub config: serde_json::Value,
    /// Cases.
    pub split: Split,
    /// Commit of the program that wrote it.
    pub commit: String,
    /// Epochs so far, oldest first.
    pub history: Vec<EpochRecord>,
    /// Losses of the steps of the epoch that is under way: empty at an epoch's end.
    pub epoch_losses: Vec<f64>,
    /// The gradient scaler, where the run is on a device that needs one.
    #[serde(default)]
    pub scaler: Option<ScalerState>,
}

/// The optimizer's state, by parameter, in the optimizer's order. Adam's second moment has the parameter's number of
/// values, Novograd's one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Moments {
    /// First moments.
    pub exp_avg: Vec<(String, Vec<f32>)>,
    /// Second moments.
    pub exp_avg_sq: Vec<(String, Vec<f32>)>,
}

/// A run at the end of a step.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// The network's `state_dict`.
    pub weights: StateDict,
    /// The optimizer's state.
    pub moments: Moments,
    /// The rest.
    pub meta: CheckpointMeta,
}

/// Number of this layout; another number is another program's file.
const FORMAT: &str = "1";
const FIRST: &str = "optim.exp_avg.";
const SECOND: &str = "optim.exp_avg_sq.";

/// Writes a checkpoint to `path`, whole or not at all. Same content, same bytes.
pub fn save(path: &Path, weights: &StateDict, moments: &Moments, meta: &CheckpointMeta) -> Result<()> {
    let mut all = StateDict::new(path);
    for (name, array) in weights.iter() {
        all.insert(name, array.clone())?;
    }
    for (prefix, list) in [(FIRST, &moments.exp_avg), (SECOND, &moments.exp_avg_sq)] {
        for (name, values) in list {
            all.insert(format!("{prefix}{name}"), Array::f32(vec![values.len()], values.clone()))?;
        }
    }
    let meta = serde_json::to_string(meta)
        .map_err(|e| Error::Internal(format!("{}: cannot write the header: {e}", path.display())))?;
    let metadata = Metadata::from([
        ("blake3".into(), digest(&all, &meta)),
        ("checkpoint".into(), FORMAT.into()),
        ("meta".into(), meta),
    ]);
    publish(path, |file| file.write_all(&safetensors_bytes(&all, &metadata)))
}

/// Reads what [`save`] wrote. A foreign, newer, damaged or half-written file is an error that says so.
pub fn load(path: &Path) -> Result<Checkpoint> {
    let bytes = std::fs::read(path).map_err(Error::io(path, "read"))?;
    let (all, metadata) = parse_safetensors(path, &bytes[..], bytes.len())?;
    let entry = |key: &str| metadata.get(key).map_or("", String::as_str);
    let refuse = |what: &str| Error::file(path, what);
    match entry("checkpoint") {
        FORMAT => (),
        "" => return Err(refuse("this is no checkpoint to resume from: it holds weights only")),
        other => return Err(refuse(&format!("checkpoint format {other} is not this program's ({FORMAT})"))),
    }
    if entry("blake3") != digest(&all, entry("meta")) {
        return Err(refuse("the checkpoint was damaged after it was written: resume from another one"));
    }
    let meta = serde_json::from_str(entry("meta"))
        .map_err(|e| refuse(&format!("the checkpoint's header is another version's ({e})")))?;
    let mut weights = StateDict::new(path);
    let mut moments = Moments::default();
    for (name, array) in all.iter() {
        let list = if let Some(name) = name.strip_prefix(FIRST) {
            Some((&mut moments.exp_avg, name))
        } else {
            name.strip_prefix(SECOND).map(|name| (&mut moments.exp_avg_sq, name))
        };
        match (list, &array.data) {
            (Some((list, name)), ArrayData::F32(values)) => list.push((name.to_owned(), values.to_vec())),
            (None, _) if !name.starts_with(OPTIMIZER_PREFIX) => weights.insert(name, array.clone())?,
            _ => return Err(refuse(&format!("{name} is unknown optimizer state"))),
        }
    }
    Ok(Checkpoint { weights, moments, meta })
}

/// Hash of names, shapes, numbers and header, in the order of names, since files keep another order than memory.
fn digest(all: &StateDict, meta: &str) -> String {
    let mut entries: Vec<_> = all.iter().collect();
    entries.sort_by_key(|(name, _)| *name);
    let mut hash = blake3::Hasher::new();
    for (name, array) in entries {
        hash.update(format!("{name} {} {:?}\n", array.dtype(), array.shape).as_bytes());
        hash.update(&array.to_le_bytes());
    }
    hash.update(meta.as_bytes());
    hash.finalize().to_hex().to_string()
}
