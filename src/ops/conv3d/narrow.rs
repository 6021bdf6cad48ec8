//! Convolutions of one or two input channels on a CUDA device (kernels/conv3d_narrow.cu).

use super::args::{FilterArgs, GROUP, Head, HeadArgs, Output, heads, volume};
use super::pack::Form;
use crate::device::cuda::{Elem, In, Kernel, Launch};
use crate::error::Result;
use crate::tensor::{PendingArgs, Shape, View};
use bytemuck::{Pod, Zeroable};

/// `Conv3dNarrow` of kernels/conv3d_narrow.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Args {
    x: In<Elem>,
    map: PendingArgs,
    head: [HeadArgs; 2],
    filter: [FilterArgs; 2],
    space: [u32; 3],
    out: [u32; 3],
    tiles: [u32; 2],
}

static FLAT: [Kernel<Args>; 2] =
    [Kernel::new("conv3d_narrow.cu", "conv3d_flat1"), Kernel::new("conv3d_narrow.cu", "conv3d_flat2")];
static BAND: Kernel<Args> = Kernel::new("conv3d_narrow.cu", "conv3d_band2");

/// Which packed weights, and so which kernel, a convolution of `inputs` to `outputs` channels takes.
pub fn form(kernel: usize, stride: usize, inputs: usize, outputs: &[usize]) -> Form {
    match (kernel, stride, inputs, outputs) {
        (3, 2, 1 | 2, _) => Form::Flat,
        (3, 1, 2, [2]) => Form::Band,
        _ => Form::Taps,
    }
}

/// The kernel's constants for one storage precision.
struct Constants {
    kernel: &'static Kernel<Args>,
    tile: [usize; 3],
    threads: usize,
    /// Groups of output channels a block computes.
    groups: usize,
    /// Cells of the haloed tile.
    cells: usize,
}

fn constants(form: Form, inputs: usize) -> Constants {
    match form {
        Form::Band => {
            Constants { kernel: &BAND, tile: [8, 16, 32], threads: 128, groups: 1, cells: 10 * 18 * 36 }
        }
        _ => Constants {
            kernel: &FLAT[inputs - 1],
            tile: [4, 8, 16],
            threads: 256,
            groups: 2,
            cells: 9 * 17 * 34,
        },
    }
}

/// Convolves `x` for one or two outputs, with weights packed as `form`, [`Form::Flat`] or [`Form::Band`], says.
///
/// # Errors
/// [`crate::Error::Shape`] for more than two outputs; those of the device.
pub fn run(
    op: &'static str,
    x: &View,
    stride: usize,
    asked: &[Head],
    form: Form,
    filters: &[FilterArgs],
) -> Result<Vec<Output>> {
    let cuda = x.data.cuda();
    let k = constants(form, x.shape.c);
    let out = x.shape.space().map(|s| s.div_ceil(stride));
    let tiles: [usize; 3] = std::array::from_fn(|i| out[i].div_ceil(k.tile[i]));
    let blocks = tiles.iter().product();
    let groups: usize = asked.iter().map(|head| head.channels.div_ceil(GROUP)).sum();
    let outputs = Output::all(&x.data, Shape::new(x.shape.n, out, 0), asked, blocks)?;
    let small = |v: usize| v as u32;
    let args = Args {
        x: x.data.read(),
        map: x.pending_args(),
        head: heads(op, &outputs, asked)?,
        filter: [filters[0], filters[filters.len() - 1]],
        space: volume(x.shape.space()),
        out: volume(out),
        tiles: [tiles[1], tiles[2]].map(small),
    };
    // The moments of every warp and channel take the tile's place when it has been used.
    let moments = k.threads / 32 * k.groups * GROUP * 12;
    let cell = x.shape.c * cuda.precision().bytes();
    let launch = Launch {
        grid: [blocks, groups.div_ceil(k.groups), x.shape.n].map(small),
        threads: small(k.threads),
        shared: small((k.cells * cell).max(moments)),
    };
    cuda.launch(k.kernel, launch, &args)?;
    Ok(outputs)
}
