//! How calls of a kernel share out what a halo tile's outputs are summed in: register tiles, planes and lane blocks.

use super::LANE_BLOCKS;
use super::micro::{SUMS, most_parts_of_a};
use std::ops::Range;

/// One call's sums: parts of A, which are register tiles one after the other, or one register tile in planes one after the
/// other, by one lane block or two.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Planes of anchors by which the first part lies further than its register tile in the cover.
    pub plane: usize,
    /// Register tile of the first part.
    pub tile: usize,
    /// Parts of A.
    pub parts: usize,
    /// First lane block.
    pub lane: usize,
    /// Lane blocks.
    pub lanes: usize,
}

impl Call {
    /// Number of sums.
    pub fn sums(&self) -> usize {
        self.parts * self.lanes
    }

    /// Part of A and lane block of sum `i`: by parts of A, of each by lane blocks.
    pub fn sum(&self, i: usize) -> (usize, usize) {
        match self.lanes {
            1 => (i, self.lane),
            _ => (i / LANE_BLOCKS, self.lane + i % LANE_BLOCKS),
        }
    }
}

/// Calls for `tiles` register tiles of a cover of one plane in each of `planes`, by every lane block: a register tile in
/// some neighbouring planes each, as evenly many as can be. Replaces what `calls` holds.
pub fn columns(planes: usize, tiles: usize, lanes: Range<usize>, calls: &mut Vec<Call>) {
    let parts = planes.div_ceil(SUMS);
    calls.clear();
    for lane in lanes {
        for part in 0..parts {
            let (plane, end) = (part * planes / parts, (part + 1) * planes / parts);
            calls.extend((0..tiles).map(|tile| Call { plane, tile, parts: end - plane, lane, lanes: 1 }));
        }
    }
}

/// Calls for `tiles` register tiles of a cover of all planes by every lane block: as many of them as a kernel takes.
/// Replaces what `calls` holds.
pub fn tiles(tiles: usize, lanes: Range<usize>, calls: &mut Vec<Call>) {
    calls.clear();
    for lane in lanes.clone().step_by(LANE_BLOCKS) {
        let lanes = LANE_BLOCKS.min(lanes.end - lane);
        let most = most_parts_of_a(lanes);
        let of = |tile| Call { plane: 0, tile, parts: most.min(tiles - tile), lane, lanes };
        calls.extend((0..tiles).step_by(most).map(of));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sum_has_one_call() {
        let mut calls = Vec::new();
        for (planes, count, lanes) in
            [(1, 2, 0..1), (3, 24, 2..4), (5, 3, 0..5), (8, 17, 1..2), (9, 1, 3..6), (6, 0, 0..2)]
        {
            for planes in [Some(planes), None] {
                match planes {
                    Some(planes) => columns(planes, count, lanes.clone(), &mut calls),
                    None => tiles(count, lanes.clone(), &mut calls),
                }
                let mut seen = vec![0; planes.unwrap_or(1) * count * lanes.end];
                for call in &calls {
                    assert!((1..=SUMS).contains(&call.sums()));
                    for (part, lane) in (0..call.sums()).map(|i| call.sum(i)) {
                        let (plane, tile) = match planes {
                            Some(_) => (call.plane + part, call.tile),
                            None => (call.plane, call.tile + part),
                        };
                        seen[(plane * count + tile) * lanes.end + lane] += 1;
                    }
                }
                let want = |i: usize| usize::from(lanes.contains(&(i % lanes.end)));
                assert!(seen.iter().enumerate().all(|(i, &n)| n == want(i)), "{planes:?} {count} {lanes:?}");
            }
        }
        for (planes, want) in [(4, vec![4]), (5, vec![2, 3]), (6, vec![3, 3]), (13, vec![3, 3, 3, 4])] {
            columns(planes, 1, 0..1, &mut calls);
            assert_eq!(calls.iter().map(|call| call.parts).collect::<Vec<_>>(), want);
        }
    }
}
