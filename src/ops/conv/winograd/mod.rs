//! Convolutions of kernel 3 and stride 1 with fewer products: Winograd's minimal filtering F(2 x 2, 3 x 3) in every plane
//! (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016), direct along D.
//!
//! The volume is cut into tiles of 2 x 2 output voxels of a plane. A task takes a slab of them and transforms its input
//! once, with the pending norm and PReLU applied. Then each of a tile's 16 products is a sum over three planes and all
//! input channels, which stays in registers, and the outputs are sums of products. An output voxel costs 12 multiply-adds
//! a channel pair instead of 27. A gradient of weights is the same sum the other way round: the gradients of 16 products,
//! summed over all tiles, each the product of a transformed input and a transformed gradient of outputs.
//!
//! In f32 rounding errors are no larger on average than those of a direct sum, whose every product is one of 27 instead of 3 a
//! channel: activations of the bundle's network lie 17 % closer to float64's. With bfloat16 operands transforms are computed in
//! f32, of weights as they are and of rounded inputs or gradients, and are rounded. Logits of the bundle's network then lie 9 % (batch
//! norm) and 14 % (instance norm) further from float32's on average than with direct sums, at 75 and 63 % of the deviation of
//! torch's autocast; gradients of a step, 9 % further, at 95 %. A value that is infinite or no number makes no number of all
//! outputs of the tiles that read it.

mod correlate;
mod slab;
mod transform;
mod wgrad;

pub use correlate::correlate;
pub use wgrad::wgrad;

use super::plan::{LANES, Map, Tile};
use super::{Head, Phase, Problem, Source};
use crate::device::bf16::Operands;
use transform::PRODUCTS;

/// Input and output channels from which the products that are saved outweigh the transforms.
const MIN_CHANNELS: usize = 8;

/// The same where pairs are multiplied, which halves what is saved: with 8 channels both take as long.
const MIN_CHANNELS_OF_PAIRS: usize = 16;

/// Accumulators of the largest register tile.
const ACCUMULATORS: usize = 24;

/// Floats that a task transforms, where the volume allows: 768 KB, for cores with an L2 of 1 MB and more.
const SLAB_FLOATS: usize = 192 << 10;

/// Tiles below which a slab rather exceeds [`SLAB_FLOATS`]: each reads all weights of its lanes.
const MIN_TILES: usize = 48;

/// Output planes of a slab at most.
const PLANES: usize = 12;

/// Whether [`correlate()`] computes this pass.
pub fn correlates(problem: &Problem, sources: &[Source], heads: &[Head]) -> bool {
    // A training step in f32 sums by the definition: `super` says why.
    let applies = problem.phase != Phase::Forward || problem.operands == Operands::Bf16;
    applies && pays(problem, sources, heads.iter().map(|h| h.channels).sum())
}

/// Whether [`wgrad()`] computes this pass.
pub fn multiplies(problem: &Problem, sources: &[Source], lane_sources: &[Source]) -> bool {
    problem.operands == Operands::Single
        && pays(problem, sources, lane_sources.iter().map(|s| s.channels).sum())
}

fn pays(problem: &Problem, sources: &[Source], lanes: usize) -> bool {
    let [_, h, w] = problem.out_space;
    let least = match problem.operands {
        Operands::Single => MIN_CHANNELS,
        Operands::Bf16 => MIN_CHANNELS_OF_PAIRS,
    };
    problem.map == Map::Gather { kernel: 3, stride: 1 }
        && sources.iter().map(|s| s.channels).sum::<usize>().min(lanes) >= least
        // Tiles reach beyond volumes of odd size: a third of the direct products at least is to be saved.
        && 3 * PRODUCTS * h.div_ceil(2) * w.div_ceil(2) <= 2 * 9 * h * w
}

/// So many floats or a few more: what lies this far apart is in different sets of a cache.
fn spread(floats: usize) -> usize {
    (floats.div_ceil(LANES) | 1) * LANES
}

/// (D, H, W) in tiles.
fn tiles([d, h, w]: [usize; 3]) -> [usize; 3] {
    [d, h.div_ceil(2), w.div_ceil(2)]
}

/// Planes and tile rows of the largest slab out of so many tiles, with so many floats of operands a tile to transform.
fn choose([d, h, w]: [usize; 3], tile_floats: usize) -> Tile {
    let even = |of: usize, at_most: usize| of.div_ceil(of.div_ceil(at_most));
    let planes = even(d, PLANES);
    let floats = PRODUCTS * (planes + 2) * w * tile_floats;
    let rows = (SLAB_FLOATS / floats).max(MIN_TILES.div_ceil(planes * w)).clamp(1, h);
    Tile { d: planes, h: even(h, rows) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tile_lies_in_one_slab_of_the_size_that_is_wanted() {
        for (tiles, tile_floats) in [
            ([48, 24, 24], 8),
            ([48, 24, 24], 16),
            ([48, 24, 24], 32),
            ([6, 3, 3], 256),
            ([13, 5, 5], 32),
            ([1, 1, 4], 16),
            ([80, 40, 40], 48),
        ] {
            let slab = choose(tiles, tile_floats);
            let mut seen = vec![0; 2 * tiles[0] * tiles[1]];
            for origin in slab.origins(2, tiles) {
                for d in origin.d..origin.d + origin.size.d {
                    let line = (origin.n * tiles[0] + d) * tiles[1];
                    (origin.h..origin.h + origin.size.h).for_each(|h| seen[line + h] += 1);
                }
            }
            assert!(seen.iter().all(|&s| s == 1), "{tiles:?} {tile_floats}: {slab:?}");
            let floats = PRODUCTS * (slab.d + 2) * slab.h * tiles[2] * tile_floats;
            // One row of tiles less would be fewer than a task should have.
            let least = slab.h == 1 || slab.d * (slab.h - 1) * tiles[2] < MIN_TILES;
            assert!(floats <= SLAB_FLOATS || least, "{tiles:?} {tile_floats}: {slab:?}");
        }
    }
}
