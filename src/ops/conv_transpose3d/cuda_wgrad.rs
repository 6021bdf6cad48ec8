//! The weight gradient of the transposed convolution on a CUDA device: that of a convolution of stride 2 that reads dy
//! and whose output gradients are the inputs.

use crate::device::cuda::Buf;
use crate::error::{Error, Result};
use crate::ops::conv3d::cuda_wgrad::accumulate;
use crate::tensor::View;

/// dw += gradient of the weights (I, O, 3, 3, 3), I the channels of all inputs together.
///
/// # Errors
/// [`Error::Shape`] when they do not fit each other; those of the device.
pub fn wgrad(inputs: &[&View], dy: &View, dw: &Buf<f32>) -> Result<()> {
    let op = "conv_transpose3d wgrad";
    let row = dy.shape.c * 27;
    let channels: usize = inputs.iter().map(|x| x.shape.c).sum();
    if dw.len() != channels * row {
        let (want, got) = (format!("{channels} x {row} weights"), dw.len().to_string());
        return Err(Error::Shape { op, want, got });
    }
    let mut start = 0;
    let dws: Vec<_> = inputs
        .iter()
        .map(|x| {
            start += x.shape.c * row;
            dw.slice(start - x.shape.c * row, x.shape.c * row)
        })
        .collect();
    accumulate(op, dy, inputs, 3, 2, &dws)
}
