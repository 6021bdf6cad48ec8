//! Which kernel, tile and arrangement of warps a convolution runs with (kernels/conv3d.cuh, kernels/conv_transpose3d.cu):
//! a pure function of shapes and device.

use super::args::GROUP;
use crate::device::cuda::{Info, Precision};

/// Bytes of a voxel's channel chunk in shared memory.
const VOXEL_BYTES: usize = 32;

/// Shared memory that a block may have on every device since sm_80 (sm_86, sm_89 and sm_120 allow no more).
pub const SHARED_LIMIT: usize = 99 << 10;

/// What products of one precision ask of a multiprocessor.
struct Products {
    /// Its cycles for one mma.m16n8k16, or for half of a float multiply() of kernels/tile.cuh.
    cycles: f64,
    /// Warps that keep it busy.
    warps: f64,
    /// Threads that a block may have, whatever the variant.
    threads: usize,
    /// Registers a thread, if more than the variant says.
    registers: usize,
}

/// At 62 % of the tensor cores' peak on an H100; two warps for each of the four, as one waits while the other computes.
const HALF: Products = Products { cycles: 1.55, warps: 8.0, threads: 1024, registers: 0 };

/// 64 multiply-adds and 8 sums a thread for two "mma", on four times 32 lanes at 90 %. A warp has work for three quarters
/// of the time. Whatever the compiler may spend to load early it does.
const SINGLE: Products = Products { cycles: 10.0, warps: 6.0, threads: 256, registers: 256 };

fn products(precision: Precision) -> &'static Products {
    match precision {
        Precision::Half => &HALF,
        Precision::Single => &SINGLE,
    }
}

/// Bytes of L2 that a multiprocessor gets a cycle: 5.5 TB/s over 132 at 1.755 GHz.
const L2_BYTES_A_CYCLE: f64 = 24.0;

/// Bytes of weights that stay in L1 beside the tiles in shared memory.
const L1_WEIGHTS: f64 = 32768.0;

/// Registers and warps of a multiprocessor.
const REGISTERS: usize = 65536;
const WARPS: usize = 64;

/// Cycles from the start of a block to its first product, and ten chunks' barriers.
const LATENCY: f64 = 1000.0;

/// An instance of a kernel's template.
#[derive(Debug, PartialEq)]
pub struct Variant {
    /// File of the kernel.
    pub file: &'static str,
    /// Entry point.
    pub name: &'static str,
    /// Input voxels along an axis that a warp's voxel sees.
    pub window: usize,
    /// Input voxels from one of a warp's voxels to the next.
    pub stride: usize,
    /// Voxels along d that a warp holds.
    pub depth: usize,
    /// Groups of 16 output channels that a warp holds.
    pub groups: usize,
    /// Fragments of 16 voxels x 16 channels that a warp sums up.
    pub blocks: usize,
    /// Among how many warps the taps of a tile can be shared.
    pub tap_shares: usize,
    /// Threads that a block may have.
    pub threads: usize,
    /// Registers a thread, as compiled for sm_90a and fp16.
    pub registers: usize,
    /// mma.m16n8k16 of a warp and chunk.
    pub mma: usize,
    /// Fragments of A and B that a warp reads a chunk, 512 bytes each. Counted in fp16: in float neither they nor their
    /// wavefronts are what a launch waits for.
    pub fragments: usize,
}

/// A convolution as the planner sees it.
#[derive(Clone, Copy, Debug)]
pub struct Problem {
    /// How activations are stored.
    pub precision: Precision,
    /// Samples.
    pub n: usize,
    /// D, H, W of the voxels that warps hold: outputs, or the inputs of a transposed convolution.
    pub space: [usize; 3],
    /// Window of the variants that compute it.
    pub window: usize,
    /// Their stride.
    pub stride: usize,
    /// Chunks of input channels.
    pub chunks: usize,
    /// Groups of output channels.
    pub groups: usize,
}

