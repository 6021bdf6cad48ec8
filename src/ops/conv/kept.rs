//! Packed weights kept between inference calls.
//!
//! A pack is found again by the tensors it was made of. It holds them weakly: whoever changes one through
//! `Arc::make_mut` moves it away from its weak references, so that a pack of old values can never be found, and a network
//! that is dropped takes its tensors with it. Packs that cannot be found any more go when the next one is made.

#[cfg(target_arch = "x86_64")]
use super::amx::{Depth, Fold};
use super::pack::Packed;
use super::plan::{Block, Map};
use super::tile::Element;
use super::{Phase, Weights};
use crate::device::shared::Shared;
use std::sync::{Arc, Mutex, Weak};

/// What a lane block of packed weights is made of.
#[derive(PartialEq)]
pub enum Layout {
    /// Vectors of such elements.
    Vectors(Element),
    /// Vectors of such elements of filters that are transformed in every plane, or `deep`, along all axes.
    Products {
        /// What is multiplied.
        element: Element,
        /// Whether along all axes.
        deep: bool,
    },
    /// B tiles of AMX.
    #[cfg(target_arch = "x86_64")]
    Tiles(Depth, Option<Fold>),
}

/// Everything but the values that a pack depends on: the pass, its blocks, and where each pair's weights lie.
#[derive(PartialEq)]
struct Key {
    map: Map,
    layout: Layout,
    sources: Vec<Block>,
    heads: Vec<Block>,
    /// (offset, head stride, source stride, mirrored) of every source and head.
    places: Vec<(usize, usize, usize, bool)>,
}

struct Kept {
    key: Key,
    tensors: Vec<Weak<Vec<f32>>>,
    packed: Shared<Packed>,
}

/// All packs of the process: a network has a few dozen.
static KEPT: Mutex<Vec<Kept>> = Mutex::new(Vec::new());

/// The pack of these weights: what `pack` makes, or in inference a kept one, or what `pack` makes, kept from now on.
pub fn packed<'a>(
    phase: Phase,
    (map, layout): (Map, Layout),
    [sources, heads]: [&[Block]; 2],
    weights: &(dyn Fn(usize, usize) -> Weights<'a> + Sync),
    pack: impl FnOnce() -> Packed,
) -> Shared<Packed> {
    if phase != Phase::Inference {
        return Shared::new(pack());
    }
    let count = |blocks: &[Block]| blocks.last().map_or(0, |b| b.tensor + 1);
    let pairs: Vec<Weights> = (0..count(sources))
        .flat_map(|source| (0..count(heads)).map(move |head| weights(source, head)))
        .collect();
    let key = Key {
        map,
        layout,
        sources: sources.to_vec(),
        heads: heads.to_vec(),
        places: pairs.iter().map(|w| (w.offset, w.head_stride, w.source_stride, w.mirrored)).collect(),
    };
    // A dead weak reference keeps its address from being used again, so an equal address is the same tensor.
    let same = |k: &Kept| {
        k.key == key && k.tensors.iter().zip(&pairs).all(|(kept, now)| kept.as_ptr() == Arc::as_ptr(now.data))
    };
    // A panicking holder leaves only whole operations behind, so a poisoned list is still a good one.
    let lock = || KEPT.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(kept) = lock().iter().find(|k| same(k)) {
        return kept.packed.clone();
    }
    // Not under the lock: packing is many tasks, and a thread that waits for them may take one that asks here too.
    let packed = Shared::new(pack());
    let tensors = pairs.iter().map(|w| Arc::downgrade(w.data)).collect();
    let mut kept = lock();
    if let Some(kept) = kept.iter().find(|k| same(k)) {
        return kept.packed.clone();
    }
    kept.retain(|k| k.tensors.iter().all(|t| t.strong_count() > 0));
    kept.push(Kept { key, tensors, packed: packed.clone() });
    packed
}

#[cfg(test)]
mod tests {
    use super::super::pack::pack;
    use super::*;

    #[test]
    fn a_pack_lasts_as_long_as_its_weights_stay_as_they_are() {
        let map = Map::Gather { kernel: 1, stride: 1 };
        let block = [Block { tensor: 0, first: 0, len: 2 }];
        let mut data = Arc::new(vec![1.0, 2.0, 3.0, 4.0]);
        let mut packs = 0;
        let mut first_lane = |data: &Arc<Vec<f32>>, offset: usize| {
            let weights = |_, _| Weights { data, offset, head_stride: 1, source_stride: 1, mirrored: false };
            let packed = packed(
                Phase::Inference,
                (map, Layout::Vectors(Element::Single)),
                [&block, &block],
                &weights,
                || {
                    packs += 1;
                    pack(map, map.classes(), &[&block], &block, Element::Single, &weights)
                },
            );
            (packed.of(0, 0)[0], packs)
        };
        assert_eq!(first_lane(&data, 0), (1.0, 1));
        assert_eq!(first_lane(&data.clone(), 0), (1.0, 1), "the same tensor");
        assert_eq!(first_lane(&data, 1), (2.0, 2), "another place");
        Arc::make_mut(&mut data)[0] = 5.0;
        assert_eq!(first_lane(&data, 0), (5.0, 3), "changed in place");
        let equal = Arc::new(data.to_vec());
        assert_eq!(first_lane(&equal, 0), (5.0, 4), "another tensor");
    }

    #[test]
    fn a_pack_is_for_one_map_and_layout() {
        let data = Arc::new(vec![1.0; 27]);
        let block = [Block { tensor: 0, first: 0, len: 1 }];
        let weights =
            |_, _| Weights { data: &data, offset: 0, head_stride: 27, source_stride: 27, mirrored: false };
        let mut packs = 0;
        let strides = [1, 2].map(|stride| Map::Gather { kernel: 3, stride });
        for map in [strides[0], strides[1], Map::Scatter] {
            for element in [Element::Single, Element::Channels, Element::Taps] {
                for layout in [
                    Layout::Vectors(element),
                    Layout::Products { element, deep: false },
                    Layout::Products { element, deep: true },
                ] {
                    packed(Phase::Inference, (map, layout), [&block, &block], &weights, || {
                        packs += 1;
                        pack(map, map.classes(), &[&block], &block, Element::Single, &weights)
                    });
                }
            }
        }
        assert_eq!(packs, 27);
    }
}
