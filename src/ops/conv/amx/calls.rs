//! How calls of a kernel share out what a halo tile's outputs are summed in: register tiles, planes and lane blocks.

use super::LANE_BLOCKS;
use super::micro::{SUMS, most_parts_of_a};
use std::ops::Range;

/// One call's sums: of several register tiles of a cover, or of one in several planes, by one lane block or two.
#[derive(Clone, Debug)]
pub struct Call {
    /// Planes of anchors by which register tiles lie further than in the cover; 0 alone where that holds all planes.
    pub planes: Range<usize>,
    /// Register tiles of the cover.
    pub tiles: Range<usize>,
    /// Lane blocks.
    pub lanes: Range<usize>,
}

impl Call {
    /// Number of parts of A.
    pub fn parts_of_a(&self) -> usize {
        self.planes.len() * self.tiles.len()
    }

    /// Number of sums.
    pub fn sums(&self) -> usize {
        self.parts_of_a() * self.lanes.len()
    }

    /// Plane and register tile of part `i` of A.
    pub fn part_of_a(&self, i: usize) -> (usize, usize) {
        match self.tiles.len() {
            1 => (self.planes.start + i, self.tiles.start),
            _ => (self.planes.start, self.tiles.start + i),
        }
    }

    /// Plane and register tile, and lane block, of sum `i`: by parts of A, of each by lane blocks.
    pub fn sum(&self, i: usize) -> ((usize, usize), usize) {
        match self.lanes.len() {
            1 => (self.part_of_a(i), self.lanes.start),
            _ => (self.part_of_a(i / LANE_BLOCKS), self.lanes.start + i % LANE_BLOCKS),
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
            let planes = part * planes / parts..(part + 1) * planes / parts;
            let of = |tile| Call { planes: planes.clone(), tiles: tile..tile + 1, lanes: lane..lane + 1 };
            calls.extend((0..tiles).map(of));
        }
    }
}

/// Calls for `tiles` register tiles of a cover of all planes by every lane block: as many of them as a kernel takes.
/// Replaces what `calls` holds.
pub fn tiles(tiles: usize, lanes: Range<usize>, calls: &mut Vec<Call>) {
    calls.clear();
    for lane in lanes.clone().step_by(LANE_BLOCKS) {
        let lanes = lane..lanes.end.min(lane + LANE_BLOCKS);
        let most = most_parts_of_a(lanes.len());
        let of = |tile| Call { planes: 0..1, tiles: tile..tiles.min(tile + most), lanes: lanes.clone() };
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
                    for ((plane, tile), lane) in (0..call.sums()).map(|i| call.sum(i)) {
                        assert!(call.planes.contains(&plane) && call.tiles.contains(&tile));
                        seen[(plane * count + tile) * lanes.end + lane] += 1;
                    }
                }
                let want = |i: usize| usize::from(lanes.contains(&(i % lanes.end)));
                assert!(seen.iter().enumerate().all(|(i, &n)| n == want(i)), "{planes:?} {count} {lanes:?}");
            }
        }
        for (planes, want) in [(4, vec![4]), (5, vec![2, 3]), (6, vec![3, 3]), (13, vec![3, 3, 3, 4])] {
            columns(planes, 1, 0..1, &mut calls);
            assert_eq!(calls.iter().map(|call| call.planes.len()).collect::<Vec<_>>(), want);
        }
    }
}