/// The haloed tile in shared memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HaloPlan {
    /// Voxels along d, h, w.
    pub extent: [usize; 3],
    /// Shared voxels from row to row.
    pub pitch: usize,
    /// Shared voxels from plane to plane.
    pub plane: usize,
    /// Where odd voxels of a row start (stride 2).
    pub odd: usize,
}

impl HaloPlan {
    /// What `tile` voxels see. The pitch is such that eight neighbours in the order of the (h, w) plane differ
    /// mod 8, so that every shifted view is read without bank conflicts (for odd `tile[2]` with stride 2 there is none).
    pub fn new(tile: [usize; 3], window: usize, stride: usize) -> Self {
        let extent = tile.map(|t| (t - 1) * stride + window);
        let width = tile[2];
        let fits = |pitch: usize| width.is_multiple_of(8) || pitch * stride % 8 == width % 8;
        let pitch = (extent[2]..extent[2] + 8).find(|&p| fits(p)).unwrap_or(extent[2]);
        HaloPlan { extent, pitch, plane: (extent[1] * pitch).next_multiple_of(8), odd: extent[2].div_ceil(2) }
    }

    /// Bytes in shared memory.
    pub fn bytes(&self) -> usize {
        self.extent[0] * self.plane * VOXEL_BYTES
    }

    /// Voxels loaded.
    pub fn voxels(&self) -> usize {
        self.extent.iter().product()
    }
}

/// How a convolution runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// What runs.
    pub variant: &'static Variant,
    /// Voxels of a block along d, h, w.
    pub tile: [usize; 3],
    /// Blocks along d, h, w.
    pub tiles: [usize; 3],
    /// Slices of output channels.
    pub slices: usize,
    /// Warps along voxels, channels, taps.
    pub warps: [usize; 3],
    /// The haloed tile.
    pub halo: HaloPlan,
    /// Dynamic shared memory of a block, bytes.
    pub shared: usize,
    /// Estimated cycles of the whole launch.
    pub cycles: f64,
}

impl Plan {
    /// Threads of a block.
    pub fn threads(&self) -> usize {
        32 * self.warps.iter().product::<usize>()
    }
}

const fn conv(
    file: &'static str,
    name: &'static str,
    [kernel, stride, depth, groups]: [usize; 4],
    threads: usize,
    registers: usize,
) -> Variant {
    let planes = (depth - 1) * stride + kernel;
    Variant {
        file,
        name,
        window: kernel,
        stride,
        depth,
        groups,
        blocks: depth * groups,
        tap_shares: kernel,
        threads,
        registers,
        mma: kernel.pow(3) * depth * 2 * groups,
        fragments: kernel.pow(2) * (planes + kernel * groups),
    }
}

/// The instances of kernels/conv3d.cuh.
pub static VARIANTS: [Variant; 7] = [
    conv("conv3d.cu", "conv3d_k3s1_d8g1", [3, 1, 8, 1], 256, 168),
    conv("conv3d.cu", "conv3d_k3s1_d6g1", [3, 1, 6, 1], 384, 136),
    conv("conv3d_wide.cu", "conv3d_k3s1_d6g2", [3, 1, 6, 2], 256, 224),
    conv("conv3d_wide.cu", "conv3d_k3s1_d4g2", [3, 1, 4, 2], 256, 184),
    conv("conv3d_strided.cu", "conv3d_k3s2_d3g1", [3, 2, 3, 1], 256, 112),
    conv("conv3d_strided.cu", "conv3d_k3s2_d3g2", [3, 2, 3, 2], 384, 160),
    conv("conv3d.cu", "conv3d_k1s1_d6g1", [1, 1, 6, 1], 384, 128),
];

/// Sides of the (h, w) plane of a block's tile.
const SIDES: [usize; 7] = [2, 4, 5, 6, 8, 12, 16];

