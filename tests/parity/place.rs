//! Where the engine computes: in host memory, or on a CUDA device that [`on_device`] sets for a while.

use std::cell::RefCell;
use std::sync::Arc;

use spleen_hpc::device::cuda::Cuda;
use spleen_hpc::nn::UNet;
use spleen_hpc::ops::norm_prelu::Running;
use spleen_hpc::tensor::{Param, Tensor};

use crate::Outcome;

thread_local! {
    static DEVICE: RefCell<Option<Arc<Cuda>>> = const { RefCell::new(None) };
}

/// Runs `work` with everything placed on `cuda`.
pub fn on_device<R>(cuda: &Arc<Cuda>, work: impl FnOnce() -> R) -> R {
    DEVICE.set(Some(cuda.clone()));
    let result = work();
    DEVICE.set(None);
    result
}

/// The device in force.
pub fn current() -> Option<Arc<Cuda>> {
    DEVICE.with_borrow(Option::clone)
}

/// `tensor` where the engine computes.
pub fn tensor(tensor: Tensor) -> Outcome<Tensor> {
    Ok(current().map_or(Ok(tensor.clone()), |cuda| tensor.to_device(&cuda))?)
}

/// `param` where the engine computes, with a gradient of 0.
pub fn param(mut param: Param) -> Outcome<Param> {
    if let Some(cuda) = current() {
        let len = param.value.len();
        param.place(cuda.buffer(len)?, Some(cuda.upload(&vec![0.0; len])?))?;
    }
    Ok(param)
}

/// `running` where the engine computes.
pub fn running(mut running: Running) -> Outcome<Running> {
    if let Some(cuda) = current() {
        running.place(&cuda)?;
    }
    Ok(running)
}

/// A copy of `net` where the engine computes, with gradients of 0.
pub fn network(net: &UNet) -> Outcome<UNet> {
    let mut net = net.clone();
    if let Some(cuda) = current() {
        let lens: Vec<usize> = net.params().iter().map(|p| p.value.len()).collect();
        net.place(|i| Ok((cuda.buffer(lens[i])?, Some(cuda.upload(&vec![0.0; lens[i]])?))))?;
    }
    Ok(net)
}
