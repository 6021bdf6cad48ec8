//! Weight gradients where x has one or two channels (kernels/conv3d_thinwgrad.cu).

use super::cuda_wgrad::{Problem, reduce};
use super::wgrad_args::{Sums, small};
use crate::device::cuda::{Buf, Info, Kernel, Launch, Precision};
use crate::error::Result;
use crate::tensor::View;

const fn kernel(name: &'static str) -> Kernel<Sums> {
    Kernel::new("conv3d_thinwgrad.cu", name)
}

/// By channels of x and stride, each less one.
static GATHER: [[Kernel<Sums>; 2]; 2] = [
    [kernel("wgrad_gather_c1s1"), kernel("wgrad_gather_c1s2")],
    [kernel("wgrad_gather_c2s1"), kernel("wgrad_gather_c2s2")],
];
static PAIR: Kernel<Sums> = kernel("wgrad_pair");

const THREADS: u32 = 256;

/// Every number of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThinPlan {
    /// Whether it is the kernel for two channels of x, two of dy and stride 1.
    pub pair: bool,
    /// Voxels of y a block has at a time, (D, H, W).
    pub tile: [usize; 3],
    /// Number of tiles along each axis.
    pub tiles: [usize; 3],
    /// Blocks: shares of the tiles, and pairs of 16 channels of y.
    pub grid: [usize; 3],
    /// Bytes of shared memory a block.
    pub shared: usize,
    /// Floats of one partial result, all of dw; there are `grid[0]` of them.
    pub partial: usize,
}

/// Whether `p` is for the kernels here.
pub fn is_thin(p: &Problem) -> bool {
    p.kernel == 3 && p.x_channels <= 2
}

/// Tiles and shares for a device: two blocks a multiprocessor, one of the kernel with 240 registers.
pub fn thin_plan(p: &Problem, info: &Info, precision: Precision) -> ThinPlan {
    let pair = p.x_channels == 2 && p.y_channels == [2, 0] && p.stride == 1;
    let [depth, height, width] = p.space;
    let partial = p.y_channels.iter().sum::<usize>() * p.x_channels * 27;
    let wide = if pair { 1 } else { p.chunks().div_ceil(2) };
    let shared = |[d, h, w]: [usize; 3]| {
        if pair {
            // Two haloed planes of float pairs; at the end 108 sums of every warp.
            return (2 * (h + 2) * (w + 2) * 8).max(8 * 108 * 4);
        }
        let side = |s: usize| p.stride * (s - 1) + 3;
        let vector = 16 / precision.bytes();
        let x = (side(d) * side(h) * side(w) * p.x_channels).next_multiple_of(vector);
        (2 * (x + 2 * 16 * d * h * w) * precision.bytes()).max(32 * 27 * p.x_channels * 4)
    };
    let tile = if pair {
        [depth.next_multiple_of(3).min(24), 8, 32]
    } else {
        let mut tile = [depth.min(2), height.min(4), width.next_multiple_of(16).min(64)];
        while shared(tile) > info.shared_per_block as usize / 2 {
            let widest = if tile[2] > 16 { 2 } else { usize::from(tile[1] > tile[0]) };
            tile[widest] = if widest == 2 { tile[2] - 16 } else { tile[widest].div_ceil(2) };
        }
        tile
    };
    let tiles = std::array::from_fn(|a| p.space[a].div_ceil(tile[a]));
    let count = p.n * tiles.iter().product::<usize>();
    let blocks = info.multiprocessors as usize * if pair { 1 } else { 2 };
    let splits = (blocks / wide).clamp(1, count);
    ThinPlan { pair, tile, tiles, grid: [splits, 1, wide], shared: shared(tile), partial }
}

/// One launch for one or two dys, and the sum of its partial results.
pub fn thin(p: &Problem, x: &View, dys: &[&View], dws: &[Buf<f32>]) -> Result<()> {
    let cuda = x.data.cuda();
    let plan = thin_plan(p, cuda.info(), cuda.precision());
    let partials = cuda.buffer(plan.grid[0] * plan.partial)?;
    let args = Sums::new(p, x, dys, &partials, (plan.tile, plan.tiles));
    let kernel = if plan.pair { &PAIR } else { &GATHER[p.x_channels - 1][p.stride - 1] };
    let launch = Launch { grid: small(plan.grid), threads: THREADS, shared: plan.shared as u32 };
    cuda.launch(kernel, launch, &args)?;
    reduce(&partials, plan.grid[0], dws)
}
