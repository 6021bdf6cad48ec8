//! Weight gradients of convolutions on a CUDA device (kernels/conv3d_wgrad.cu).
//!
//! The transposed convolution's are the same sums with other roles (see there), so its module calls `accumulate`.

use super::cuda_thinwgrad::{is_thin, thin};
use super::wgrad_args::{CHUNK, Sums, small};
use crate::device::cuda::{Buf, In, InOut, Info, Kernel, Launch, Precision};
use crate::error::{Error, Result};
use crate::tensor::View;
use bytemuck::{Pod, Zeroable};

/// `Wgrad` of kernels/conv3d_wgrad.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Args {
    sums: Sums,
    pitch: u32,
    steps: u32,
    x_plane: u32,
    y_plane: u32,
}

/// `Reduce` of kernels/conv3d_wgrad.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ReduceArgs {
    partials: In<f32>,
    dw: [InOut<f32>; 2],
    len: u32,
    first_len: u32,
    splits: u32,
    groups: u32,
}

static K3S1: Kernel<Args> = Kernel::new("conv3d_wgrad.cu", "wgrad_k3s1");
static K3S2: Kernel<Args> = Kernel::new("conv3d_wgrad.cu", "wgrad_k3s2");
static K1S1: Kernel<Args> = Kernel::new("conv3d_wgrad.cu", "wgrad_k1s1");
static REDUCE: Kernel<ReduceArgs> = Kernel::new("conv3d_wgrad.cu", "wgrad_reduce");

/// Threads of a block: 12 warps.
const THREADS: u32 = 384;
/// Threads of a block of the reduction.
const REDUCE_THREADS: usize = 256;

/// What a call computes: sums over the voxels of `n` samples of `space` (of y; x is `stride` times as large or one less).
#[derive(Clone, Copy, Debug)]
pub struct Problem {
    /// Edge of the kernel, 1 or 3.
    pub kernel: usize,
    /// Stride, 1 or 2.
    pub stride: usize,
    /// Samples.
    pub n: usize,
    /// (D, H, W) of y; for kernel 1, which sees no neighbours, (1, 1, voxels).
    pub space: [usize; 3],
    /// Channels of x.
    pub x_channels: usize,
    /// Channels of each y.
    pub y_channels: [usize; 2],
}

/// Every number of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Voxels of y that are in shared memory at a time, (D, H, W).
    pub tile: [usize; 3],
    /// Number of tiles along each axis.
    pub tiles: [usize; 3],
    /// Voxels between rows of the tile.
    pub pitch: usize,
    /// Groups of 16 voxels of a slice of the tile.
    pub steps: usize,
    /// Voxels of x, and of y, in shared memory.
    pub planes: [usize; 2],
    /// Blocks: shares of the tiles, 16s of x's channels, groups of 16s of y's channels.
    pub grid: [usize; 3],
    /// Bytes of shared memory a block.
    pub shared: usize,
    /// Floats of one partial result, all of dw; there are `grid[0]` of them.
    pub partial: usize,
}

impl Problem {
    fn taps(&self) -> usize {
        self.kernel.pow(3)
    }

    /// 16s of y's channels that a block owns.
    fn chunks_per_block(&self) -> usize {
        if (self.kernel, self.stride) == (3, 1) { 1 } else { 2 }
    }

    /// Most that y is moved along w against x.
    fn shifts(&self) -> usize {
        if self.kernel == 1 { 0 } else { 3 - self.stride }
    }

    /// 16s of y's channels.
    pub fn chunks(&self) -> usize {
        self.y_channels.iter().map(|c| c.div_ceil(CHUNK)).sum()
    }

    /// How a tile lies in shared memory: pitch, steps, planes. The last step of a slice may read up to 15 voxels past
    /// the plane of x: finite numbers of the planes behind it, against zeros of y.
    fn layout(&self, [d, h, w]: [usize; 3]) -> (usize, usize, [usize; 2]) {
        let pitch = match (self.kernel, self.stride) {
            (1, _) => w,
            (_, 1) if w < self.space[2] => w + 2,
            _ => w + 1,
        };
        let steps = ((h - 1) * pitch + w + self.shifts()).div_ceil(16);
        let x = match self.stride {
            1 => (d + self.kernel - 1) * (h + self.kernel - 1) * pitch,
            _ => (2 * d + 1) * (2 * h + 1) * 2 * pitch,
        };
        (pitch, steps, [x, d * (steps * 16 + self.shifts())])
    }
}

/// Tiles and shares for a device.
///
/// The tile is the one with the least time, in cycles of an SM, for the block that has most of them: its mma (16 x 8 x
/// 16 in 1.6 cycles, 62 % of peak) and the bytes it loads (24 a cycle from L2, roofline.md), as if one followed the
/// other.
pub fn plan(p: &Problem, info: &Info, precision: Precision) -> Plan {
    let blocks_of_channels = [p.x_channels.div_ceil(CHUNK), p.chunks().div_ceil(p.chunks_per_block())];
    let voxel = CHUNK * precision.bytes();
    // Where sums pass through: 16 rows of 16 channels' taps, padded.
    let epilogue = CHUNK * (CHUNK * p.taps() + 4) * size_of::<f32>();
    let shares = info.multiprocessors as usize / (blocks_of_channels[0] * blocks_of_channels[1]);
    let partial = p.y_channels.iter().sum::<usize>() * p.x_channels * p.taps();
    let mut best: Option<(f64, Plan)> = None;
    let [depth, height, width] = p.space;
    for w in sizes(width) {
        for (d, h) in sizes(depth).flat_map(|d| sizes(height).map(move |h| (d, h))) {
            let (pitch, steps, planes) = p.layout([d, h, w]);
            let stage = (planes[0] + p.chunks_per_block() * planes[1]) * voxel;
            let shared = (2 * stage).max(epilogue);
            if shared > info.shared_per_block as usize {
                continue;
            }
            let tiles = [depth.div_ceil(d), height.div_ceil(h), width.div_ceil(w)];
            let count = p.n * tiles.iter().product::<usize>();
            let splits = shares.clamp(1, count);
            let mma = (d * steps * p.taps() * p.chunks_per_block() * 2) as f64 * 1.6;
            let cost = count.div_ceil(splits) as f64 * (mma + stage as f64 / 24.0);
            if best.is_none_or(|(least, _)| cost < least) {
                let grid = [splits, blocks_of_channels[0], blocks_of_channels[1]];
                let plan = Plan { tile: [d, h, w], tiles, pitch, steps, planes, grid, shared, partial };
                best = Some((cost, plan));
            }
        }
    }
    best.expect("a tile of one voxel fits everywhere").1
}

