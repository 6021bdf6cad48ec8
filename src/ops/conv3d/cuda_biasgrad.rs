//! Bias gradients of convolutions on a CUDA device (kernels/conv3d_biasgrad.cu).

use super::cuda_wgrad::reduce;
use crate::device::cuda::{Buf, Elem, In, Kernel, Launch, Out};
use crate::error::Result;
use crate::tensor::View;
use bytemuck::{Pod, Zeroable};

/// `BiasGrad` of kernels/conv3d_biasgrad.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct BiasArgs {
    dy: In<Elem>,
    partials: Out<f32>,
    len: u64,
    channels: u32,
    rows: u32,
}

static BIAS: Kernel<BiasArgs> = Kernel::new("conv3d_biasgrad.cu", "bias_grad");

const THREADS: u32 = 256;

/// db += sum of dy, which has nothing pending, over samples and voxels.
///
/// # Errors
/// Those of the device.
pub fn bias_grad(dy: &View, db: &Buf<f32>) -> Result<()> {
    debug_assert!(dy.pending.is_none() && db.len() == dy.shape.c, "a plain dy and a db of its channels");
    let cuda = dy.data.cuda();
    let channels = dy.shape.c;
    // 8 values a thread; at least 8 rows, so that whole vectors fill a stretch whatever the channels.
    let rows = (8 * THREADS as usize / channels).max(8);
    let rows = 1 << rows.ilog2();
    let stretch = rows * channels;
    let blocks = dy.shape.len().div_ceil(stretch).min(4 * cuda.info().multiprocessors as usize);
    let partials = cuda.buffer(blocks * channels)?;
    let args = BiasArgs {
        dy: dy.data.read(),
        partials: partials.write(),
        len: dy.shape.len() as u64,
        channels: channels as u32,
        rows: rows as u32,
    };
    let shared = (stretch * size_of::<f32>()) as u32;
    cuda.launch(&BIAS, Launch { grid: [blocks as u32, 1, 1], threads: THREADS, shared }, &args)?;
    reduce(&partials, blocks, std::slice::from_ref(db))
}
