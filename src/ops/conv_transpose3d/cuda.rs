//! Transposed 3D convolution on a CUDA device (kernels/conv_transpose3d.cu). Its dgrad is a convolution of stride 2, and
//! it is the dgrad of one.

use crate::device::cuda::{Act, Kernel, Launch};
use crate::error::{Error, Result};
use crate::ops::conv3d::args::{
    FilterArgs, GROUP, HaloArgs, HeadArgs, SourceArgs, chunks, heads, sources, volume,
};
use crate::ops::conv3d::cuda::Gather;
pub use crate::ops::conv3d::cuda::Output;
use crate::ops::conv3d::narrow;
use crate::ops::conv3d::pack::{Form, Packing, packed};
use crate::ops::conv3d::plan::{Problem, Variant, plan};
use crate::tensor::{DeviceParam, Shape, View};
use bytemuck::{Pod, Zeroable};

/// `ConvTranspose3d` of kernels/conv_transpose3d.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Args {
    source: [SourceArgs; 2],
    head: [HeadArgs; 2],
    filter: [FilterArgs; 2],
    halo: HaloArgs,
    space: [u32; 3],
    out: [u32; 3],
    tile: [u32; 2],
    tiles: [u32; 2],
    warps: [u32; 2],
    chunks: u32,
    buffer_bytes: u32,
}

const fn variant(name: &'static str, depth: usize, registers: usize, mma: usize, weights: usize) -> Variant {
    Variant {
        name,
        window: 2,
        stride: 1,
        depth,
        groups: 1,
        splits_taps: false,
        threads: 256,
        registers,
        mma: mma * depth,
        fragments: 4 * (depth + 1) + weights,
    }
}

/// The kernels at the end of kernels/conv_transpose3d.cu: 27 products of two mma each a chunk and anchor fragment, or 8
/// of which every other one needs one mma.
static GENERAL: [Variant; 1] = [variant("conv_transpose3d_general", 2, 255, 54, 27)];
static NARROW: [Variant; 1] = [variant("conv_transpose3d_narrow", 4, 128, 12, 8)];

/// Output channels up to which all parities of a voxel fit one fragment.
const NARROW_CHANNELS: usize = 2;

/// The scattering product y[2 i + t - 1] += x[i] w[t] of `inputs`, concatenated.
pub(in crate::ops) struct Scatter<'a> {
    /// Name for errors.
    pub op: &'static str,
    /// One or two inputs of one size.
    pub inputs: &'a [&'a View],
    /// D, H, W of the output: twice the inputs', or one less.
    pub out: [usize; 3],
    /// Output channels.
    pub channels: usize,
    /// (channels), if any.
    pub bias: Option<&'a DeviceParam>,
    /// Whether to take statistics.
    pub stats: bool,
    /// Packed weights of the only filter, or of one for each input.
    pub filters: &'a [FilterArgs],
}

/// What a block of packed weights holds for an output of `channels`.
pub(in crate::ops) fn form(channels: usize) -> Form {
    if channels <= NARROW_CHANNELS { Form::Parity } else { Form::Taps }
}

impl Scatter<'_> {
    /// Runs it.
    ///
    /// # Errors
    /// [`Error::Shape`] for more than two inputs; those of the device.
    pub fn run(&self) -> Result<Output> {
        let (x, op) = (self.inputs[0], self.op);
        let cuda = x.data.cuda();
        let source = sources(op, self.inputs)?;
        let problem = Problem {
            n: x.shape.n,
            space: x.shape.space(),
            window: 2,
            stride: 1,
            chunks: chunks(&source),
            groups: self.channels.div_ceil(GROUP),
        };
        let variants = if form(self.channels) == Form::Parity { &NARROW } else { &GENERAL };
        let plan = plan(&problem, variants, cuda.info());
        let tiles = plan.tiles.iter().product();
        let shape = Shape::new(x.shape.n, self.out, self.channels);
        let outputs = [Output::new(&x.data, shape, self.stats.then_some(tiles))?];
        let small = |v: usize| v as u32;
        let args = Args {
            source,
            head: heads(op, &outputs, &[self.bias])?,
            filter: [self.filters[0], self.filters[self.filters.len() - 1]],
            halo: HaloArgs::from(&plan.halo),
            space: volume(x.shape.space()),
            out: volume(self.out),
            tile: [plan.tile[1], plan.tile[2]].map(small),
            tiles: [plan.tiles[1], plan.tiles[2]].map(small),
            warps: [plan.warps[0], plan.warps[1]].map(small),
            chunks: small(problem.chunks),
            buffer_bytes: small(plan.halo.bytes()),
        };
        let launch = Launch {
            grid: [tiles, plan.slices, x.shape.n].map(small),
            threads: small(plan.threads()),
            shared: small(plan.shared),
        };
        let kernel = Kernel::<Args>::new("conv_transpose3d.cu", plan.variant.name);
        cuda.launch(&kernel, launch, &args)?;
        let [output] = outputs;
        Ok(output)
    }
}

