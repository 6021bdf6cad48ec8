//! Which anchors the 16 rows of a register tile stand for.
//!
//! Anchor (d, h, w) of a halo tile reads from position (d * extent_h + h) * extent_w + w on, in units of an anchor's step
//! along w, whatever the stride: the same distance lies between neighbouring positions everywhere. A register tile is any
//! 16 of them, its first an anchor's own; those between one row's last anchor and the next row's first come to nothing.

use crate::device::amx::ROWS;

/// Neighbouring anchors of one row in neighbouring rows of a register tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First row of the register tile.
    pub row: usize,
    /// Anchor (d, h) of the halo tile.
    pub place: (usize, usize),
    /// First anchor along w.
    pub w: usize,
    /// Anchors.
    pub len: usize,
}

/// Register tiles that hold every anchor of a halo tile once.
#[derive(Debug, Default)]
pub struct Cover {
    /// Position of the first row of each, and the number of its first run.
    tiles: Vec<(usize, usize)>,
    runs: Vec<Run>,
}

impl Cover {
    /// Covers d x h rows of `width` anchors, the rows `extent_w` and the planes `extent_h` rows apart, by as few register
    /// tiles as can be: each begins at the first anchor that the last one does not hold.
    pub fn fill(&mut self, (d, h, width): (usize, usize, usize), (extent_h, extent_w): (usize, usize)) {
        self.tiles.clear();
        self.runs.clear();
        for place in (0..d).flat_map(|d| (0..h).map(move |h| (d, h))) {
            let row_start = (place.0 * extent_h + place.1) * extent_w;
            let mut w = 0;
            while w < width {
                let position = row_start + w;
                let row = match self.tiles.last() {
                    Some(&(start, _)) if position < start + ROWS => position - start,
                    _ => {
                        self.tiles.push((position, self.runs.len()));
                        0
                    }
                };
                let len = (ROWS - row).min(width - w);
                self.runs.push(Run { row, place, w, len });
                w += len;
            }
        }
    }

    /// Number of register tiles.
    pub fn len(&self) -> usize {
        self.tiles.len()
    }

    /// Position of the first row of register tile `i`.
    pub fn start(&self, i: usize) -> usize {
        self.tiles[i].0
    }

    /// The anchors of register tile `i`.
    pub fn runs(&self, i: usize) -> &[Run] {
        let end = self.tiles.get(i + 1).map_or(self.runs.len(), |t| t.1);
        &self.runs[self.tiles[i].1..end]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_anchor_has_one_row_at_its_position() {
        for (size, extent) in [
            ((1, 1, 1), (3, 3)),
            ((6, 6, 6), (8, 8)),
            ((2, 8, 24), (10, 26)),
            ((3, 4, 12), (9, 25)),
            ((2, 3, 48), (5, 50)),
            ((4, 5, 17), (5, 17)),
        ] {
            let mut cover = Cover::default();
            cover.fill(size, extent);
            let mut seen = vec![0; size.0 * size.1 * size.2];
            for tile in 0..cover.len() {
                assert_eq!(cover.runs(tile)[0].row, 0, "a tile begins with an anchor");
                for run in cover.runs(tile) {
                    assert!(run.row + run.len <= ROWS);
                    for i in 0..run.len {
                        let (d, h) = run.place;
                        let position = (d * extent.0 + h) * extent.1 + run.w + i;
                        assert_eq!(position, cover.start(tile) + run.row + i);
                        seen[(d * size.1 + h) * size.2 + run.w + i] += 1;
                    }
                }
            }
            assert!(seen.iter().all(|&s| s == 1), "{size:?}");
            let by_rows = size.0 * size.1 * size.2.div_ceil(ROWS);
            assert!(cover.len() <= by_rows, "{size:?}: {} register tiles, {by_rows} by rows", cover.len());
        }
    }
}
