//! A parameter on a CUDA device.

use crate::device::cuda::{Act, Buf};
use crate::error::Result;
use std::collections::HashMap;
use std::sync::Mutex;

/// An f32 master in PyTorch's layout, the sum of its gradients, and what kernels made of it for this step.
#[derive(Debug)]
pub struct DeviceParam {
    /// The master, C order.
    pub value: Buf<f32>,
    /// Its gradient, same layout: backward passes add to it. `None` for inference.
    pub grad: Option<Buf<f32>>,
    packed: Mutex<HashMap<&'static str, Act>>,
}

impl DeviceParam {
    /// A parameter whose master is `value`.
    pub fn new(value: Buf<f32>, grad: Option<Buf<f32>>) -> Self {
        DeviceParam { value, grad, packed: Mutex::default() }
    }

    /// Where backward passes add the gradient.
    ///
    /// # Panics
    /// When the parameter was placed for inference.
    pub fn grad(&self) -> &Buf<f32> {
        self.grad.as_ref().expect("a tape that records has parameters placed for training")
    }

    /// The master as kernels of one layout want it: made by `pack` the first time, kept until the master changes.
    ///
    /// # Errors
    /// Those of `pack`.
    pub fn packed(&self, layout: &'static str, pack: impl FnOnce() -> Result<Act>) -> Result<Act> {
        let mut kept = self.packed.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(act) = kept.get(layout) {
            return Ok(act.clone());
        }
        let act = pack()?;
        kept.insert(layout, act.clone());
        Ok(act)
    }

    /// Forgets what was packed: to be called when the master has changed.
    pub fn forget_packed(&self) {
        self.packed.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clear();
    }
}
