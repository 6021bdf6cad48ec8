//! What the convolution kernels take (kernels/tile.cuh, kernels/epilogue.cuh).

use super::plan::HaloPlan;
use crate::device::cuda::{Act, Elem, In, Out, Precision};
use crate::error::{Error, Result};
use crate::tensor::{DeviceParam, Partials, PendingArgs, Shape, View};
use bytemuck::{Pod, Zeroable};

/// Output channels of a fragment.
pub const GROUP: usize = 16;

/// Input channels of a chunk: 32 bytes.
pub fn chunk(precision: Precision) -> usize {
    32 / precision.bytes()
}

/// `Source` of kernels/tile.cuh.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct SourceArgs {
    x: In<Elem>,
    map: PendingArgs,
    channels: u32,
    chunks: u32,
}

/// `Head` of kernels/epilogue.cuh.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct HeadArgs {
    y: Out<Elem>,
    bias: In<f32>,
    stats: Out<f32>,
    channels: u32,
    groups: u32,
}

/// `Filter` of kernels/tile.cuh.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct FilterArgs {
    /// Packed weights.
    pub w: In<Elem>,
    /// First chunk of the concatenated input that they are for.
    pub first_chunk: u32,
    /// First group of the concatenated output that they are for.
    pub first_group: u32,
    /// Groups in them.
    pub groups: u32,
    /// For size.
    pub unused: u32,
}

impl FilterArgs {
    /// All chunks and groups of `groups`.
    pub fn new(w: &Act, groups: usize) -> Self {
        FilterArgs { w: w.read(), first_chunk: 0, first_group: 0, groups: groups as u32, unused: 0 }
    }
}

/// `Halo` of kernels/tile.cuh.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct HaloArgs {
    extent: [u32; 3],
    pitch: u32,
    plane: u32,
    odd: u32,
    per_h: u32,
    per_w: u32,
}

impl From<&HaloPlan> for HaloArgs {
    fn from(halo: &HaloPlan) -> Self {
        // quotient() of kernels/tile.cuh.
        let per = |extent: usize| ((1usize << 19) / extent + 1) as u32;
        HaloArgs {
            extent: halo.extent.map(|e| e as u32),
            pitch: halo.pitch as u32,
            plane: halo.plane as u32,
            odd: halo.odd as u32,
            per_h: per(halo.extent[1]),
            per_w: per(halo.extent[2]),
        }
    }
}

/// D, H, W for a kernel.
pub fn volume(space: [usize; 3]) -> [u32; 3] {
    space.map(|s| s as u32)
}

/// One or two inputs, concatenated along channels; what is missing has no channels.
///
/// # Errors
/// [`Error::Shape`] for more than two.
pub fn sources(op: &'static str, inputs: &[&View]) -> Result<[SourceArgs; 2]> {
    at_most_two(op, "inputs", inputs.len())?;
    let mut sources = [SourceArgs::zeroed(); 2];
    for (source, x) in sources.iter_mut().zip(inputs) {
        *source = SourceArgs {
            x: x.data.read(),
            map: x.pending_args(),
            channels: x.shape.c as u32,
            chunks: x.shape.c.div_ceil(chunk(x.data.precision())) as u32,
        };
    }
    Ok(sources)
}

/// Chunks of all inputs.
pub fn chunks(sources: &[SourceArgs; 2]) -> usize {
    sources.iter().map(|s| s.chunks as usize).sum()
}

/// One output of a convolution.
#[derive(Debug)]
pub struct Output {
    /// Its values, with nothing applied after the convolution.
    pub data: Act,
    /// Its shape.
    pub shape: Shape,
    /// Statistics of the stored values, where they were asked for.
    pub partials: Option<Partials>,
}

/// What an output is asked to be.
#[derive(Clone, Copy)]
pub struct Head<'a> {
    /// Its channels.
    pub channels: usize,
    /// (channels), added to it.
    pub bias: Option<&'a DeviceParam>,
    /// Whether to take statistics.
    pub stats: bool,
}

impl<'a> Head<'a> {
    /// `channels` channels and nothing else.
    pub fn plain(channels: usize) -> Self {
        Head { channels, bias: None, stats: false }
    }
}

impl Output {
    /// Memory on the device of `like` for one output a head, each `shape` but for its channels, with `tiles` statistics
    /// a sample where they are asked for.
    ///
    /// # Errors
    /// When the device has not enough.
    pub fn all(like: &Act, shape: Shape, heads: &[Head], tiles: usize) -> Result<Vec<Self>> {
        let cuda = like.cuda();
        let output = |head: &Head| {
            let shape = shape.with_channels(head.channels);
            let partials = match head.stats {
                true => Some(Partials { stats: cuda.buffer(shape.n * tiles * shape.c * 3)?, tiles }),
                false => None,
            };
            Ok(Output { data: cuda.act(shape.len())?, shape, partials })
        };
        heads.iter().map(output).collect()
    }
}

/// One or two outputs, concatenated along channels; what is missing has no channels.
///
/// # Errors
/// [`Error::Shape`] for more than two.
pub fn heads(op: &'static str, outputs: &[Output], asked: &[Head]) -> Result<[HeadArgs; 2]> {
    at_most_two(op, "outputs", outputs.len())?;
    let mut heads = [HeadArgs::zeroed(); 2];
    for ((head, y), asked) in heads.iter_mut().zip(outputs).zip(asked) {
        *head = HeadArgs {
            y: y.data.write(),
            bias: asked.bias.map_or(In::NULL, |b| b.value.read()),
            stats: y.partials.as_ref().map_or_else(Out::zeroed, |p| p.stats.write()),
            channels: y.shape.c as u32,
            groups: y.shape.c.div_ceil(GROUP) as u32,
        };
    }
    Ok(heads)
}

fn at_most_two(op: &'static str, what: &str, got: usize) -> Result<()> {
    if (1..=2).contains(&got) {
        return Ok(());
    }
    Err(Error::Shape { op, want: format!("one or two {what}"), got: got.to_string() })
}
