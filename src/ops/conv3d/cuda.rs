//! 3D convolution on a CUDA device (kernels/conv3d.cuh). dgrad of stride 1 is a convolution again, that of stride 2 a
//! transposed one.

pub use super::args::Output;
use super::args::{FilterArgs, GROUP, Head, chunk};
use super::narrow;
use super::pack::{Form, Packing, packed};
use super::plan::VARIANTS;
use super::tiled::Tiled;
use crate::device::cuda::Act;
use crate::error::{Error, Result};
use crate::ops::conv_transpose3d;
use crate::tensor::{DeviceParam, Shape, View};

/// A convolution's parameters on the device.
#[derive(Clone, Copy, Debug)]
pub struct DeviceFilter<'a> {
    /// Master (O, I, k, k, k).
    pub weight: &'a DeviceParam,
    /// Its shape.
    pub dims: [usize; 5],
    /// (O); `None` where a norm follows, which cancels it.
    pub bias: Option<&'a DeviceParam>,
}

/// A convolution of `inputs` for `outputs`, both concatenated along channels, with weights packed as `form` says: of the
/// only filter, or of one for each input or output.
///
/// # Errors
/// [`Error::Shape`] for more than two inputs or outputs; those of the device.
pub(in crate::ops) fn gather(
    op: &'static str,
    [kernel, stride]: [usize; 2],
    inputs: &[&View],
    outputs: &[Head],
    form: Form,
    filters: &[FilterArgs],
) -> Result<Vec<Output>> {
    if form != Form::Taps {
        return narrow::run(op, inputs[0], stride, outputs, form, filters);
    }
    let out = inputs[0].shape.space().map(|s| s.div_ceil(stride));
    let tiled =
        Tiled { op, variants: &VARIANTS, window: kernel, stride, held: out, out, inputs, outputs, filters };
    tiled.run()
}

/// The kernel size of one or two filters over `channels` input channels, each with one of `others` (statistics to take
/// or gradients given).
fn check(channels: usize, filters: &[DeviceFilter], stride: usize, others: usize) -> Result<usize> {
    let kernel = filters.first().map_or(0, |f| f.dims[2]);
    let fits = |f: &DeviceFilter| {
        let [o, i, a, b, c] = f.dims;
        i == channels
            && [a, b, c] == [kernel; 3]
            && f.weight.value.len() == f.dims.iter().product::<usize>()
            && f.bias.is_none_or(|b| b.value.len() == o)
    };
    let known = matches!((kernel, stride), (1, 1) | (3, 1) | (3, 2));
    if (1..=2).contains(&filters.len()) && others == filters.len() && known && filters.iter().all(fits) {
        return Ok(kernel);
    }
    let dims: Vec<_> = filters.iter().map(|f| f.dims).collect();
    Err(Error::Shape {
        op: "conv3d",
        want: format!("one or two weights [O, {channels}, k, k, k] with k s of 1 1, 3 1 or 3 2"),
        got: format!("{dims:?} with stride {stride} for {others} outputs"),
    })
}

/// y = conv(x) for every filter; all have one kernel size and read x once. `stats[i]` asks for the statistics of output
/// i that the norm after it needs.
///
/// # Errors
/// [`Error::Shape`] when a filter does not fit `x`, or for none or more than two; those of the device.
pub fn fprop(x: &View, filters: &[DeviceFilter], stride: usize, stats: &[bool]) -> Result<Vec<Output>> {
    let kernel = check(x.shape.c, filters, stride, stats.len())?;
    let channels: Vec<usize> = filters.iter().map(|f| f.dims[0]).collect();
    let form = narrow::form(kernel, stride, x.shape.c, &channels);
    let mut packs = Vec::new();
    for f in filters {
        let packing = Packing {
            layout: if form == Form::Band { "conv3d fprop, band" } else { "conv3d fprop" },
            form,
            first_is_input: false,
            mirrored: false,
            inputs: [f.dims[1], 0],
            outputs: [f.dims[0], 0],
        };
        packs.push(packed(f.weight, f.dims, packing)?);
    }
    let mut first_group = 0;
    let mut args = Vec::new();
    for (f, w) in filters.iter().zip(&packs) {
        let groups = f.dims[0].div_ceil(GROUP);
        args.push(FilterArgs { first_group: first_group as u32, ..FilterArgs::new(w, groups) });
        first_group += groups;
    }
    let outputs: Vec<_> = filters
        .iter()
        .zip(stats)
        .map(|(f, &stats)| Head { channels: f.dims[0], bias: f.bias, stats })
        .collect();
    gather("conv3d", [kernel, stride], &[x], &outputs, form, &args)
}

/// dx = sum over the filters of their dy convolved backwards, for an input of `x_shape`.
///
/// # Errors
/// [`Error::Shape`] when a filter does not fit its dy, or for none or more than two; those of the device.
pub fn dgrad(dys: &[View], filters: &[DeviceFilter], x_shape: Shape, stride: usize) -> Result<Act> {
    let kernel = check(x_shape.c, filters, stride, dys.len())?;
    for (f, dy) in filters.iter().zip(dys) {
        let fits = dy.shape == Shape::new(x_shape.n, x_shape.space().map(|s| s.div_ceil(stride)), f.dims[0]);
        if !fits {
            return Err(Error::Shape {
                op: "conv3d dgrad",
                want: format!("one gradient for each filter onto {x_shape}"),
                got: format!("{} for weights {:?}", dy.shape, f.dims),
            });
        }
    }
    let form = match (stride, dys) {
        (1, [dy]) => narrow::form(kernel, 1, dy.shape.c, &[x_shape.c]),
        (1, _) => Form::Taps,
        _ => conv_transpose3d::cuda::form(x_shape.c),
    };
    let mut packs = Vec::new();
    for f in filters {
        let packing = Packing {
            layout: if form == Form::Band { "conv3d dgrad, band" } else { "conv3d dgrad" },
            form,
            first_is_input: true,
            mirrored: stride == 1,
            inputs: [f.dims[0], 0],
            outputs: [f.dims[1], 0],
        };
        packs.push(packed(f.weight, f.dims, packing)?);
    }
    let mut first_chunk = 0;
    let mut args = Vec::new();
    for (dy, w) in dys.iter().zip(&packs) {
        args.push(FilterArgs { first_chunk, ..FilterArgs::new(w, x_shape.c.div_ceil(GROUP)) });
        first_chunk += dy.shape.c.div_ceil(chunk(dy.data.precision())) as u32;
    }
    let inputs: Vec<&View> = dys.iter().collect();
    let op = "conv3d dgrad";
    let mut dxs = match stride {
        1 => gather(op, [kernel, 1], &inputs, &[Head::plain(x_shape.c)], form, &args)?,
        _ => conv_transpose3d::cuda::scatter(op, &inputs, x_shape.space(), Head::plain(x_shape.c), &args)?,
    };
    Ok(dxs.swap_remove(0).data)
}
