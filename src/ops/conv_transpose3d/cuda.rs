//! Transposed 3D convolution on a CUDA device (kernels/conv_transpose3d.cu). Its dgrad is a convolution of stride 2, and
//! it is the dgrad of one.

use crate::device::cuda::Act;
use crate::error::{Error, Result};
use crate::ops::conv3d::args::{FilterArgs, GROUP, Head};
pub use crate::ops::conv3d::cuda::Output;
use crate::ops::conv3d::cuda::gather;
use crate::ops::conv3d::narrow;
use crate::ops::conv3d::pack::{Form, Packing, packed};
use crate::ops::conv3d::plan::Variant;
use crate::ops::conv3d::tiled::Tiled;
use crate::tensor::{DeviceParam, View};

const fn variant(
    name: &'static str,
    [depth, parities]: [usize; 2],
    registers: usize,
    mma: usize,
    weights: usize,
) -> Variant {
    Variant {
        file: "conv_transpose3d.cu",
        name,
        window: 2,
        stride: 1,
        depth,
        groups: 1,
        blocks: parities * depth,
        tap_shares: if parities == 1 { 1 } else { 2 },
        threads: 256,
        registers,
        mma: mma * depth,
        fragments: 4 * (depth + 1) + weights,
    }
}

/// The kernels at the end of kernels/conv_transpose3d.cu: 27 products of two mma each a chunk and anchor fragment, or 8
/// of which every other one needs one mma.
static GENERAL: [Variant; 1] = [variant("conv_transpose3d_general", [2, 8], 232, 54, 27)];
static NARROW: [Variant; 1] = [variant("conv_transpose3d_narrow", [4, 1], 120, 12, 8)];

/// Output channels up to which all parities of a voxel fit one fragment.
const NARROW_CHANNELS: usize = 2;

/// What a block of packed weights holds for an output of `channels`.
pub(in crate::ops) fn form(channels: usize) -> Form {
    if channels <= NARROW_CHANNELS { Form::Parity } else { Form::Taps }
}

/// The product `y[2 i + t - 1] += x[i] w[t]` of `inputs`, concatenated along channels, for an output of size `out`, which
/// is twice theirs or one less. Weights are packed as [`form`] says: of the only filter, or of one for each input.
///
/// # Errors
/// [`Error::Shape`] for more than two inputs; those of the device.
pub(in crate::ops) fn scatter(
    op: &'static str,
    inputs: &[&View],
    out: [usize; 3],
    output: Head,
    filters: &[FilterArgs],
) -> Result<Vec<Output>> {
    let tiled = Tiled {
        op,
        variants: if form(output.channels) == Form::Parity { &NARROW } else { &GENERAL },
        window: 2,
        stride: 1,
        held: inputs[0].shape.space(),
        out,
        inputs,
        outputs: &[output],
        filters,
    };
    tiled.run()
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
    let out = inputs[0].shape.space().map(|s| 2 * s);
    let filter = FilterArgs::new(&w, dims[1].div_ceil(GROUP));
    Ok(scatter(op, inputs, out, Head { channels: dims[1], bias, stats }, &[filter])?.swap_remove(0))
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
    let outputs: Vec<_> = input_channels.iter().map(|&c| Head::plain(c)).collect();
    let dxs = gather(op, [3, 2], &[dy], &outputs, form, &[FilterArgs::new(&w, groups)])?;
    Ok(dxs.into_iter().map(|dx| dx.data).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::{Info, Precision};
    use crate::ops::conv3d::plan::{Problem, SHARED_LIMIT, plan};

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
            let precision = Precision::Half;
            let p = Problem { precision, n: 8, space: [side; 3], window: 2, stride: 1, chunks, groups };
            let variants = if form(channels) == Form::Parity { &NARROW } else { &GENERAL };
            let plan = plan(&p, variants, &info);
            let blocks = p.n * plan.tiles.iter().product::<usize>() * plan.slices;
            assert!(plan.shared <= SHARED_LIMIT && blocks >= 96, "{p:?}: {plan:?}");
        }
    }
}
