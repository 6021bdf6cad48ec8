//! Weights as the convolution kernels want them (kernels/conv3d_pack.cu).

use super::args::{GROUP, chunk};
use crate::device::cuda::{Act, Elem, In, Kernel, Launch, Out};
use crate::error::Result;
use crate::tensor::DeviceParam;
use bytemuck::{Pod, Zeroable};

/// What a block of packed weights holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// One tap for each block: any channels.
    Taps,
    /// All 27 taps along the inner axis: one or two input channels.
    Flat,
    /// A row of taps as a band: two channels to two.
    Band,
    /// One input offset for each block, output parities side by side: transposed, at most two output channels.
    Parity,
}

/// `Pack` of kernels/conv3d_pack.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Args {
    w: In<f32>,
    out: Out<Elem>,
    k_step: u32,
    n_step: u32,
    k: [u32; 2],
    n: [u32; 2],
    taps: u32,
    mirrored: u32,
    blocks: u32,
    len: u32,
}

static TAPS: Kernel<Args> = Kernel::new("conv3d_pack.cu", "conv3d_pack_taps");
static FLAT: Kernel<Args> = Kernel::new("conv3d_pack.cu", "conv3d_pack_flat");
static BAND: Kernel<Args> = Kernel::new("conv3d_pack.cu", "conv3d_pack_band");
static PARITY: Kernel<Args> = Kernel::new("conv3d_pack.cu", "conv3d_pack_parity");

const THREADS: u32 = 256;

/// How a master of shape (A, B, k, k, k) is seen by a kernel.
#[derive(Clone, Copy, Debug)]
pub struct Packing {
    /// Name under which the parameter keeps the result.
    pub layout: &'static str,
    /// What a block holds.
    pub form: Form,
    /// Whether the master's first axis is the kernel's input channels (else its second is).
    pub first_is_input: bool,
    /// Whether taps run backwards.
    pub mirrored: bool,
    /// Channels of the one or two inputs that this weight is for.
    pub inputs: [usize; 2],
    /// Channels of the one or two outputs that this weight is for.
    pub outputs: [usize; 2],
}

/// Packs `weight` of `dims`, once until its master changes.
///
/// # Errors
/// Those of the device.
pub fn packed(weight: &DeviceParam, dims: [usize; 5], p: Packing) -> Result<Act> {
    weight.packed(p.layout, || {
        let cuda = weight.value.cuda();
        let precision = cuda.precision();
        let taps = dims[2].pow(3);
        let (first, second) = (dims[1] * taps, taps);
        let (k_step, n_step) = if p.first_is_input { (first, second) } else { (second, first) };
        let pieces = |channels: [usize; 2], unit: usize| channels.map(|c| c.div_ceil(unit)).iter().sum();
        let per_block = chunk(precision) * GROUP;
        let (chunks, groups): (usize, usize) = (pieces(p.inputs, chunk(precision)), pieces(p.outputs, GROUP));
        let (blocks, kernel) = match p.form {
            Form::Taps => (taps, &TAPS),
            Form::Flat => (1, &FLAT),
            Form::Band => (taps / dims[4], &BAND),
            Form::Parity => (8, &PARITY),
        };
        let len = match p.form {
            Form::Flat => (taps * p.inputs[0]).div_ceil(chunk(precision)) * groups * per_block,
            Form::Band if precision.bytes() == 4 => taps * p.inputs[0] * p.outputs[0],
            _ => chunks * blocks * groups * per_block,
        };
        let out = cuda.act(len)?;
        let args = Args {
            w: weight.value.read(),
            out: out.write(),
            k_step: k_step as u32,
            n_step: n_step as u32,
            k: p.inputs.map(|c| c as u32),
            n: p.outputs.map(|c| c as u32),
            taps: taps as u32,
            mirrored: u32::from(p.mirrored),
            blocks: blocks as u32,
            len: len as u32,
        };
        cuda.launch(kernel, Launch::over(len, THREADS), &args)?;
        Ok(out)
    })
}
