//! Convolutions of kernel 3 with fewer products: minimal filtering ([`filtering`]; Winograd, "Arithmetic Complexity of Computations",
//! 1980; Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016) in every plane, direct along D, or along
//! all three axes.
//!
//! | map | filtering of a tile of 2 x 2 anchors, or of a cube of them | sums of products | multiply-adds a channel pair |
//! |---|---|---|---|
//! | stride 1 | F(2 x 2, 3 x 3): 4 x 4 inputs, 2 x 2 outputs | 16 of 1 | 12 an output, not 27 |
//! | stride 1, inference | F(2 x 2 x 2, 3 x 3 x 3): 4 x 4 x 4 inputs, 2 x 2 x 2 outputs | 64 of 1 | 8 an output, not 27 |
//! | stride 2 | F(2 x 2, 2 x 2) of every other voxel: 5 x 5 inputs, 2 x 2 outputs | 9 of 1 to 4 | 18.75 an output, not 27 |
//! | scatter | its transpose: 3 x 3 inputs, 4 x 4 outputs, in two planes | 25 of 1 | 18.75 eight outputs, not 27 |
//!
//! A task takes a slab of tiles and transforms its input once, with the pending norm and PReLU applied. Then each of a tile's
//! sums is over the taps along D, but for cubes, and all input channels, and stays in registers, and the outputs are sums of sums.
//! A gradient of weights is the same the other way round: the gradients of the 16 or 25 products, summed over all tiles, each the
//! product of a transformed input and a transformed gradient of outputs. (That of a scatter is a gather's: input and gradient
//! change places.)
//!
//! Filters are transformed once in inference, which keeps them, and in every pass of a training step. There stride 2 and scatters
//! are filtered in the backward pass alone, where there are so many anchors that they save more ([`MIN_ANCHORS`]), and nothing
//! along D.
//!
//! In f32 rounding errors are no larger on average than those of a direct sum, whose every product is one of 27 instead of 3 a
//! channel, or of 1 in a cube: with stride 1 filtered in planes, activations of the bundle's network lie 17 % closer to float64's,
//! and a layer's outputs are in cubes 40 to 60 % as far from them as a direct sum's. With bfloat16 operands
//! transforms are computed in f32, of weights as they are and of rounded inputs or gradients, and are rounded. Logits of the bundle's
//! network then lie 21 % (batch norm) and 28 % (instance norm) further from float32's on average than with direct sums, at 83 and
//! 71 % of the deviation of torch's autocast; gradients of a step, 9 % further, at 95 %, which is due to what they are computed of:
//! that they are filtered themselves does not show. A value that is infinite may make no number of outputs that read it and of
//! gradients of weights, where a direct sum would be infinite.

mod columns;
mod correlate;
mod filtering;
mod pack;
mod slab;
mod transform;
mod wgrad;

pub use wgrad::wgrad;

use super::plan::{LANES, Map, Tile};
use super::{Head, Phase, Problem, Source, Weights};
use crate::device::bf16::Operands;
use filtering::{Cubes, Dense, Elements, Filtering, Scattered, Strided};

/// Input and output channels from which the products that are saved outweigh the transforms.
const MIN_CHANNELS: usize = 8;

/// The same where pairs are multiplied, which halves what is saved: with 8 channels both take as long.
const MIN_CHANNELS_OF_PAIRS: usize = 16;

/// The same of [`Cubes`], whose transforms are of more elements: 16 channels take 15 % less time in f32, 5 % more in bfloat16.
const MIN_CHANNELS_OF_CUBES: usize = 16;

/// The same where pairs are multiplied.
const MIN_CHANNELS_OF_CUBES_OF_PAIRS: usize = 32;

/// Anchors of all samples from which a backward pass with a stride of 2, or scattered, saves more (8.25 multiply-adds an anchor and
/// channel pair) than the transform of its filters, or of their gradients, costs. For gradients of inputs 64 anchors do not, 216
/// do in f32, 512 in bfloat16, too; for those of weights 432 do in f32, and are as fast either way in bfloat16.
const MIN_ANCHORS: usize = 256;

/// Accumulators of the largest register tile.
const ACCUMULATORS: usize = 24;

/// Floats that a task transforms, where the volume allows: 768 KB, for cores with an L2 of 1 MB and more.
const SLAB_FLOATS: usize = 192 << 10;

