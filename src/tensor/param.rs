//! A trainable tensor.

use super::{DeviceParam, Grads, ParamId};
use crate::device::cuda::{Buf, Cuda};
use crate::error::Result;
use std::sync::Arc;

/// An f32 master in PyTorch's layout. Closures on a tape share the value; the optimizer changes it between tapes.
///
/// While a parameter is on a device its master is there, and `value` is what it was at the last
/// [`Param::refresh`].
#[derive(Clone, Debug)]
pub struct Param {
    /// Position in `named_parameters()` order.
    pub id: ParamId,
    /// PyTorch's shape: (O, I, k, k, k), (I, O, k, k, k), (C) or (1).
    pub shape: Arc<[usize]>,
    /// The values, C order.
    pub value: Arc<Vec<f32>>,
    device: Option<Arc<DeviceParam>>,
}

impl Param {
    /// A parameter in host memory.
    pub fn new(id: ParamId, shape: impl Into<Arc<[usize]>>, value: Vec<f32>) -> Self {
        Param { id, shape: shape.into(), value: Arc::new(value), device: None }
    }

    /// The values for writing; copies them if a tape still shares them.
    pub fn make_mut(&mut self) -> &mut [f32] {
        Arc::make_mut(&mut self.value).as_mut_slice()
    }

    /// Where it is on a device.
    ///
    /// # Panics
    /// When it is not there: ops get their parameters where their inputs are.
    pub fn device(&self) -> &Arc<DeviceParam> {
        self.device.as_ref().expect("parameters are on the device that their op runs on")
    }

    /// The device it is on, if it is on one.
    pub fn cuda(&self) -> Option<&Arc<Cuda>> {
        self.device.as_ref().map(|device| device.value.cuda())
    }

    /// Moves the master to `value` on a device, with a place for its gradient where it is to be trained.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn place(&mut self, value: Buf<f32>, grad: Option<Buf<f32>>) -> Result<()> {
        value.upload(&self.value)?;
        self.device = Some(Arc::new(DeviceParam::new(value, grad)));
        Ok(())
    }

    /// Its gradient after a backward pass, in its own layout; waits for the device.
    ///
    /// # Errors
    /// What went wrong on the device.
    pub fn gradient(&self, grads: &Grads) -> Result<Vec<f32>> {
        match &self.device {
            None => Ok(grads.param(self.id).to_vec()),
            Some(device) => device.grad().download(),
        }
    }

    /// Makes `value` the master's; waits for the device. Nothing to do in host memory.
    ///
    /// # Errors
    /// What went wrong on the device.
    pub fn refresh(&mut self) -> Result<()> {
        if let Some(device) = &self.device {
            self.value = Arc::new(device.value.download()?);
        }
        Ok(())
    }
}
