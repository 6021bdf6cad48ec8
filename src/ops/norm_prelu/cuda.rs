//! Norm and PReLU on a CUDA device (kernels/norm_prelu.cu, kernels/norm_prelu_backward.cu).
//!
//! A group is what shares statistics: all samples, or each sample. Tables are (groups, C).

use crate::device::cuda::{Act, Buf, Cuda, Elem, In, InOut, Info, Kernel, Launch, Out};
use crate::error::{Error, Result};
use crate::tensor::{DeviceParam, DevicePending, Partials, PendingArgs, Shape, View};
use bytemuck::{Pod, Zeroable};
use std::sync::Arc;

/// Where mean and variance come from.
#[derive(Clone, Copy, Debug)]
pub enum DeviceStatistics<'a> {
    /// These tiles, all samples together: batch norm in training.
    Batch(&'a Partials),
    /// These tiles, each sample for itself: instance norm.
    Instance(&'a Partials),
    /// Given, one a channel: batch norm in evaluation.
    Fixed {
        /// Mean (C) of the convolution with its bias.
        mean: &'a Buf<f32>,
        /// Biased variance (C) as running_var holds it.
        var: &'a Buf<f32>,
        /// The convolution's bias (C), left out of x: x's mean is `mean` - `bias`.
        bias: Option<&'a Buf<f32>>,
    },
    /// Mean 0, variance 1 - eps: gamma, beta and PReLU alone.
    Identity,
}

/// The parameters of the block; without `slope` there is no PReLU.
#[derive(Clone, Copy, Debug, Default)]
pub struct DeviceAffine<'a> {
    /// Scale (C).
    pub gamma: Option<&'a DeviceParam>,
    /// Shift (C).
    pub beta: Option<&'a DeviceParam>,
    /// PReLU's one slope (1).
    pub slope: Option<&'a DeviceParam>,
}

/// Mean and biased variance of each group and channel.
#[derive(Clone, Debug)]
pub struct DeviceMoments {
    /// Means (groups, C).
    pub mean: Buf<f32>,
    /// Biased variances (groups, C).
    pub var: Buf<f32>,
    /// Voxels a group; 1 where statistics are given.
    pub count: f64,
}

/// What the backward pass needs beside x.
#[derive(Clone, Debug)]
pub struct Saved {
    mean: Buf<f32>,
    rstd: Buf<f32>,
    groups: usize,
    /// Voxels a group, or `None` where statistics are constants.
    count: Option<f64>,
    ticket: Buf<u32>,
}

/// `Norm` of kernels/norm_prelu.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct NormArgs {
    gamma: In<f32>,
    beta: In<f32>,
    mean: Out<f32>,
    var: Out<f32>,
    rstd: Out<f32>,
    scale: Out<f32>,
    shift: Out<f32>,
    ticket: Out<u32>,
    channels: u32,
    unused: u32,
}

/// `NormMerge` of kernels/norm_prelu.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct MergeArgs {
    tiles: In<f32>,
    norm: NormArgs,
    count: f64,
    tile_count: u32,
    slice: u32,
}

/// `NormConstant` of kernels/norm_prelu.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ConstantArgs {
    mean: In<f32>,
    var: In<f32>,
    bias: In<f32>,
    norm: NormArgs,
}

/// `NormRunning` of kernels/norm_prelu.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct RunningArgs {
    batch_mean: In<f32>,
    batch_var: In<f32>,
    bias: In<f32>,
    mean: InOut<f32>,
    var: InOut<f32>,
    unbiased: f64,
    channels: u32,
    unused: u32,
}

/// `NormLayer` of kernels/norm_prelu_backward.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct LayerArgs {
    x: In<Elem>,
    dy: In<Elem>,
    map: PendingArgs,
    mean: In<f32>,
    channels: u32,
    row: u32,
    lanes: u32,
    rows: u32,
    rows_per_block: u32,
    unused: u32,
}

