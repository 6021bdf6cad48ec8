//! Named arrays in PyTorch's order, and MONAI's names for the arrays of its residual U-Net.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::config::{Net, Norm};
use crate::error::{Error, Result};

/// The numbers of an [`Array`], C order.
#[derive(Clone, Debug, PartialEq)]
pub enum ArrayData {
    /// Every floating-point entry, whatever the file's precision was. Shared: a network that takes it copies nothing.
    F32(Arc<Vec<f32>>),
    /// Counters: `num_batches_tracked`.
    I64(Vec<i64>),
}

/// One entry: a shape and its numbers. A scalar has the empty shape.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    /// PyTorch's shape: (out, in, D, H, W) of a convolution, (in, out, D, H, W) of a transposed one.
    pub shape: Vec<usize>,
    /// `shape.iter().product()` numbers, the last axis fastest.
    pub data: ArrayData,
}

impl Array {
    /// Floats of `shape`. `data` must hold `shape.iter().product()` numbers.
    pub fn f32(shape: Vec<usize>, data: impl Into<Arc<Vec<f32>>>) -> Self {
        let data = data.into();
        assert_eq!(shape.iter().product::<usize>(), data.len(), "shape and data differ");
        Array { shape, data: ArrayData::F32(data) }
    }

    /// Integers of `shape`. `data` must hold `shape.iter().product()` numbers.
    pub fn i64(shape: Vec<usize>, data: Vec<i64>) -> Self {
        assert_eq!(shape.iter().product::<usize>(), data.len(), "shape and data differ");
        Array { shape, data: ArrayData::I64(data) }
    }

