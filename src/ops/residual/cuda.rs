//! Residual sums on a CUDA device (kernels/residual.cu).

use crate::device::cuda::{Act, Elem, In, Kernel, Launch, Out};
use crate::error::{Error, Result};
use crate::tensor::{PendingArgs, View};
use bytemuck::{Pod, Zeroable};

/// `Residual` of kernels/residual.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct AddArgs {
    a: In<Elem>,
    b: In<Elem>,
    y: Out<Elem>,
    map_a: PendingArgs,
    map_b: PendingArgs,
    channels: u32,
    sample_len: u32,
}

static ADD: Kernel<AddArgs> = Kernel::new("residual.cu", "residual_add");
static ADD_SCALAR: Kernel<AddArgs> = Kernel::new("residual.cu", "residual_add_scalar");

const THREADS: u32 = 256;

/// Bytes of a vector access.
const VECTOR: usize = 16;

/// a + b written out, or a alone with nothing pending. [N, D, H, W, C].
///
/// # Errors
/// [`Error::Shape`] when shapes differ; those of the device.
pub fn add(a: &View, b: Option<&View>) -> Result<Act> {
    if let Some(b) = b.filter(|b| b.shape != a.shape) {
        return Err(Error::Shape { op: "add", want: a.shape.to_string(), got: b.shape.to_string() });
    }
    let cuda = a.data.cuda();
    let y = cuda.act(a.data.len())?;
    let sample_len = a.shape.voxels() * a.shape.c;
    let args = AddArgs {
        a: a.data.read(),
        b: b.map_or(In::NULL, |b| b.data.read()),
        y: y.write(),
        map_a: a.pending_args(),
        map_b: b.map_or(PendingArgs::zeroed(), View::pending_args),
        channels: a.shape.c as u32,
        sample_len: sample_len as u32,
    };
    let vector = VECTOR / y.precision().bytes();
    let (kernel, items) = match sample_len % vector {
        0 => (&ADD, sample_len / vector),
        _ => (&ADD_SCALAR, sample_len),
    };
    let mut launch = Launch::over(items, THREADS);
    launch.grid[1] = a.shape.n as u32;
    cuda.launch(kernel, launch, &args)?;
    Ok(y)
}

/// `x` written out with nothing pending: what its consumers see as they load it. [N, D, H, W, C].
///
/// # Errors
/// Those of the device.
pub fn materialize(x: &View) -> Result<Act> {
    add(x, None)
}
