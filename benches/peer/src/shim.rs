//! Safe faces of shim.cpp.

use spleen_hpc::{Error, Result};
use tch::Tensor;
use torch_sys::C_tensor;

unsafe extern "C" {
    fn peer_autocast(on: bool);
    fn peer_convolution_backward(
        dy: *const C_tensor,
        x: *const C_tensor,
        weight: *const C_tensor,
        stride: i64,
        padding: i64,
        transposed: bool,
        of_weight: bool,
    ) -> bool;
}

/// What `work` makes under `torch.autocast("cpu", torch.bfloat16)`.
pub fn autocast<T>(work: impl FnOnce() -> T) -> T {
    // SAFETY: sets two variables of this thread.
    unsafe { peer_autocast(true) };
    let result = work();
    // SAFETY: as above, and frees what autocast keeps for itself.
    unsafe { peer_autocast(false) };
    result
}

/// A 3D convolution's geometry.
#[derive(Clone, Copy)]
pub struct Geometry {
    pub stride: i64,
    pub padding: i64,
    pub transposed: bool,
}

/// Computes one gradient of a convolution, the weight's or the input's.
pub fn convolution_backward(
    dy: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    geometry: Geometry,
    of_weight: bool,
) -> Result<()> {
    let Geometry { stride, padding, transposed } = geometry;
    // SAFETY: a `C_tensor` is an `at::Tensor`; the three live until the call returns, which keeps none of them.
    let done = unsafe {
        peer_convolution_backward(
            dy.as_ptr(),
            x.as_ptr(),
            weight.as_ptr(),
            stride,
            padding,
            transposed,
            of_weight,
        )
    };
    if done {
        Ok(())
    } else {
        Err(Error::Internal("libtorch: convolution_backward failed, see above".into()))
    }
}
