//! The residual sum on a CUDA device (kernels/residual.cu).

use crate::device::cuda::{Act, Elem, In, Kernel, Launch, Out};
use crate::error::Result;
use crate::tensor::{PendingArgs, View};
use bytemuck::{Pod, Zeroable};

/// `Residual` of kernels/residual.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Args {
    a: In<Elem>,
    b: In<Elem>,
    y: Out<Elem>,
    map_a: PendingArgs,
    map_b: PendingArgs,
    channels: u32,
    sample_len: u32,
    len: u64,
}

static ADD: Kernel<Args> = Kernel::new("residual.cu", "residual_add");

const THREADS: u32 = 256;

/// a + b written out, or a alone with nothing pending. Shapes must be equal.
///
/// # Errors
/// Those of the device.
pub fn add(a: &View, b: Option<&View>) -> Result<Act> {
    let cuda = a.data.cuda();
    let y = cuda.act(a.data.len())?;
    let args = Args {
        a: a.data.read(),
        b: b.map_or(In::NULL, |b| b.data.read()),
        y: y.write(),
        map_a: a.pending_args(),
        map_b: b.map_or(PendingArgs::zeroed(), View::pending_args),
        channels: a.shape.c as u32,
        sample_len: (a.shape.voxels() * a.shape.c) as u32,
        len: a.data.len() as u64,
    };
    cuda.launch(&ADD, Launch::over(a.data.len(), THREADS), &args)?;
    Ok(y)
}