/// Channels of one or two inputs, the second 0 where there is one.
fn pair(op: &'static str, channels: &[usize]) -> Result<[usize; 2]> {
    match *channels {
        [a] => Ok([a, 0]),
        [a, b] => Ok([a, b]),
        _ => Err(Error::Shape { op, want: "one or two inputs".into(), got: channels.len().to_string() }),
    }
}

fn check(
    op: &'static str,
    channels: &[usize],
    weight: &DeviceParam,
    dims: [usize; 5],
    fits: bool,
) -> Result<[usize; 2]> {
    let pair = pair(op, channels)?;
    let sum: usize = channels.iter().sum();
    let whole = weight.value.len() == dims.iter().product::<usize>();
    if dims[0] != sum || dims[2..] != [3; 3] || !whole || !fits {
        return Err(Error::Shape {
            op,
            want: format!("weights [{sum}, O, 3, 3, 3] and inputs of one size"),
            got: format!("weights {dims:?} for inputs of {channels:?} channels"),
        });
    }
    Ok(pair)
}

/// y = transposed convolution of `cat(inputs)`, twice as large on every axis; weights (I, O, 3, 3, 3) of `dims`.
///
/// # Errors
/// [`Error::Shape`] when inputs, weights and bias do not fit each other, or for more than two inputs; those of the
/// device.
pub fn fprop(
    inputs: &[&View],
    weight: &DeviceParam,
    dims: [usize; 5],
    bias: Option<&DeviceParam>,
    stats: bool,
) -> Result<Output> {
    let op = "conv_transpose3d";
    let channels: Vec<usize> = inputs.iter().map(|x| x.shape.c).collect();
    let same = inputs.iter().all(|x| x.shape.with_channels(0) == inputs[0].shape.with_channels(0));
    let fits = same && bias.is_none_or(|b| b.value.len() == dims[1]);
    let packing = Packing {
        layout: "conv_transpose3d fprop",
        form: form(dims[1]),
        first_is_input: true,
        mirrored: false,
        inputs: check(op, &channels, weight, dims, fits)?,
        outputs: [dims[1], 0],
    };
    let w = packed(weight, dims, packing)?;
    let scatter = Scatter {
        op,
        inputs,
        out: inputs[0].shape.space().map(|s| 2 * s),
        channels: dims[1],
        bias,
        stats,
        filters: &[FilterArgs::new(&w, dims[1].div_ceil(GROUP))],
    };
    scatter.run()
}

/// dx of every input, which had `input_channels` channels: a convolution of dy with stride 2.
///
/// # Errors
/// [`Error::Shape`] when dy and weights do not fit each other, or for more than two inputs; those of the device.
pub fn dgrad(
    dy: &View,
    weight: &DeviceParam,
    dims: [usize; 5],
    input_channels: &[usize],
) -> Result<Vec<Act>> {
    let op = "conv_transpose3d dgrad";
    let even = dy.shape.space().iter().all(|s| s % 2 == 0);
    let form = narrow::form(3, 2, dy.shape.c, input_channels);
    let packing = Packing {
        layout: "conv_transpose3d dgrad",
        form,
        first_is_input: false,
        mirrored: false,
        inputs: [dy.shape.c, 0],
        outputs: check(op, input_channels, weight, dims, even && dy.shape.c == dims[1])?,
    };
    let w = packed(weight, dims, packing)?;
    let groups = input_channels.iter().map(|c| c.div_ceil(GROUP)).sum();
    let outputs: Vec<_> = input_channels.iter().map(|&c| (c, None, false)).collect();
    let gather = Gather {
        op,
        kernel: 3,
        stride: 2,
        inputs: &[dy],
        outputs: &outputs,
        form,
        filters: &[FilterArgs::new(&w, groups)],
    };
    Ok(gather.run()?.into_iter().map(|y| y.data).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Info;
    use crate::ops::conv3d::plan::SHARED_LIMIT;

    #[test]
    fn plans_fill_an_h100() {
        let info = Info {
            name: "H100".into(),
            capability: (9, 0),
            multiprocessors: 132,
            memory: 80 << 30,
            shared_per_block: 227 << 10,
        };
        // The network's, 8 patches of 96^3: side of the input, chunks, output channels.
        for (side, chunks, channels) in [(6, 24, 64usize), (12, 8, 32), (24, 4, 16), (48, 2, 2)] {
            let groups = channels.div_ceil(GROUP);
            let p = Problem { n: 8, space: [side; 3], window: 2, stride: 1, chunks, groups };
            let variants = if form(channels) == Form::Parity { &NARROW } else { &GENERAL };
            let plan = plan(&p, variants, &info);
            let blocks = p.n * plan.tiles.iter().product::<usize>() * plan.slices;
            println!(
                "{p:?} {} tile {:?} warps {:?} {blocks} blocks {} KB {:.1} us",
                plan.variant.name,
                plan.tile,
                plan.warps,
                plan.shared >> 10,
                plan.cycles / 1755.0
            );
            assert!(plan.shared <= SHARED_LIMIT && blocks >= 96, "{p:?}: {plan:?}");
        }
    }
}
