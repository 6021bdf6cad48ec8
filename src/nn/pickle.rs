//! A reader of Python pickles that executes nothing.
//!
//! A pickle is a program for a stack machine that may call any importable function. This machine knows the opcodes
//! that `torch.save` emits for a `state_dict` (protocols 2 to 4) and a fixed list of classes, [`Class`]; "calling"
//! one of them builds a [`Value`]. Everything else ends the reading with a sentence that names the opcode or the
//! class. Values lie in one arena and refer to each other by [`Id`], so that shared, deep or cyclic structures cost
//! neither copies nor recursion; work and memory are linear in the pickle's bytes, and bounded.
//!
//! Opcodes: CPython's `Lib/pickletools.py`. What torch puts in: `torch/serialization.py`, `torch/_utils.py`.

use std::collections::HashMap;

use super::pickle_class::{Class, Dtype, Refusal};

/// Where a [`Value`] lies in its [`Pickle`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Id(u32);

/// The block of numbers that one or more tensors look into.
#[derive(Clone, Copy, Debug)]
pub struct Storage {
    /// Element type.
    pub dtype: Dtype,
    /// Its name: a [`Value::Str`].
    pub key: Id,
    /// Number of elements, as the pickle claims.
    pub numel: usize,
}

/// A view of a storage. Nothing about it is checked yet but the number of axes.
#[derive(Debug)]
pub struct Tensor {
    /// The storage it looks into.
    pub storage: Storage,
    /// First element.
    pub offset: usize,
    /// Elements along each axis.
    pub shape: Vec<usize>,
    /// Elements between neighbours along each axis.
    pub stride: Vec<usize>,
}

/// What a pickle can hold.
#[derive(Debug)]
pub enum Value {
    /// None.
    None,
    /// bool.
    Bool(bool),
    /// int, up to 127 bits.
    Int(i128),
    /// float.
    Float(f64),
    /// str.
    Str(String),
    /// tuple, torch.Size.
    Tuple(Vec<Id>),
    /// list.
    List(Vec<Id>),
    /// dict, OrderedDict: keys and values in the order they were set.
    Dict(Vec<(Id, Id)>),
    /// A class by itself.
    Class(Class),
    /// torch storage.
    Storage(Storage),
    /// torch.Tensor, torch.nn.Parameter.
    Tensor(Box<Tensor>),
}

/// A pickle that was read.
#[derive(Debug)]
pub struct Pickle {
    values: Vec<Value>,
    root: Id,
    /// Bytes it took, its STOP included.
    pub length: usize,
}

impl Pickle {
    /// The outermost value.
    pub fn root(&self) -> &Value {
        self.get(self.root)
    }

    /// The value at `id`.
    pub fn get(&self, id: Id) -> &Value {
        &self.values[id.0 as usize]
    }

    /// The string at `id`, if it is one.
    pub fn str(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Value::Str(s) => Some(s),
            _ => None,
        }
    }

    /// Every storage that the pickle mentions.
    pub fn storages(&self) -> impl Iterator<Item = &Storage> {
        self.values.iter().filter_map(|value| match value {
            Value::Storage(s) => Some(s),
            _ => None,
        })
    }
}

/// A state_dict has about 20 values a tensor; this allows 50,000 tensors and bounds memory to some 50 MB.
const MAX_VALUES: usize = 1 << 20;
/// torch tensors have at most 64 axes; weights have five.
const MAX_AXES: usize = 8;