/// Tiles, or half as many cubes, below which a slab rather exceeds [`SLAB_FLOATS`]: each reads all weights of its lanes.
const MIN_TILES: usize = 48;

/// Planes of tiles of a slab at most.
const PLANES: usize = 12;

/// [`super::correlate()`] by fewer products, if this pass is one that they pay in.
pub fn correlate<'a>(
    problem: Problem,
    sources: &[Source],
    heads: &mut [Head],
    weights: &(dyn Fn(usize, usize) -> Weights<'a> + Sync),
) -> bool {
    let lanes = heads.iter().map(|h| h.channels).sum();
    // The forward pass of a training step in f32 sums by the definition: `super` says why.
    if problem.phase == Phase::Forward && problem.operands == Operands::Single {
        return false;
    }
    let other = match problem.phase {
        Phase::Inference => true,
        // A step in bfloat16 would gain 2 %, and its gradients lie 5 to 8 % further from f32's.
        Phase::Forward => false,
        Phase::Backward => is_large(&problem),
    };
    let out_space = problem.out_space;
    // There a scatter's anchors have all their outputs.
    let whole = out_space.iter().all(|o| o.is_multiple_of(Scattered::MAP.outputs()));
    match problem.map {
        Dense::MAP if pays::<Dense>(&problem, tiles::<Dense>(out_space), sources, lanes) => {
            if problem.phase == Phase::Inference && cubes_pay(&problem, sources, lanes) {
                correlate::run::<Cubes>(problem, sources, heads, weights);
            } else {
                correlate::run::<Dense>(problem, sources, heads, weights);
            }
        }
        Strided::MAP if other && pays::<Strided>(&problem, tiles::<Strided>(out_space), sources, lanes) => {
            correlate::run::<Strided>(problem, sources, heads, weights);
        }
        Scattered::MAP
            if other
                && whole
                && pays::<Scattered>(&problem, tiles::<Scattered>(out_space), sources, lanes) =>
        {
            correlate::run::<Scattered>(problem, sources, heads, weights);
        }
        _ => return false,
    }
    true
}

/// Whether [`wgrad()`] computes this pass.
pub fn multiplies(problem: &Problem, sources: &[Source], lane_sources: &[Source]) -> bool {
    let lanes = lane_sources.iter().map(|s| s.channels).sum();
    let tiles = wgrad::tiles(problem);
    match problem.map {
        Dense::MAP => pays::<Dense>(problem, tiles, sources, lanes),
        Strided::MAP => is_large(problem) && pays::<Strided>(problem, tiles, sources, lanes),
        _ => false,
    }
}

/// Whether it has [`MIN_ANCHORS`].
fn is_large(problem: &Problem) -> bool {
    problem.n * anchors(problem.map, problem.out_space).iter().product::<usize>() >= MIN_ANCHORS
}

/// Whether so many tiles of anchors have few enough products.
fn pays<F: Filtering>(
    problem: &Problem,
    [_, tiles_h, tiles_w]: [usize; 3],
    sources: &[Source],
    lanes: usize,
) -> bool {
    let least = match problem.operands {
        Operands::Single => MIN_CHANNELS,
        Operands::Bf16 => MIN_CHANNELS_OF_PAIRS,
    };
    let [_, h, w] = anchors(problem.map, problem.out_space);
    let (products, direct) = (F::PRODUCTS.len().pow(2) * tiles_h * tiles_w, 9 * h * w);
    let [left, of] = F::LEFT;
    channels(sources, lanes) >= least && of * products <= left * direct
}

/// Whether [`Cubes`] pay more than [`Dense`].
fn cubes_pay(problem: &Problem, sources: &[Source], lanes: usize) -> bool {
    let least = match problem.operands {
        Operands::Single => MIN_CHANNELS_OF_CUBES,
        Operands::Bf16 => MIN_CHANNELS_OF_CUBES_OF_PAIRS,
    };
    // Of three planes, two cubes deep, a ninth of the products is still saved, of one there would be a third more. Windows that share
    // a first level rely on one choice for all depths that they have.
    channels(sources, lanes) >= least && problem.out_space[0] >= Cubes::PLANES
}

/// Those of the thinner side.
fn channels(sources: &[Source], lanes: usize) -> usize {
    sources.iter().map(|s| s.channels).sum::<usize>().min(lanes)
}