/// `NormSums` of kernels/norm_prelu_backward.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct SumsArgs {
    layer: LayerArgs,
    rstd: In<f32>,
    partials: InOut<f32>,
    slopes: InOut<f32>,
    totals: InOut<f64>,
    means: Out<f32>,
    dgamma: InOut<f32>,
    dbeta: InOut<f32>,
    dslope: InOut<f32>,
    ticket: InOut<u32>,
    weight: f64,
}

/// `NormDx` of kernels/norm_prelu_backward.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct DxArgs {
    layer: LayerArgs,
    means: In<f32>,
    dx: Out<Elem>,
}

static MERGE: Kernel<MergeArgs> = Kernel::new("norm_prelu.cu", "norm_prelu_merge");
static CONSTANT: Kernel<ConstantArgs> = Kernel::new("norm_prelu.cu", "norm_prelu_constant");
static RUNNING: Kernel<RunningArgs> = Kernel::new("norm_prelu.cu", "norm_prelu_running");
static SUMS: Kernel<SumsArgs> = Kernel::new("norm_prelu_backward.cu", "norm_prelu_sums");
static SUMS_SCALAR: Kernel<SumsArgs> = Kernel::new("norm_prelu_backward.cu", "norm_prelu_sums_scalar");
static DX: Kernel<DxArgs> = Kernel::new("norm_prelu_backward.cu", "norm_prelu_dx");
static DX_SCALAR: Kernel<DxArgs> = Kernel::new("norm_prelu_backward.cu", "norm_prelu_dx_scalar");

/// Threads of `norm_prelu_merge` and, at most, of the backward kernels.
const THREADS: usize = 512;

/// Threads of the kernels that have one a channel.
const CHANNEL_THREADS: u32 = 256;

/// Bytes of a vector access.
const VECTOR: usize = 16;

fn refuse(want: String, got: String) -> Error {
    Error::Shape { op: "norm_prelu", want, got }
}

/// Makes the map that consumers of x [N, D, H, W, C] apply while they load it; nothing may be pending on `x`. One small
/// launch.
///
/// # Errors
/// [`Error::Shape`] when a parameter or the tiles do not fit x; those of the device.
pub fn forward(
    x: &View,
    statistics: DeviceStatistics,
    affine: DeviceAffine,
) -> Result<(Arc<DevicePending>, Saved, DeviceMoments)> {
    let (shape, c, cuda) = (x.shape, x.shape.c, x.data.cuda());
    if x.pending.is_some() {
        return Err(Error::Internal("norm_prelu: x still has a map pending".into()));
    }
    for (param, len) in [(affine.gamma, c), (affine.beta, c), (affine.slope, 1)] {
        if let Some(param) = param.filter(|p| p.value.len() != len) {
            return Err(refuse(format!("{len} values for {shape}"), param.value.len().to_string()));
        }
    }
    let groups = if matches!(statistics, DeviceStatistics::Instance(_)) { shape.n } else { 1 };
    let voxels = (shape.n * shape.voxels() / groups) as f64;
    let measured = matches!(statistics, DeviceStatistics::Batch(_) | DeviceStatistics::Instance(_));
    let count = measured.then_some(voxels);
    let table = || cuda.buffer::<f32>(groups * c);
    let (mean, var, rstd, scale, shift) = (table()?, table()?, table()?, table()?, table()?);
    let ticket = cuda.buffer(1)?;
    let value = |p: Option<&DeviceParam>| p.map_or(In::NULL, |p| p.value.read());
    let norm = NormArgs {
        gamma: value(affine.gamma),
        beta: value(affine.beta),
        mean: mean.write(),
        var: var.write(),
        rstd: rstd.write(),
        scale: scale.write(),
        shift: shift.write(),
        ticket: ticket.write(),
        channels: c as u32,
        unused: 0,
    };
    match statistics {
        DeviceStatistics::Batch(tiles) | DeviceStatistics::Instance(tiles) => {
            let len = shape.n * tiles.tiles * c * 3;
            if tiles.stats.len() != len {
                return Err(refuse(format!("{len} statistics for {shape}"), tiles.stats.len().to_string()));
            }
            let tile_count = shape.n * tiles.tiles / groups;
            let slice = slice(c, tile_count);
            let launch = Launch {
                grid: [c.div_ceil(slice) as u32, groups as u32, 1],
                threads: THREADS as u32,
                shared: (THREADS * 3 * size_of::<f32>()) as u32,
            };
            let tiles = tiles.stats.read();
            let (tile_count, slice) = (tile_count as u32, slice as u32);
            cuda.launch(&MERGE, launch, &MergeArgs { tiles, norm, count: voxels, tile_count, slice })?;
        }
        DeviceStatistics::Fixed { mean, var, bias } => {
            let mut given = [Some(mean), Some(var), bias].into_iter().flatten();
            if let Some(buf) = given.find(|b| b.len() != c) {
                return Err(refuse(format!("{c} statistics for {shape}"), buf.len().to_string()));
            }
            let bias = bias.map_or(In::NULL, Buf::read);
            constant(cuda, ConstantArgs { mean: mean.read(), var: var.read(), bias, norm })?;
        }
        DeviceStatistics::Identity => {
            constant(cuda, ConstantArgs { mean: In::NULL, var: In::NULL, bias: In::NULL, norm })?;
        }
    }
    let slope = affine.slope.map(|p| p.value.clone());
    let pending = Arc::new(DevicePending { scale, shift, slope, per_sample: groups > 1 });
    let saved = Saved { mean: mean.clone(), rstd, groups, count, ticket };
    Ok((pending, saved, DeviceMoments { mean, var, count: count.unwrap_or(1.0) }))
}

