//! Which anchors the 16 rows of a register tile stand for.
//!
//! Anchor (d, h, w) of a halo tile reads from position (d * extent_h + h) * extent_w + w on, in units of an anchor's step
//! along w, whatever the stride: the same distance lies between neighbouring positions everywhere. A register tile is any
//! 16 of them, its first an anchor's own; those between one row's last anchor and the next row's first come to nothing.

use crate::device::amx::ROWS;
use std::ops::Range;

/// Neighbouring anchors, or bands of them, of one row in neighbouring rows of a register tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First row of the register tile.
    pub row: usize,
    /// First anchor along w.
    pub w: usize,
    /// Anchors.
    pub len: usize,
    /// The first one's outputs, in voxels from those of the halo tile's first anchor.
    pub voxel: usize,
}

/// What a cover is of. Where anchors share positions in bands, bands stand for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Anchors {
    /// Planes, rows, anchors of a row.
    pub size: [usize; 3],
    /// Positions from a plane to the next, from a row to the next.
    pub pitches: (usize, usize),
    /// Output voxels from a plane, row and anchor to the next.
    pub voxels: [usize; 3],
}

/// Register tiles that hold every anchor of a halo tile once.
#[derive(Debug, Default)]
pub struct Cover {
    of: Option<Anchors>,
    tiles: Vec<Covered>,
    runs: Vec<Run>,
}

/// A register tile.
#[derive(Debug)]
struct Covered {
    /// Of its first row.
    position: usize,
    runs: Range<usize>,
}

impl Cover {
    /// Covers these anchors by as few register tiles as can be: each begins at the first anchor that the last one does not
    /// hold.
    pub fn fill(&mut self, anchors: Anchors) {
        if self.of == Some(anchors) {
            return;
        }
        let Anchors { size: [d, h, width], pitches: (plane_pitch, row_pitch), voxels } = anchors;
        self.of = None;
        self.tiles.clear();
        self.runs.clear();
        for (d, h) in (0..d).flat_map(|d| (0..h).map(move |h| (d, h))) {
            let mut w = 0;
            while w < width {
                let position = d * plane_pitch + h * row_pitch + w;
                let row = match self.tiles.last() {
                    Some(tile) if position < tile.position + ROWS => position - tile.position,
                    _ => {
                        self.tiles.push(Covered { position, runs: self.runs.len()..self.runs.len() });
                        0
                    }
                };
                let len = (ROWS - row).min(width - w);
                self.runs.push(Run { row, w, len, voxel: d * voxels[0] + h * voxels[1] + w * voxels[2] });
                self.tiles.last_mut().expect("the run's").runs.end += 1;
                w += len;
            }
        }
        self.of = Some(anchors);
    }

    /// Number of register tiles.
    pub fn len(&self) -> usize {
        self.tiles.len()
    }

    /// Position of the first row of register tile `i`.
    pub fn start(&self, i: usize) -> usize {
        self.tiles[i].position
    }

    /// The anchors of register tile `i`.
    pub fn runs(&self, i: usize) -> &[Run] {
        &self.runs[self.tiles[i].runs.clone()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_anchor_has_one_row_at_its_position() {
        // One after the other, as a task uses it.
        let mut cover = Cover::default();
        for (size, extent) in [
            ([1, 1, 1], (3, 3)),
            ([6, 6, 6], (8, 8)),
            ([2, 8, 24], (10, 26)),
            ([3, 4, 12], (9, 25)),
            ([2, 3, 48], (5, 50)),
            ([4, 5, 17], (5, 17)),
        ] {
            let [d, h, w] = size;
            let pitches = (extent.0 * extent.1, extent.1);
            // As outputs of a scatter lie, and then as the anchors do.
            cover.fill(Anchors { size, pitches, voxels: [8 * h * w, 4 * w, 2] });
            let last = cover.runs(cover.len() - 1).last().expect("an anchor");
            assert_eq!(last.voxel, (d - 1) * 8 * h * w + (h - 1) * 4 * w + last.w * 2);
            let anchors = Anchors { size, pitches, voxels: [h * w, w, 1] };
            cover.fill(anchors);
            cover.fill(anchors);
            let mut seen = vec![0; d * h * w];
            for tile in 0..cover.len() {
                assert_eq!(cover.runs(tile)[0].row, 0, "a tile begins with an anchor");
                for run in cover.runs(tile) {
                    assert!(run.row + run.len <= ROWS && run.w + run.len <= w);
                    for anchor in run.voxel..run.voxel + run.len {
                        let position = anchor / (h * w) * pitches.0 + anchor / w % h * pitches.1 + anchor % w;
                        assert_eq!(position, cover.start(tile) + run.row + anchor - run.voxel);
                        seen[anchor] += 1;
                    }
                    assert_eq!(run.voxel % w, run.w);
                }
            }
            assert!(seen.iter().all(|&s| s == 1), "{size:?}");
            let by_rows = d * h * w.div_ceil(ROWS);
            assert!(cover.len() <= by_rows, "{size:?}: {} register tiles, {by_rows} by rows", cover.len());
        }
    }
}
