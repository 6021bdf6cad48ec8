//! 3D convolution on a CUDA device (kernels/conv3d.cu). dgrad of stride 1 is a convolution again, that of stride 2 a
//! transposed one.

pub use super::args::Output;
use super::args::{FilterArgs, GROUP, HaloArgs, HeadArgs, SourceArgs, chunks, heads, sources, volume};
use super::narrow;
use super::pack::{Form, Packing, packed};
use super::plan::{Problem, VARIANTS, plan};
use crate::device::cuda::{Act, Kernel, Launch};
use crate::error::{Error, Result};
use crate::ops::conv_transpose3d::{self, cuda::Scatter};
use crate::tensor::{DeviceParam, Shape, View};
use bytemuck::{Pod, Zeroable};

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

/// `Conv3d` of kernels/conv3d.cu.
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
    warps: [u32; 3],
    chunks: u32,
    buffer_bytes: u32,
    unused: u32,
}

/// A gathering convolution of `inputs`, concatenated, for `outputs`, concatenated.
pub(in crate::ops) struct Gather<'a> {
    /// Name for errors.
    pub op: &'static str,
    /// Kernel size.
    pub kernel: usize,
    /// Stride.
    pub stride: usize,
    /// One or two inputs of one size.
    pub inputs: &'a [&'a View],
    /// Channels, bias and whether to take statistics of one or two outputs.
    pub outputs: &'a [(usize, Option<&'a DeviceParam>, bool)],
    /// What is in the packed weights.
    pub form: Form,
    /// Packed weights of the only filter, or of one for each input or output.
    pub filters: &'a [FilterArgs],
}

impl Gather<'_> {
    /// Runs it.
    ///
    /// # Errors
    /// [`Error::Shape`] for more than two inputs or outputs; those of the device.
    pub fn run(&self) -> Result<Vec<Output>> {
        if self.form != Form::Taps {
            return narrow::run(self, self.form);
        }
        let (x, op) = (self.inputs[0], self.op);
        let cuda = x.data.cuda();
        let source = sources(op, self.inputs)?;
        let out = x.shape.space().map(|s| s.div_ceil(self.stride));
        let problem = Problem {
            n: x.shape.n,
            space: out,
            window: self.kernel,
            stride: self.stride,
            chunks: chunks(&source),
            groups: self.outputs.iter().map(|(c, ..)| c.div_ceil(GROUP)).sum(),
        };
        let plan = plan(&problem, &VARIANTS, cuda.info());
        let tiles = plan.tiles.iter().product();
        let outputs = self.outputs.iter().map(|&(c, _, stats)| {
            Output::new(&x.data, Shape::new(x.shape.n, out, c), stats.then_some(tiles))
        });
        let outputs = outputs.collect::<Result<Vec<_>>>()?;
        let biases: Vec<_> = self.outputs.iter().map(|&(_, bias, _)| bias).collect();
        let small = |v: usize| v as u32;
        let args = Args {
            source,
            head: heads(op, &outputs, &biases)?,
            filter: [self.filters[0], self.filters[self.filters.len() - 1]],
            halo: HaloArgs::from(&plan.halo),
            space: volume(x.shape.space()),
            out: volume(out),
            tile: [plan.tile[1], plan.tile[2]].map(small),
            tiles: [plan.tiles[1], plan.tiles[2]].map(small),
            warps: plan.warps.map(small),
            chunks: small(problem.chunks),
            buffer_bytes: small(plan.halo.bytes()),
            unused: 0,
        };
        let launch = Launch {
            grid: [tiles, plan.slices, x.shape.n].map(small),
            threads: small(plan.threads()),
            shared: small(plan.shared),
        };
        let kernel = Kernel::<Args>::new("conv3d.cu", plan.variant.name);
        cuda.launch(&kernel, launch, &args)?;
        Ok(outputs)
    }
}

fn check(channels: usize, filters: &[DeviceFilter], stride: usize, by_input: bool) -> Result<usize> {
    let kernel = filters.first().map_or(0, |f| f.dims[2]);
    for f in filters {
        let [o, i, a, b, c] = f.dims;
        let fits = [a, b, c] == [kernel; 3]
            && channels == if by_input { i } else { o }
            && f.weight.value.len() == f.dims.iter().product::<usize>()
            && f.bias.is_none_or(|b| b.value.len() == o);
        if !fits || !matches!((kernel, stride), (1, 1) | (3, 1) | (3, 2)) {
            return Err(Error::Shape {
                op: "conv3d",
                want: format!("{channels} channels and k s of 1 1, 3 1 or 3 2"),
                got: format!("weights {:?} with stride {stride}", f.dims),
            });
        }
    }
    Ok(kernel)
}

/// y = conv(x) for every filter; all have one kernel size and read x once. `stats[i]` asks for the statistics of output
/// i that the norm after it needs.
///
/// # Errors
/// [`Error::Shape`] when a filter does not fit `x`, or for none or more than two; those of the device.
pub fn fprop(x: &View, filters: &[DeviceFilter], stride: usize, stats: &[bool]) -> Result<Vec<Output>> {
    let kernel = check(x.shape.c, filters, stride, true)?;
    let channels: Vec<usize> = filters.iter().map(|f| f.dims[0]).collect();
    let form = narrow::form(kernel, stride, x.shape.c, &channels);
    let mut packs = Vec::new();
    for f in filters {
        let packing = Packing {
            layout: "conv3d fprop",
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
    let outputs: Vec<_> = filters.iter().zip(stats).map(|(f, &stats)| (f.dims[0], f.bias, stats)).collect();
    Gather { op: "conv3d", kernel, stride, inputs: &[x], outputs: &outputs, form, filters: &args }.run()
}

/// dx = sum over the filters of their dy convolved backwards, for an input of `x_shape`.
///
/// # Errors
/// [`Error::Shape`] when a filter does not fit its dy, or for none or more than two; those of the device.
pub fn dgrad(dys: &[View], filters: &[DeviceFilter], x_shape: Shape, stride: usize) -> Result<Act> {
    let kernel = check(x_shape.c, filters, stride, true)?;
    for (f, dy) in filters.iter().zip(dys) {
        let fits = dy.shape == Shape::new(x_shape.n, x_shape.space().map(|s| s.div_ceil(stride)), f.dims[0]);
        if !fits || dys.len() != filters.len() {
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
            layout: "conv3d dgrad",
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
        first_chunk += dy.shape.c.div_ceil(super::args::chunk(dy.data.precision())) as u32;
    }
    let inputs: Vec<&View> = dys.iter().collect();
    if stride == 2 {
        let scatter = Scatter {
            op: "conv3d dgrad",
            inputs: &inputs,
            out: x_shape.space(),
            channels: x_shape.c,
            bias: None,
            stats: false,
            filters: &args,
        };
        return Ok(scatter.run()?.data);
    }
    let gather = Gather {
        op: "conv3d dgrad",
        kernel,
        stride,
        inputs: &inputs,
        outputs: &[(x_shape.c, None, false)],
        form,
        filters: &args,
    };
    Ok(gather.run()?.swap_remove(0).data)
}
