//! A trainable tensor.

use super::ParamId;
use std::sync::Arc;

/// An f32 master in PyTorch's layout. Closures on a tape share the value; the optimizer changes it between tapes.
#[derive(Clone, Debug)]
pub struct Param {
    /// Position in `named_parameters()` order.
    pub id: ParamId,
    /// PyTorch's shape: (O, I, k, k, k), (I, O, k, k, k), (C) or (1).
    pub shape: Vec<usize>,
    /// The values, C order.
    pub value: Arc<Vec<f32>>,
}

impl Param {
    /// The values for writing; copies them if a tape still shares them.
    pub fn make_mut(&mut self) -> &mut [f32] {
        Arc::make_mut(&mut self.value).as_mut_slice()
    }
}