    /// Element type as safetensors names it.
    pub fn dtype(&self) -> &'static str {
        match self.data {
            ArrayData::F32(_) => "F32",
            ArrayData::I64(_) => "I64",
        }
    }

    /// The numbers as little-endian bytes.
    pub fn to_le_bytes(&self) -> Vec<u8> {
        match &self.data {
            ArrayData::F32(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            ArrayData::I64(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
        }
    }
}

/// A PyTorch `state_dict`: arrays by name, in a stated order, and the file they came from.
#[derive(Clone, Debug)]
pub struct StateDict {
    origin: PathBuf,
    entries: Vec<(String, Array)>,
    index: HashMap<String, usize>,
}

impl StateDict {
    /// An empty dictionary; `origin` is the file that messages name.
    pub fn new(origin: impl Into<PathBuf>) -> Self {
        StateDict { origin: origin.into(), entries: Vec::new(), index: HashMap::new() }
    }

    /// The file that messages name.
    pub fn origin(&self) -> &Path {
        &self.origin
    }

    /// Appends an entry. A name that is there already is an error: no state_dict has one twice.
    pub fn insert(&mut self, name: impl Into<String>, array: Array) -> Result<()> {
        let name = name.into();
        if self.index.contains_key(&name) {
            return Err(self.refuse(format!("{} occurs twice", shown(&name))));
        }
        self.index.insert(name.clone(), self.entries.len());
        self.entries.push((name, array));
        Ok(())
    }

    /// The array called `name`.
    pub fn get(&self, name: &str) -> Option<&Array> {
        self.index.get(name).map(|&i| &self.entries[i].1)
    }

    /// Leaves out the entries whose name `keep` refuses.
    pub fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.entries.retain(|(name, _)| keep(name));
        self.index = self.entries.iter().enumerate().map(|(i, (name, _))| (name.clone(), i)).collect();
    }

    /// Entries in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Array)> {
        self.entries.iter().map(|(name, array)| (name.as_str(), array))
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The array called `name`, if it has this shape and the type that its name implies; else a sentence that
    /// says which network the file holds.
    pub fn expect(&self, name: &str, shape: &[usize]) -> Result<&Array> {
        let Some(array) = self.get(name) else {
            return Err(self.refuse(format!("{name} is missing; {}", self.looks_like())));
        };
        if array.shape != shape {
            return Err(self.refuse(format!(
                "{name} is {:?} where the network needs {shape:?}; {}",
                array.shape,
                self.looks_like()
            )));
        }
        let want = if name.ends_with(COUNTER) { "I64" } else { "F32" };
        if array.dtype() != want {
            return Err(self.refuse(format!("{name} holds {} where the network needs {want}", array.dtype())));
        }
        Ok(array)
    }

    /// The floats of `name`, checked like [`StateDict::expect`].
    pub fn expect_f32(&self, name: &str, shape: &[usize]) -> Result<&Arc<Vec<f32>>> {
        // A whole chunk at a time, which the compiler makes vectors of.
        let finite = |chunk: &[f32]| chunk.iter().fold(true, |all, v| all & v.is_finite());
        match &self.expect(name, shape)?.data {
            ArrayData::F32(v) if !v.chunks(1 << 12).all(finite) => {
                Err(self.refuse(format!("{name} holds NaN or infinity: the training that wrote it diverged")))
            }
            ArrayData::F32(v) => Ok(v),
            ArrayData::I64(_) => Err(self.refuse(format!("{name} holds integers"))),
        }
    }

    /// The integers of `name`, checked like [`StateDict::expect`].
    pub fn expect_i64(&self, name: &str, shape: &[usize]) -> Result<&[i64]> {
        match &self.expect(name, shape)?.data {
            ArrayData::I64(v) => Ok(v),
            ArrayData::F32(_) => Err(self.refuse(format!("{name} holds floats"))),
        }
    }

    /// Strict, as `load_state_dict` is: exactly the entries of `net`, each of its shape and type.
    pub fn check(&self, net: &Net) -> Result<()> {
        if let Some(found) = layout(self) {
            if found.norm != net.norm {
                let name = norm_name(found.norm);
                return Err(self.refuse(format!("these are {name}-norm weights: pass --norm {name}")));
            }
            if found.channels != net.channels {
                return Err(self.refuse(format!(
                    "these weights are for channels {:?}, the network has {:?}: give it the same channels",
                    found.channels, net.channels
                )));
            }
        }
        let wanted = names(net);
        for (name, shape) in &wanted {
            self.expect(name, shape)?;
        }
        if self.len() > wanted.len() {
            let known: std::collections::HashSet<_> = wanted.iter().map(|(name, _)| name.as_str()).collect();
            let alien = self.iter().find(|(name, _)| !known.contains(name)).map_or("", |(name, _)| name);
            return Err(self.refuse(format!(
                "{} is not part of MONAI's UNet with two residual units; {}",
                shown(alien),
                self.looks_like()
            )));
        }
        Ok(())
    }

    /// The same entries in PyTorch's order, if they are those of a U-Net; else as they are.
    pub(super) fn in_torch_order(mut self) -> Self {
        let Some(net) = layout(&self) else { return self };
        let rank: HashMap<String, usize> =
            names(&net).into_iter().enumerate().map(|(i, (name, _))| (name, i)).collect();
        // Stable: what the network does not know keeps its order, at the end.
        self.entries.sort_by_key(|(name, _)| rank.get(name).copied().unwrap_or(usize::MAX));
        self.index = self.entries.iter().enumerate().map(|(i, (name, _))| (name.clone(), i)).collect();
        self
    }

    fn refuse(&self, what: impl Into<String>) -> Error {
        Error::file(&self.origin, what)
    }

    /// What a reader of a message should know about the file.
    fn looks_like(&self) -> String {
        match layout(self) {
            Some(net) => format!(
                "the file looks like a U-Net with {} norm and channels {:?}",
                norm_name(net.norm),
                net.channels
            ),
            None => match self.entries.first() {
                Some((name, _)) => {
                    format!("the file is no MONAI UNet state_dict: its first entry is {}", shown(name))
                }
                None => "the file holds no tensor".into(),
            },
        }
    }
}

/// Deduces the network from names and shapes, then checks every entry against it.
///
/// Fails with a sentence if the file is not the `state_dict` of a MONAI `UNet` with one input channel, two classes,
/// kernel 3, strides 2, two residual units, and batch norm or instance norm without parameters.
pub fn infer_net(weights: &StateDict) -> Result<Net> {
    let net = layout(weights).ok_or_else(|| weights.refuse(weights.looks_like()))?;
    weights.check(&net)?;
    Ok(net)
}

/// Names and shapes of MONAI's `UNet(3, 1, 2, channels, strides 2, num_res_units 2, norm)`, in the order of its
/// `state_dict` (numbers of channels from top to bottom, at least two levels).
pub fn names(net: &Net) -> Vec<(String, Vec<usize>)> {
    let mut list = Names { norm: net.norm, entries: Vec::new() };
    list.level(TOP, 1, CLASSES, &net.channels, true);
    list.entries
}

/// Background and spleen.
const CLASSES: usize = 2;
/// The outermost Sequential (down, skip connection, up).
const TOP: &str = "model.";
/// BatchNorm's number of steps; the only integer entry.
const COUNTER: &str = "num_batches_tracked";