/// The fastest arrangement of one of `variants` by the model of `cycles`.
pub fn plan(p: &Problem, variants: &'static [Variant], info: &Info) -> Plan {
    let mut best: Option<Plan> = None;
    let most = products(p.precision).threads;
    for v in variants.iter().filter(|v| (v.window, v.stride) == (p.window, p.stride)) {
        for (h, w) in SIDES.iter().flat_map(|&h| SIDES.iter().map(move |&w| (h, w))) {
            for (warps_n, warps_k) in [(1, 1), (2, 1), (1, v.tap_shares), (2, v.tap_shares)] {
                let warps = [(h * w).div_ceil(16), warps_n, warps_k];
                let threads = 32 * warps.iter().product::<usize>();
                let fits = threads <= v.threads.min(most) && (warps_n - 1) * v.groups < p.groups;
                let candidate = fits.then(|| arrange(p, v, [v.depth, h, w], warps, info)).flatten();
                let better = |c: &Plan| best.as_ref().is_none_or(|b| c.cycles < b.cycles);
                if let Some(candidate) = candidate.filter(better) {
                    best = Some(candidate);
                }
            }
        }
    }
    best.expect("the smallest tile fits every device")
}

fn arrange(
    p: &Problem,
    variant: &'static Variant,
    tile: [usize; 3],
    warps: [usize; 3],
    info: &Info,
) -> Option<Plan> {
    let v = variant;
    let halo = HaloPlan::new(tile, v.window, v.stride);
    // What warps that share taps hand over, and the moments of each warp and channel.
    let sums = if warps[2] > 1 { warps[0] * warps[1] * v.blocks * 32 * 32 } else { 0 };
    let moments = warps[0] * warps[1] * v.groups * GROUP * 12;
    let shared = (halo.bytes() * p.chunks.min(2)).max(sums).max(moments);
    if shared > SHARED_LIMIT || halo.voxels() >= 4096 {
        return None;
    }
    let tiles: [usize; 3] = std::array::from_fn(|i| p.space[i].div_ceil(tile[i]));
    let slices = p.groups.div_ceil(warps[1] * v.groups);
    let mut plan = Plan { variant, tile, tiles, slices, warps, halo, shared, cycles: 0.0 };
    plan.cycles = cycles(p, &plan, info);
    Some(plan)
}