/// Reads the pickle at the beginning of `bytes`; what follows its STOP is left alone.
pub fn load(bytes: &[u8]) -> Result<Pickle, Refusal> {
    let mut vm = Machine {
        bytes,
        at: 0,
        values: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
    };
    let root = vm.run()?;
    Ok(Pickle { values: vm.values, root, length: vm.at })
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    values: Vec<Value>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    fn run(&mut self) -> Result<Id, Refusal> {
        loop {
            let start = self.at;
            let op = self.take(1)?[0];
            match op {
                // PROTO: 2 is torch's, 3 and 4 other writers'.
                0x80 => match self.take(1)?[0] {
                    2..=4 => (),
                    other => {
                        return Err(format!("its pickle has protocol {other}, this program reads 2 to 4"));
                    }
                },
                // FRAME: a hint for readers of streams.
                0x95 => drop(self.take(8)?),
                b'.' => return self.pop(),
                b'(' => self.marks.push(self.stack.len()),
                b'N' => self.push(Value::None)?,
                0x88 => self.push(Value::Bool(true))?,
                0x89 => self.push(Value::Bool(false))?,
                b'K' => {
                    let v = self.take(1)?[0];
                    self.push(Value::Int(v.into()))?;
                }
                b'M' => {
                    let v = u16::from_le_bytes(self.array()?);
                    self.push(Value::Int(v.into()))?;
                }
                b'J' => {
                    let v = i32::from_le_bytes(self.array()?);
                    self.push(Value::Int(v.into()))?;
                }
                0x8a => self.long1()?,
                b'G' => {
                    let v = f64::from_be_bytes(self.array()?);
                    self.push(Value::Float(v))?;
                }
                b'X' => {
                    let length = u32::from_le_bytes(self.array()?);
                    self.string(length as usize)?;
                }
                0x8c => {
                    let length = self.take(1)?[0];
                    self.string(length.into())?;
                }
                b')' => self.push(Value::Tuple(Vec::new()))?,
                0x85..=0x87 => {
                    let first = self.height(usize::from(op - 0x84))?;
                    let items = self.stack.split_off(first);
                    self.push(Value::Tuple(items))?;
                }
                b't' => {
                    let items = self.pop_mark()?;
                    self.push(Value::Tuple(items))?;
                }
                b']' => self.push(Value::List(Vec::new()))?,
                b'a' => {
                    let item = self.pop()?;
                    self.append(vec![item])?;
                }
                b'e' => {
                    let items = self.pop_mark()?;
                    self.append(items)?;
                }
                b'}' => self.push(Value::Dict(Vec::new()))?,
                b's' => {
                    let first = self.height(2)?;
                    let items = self.stack.split_off(first);
                    self.set_items(items)?;
                }
                b'u' => {
                    let items = self.pop_mark()?;
                    self.set_items(items)?;
                }
                b'q' => {
                    let slot = self.take(1)?[0];
                    self.memoize(slot.into())?;
                }
                b'r' => {
                    let slot = u32::from_le_bytes(self.array()?);
                    self.memoize(slot)?;
                }
                0x94 => self.memoize(self.memo.len() as u32)?,
                b'h' => {
                    let slot = self.take(1)?[0];
                    self.recall(slot.into())?;
                }
                b'j' => {
                    let slot = u32::from_le_bytes(self.array()?);
                    self.recall(slot)?;
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.push(Value::Class(Class::find(module, name)?))?;
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let (Value::Str(module), Value::Str(name)) = (self.get(module), self.get(name)) else {
                        return Err("its pickle names a class by something that is not text".into());
                    };
                    let class = Class::find(module, name)?;
                    self.push(Value::Class(class))?;
                }
                b'Q' => self.persistent_id()?,
                b'R' => self.reduce()?,
                b'b' => {
                    // state_dict's _metadata (versions of modules): nothing a network's numbers depend on.
                    self.pop()?;
                    let target = self.top()?;
                    if !matches!(self.get(target), Value::Dict(_)) {
                        return Err("its pickle sets the state of an object that is no OrderedDict".into());
                    }
                }
                other => {
                    return Err(format!(
                        "its pickle has opcode {other:#04x} at byte {start}, which no state_dict needs, so nothing \
                         was loaded"
                    ));
                }
            }
        }
    }

    fn get(&self, id: Id) -> &Value {
        &self.values[id.0 as usize]
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], Refusal> {
        let taken = self.bytes[self.at..].get(..n).ok_or("its pickle is cut short")?;
        self.at += n;
        Ok(taken)
    }

    /// Text up to a newline.
    fn line(&mut self) -> Result<&'a str, Refusal> {
        let length =
            self.bytes[self.at..].iter().position(|&b| b == b'\n').ok_or("its pickle is cut short")?;
        let line = self.take(length + 1)?;
        std::str::from_utf8(&line[..length]).map_err(|_| "its pickle has text that is not UTF-8".into())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Refusal> {
        Ok(self.take(N)?.try_into().expect("take returns N bytes"))
    }

    fn push(&mut self, value: Value) -> Result<(), Refusal> {
        if self.values.len() == MAX_VALUES {
            return Err(format!("its pickle holds more than {MAX_VALUES} values, which no state_dict does"));
        }
        self.stack.push(Id(self.values.len() as u32));
        self.values.push(value);
        Ok(())
    }

    /// Where the topmost `n` items begin. Items below the last mark are out of reach.
    fn height(&self, n: usize) -> Result<usize, Refusal> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let first = self.stack.len().checked_sub(n).filter(|&first| first >= floor);
        first.ok_or_else(|| "its pickle takes more from the stack than there is".into())
    }

    fn top(&self) -> Result<Id, Refusal> {
        Ok(self.stack[self.height(1)?])
    }

    fn pop(&mut self) -> Result<Id, Refusal> {
        let id = self.top()?;
        self.stack.pop();
        Ok(id)
    }

    fn pop_mark(&mut self) -> Result<Vec<Id>, Refusal> {
        let mark = self.marks.pop().ok_or("its pickle closes a mark that was not set")?;
        Ok(self.stack.split_off(mark))
    }

    fn memoize(&mut self, slot: u32) -> Result<(), Refusal> {
        let id = self.top()?;
        self.memo.insert(slot, id);
        Ok(())
    }

    fn recall(&mut self, slot: u32) -> Result<(), Refusal> {
        let id = self.memo.get(&slot).ok_or("its pickle recalls a value that was not memoized")?;
        self.stack.push(*id);
        Ok(())
    }

    fn string(&mut self, length: usize) -> Result<(), Refusal> {
        let text =
            std::str::from_utf8(self.take(length)?).map_err(|_| "its pickle has text that is not UTF-8")?;
        let value = Value::Str(text.to_owned());
        self.push(value)
    }

    /// Little-endian two's complement of up to 16 bytes (the legacy format's magic number has 10).
    fn long1(&mut self) -> Result<(), Refusal> {
        let length = usize::from(self.take(1)?[0]);
        if length > 16 {
            return Err(format!("its pickle has an integer of {length} bytes"));
        }
        let digits = self.take(length)?;
        let negative = digits.last().is_some_and(|&b| b >= 0x80);
        let mut wide = [if negative { 0xff } else { 0 }; 16];
        wide[..length].copy_from_slice(digits);
        self.push(Value::Int(i128::from_le_bytes(wide)))
    }

    fn append(&mut self, new: Vec<Id>) -> Result<(), Refusal> {
        let target = self.top()?;
        match &mut self.values[target.0 as usize] {
            Value::List(items) => items.extend(new),
            _ => return Err("its pickle appends to something that is no list".into()),
        }
        Ok(())
    }

    fn set_items(&mut self, new: Vec<Id>) -> Result<(), Refusal> {
        let target = self.top()?;
        match &mut self.values[target.0 as usize] {
            Value::Dict(items) if new.len().is_multiple_of(2) => {
                items.extend(new.chunks_exact(2).map(|pair| (pair[0], pair[1])));
            }
            _ => return Err("its pickle sets items of something that is no dict".into()),
        }
        Ok(())
    }

    /// ('storage', class, key, location, numel), and None for the legacy format's view.
    fn persistent_id(&mut self) -> Result<(), Refusal> {
        let id = self.pop()?;
        let storage = (|| {
            let Value::Tuple(items) = self.get(id) else { return None };
            let (&[kind, class, key, location, numel], rest) = items.split_first_chunk()?;
            match (self.get(kind), self.get(class), self.get(key), self.get(location)) {
                (Value::Str(kind), Value::Class(Class::Storage(dtype)), Value::Str(_), Value::Str(_))
                    if kind == "storage" && rest.iter().all(|&id| matches!(self.get(id), Value::None)) =>
                {
                    Some(Storage { dtype: *dtype, key, numel: self.index(numel)? })
                }
                _ => None,
            }
        })();
        self.push(Value::Storage(storage.ok_or("its pickle refers to a storage in a way torch does not")?))
    }

    fn index(&self, id: Id) -> Option<usize> {
        match self.get(id) {
            Value::Int(v) => usize::try_from(*v).ok(),
            _ => None,
        }
    }

    /// Sizes or strides: a tuple of a few integers that are not negative.
    fn axes(&self, id: Id) -> Option<Vec<usize>> {
        match self.get(id) {
            Value::Tuple(items) if items.len() <= MAX_AXES => items.iter().map(|&i| self.index(i)).collect(),
            _ => None,
        }
    }

    fn reduce(&mut self) -> Result<(), Refusal> {
        let (args, function) = (self.pop()?, self.pop()?);
        let (Value::Class(class), Value::Tuple(args)) = (self.get(function), self.get(args)) else {
            return Err("its pickle calls something that is no class".into());
        };
        match (class, args.as_slice()) {
            (Class::OrderedDict, []) => self.push(Value::Dict(Vec::new())),
            (Class::Size, &[sizes]) if matches!(self.get(sizes), Value::Tuple(_)) => {
                self.stack.push(sizes);
                Ok(())
            }
            (Class::RebuildParameter, &[tensor, ..]) if matches!(self.get(tensor), Value::Tensor(_)) => {
                self.stack.push(tensor);
                Ok(())
            }
            (Class::RebuildTensor, &[storage, offset, size, stride, ..]) => {
                let tensor = (|| {
                    let &Value::Storage(storage) = self.get(storage) else { return None };
                    let (shape, stride) = (self.axes(size)?, self.axes(stride)?);
                    let offset = self.index(offset)?;
                    (shape.len() == stride.len()).then_some(Tensor { storage, offset, shape, stride })
                })();
                let tensor = tensor.ok_or("its pickle describes a tensor in a way torch does not")?;
                self.push(Value::Tensor(Box::new(tensor)))
            }
            (class, _) => Err(format!("its pickle calls {class:?} with arguments that no state_dict needs")),
        }
    }
}
