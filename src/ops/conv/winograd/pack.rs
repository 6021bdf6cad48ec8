//! Transformed filters in the order in which they are multiplied.

use super::super::Weights;
use super::super::pack::{Packed, gather, lane_block_floats, pair_rows};
use super::super::plan::Block;
use super::super::tile::Element;
use super::filtering::{Dense, Elements, Filtering, MOST, of_sums};
use super::transform::{filters, filters_along_d};
use crate::device::arena::Buffer;
use crate::device::scratch::Scratch;
use rayon::prelude::*;

/// Packs to lane blocks of `[parity along d][sum][product][source block][tap along d][channel or pair of them][16 lanes]`, of cubes
/// of `[product along d][sum][source block][channel or pair of them][16 lanes]`.
pub fn pack<'a, F: Filtering>(
    element: Element,
    blocks: &[Block],
    lanes: &[Block],
    weights: &(dyn Fn(usize, usize) -> Weights<'a> + Sync),
) -> Packed {
    // All 27 taps in the tensor's order.
    let class = &Dense::MAP.classes()[0];
    let products = F::PRODUCTS.len().pow(2);
    let planes = if F::DEEP { F::PRODUCTS.len() } else { 3 };
    let plane_floats = |blocks: &[Block], element| lane_block_floats(class, blocks, element) / 27;
    let plane = plane_floats(blocks, element);
    let mut data = Buffer::dirty(lanes.len() * products * planes * plane);
    let of_lanes = data.par_chunks_exact_mut(products * planes * plane).zip(lanes);
    of_lanes.for_each_init(Scratch::take, |scratch: &mut Scratch<[Vec<_>; 3]>, (out, lane)| {
        let [taps, deep, of_products] = &mut **scratch;
        let mut before = 0;
        for &block in blocks {
            let [single, floats] = [Element::Single, element].map(|element| plane_floats(&[block], element));
            // Where each product's plane of this block goes.
            let mut places = [[0; MOST]; MOST * MOST];
            let mut of_parity = 0;
            for parity in 0..F::MAP.outputs() {
                let depth = F::MAP.taps(parity);
                for (rank, p) in of_sums::<F>().flatten().enumerate() {
                    let places = &mut places[F::PRODUCTS.len() * p.h + p.w];
                    if F::DEEP {
                        *places = std::array::from_fn(|d| (d * products + rank) * plane + before);
                        continue;
                    }
                    let place = of_parity + depth.len() * (rank * plane + before);
                    for (i, &(_, kd)) in depth.iter().enumerate() {
                        places[kd] = place + i * floats;
                    }
                }
                of_parity += depth.len() * products * plane;
            }
            let places = &places[..products];
            taps.resize(27 * single, 0.0);
            gather(Dense::MAP, class, weights(block.tensor, lane.tensor), [&block, lane], taps);
            let taps: &[f32] = if F::DEEP {
                deep.resize(9 * planes * single, 0.0);
                filters_along_d::<F>(taps, deep);
                deep
            } else {
                taps
            };
            if element == Element::Single {
                filters::<F>(taps, block.len, out, places);
            } else {
                of_products.resize(products * planes * single, 0.0);
                let in_order: [[usize; MOST]; MOST * MOST] =
                    std::array::from_fn(|p| std::array::from_fn(|d| (planes * p + d) * single));
                filters::<F>(taps, block.len, of_products, &in_order[..products]);
                let places = places.iter().flat_map(|places| &places[..planes]);
                for (filter, &place) in of_products.chunks_exact(single).zip(places) {
                    pair_rows(filter, single, &mut out[place..][..floats]);
                }
            }
            before += floats;
        }
    });
    Packed::from_buffer(data)
}