/// (D, H, W) in anchors.
fn anchors(map: Map, out_space: [usize; 3]) -> [usize; 3] {
    out_space.map(|o| o.div_ceil(map.outputs()))
}

/// So many floats or a few more: what lies this far apart is in different sets of a cache.
fn spread(floats: usize) -> usize {
    (floats.div_ceil(LANES) | 1) * LANES
}

/// (D, H, W) in tiles.
fn tiles<E: Elements>(out_space: [usize; 3]) -> [usize; 3] {
    let [d, h, w] = anchors(E::MAP, out_space);
    [d.div_ceil(E::PLANES), h.div_ceil(2), w.div_ceil(2)]
}

/// Planes and tile rows of the largest slab out of so many tiles, with so many floats of operands a tile to transform.
fn choose<E: Elements>([d, h, w]: [usize; 3], tile_floats: usize) -> Tile {
    let even = |of: usize, at_most: usize| of.div_ceil(of.div_ceil(at_most));
    let row_floats = |planes| E::ELEMENTS.pow(2) * E::planes(planes) * w * tile_floats;
    let least = MIN_TILES / E::PLANES;
    let fits = |planes: usize| row_floats(planes) <= SLAB_FLOATS || planes * w <= least;
    let planes = even(d, (1..=PLANES).rev().find(|&planes| fits(planes)).unwrap_or(1));
    let rows = (SLAB_FLOATS / row_floats(planes)).max(least.div_ceil(planes * w)).clamp(1, h);
    Tile { d: planes, h: even(h, rows) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Values;

    #[test]
    fn every_tile_lies_in_one_slab_of_the_size_that_is_wanted() {
        check_slabs::<Dense>();
        check_slabs::<Cubes>();
        check_slabs::<Strided>();
        check_slabs::<Scattered>();
    }

    /// `first_level` relies on one choice for all depths of two features and more.
    #[test]
    fn cubes_are_taken_from_two_planes_and_so_many_channels_on() {
        for (operands, least) in [(Operands::Single, 16), (Operands::Bf16, 32)] {
            let pay = |depth: usize, [inputs, lanes]: [usize; 2]| {
                let space = [depth, 8, 8];
                let phase = Phase::Inference;
                let problem = Problem { map: Cubes::MAP, operands, phase, n: 1, space, out_space: space };
                let source = Source { data: Values::Single(&[]), channels: inputs, pending: None };
                cubes_pay(&problem, &[source], lanes)
            };
            assert!((2..9).all(|depth| pay(depth, [least, least])), "{operands:?}");
            assert!(!pay(1, [64, 64]), "{operands:?}");
            assert!(![[least - 1, 64], [64, least - 1]].into_iter().any(|c| pay(8, c)), "{operands:?}");
        }
    }

    fn check_slabs<E: Elements>() {
        for (tiles, tile_floats) in [
            ([48, 24, 24], 8),
            ([48, 24, 24], 16),
            ([48, 24, 24], 32),
            ([6, 3, 3], 256),
            ([13, 5, 5], 32),
            ([1, 1, 4], 16),
            ([80, 40, 40], 48),
            ([48, 24, 130], 16),
        ] {
            let slab = choose::<E>(tiles, tile_floats);
            let mut seen = vec![0; 2 * tiles[0] * tiles[1]];
            for origin in slab.origins(2, tiles) {
                for d in origin.d..origin.d + origin.size.d {
                    let line = (origin.n * tiles[0] + d) * tiles[1];
                    (origin.h..origin.h + origin.size.h).for_each(|h| seen[line + h] += 1);
                }
            }
            assert!(seen.iter().all(|&s| s == 1), "{tiles:?} {tile_floats}: {slab:?}");
            let floats = E::ELEMENTS.pow(2) * E::planes(slab.d) * slab.h * tiles[2] * tile_floats;
            // One row of tiles less, or one plane, would be fewer than a task should have.
            let fewer = if slab.h > 1 { [slab.d, slab.h - 1] } else { [slab.d - 1, 1] };
            let least = fewer[0] * fewer[1] * tiles[2] < MIN_TILES / E::PLANES;
            assert!(floats <= SLAB_FLOATS || least, "{tiles:?} {tile_floats}: {slab:?}");
        }
    }
}