/// Channels a block of `norm_prelu_merge`: as many as leave a thread at most 8 tiles, so that a warp reads neighbours.
fn slice(channels: usize, tiles: usize) -> usize {
    let mut slice = channels.next_power_of_two().min(32);
    while slice > 1 && tiles > 8 * (THREADS / slice) {
        slice /= 2;
    }
    slice
}

fn constant(cuda: &Cuda, args: ConstantArgs) -> Result<()> {
    cuda.launch(&CONSTANT, Launch::over(args.norm.channels as usize, CHANNEL_THREADS), &args)
}

/// `NormTiles` of kernels/norm_prelu.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct TilesArgs {
    x: In<Elem>,
    tiles: Out<f32>,
    voxels: u32,
    channels: u32,
    tile: u32,
    tile_count: u32,
}

static TILES: Kernel<TilesArgs> = Kernel::new("norm_prelu.cu", "norm_prelu_tiles");

/// Statistics of an `x` that no convolution left them of.
///
/// # Errors
/// Those of the device.
pub fn partials(x: &View) -> Result<Partials> {
    const TILE: usize = 512;
    let cuda = x.data.cuda();
    let (voxels, c) = (x.shape.voxels(), x.shape.c);
    let tiles = voxels.div_ceil(TILE);
    let stats = cuda.buffer(x.shape.n * tiles * c * 3)?;
    let args = TilesArgs {
        x: x.data.read(),
        tiles: stats.write(),
        voxels: voxels as u32,
        channels: c as u32,
        tile: TILE as u32,
        tile_count: tiles as u32,
    };
    let launch = Launch { grid: [tiles as u32, x.shape.n as u32, 1], threads: 128, shared: 0 };
    cuda.launch(&TILES, launch, &args)?;
    Ok(Partials { stats, tiles })
}

