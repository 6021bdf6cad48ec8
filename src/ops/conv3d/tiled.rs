//! A launch of one of the tiled kernels, kernels/conv3d.cuh or kernels/conv_transpose3d.cu.

use super::args::{
    FilterArgs, GROUP, HaloArgs, Head, HeadArgs, Output, SourceArgs, chunks, heads, sources, volume,
};
use super::plan::{Problem, Variant, plan};
use crate::device::cuda::{Kernel, Launch};
use crate::error::Result;
use crate::tensor::{Shape, View};
use bytemuck::{Pod, Zeroable};

/// `Convolution` of kernels/convolution.cuh.
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

/// What is convolved with what.
pub struct Tiled<'a> {
    /// Name for errors.
    pub op: &'static str,
    /// Instances of the kernel.
    pub variants: &'static [Variant],
    /// Window of the instances that compute this.
    pub window: usize,
    /// Their stride.
    pub stride: usize,
    /// D, H, W of the voxels that warps hold: the outputs, or the inputs of a transposed convolution.
    pub held: [usize; 3],
    /// D, H, W of the outputs.
    pub out: [usize; 3],
    /// One or two inputs of one size, concatenated along channels.
    pub inputs: &'a [&'a View],
    /// One or two outputs, concatenated along channels.
    pub outputs: &'a [Head<'a>],
    /// Packed weights of the only filter, or of one for each input or output.
    pub filters: &'a [FilterArgs],
}

impl Tiled<'_> {
    /// Runs it.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for more than two inputs or outputs; those of the device.
    pub fn run(&self) -> Result<Vec<Output>> {
        let x = self.inputs[0];
        let cuda = x.data.cuda();
        let source = sources(self.op, self.inputs)?;
        let problem = Problem {
            precision: cuda.precision(),
            n: x.shape.n,
            space: self.held,
            window: self.window,
            stride: self.stride,
            chunks: chunks(&source),
            groups: self.outputs.iter().map(|head| head.channels.div_ceil(GROUP)).sum(),
        };
        let plan = plan(&problem, self.variants, cuda.info());
        let tiles = plan.tiles.iter().product();
        let outputs = Output::all(&x.data, Shape::new(x.shape.n, self.out, 0), self.outputs, tiles)?;
        let small = |v: usize| v as u32;
        let args = Args {
            source,
            head: heads(self.op, &outputs, self.outputs)?,
            filter: [self.filters[0], self.filters[self.filters.len() - 1]],
            halo: HaloArgs::from(&plan.halo),
            space: volume(x.shape.space()),
            out: volume(self.out),
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
        cuda.launch(&Kernel::<Args>::new(plan.variant.file, plan.variant.name), launch, &args)?;
        Ok(outputs)
    }
}
