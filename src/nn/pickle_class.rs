//! The classes a pickle may name: what torch needs to describe tensors, and nothing that acts.

use super::state_dict::shown;

/// Why a pickle was refused: a clause to stand behind the file's name.
pub type Refusal = String;

/// Element type of a storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// torch.FloatStorage.
    F32,
    /// torch.DoubleStorage.
    F64,
    /// torch.HalfStorage.
    F16,
    /// torch.BFloat16Storage.
    Bf16,
    /// torch.LongStorage.
    I64,
    /// A type that no weight has; optimizers and counters may.
    Other {
        /// torch's class, without its module.
        name: &'static str,
        /// Bytes an element.
        size: usize,
    },
}

impl Dtype {
    /// Bytes an element.
    pub fn size(self) -> usize {
        match self {
            Dtype::F16 | Dtype::Bf16 => 2,
            Dtype::F32 => 4,
            Dtype::F64 | Dtype::I64 => 8,
            Dtype::Other { size, .. } => size,
        }
    }
}

/// The classes a pickle may name. There is no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// collections.OrderedDict.
    OrderedDict,
    /// torch.Size.
    Size,
    /// torch._utils._rebuild_tensor and _rebuild_tensor_v2 (storage, offset, size, stride, ..).
    RebuildTensor,
    /// torch._utils._rebuild_parameter (tensor, requires_grad, hooks).
    RebuildParameter,
    /// torch.FloatStorage and its like.
    Storage(Dtype),
}

impl Class {
    /// The class a pickle names, if it is on the list.
    pub(super) fn find(module: &str, name: &str) -> Result<Self, Refusal> {
        let storage = |name, size| Class::Storage(Dtype::Other { name, size });
        Ok(match (module, name) {
            ("collections", "OrderedDict") => Class::OrderedDict,
            ("torch", "Size") => Class::Size,
            ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Class::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Class::RebuildParameter,
            ("torch", "FloatStorage") => Class::Storage(Dtype::F32),
            ("torch", "DoubleStorage") => Class::Storage(Dtype::F64),
            ("torch", "HalfStorage") => Class::Storage(Dtype::F16),
            ("torch", "BFloat16Storage") => Class::Storage(Dtype::Bf16),
            ("torch", "LongStorage") => Class::Storage(Dtype::I64),
            ("torch", "IntStorage") => storage("IntStorage", 4),
            ("torch", "ShortStorage") => storage("ShortStorage", 2),
            ("torch", "CharStorage") => storage("CharStorage", 1),
            ("torch", "ByteStorage") => storage("ByteStorage", 1),
            ("torch", "BoolStorage") => storage("BoolStorage", 1),
            _ => {
                return Err(format!(
                    "its pickle names {}.{}, which no state_dict needs, so nothing was loaded; save \
                     net.state_dict() alone",
                    shown(module),
                    shown(name)
                ));
            }
        })
    }
}
