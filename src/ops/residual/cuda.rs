//! The residual sum on a CUDA device (kernels/residual.cu).

use crate::device::cuda::{Act, Cuda, Elem, In, Kernel, Launch, Out, SelfTest, agree};
use crate::error::Result;
use crate::tensor::{PendingArgs, Shape, Tape, Tensor, View};
use bytemuck::{Pod, Zeroable};
use std::sync::Arc;

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

/// See [`SelfTest`].
pub const SELF_TESTS: &[SelfTest] = &[SelfTest { name: "residual", run: self_test }];

fn self_test(cuda: &Arc<Cuda>) -> Result<String> {
    let shape = Shape::new(2, [5, 6, 7], 16);
    // Multiples of 1/64 up to 2, which fp16 holds exactly; their sums too.
    let values =
        |step: usize| (0..shape.len()).map(|i| (i * step % 257) as f32 / 64.0 - 2.0).collect::<Vec<_>>();
    let (a, b) = (values(37), values(101));
    let tensor = |values: &[f32]| Tensor::from_slice(shape, values).into();
    let want = super::add(&mut Tape::off(), &tensor(&a), &tensor(&b))?;
    let view = |values: &[f32]| {
        let act = cuda.act(values.len())?;
        act.upload(values)?;
        Ok::<_, crate::Error>(View::plain(act, shape))
    };
    let got = add(&view(&a)?, Some(&view(&b)?))?.download()?;
    agree(&got, want.data(), 0.0)
}