/// What `length` can be cut into: the size of the parts, for every number of parts that changes it.
fn sizes(length: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(length), move |&s| (s > 1).then(|| length.div_ceil(length.div_ceil(s - 1))))
}

/// dw_i += sum over samples and voxels v of `x[stride v + t - p]` `dy_i[v]`, (channels of dy_i, channels of x, taps);
/// x and each dy seen through what is pending on them. Two dys at a time share one reading of x.
///
/// # Errors
/// [`Error::Shape`] when they do not fit each other; those of the device.
pub(in crate::ops) fn accumulate(
    op: &'static str,
    x: &View,
    dys: &[&View],
    kernel: usize,
    stride: usize,
    dws: &[Buf<f32>],
) -> Result<()> {
    let space = x.shape.space().map(|s| s.div_ceil(stride));
    for (dy, dw) in dys.iter().zip(dws) {
        let fits = dy.shape.space() == space && dy.shape.n == x.shape.n;
        if !fits || dw.len() != dy.shape.c * x.shape.c * kernel.pow(3) {
            return Err(Error::Shape {
                op,
                want: format!("{} samples of {space:?} and their dw", x.shape.n),
                got: format!("{} and {} weights", dy.shape, dw.len()),
            });
        }
    }
    if dys.len() != dws.len() || !matches!((kernel, stride), (1, 1) | (3, 1) | (3, 2)) {
        return Err(Error::Shape {
            op,
            want: "one dw a dy, kernel and stride 1 1, 3 1 or 3 2".into(),
            got: format!("{} dy, {} dw, {kernel} {stride}", dys.len(), dws.len()),
        });
    }
    for (dys, dws) in dys.chunks(2).zip(dws.chunks(2)) {
        one_or_two(x, dys, kernel, stride, dws)?;
    }
    Ok(())
}

/// Launches for one or two dys.
fn one_or_two(x: &View, dys: &[&View], kernel: usize, stride: usize, dws: &[Buf<f32>]) -> Result<()> {
    let y = dys[0].shape;
    let problem = Problem {
        kernel,
        stride,
        n: x.shape.n,
        space: if kernel == 1 { [1, 1, y.voxels()] } else { y.space() },
        x_channels: x.shape.c,
        y_channels: [y.c, dys.get(1).map_or(0, |y| y.shape.c)],
    };
    if is_thin(&problem) { thin(&problem, x, dys, dws) } else { tiled(&problem, x, dys, dws) }
}

/// One launch, and the sum of its partial results.
fn tiled(problem: &Problem, x: &View, dys: &[&View], dws: &[Buf<f32>]) -> Result<()> {
    let cuda = x.data.cuda();
    let plan = plan(problem, cuda.info(), cuda.precision());
    let partials = cuda.buffer(plan.grid[0] * plan.partial)?;
    let args = Args {
        sums: Sums::new(problem, x, dys, &partials, (plan.tile, plan.tiles)),
        pitch: plan.pitch as u32,
        steps: plan.steps as u32,
        x_plane: plan.planes[0] as u32,
        y_plane: plan.planes[1] as u32,
    };
    let kernel = match (problem.kernel, problem.stride) {
        (3, 1) => &K3S1,
        (3, 2) => &K3S2,
        _ => &K1S1,
    };
    let launch = Launch { grid: small(plan.grid), threads: THREADS, shared: plan.shared as u32 };
    cuda.launch(kernel, launch, &args)?;
    reduce(&partials, plan.grid[0], dws)
}

/// dws (one or two) += the sum of `splits` partial results, each as long as all of them.
pub(super) fn reduce(partials: &Buf<f32>, splits: usize, dws: &[Buf<f32>]) -> Result<()> {
    let len = partials.len() / splits;
    let groups = splits.next_power_of_two().min(8);
    let args = ReduceArgs {
        partials: partials.read(),
        dw: [dws[0].both(), dws.get(1).map_or(InOut::NULL, Buf::both)],
        len: len as u32,
        first_len: dws[0].len() as u32,
        splits: splits as u32,
        groups: groups as u32,
    };
    let blocks = len.div_ceil(REDUCE_THREADS / groups) as u32;
    let shared = (REDUCE_THREADS * size_of::<f32>()) as u32;
    let launch = Launch { grid: [blocks, 1, 1], threads: REDUCE_THREADS as u32, shared };
    partials.cuda().launch(&REDUCE, launch, &args)
}

/// dw_i += gradient of filter i, (O_i, I, k, k, k), of the convolution of `x` that gave the output with gradient dy_i.
///
/// # Errors
/// [`Error::Shape`] when they do not fit each other; those of the device.
pub fn wgrad(x: &View, dys: &[View], kernel: usize, stride: usize, dws: &[Buf<f32>]) -> Result<()> {
    accumulate("conv3d wgrad", x, &dys.iter().collect::<Vec<_>>(), kernel, stride, dws)
}
