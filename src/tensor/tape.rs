//! Reverse-mode differentiation: a list of closures, run newest first.
//!
//! Contract: an op appends one closure that owns exactly what its backward pass needs. It takes the gradient of its
//! output out of [`Grads`] (so memory falls during the backward pass and nothing aliases), gives the gradients of its
//! inputs with `ops::residual::give` (the first one is stored, a second consumer's is added) and accumulates those of
//! its parameters with [`Grads::add_param`], or on a device in `DeviceParam::grad`.

use super::{Tensor, ValueId};
use crate::device::arena::Buffer;
use crate::device::bf16::Operands;
use crate::device::list::{List, Reused};
use crate::device::nvtx::range;
use crate::error::Result;
use allocator_api2::boxed::Box;
use allocator_api2::unsize_box;
use std::sync::{Arc, OnceLock};

/// A parameter: its index in the network's `named_parameters()` order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParamId(pub usize);

/// A closure until it has run. (A box of memory that is not the system's cannot be called itself.)
trait Backward: Send {
    /// Calls it; once.
    fn run(&mut self, grads: &mut Grads) -> Result<()>;
}

impl<F: FnOnce(&mut Grads) -> Result<()> + Send> Backward for Option<F> {
    fn run(&mut self, grads: &mut Grads) -> Result<()> {
        self.take().expect("it runs once")(grads)
    }
}

/// The backward pass of an op, and the layer it belongs to.
type Step = (Arc<str>, Box<dyn Backward, Reused>);

/// What happened, in order; or nothing, when only the result matters.
#[derive(Default)]
pub struct Tape {
    backward: Option<List<Step>>,
    layer: Arc<str>,
    /// What convolutions on the CPU multiply, forwards and backwards, and what the gradients that norms give them are stored as.
    pub operands: Operands,
}

impl Tape {
    /// A tape that records.
    pub fn recording() -> Self {
        Tape { backward: Some(List::default()), ..Tape::default() }
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
    pub fn set_layer(&mut self, name: Arc<str>) {
        self.layer = name;
    }

    /// Appends the backward pass of one op.
    pub fn record(&mut self, backward: impl FnOnce(&mut Grads) -> Result<()> + Send + 'static) {
        if let Some(list) = &mut self.backward {
            list.push((self.layer.clone(), unsize_box!(Box::new_in(Some(backward), Reused))));
        }
    }

    /// Runs every closure, newest first, from the gradients already in `grads`.
    ///
    /// # Errors
    /// The first error of a closure.
    pub fn backward(self, grads: &mut Grads) -> Result<()> {
        for (layer, mut closure) in self.backward.into_iter().flatten().rev() {
            let _layer = (!layer.is_empty()).then(|| range(&layer));
            closure.run(grads)?;
        }
        Ok(())
    }
}

/// Gradients of a scalar with respect to values and parameters.
#[derive(Default)]
pub struct Grads {
    /// Few at a time: of what ops have given and none has taken yet.
    values: List<(ValueId, Tensor)>,
    params: List<ParamGrad>,
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
        Grads { values: List::default(), params }
    }

    /// Takes the gradient of a value out, if one arrived.
    pub fn take(&mut self, id: ValueId) -> Option<Tensor> {
        let at = self.values.iter().position(|(of, _)| *of == id)?;
        Some(self.values.remove(at).1)
    }

    /// Sets the gradient of a value that has none: ops use `ops::residual::give`, which adds.
    pub fn set(&mut self, id: ValueId, grad: Tensor) {
        assert!(self.values.iter().all(|(of, _)| *of != id), "a gradient is taken out before it is set");
        self.values.push((id, grad));
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