/// Moves running statistics (C) towards those of a training batch: mean plus the `bias` (C) that the normalised values
/// are without, variance unbiased (torch `BatchNorm3d`).
///
/// # Errors
/// [`Error::Shape`] when lengths differ; those of the device.
pub fn update_running(
    moments: &DeviceMoments,
    mean: &Buf<f32>,
    var: &Buf<f32>,
    bias: &Buf<f32>,
) -> Result<()> {
    let c = moments.mean.len();
    if let Some(buf) = [mean, var, bias].into_iter().find(|b| b.len() != c) {
        return Err(refuse(format!("running statistics of {c} channels"), buf.len().to_string()));
    }
    let args = RunningArgs {
        batch_mean: moments.mean.read(),
        batch_var: moments.var.read(),
        bias: bias.read(),
        mean: mean.both(),
        var: var.both(),
        unbiased: moments.count / (moments.count - 1.0).max(1.0),
        channels: c as u32,
        unused: 0,
    };
    mean.cuda().launch(&RUNNING, Launch::over(c, CHANNEL_THREADS), &args)
}

/// How the backward kernels cut [groups, rows, row] into blocks. A row is C elements or, where a vector holds several
/// voxels, one vector; a lane is a vector of a row, or one element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    /// Elements a lane: a vector, or 1.
    width: usize,
    /// Elements a row.
    row: usize,
    /// Rows a group.
    rows: usize,
    /// Lanes of a row that a block has.
    lanes: usize,
    rows_per_block: usize,
    launch: Launch,
}

/// Blocks a multiprocessor: what 64 registers a thread allow.
const BLOCKS: usize = 2;

/// Rows a thread has at least, so that reading its channels' map pays.
const MIN_ROWS: usize = 4;

fn plan(shape: Shape, groups: usize, elem_bytes: usize, info: &Info) -> Plan {
    let (c, group_len, vector) = (shape.c, shape.len() / groups, VECTOR / elem_bytes);
    let fits = c % vector == 0 || (vector % c == 0 && group_len % vector == 0);
    let width = if fits { vector } else { 1 };
    let row = c.max(width);
    let (rows, row_lanes) = (group_len / row, row / width);
    let lanes = row_lanes.min(THREADS);
    let step = THREADS / lanes;
    let slices = row_lanes.div_ceil(lanes);
    let wanted = (info.multiprocessors as usize * BLOCKS / (groups * slices)).max(1);
    let rows_per_block = rows.div_ceil(wanted).max(step * MIN_ROWS).next_multiple_of(step);
    let launch = Launch {
        grid: [rows.div_ceil(rows_per_block), slices, groups].map(|n| n as u32),
        threads: (lanes * step) as u32,
        shared: (16 + (2 * width + 1) * lanes * step * size_of::<f32>()) as u32,
    };
    Plan { width, row, rows, lanes, rows_per_block, launch }
}

