//! Reverse-mode differentiation: a list of closures, run newest first.
//!
//! Contract: an op appends one closure that owns exactly what its backward pass needs. It takes the gradient of its
//! output out of [`Grads`] (so memory falls during the backward pass and nothing aliases), gives the gradients of its
//! inputs with `ops::residual::give` (the first one is stored, a second consumer's is added) and accumulates those of
//! its parameters with [`Grads::add_param`], or on a device in `DeviceParam::grad`.

use super::{Tensor, ValueId};
use crate::device::arena::Buffer;
use crate::device::bf16::Operands;
use crate::device::nvtx::range;
use crate::error::Result;
use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

/// A parameter: its index in the network's `named_parameters()` order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParamId(pub usize);

type Backward = Box<dyn FnOnce(&mut Grads) -> Result<()> + Send>;

/// What happened, in order; or nothing, when only the result matters.
#[derive(Default)]
pub struct Tape {
    backward: Option<Vec<(Arc<str>, Backward)>>,
    layer: Arc<str>,
    /// What convolutions on the CPU multiply, forwards and backwards, and what the gradients that norms give them are stored as.
    pub operands: Operands,
}

impl Tape {
    /// A tape that records.
    pub fn recording() -> Self {
        Tape { backward: Some(Vec::new()), ..Tape::default() }
    }

    /// A tape that drops every closure: inference is the same code and keeps nothing.
    pub fn off() -> Self {
        Tape::default()
    }

    /// Whether closures are kept.
    pub fn is_recording(&self) -> bool {
        self.backward.is_some()
    }

    /// Ops from now on belong to this layer: their backward passes run in a range of its name; "" is none.
    pub fn set_layer(&mut self, name: &str) {
        if self.is_recording() {
            self.layer = name.into();
        }
    }

    /// Appends the backward pass of one op.
    pub fn record(&mut self, backward: impl FnOnce(&mut Grads) -> Result<()> + Send + 'static) {
        if let Some(list) = &mut self.backward {
            list.push((self.layer.clone(), Box::new(backward)));
        }
    }

    /// Runs every closure, newest first, from the gradients already in `grads`.
    ///
    /// # Errors
    /// The first error of a closure.
    pub fn backward(self, grads: &mut Grads) -> Result<()> {
        for (layer, step) in self.backward.into_iter().flatten().rev() {
            let _layer = (!layer.is_empty()).then(|| range(&layer));
            step(grads)?;
        }
        Ok(())
    }
}

/// Gradients of a scalar with respect to values and parameters.
#[derive(Default)]
pub struct Grads {
    values: HashMap<ValueId, Tensor>,
    params: Vec<ParamGrad>,
}

/// Floats of a parameter, and its gradient once one arrived.
struct ParamGrad {
    len: usize,
    sum: OnceLock<Buffer>,
}

impl Grads {
    /// Zero gradients for parameters of the given sizes.
    pub fn new(param_lens: impl IntoIterator<Item = usize>) -> Self {
        let params = param_lens.into_iter().map(|len| ParamGrad { len, sum: OnceLock::new() }).collect();
        Grads { values: HashMap::new(), params }
    }

    /// Takes the gradient of a value out, if one arrived.
    pub fn take(&mut self, id: ValueId) -> Option<Tensor> {
        self.values.remove(&id)
    }

    /// Sets the gradient of a value that has none: ops use `ops::residual::give`, which adds.
    pub fn set(&mut self, id: ValueId, grad: Tensor) {
        let before = self.values.insert(id, grad);
        assert!(before.is_none(), "a gradient is taken out before it is set");
    }

    /// Adds `grad` to the gradient of a parameter; lengths must agree.
    pub fn add_param(&mut self, id: ParamId, grad: Buffer) {
        let param = &mut self.params[id.0];
        assert_eq!(param.len, grad.len(), "a gradient is as long as its parameter");
        match param.sum.get_mut() {
            Some(sum) => add_assign(sum, &grad),
            None => param.sum = OnceLock::from(grad),
        }
    }

    /// The gradient of a parameter, in the parameter's own (PyTorch) layout.
    pub fn param(&self, id: ParamId) -> &[f32] {
        let param = &self.params[id.0];
        param.sum.get_or_init(|| Buffer::zeroed(param.len))
    }
}

/// sum += x.
pub fn add_assign(sum: &mut [f32], x: &[f32]) {
    use rayon::prelude::*;
    assert_eq!(sum.len(), x.len(), "gradients of one value have one length");
    const CHUNK: usize = 1 << 16;
    sum.par_chunks_mut(CHUNK)
        .zip(x.par_chunks(CHUNK))
        .for_each(|(sum, x)| sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += x));
}