/// The list under construction.
struct Names {
    norm: Norm,
    entries: Vec<(String, Vec<usize>)>,
}

impl Names {
    /// Sequential(0: down, 1: skip connection around the levels below, 2: up) at `prefix`; the last level is the
    /// bottom, one residual unit.
    fn level(&mut self, prefix: &str, c_in: usize, c_out: usize, channels: &[usize], top: bool) {
        let (c, below) = channels.split_first().expect("a network has at least one level");
        if below.is_empty() {
            self.residual_unit(prefix, c_in, *c, false);
            return;
        }
        self.residual_unit(&format!("{prefix}0."), c_in, *c, true);
        // The bottom keeps its own width, every other level gives back the width it was given.
        let c_below = if below.len() == 1 { below[0] } else { *c };
        self.level(&format!("{prefix}1.submodule."), *c, *c, below, false);
        let up = format!("{prefix}2.");
        self.conv(&format!("{up}0."), [c + c_below, c_out], c_out, 3);
        self.adn(&format!("{up}0."), c_out);
        self.conv(&format!("{up}1.conv.unit0."), [c_out, c_out], c_out, 3);
        // The very last convolution gives the logits: no norm, no activation.
        if !top {
            self.adn(&format!("{up}1.conv.unit0."), c_out);
        }
    }

    /// Two Conv+ADN and the residual: a strided convolution, or 1x1x1 if only the width changes, or nothing.
    fn residual_unit(&mut self, prefix: &str, c_in: usize, c_out: usize, strided: bool) {
        for (unit, c) in [("unit0", c_in), ("unit1", c_out)] {
            self.conv(&format!("{prefix}conv.{unit}."), [c_out, c], c_out, 3);
            self.adn(&format!("{prefix}conv.{unit}."), c_out);
        }
        if strided || c_in != c_out {
            let k = if strided { 3 } else { 1 };
            self.push(format!("{prefix}residual.weight"), vec![c_out, c_in, k, k, k]);
            self.push(format!("{prefix}residual.bias"), vec![c_out]);
        }
    }

    fn conv(&mut self, prefix: &str, [rows, columns]: [usize; 2], bias: usize, k: usize) {
        self.push(format!("{prefix}conv.weight"), vec![rows, columns, k, k, k]);
        self.push(format!("{prefix}conv.bias"), vec![bias]);
    }

    /// Norm (its five entries if it is batch norm) and PReLU with one slope.
    fn adn(&mut self, prefix: &str, c: usize) {
        if self.norm == Norm::Batch {
            for name in ["weight", "bias", "running_mean", "running_var"] {
                self.push(format!("{prefix}adn.N.{name}"), vec![c]);
            }
            self.push(format!("{prefix}adn.N.{COUNTER}"), vec![]);
        }
        self.push(format!("{prefix}adn.A.weight"), vec![1]);
    }

    fn push(&mut self, name: String, shape: Vec<usize>) {
        self.entries.push((name, shape));
    }
}

/// Norm and channels from the first convolution of each level; `None` if the names are not MONAI's.
fn layout(weights: &StateDict) -> Option<Net> {
    // Far beyond any network; keeps sums of channels from overflowing.
    let width = |prefix: &str| {
        let array = weights.get(&format!("{prefix}conv.unit0.conv.weight"))?;
        array.shape.first().copied().filter(|c| (1..=1 << 16).contains(c))
    };
    let mut prefix = TOP.to_owned();
    let mut channels = Vec::new();
    while let Some(c) = width(&format!("{prefix}0.")) {
        channels.push(c);
        prefix.push_str("1.submodule.");
    }
    channels.push(width(&prefix)?);
    let normed = weights.get("model.0.conv.unit0.adn.N.weight").is_some();
    (channels.len() >= 2).then_some(Net { norm: if normed { Norm::Batch } else { Norm::Instance }, channels })
}

/// As the command line spells it.
fn norm_name(norm: Norm) -> &'static str {
    match norm {
        Norm::Batch => "batch",
        Norm::Instance => "instance",
    }
}

/// A foreign name fit for a message: printable, and not a page long.
pub(super) fn shown(name: &str) -> String {
    let mut text: String = name.chars().take(100).flat_map(char::escape_default).collect();
    if name.chars().nth(100).is_some() {
        text.push_str("...");
    }
    text
}