/// dx [N, D, H, W, C] of the raw x under `y`, from dy; adds to the gradients of gamma, beta and slope. `y` is x with the
/// map that [`forward`] made.
///
/// # Errors
/// [`Error::Shape`] when dy does not fit y; those of the device.
pub fn backward(y: &View, dy: &Act, saved: &Saved, affine: DeviceAffine) -> Result<Act> {
    let (shape, cuda) = (y.shape, y.data.cuda());
    if dy.len() != shape.len() || saved.mean.len() != saved.groups * shape.c {
        return Err(refuse(format!("a gradient of {shape}"), format!("{} elements", dy.len())));
    }
    if y.pending.is_none() {
        return Err(Error::Internal("norm_prelu: y has no map pending".into()));
    }
    let plan = plan(shape, saved.groups, dy.precision().bytes(), cuda.info());
    let blocks: usize = plan.launch.grid.iter().map(|&n| n as usize).product();
    let partials = cuda.buffer(plan.launch.grid[0] as usize * saved.groups * 2 * shape.c)?;
    let slopes = cuda.buffer(blocks * plan.lanes)?;
    let totals = cuda.buffer(saved.groups * 2 * shape.c)?;
    let means = cuda.buffer(saved.groups * 2 * shape.c)?;
    let dx = cuda.act(shape.len())?;
    let layer = LayerArgs {
        x: y.data.read(),
        dy: dy.read(),
        map: y.pending_args(),
        mean: saved.mean.read(),
        channels: shape.c as u32,
        row: plan.row as u32,
        lanes: plan.lanes as u32,
        rows: plan.rows as u32,
        rows_per_block: plan.rows_per_block as u32,
        unused: 0,
    };
    let grad = |p: Option<&DeviceParam>| p.and_then(|p| p.grad.as_ref()).map_or(InOut::NULL, Buf::both);
    let sums = SumsArgs {
        layer,
        rstd: saved.rstd.read(),
        partials: partials.both(),
        slopes: slopes.both(),
        totals: totals.both(),
        means: means.write(),
        dgamma: grad(affine.gamma),
        dbeta: grad(affine.beta),
        dslope: grad(affine.slope),
        ticket: saved.ticket.both(),
        weight: saved.count.map_or(0.0, |count| 1.0 / count),
    };
    let (sums_kernel, dx_kernel) = if plan.width == 1 { (&SUMS_SCALAR, &DX_SCALAR) } else { (&SUMS, &DX) };
    cuda.launch(sums_kernel, plan.launch, &sums)?;
    let launch = Launch { shared: 0, ..plan.launch };
    cuda.launch(dx_kernel, launch, &DxArgs { layer, means: means.read(), dx: dx.write() })?;
    Ok(dx)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(multiprocessors: u32) -> Info {
        Info {
            name: "GPU".into(),
            capability: (9, 0),
            multiprocessors,
            memory: 80 << 30,
            shared_per_block: 99 << 10,
        }
    }

    #[test]
    fn a_plan_covers_every_row_within_the_limits() {
        for c in [1, 2, 4, 5, 6, 12, 16, 32, 64, 128, 256, 600, 4096, 5000] {
            for (n, space) in [(1, [3, 3, 3]), (3, [5, 7, 3]), (8, [16, 16, 16])] {
                for (groups, bytes) in [(1, 2), (n, 2), (1, 4), (n, 4)] {
                    let shape = Shape::new(n, space, c);
                    let p = plan(shape, groups, bytes, &machine(132));
                    let [blocks, slices, grid_groups] = p.launch.grid.map(|v| v as usize);
                    assert_eq!(p.rows * p.row * groups, shape.len(), "{p:?}");
                    assert_eq!(p.row % p.width, 0, "{p:?}");
                    assert_eq!(p.row % c, 0, "{p:?}");
                    assert!(blocks * p.rows_per_block >= p.rows, "{p:?}");
                    assert!((blocks - 1) * p.rows_per_block < p.rows, "an idle block: {p:?}");
                    assert!(slices * p.lanes * p.width >= p.row && grid_groups == groups, "{p:?}");
                    assert!(p.launch.threads as usize <= THREADS, "{p:?}");
                    assert_eq!(p.launch.threads as usize % p.lanes, 0, "{p:?}");
                    assert!(p.launch.shared <= 48 << 10, "{p:?}");
                }
            }
        }
    }

    #[test]
    fn the_networks_channels_move_as_vectors_and_fill_the_machine() {
        for (c, side) in [(2, 96), (16, 48), (32, 24), (64, 12), (128, 6), (256, 6)] {
            let p = plan(Shape::new(8, [side; 3], c), 1, 2, &machine(132));
            assert_eq!(p.width, 8, "{c}: {p:?}");
            assert!(p.launch.grid[0] <= 264, "{c}: more blocks than fit at once: {p:?}");
            assert!(c > 32 || p.launch.grid[0] > 200, "{c}: {p:?}");
        }
    }

    #[test]
    fn tiles_are_spread_over_blocks() {
        assert_eq!(slice(16, 1728), 2);
        assert_eq!(slice(2, 13824), 1);
        assert_eq!(slice(256, 8), 32);
        assert_eq!(slice(5, 8), 8);
    }
}