/// Estimated cycles of a launch: of the resources that the blocks of a multiprocessor share (multipliers, wavefronts of
/// shared memory and L1, issue slots, its part of L2) the one asked for most, and the shorter of a block's loading and
/// computing, which nothing hides when it starts.
fn cycles(p: &Problem, plan: &Plan, info: &Info) -> f64 {
    let v = plan.variant;
    let products = products(p.precision);
    let warps = plan.threads() / 32;
    let chunks = p.chunks as f64;
    let sharing = (plan.warps[0] * plan.warps[1]) as f64;
    let voxels = plan.halo.voxels() as f64;
    let multiply = chunks * sharing * v.mma as f64 * products.cycles;
    // A fragment is 4 wavefronts; a loaded voxel of 32 bytes is written, read and rewritten.
    let wavefronts = chunks * (sharing * (4 * v.fragments) as f64 + voxels * 3.0 * 32.0 / 128.0);
    // An address and a load a fragment; 40 instructions a loaded vector and thread; four schedulers.
    let issue = chunks * (sharing * (v.mma + 3 * v.fragments) as f64 + voxels * 2.0 * 40.0 / 32.0) / 4.0;
    // Weights that do not stay in L1 are read from L2 by every block.
    let weights = chunks * (v.mma / (2 * v.depth) * plan.warps[1] * 512) as f64;
    let streamed = if weights > L1_WEIGHTS { weights } else { 0.0 };
    let l2 = (chunks * voxels * VOXEL_BYTES as f64 + streamed) / L2_BYTES_A_CYCLE;

    let resident = (WARPS / warps)
        .min(REGISTERS / (v.registers.max(products.registers) * plan.threads()))
        .min((info.shared_per_block as usize + 1024) / (plan.shared + 1024))
        .max(1) as f64;
    let blocks = (p.n * plan.tiles.iter().product::<usize>() * plan.slices) as f64;
    let sms = f64::from(info.multiprocessors);
    let on_one = (blocks / sms).ceil().min(resident);
    let busy = (on_one * warps as f64 / products.warps).clamp(0.25, 1.0);
    let most = (multiply / busy).max(wavefronts).max(issue).max(l2);
    let exposed = multiply.min(l2) / chunks;
    let round = on_one * most + exposed + LATENCY * (1.0 + 0.1 * chunks);
    // Rounds of a few blocks end raggedly, many even out.
    let rounds = (blocks / (sms * resident)).max(1.0);
    round * if rounds < 4.0 { rounds.ceil() } else { rounds + 0.5 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::sources;

    /// An H100.
    fn info() -> Info {
        Info {
            name: "H100".into(),
            capability: (9, 0),
            multiprocessors: 132,
            memory: 80 << 30,
            shared_per_block: 227 << 10,
        }
    }

    /// The network's convolutions, 8 patches of 96^3: side of the output, chunks, groups, kernel, stride.
    const LAYERS: [[usize; 5]; 12] = [
        [48, 1, 1, 3, 1],
        [24, 1, 4, 3, 2],
        [24, 2, 2, 3, 1],
        [12, 2, 8, 3, 2],
        [12, 4, 4, 3, 1],
        [6, 4, 16, 3, 2],
        [6, 8, 8, 3, 1],
        [6, 8, 16, 3, 1],
        [6, 8, 16, 1, 1],
        [6, 16, 16, 3, 1],
        [6, 16, 8, 3, 1],
        [6, 4, 24, 3, 2],
    ];

    #[test]
    fn variants_are_in_their_files() {
        for v in &VARIANTS {
            let text = sources::find(v.file).expect("a kernel file").text;
            assert!(text.contains(&format!("CONV3D({},", v.name)), "{} is not in {}", v.name, v.file);
        }
    }

    #[test]
    fn plans_fill_the_machine() {
        for ([side, chunks, groups, window, stride], precision) in
            LAYERS.iter().flat_map(|&layer| [Precision::Half, Precision::Single].map(|p| (layer, p)))
        {
            // A chunk has half as many float channels.
            let chunks = chunks * precision.bytes() / 2;
            let p = Problem { precision, n: 8, space: [side; 3], window, stride, chunks, groups };
            let plan = plan(&p, &VARIANTS, &info());
            let blocks = p.n * plan.tiles.iter().product::<usize>() * plan.slices;
            assert!(plan.shared <= SHARED_LIMIT, "{plan:?}");
            assert!(plan.threads() <= products(precision).threads, "{plan:?}");
            assert!(blocks >= 96, "{p:?}: {plan:?}");
            assert!(plan.tile.iter().zip(plan.tiles).all(|(t, n)| t * n >= side && t * (n - 1) < side));
        }
    }

    #[test]
    fn views_are_read_without_bank_conflicts() {
        for (window, stride) in [(1, 1), (2, 1), (3, 1), (3, 2)] {
            for (h, w) in SIDES.iter().flat_map(|&h| SIDES.iter().map(move |&w| (h, w))) {
                let halo = HaloPlan::new([2, h, w], window, stride);
                let voxel = |i: usize| i / w * stride * halo.pitch + i % w;
                for first in (0..h * w / 8).map(|i| 8 * i) {
                    let mut banks: Vec<usize> = (first..first + 8).map(|i| voxel(i) % 8).collect();
                    banks.sort_unstable();
                    assert!(
                        banks == (0..8).collect::<Vec<_>>() || stride == 2 && w % 2 == 1,
                        "{h} x {w}: {halo:?}"
                    );
                }
            }
        }
    }
}
