//! Asking the cache for the next halo tile while this one's sums are computed, in as few instructions as can be.
//!
//! The vector units have [`Place::prefetch`], which takes several times as many a line: at its pace their forward passes are
//! 2 to 5 % faster on the CPU that could be measured (benches/RESULTS.md). So there are two.

use crate::device::cpu::prefetch_to_read_later;
use crate::ops::conv::Source;
use crate::ops::conv::plan::Block;
use crate::ops::conv::tile::Place;
use crate::tensor::Values;
use std::cell::Cell;
use std::ops::Range;

/// Parts in which a class of sums asks for its share: more than it has sums.
pub const PARTS: usize = 1 << 20;

/// What will be loaded after a group. The cache is asked for a row of it at a time: many rows at once would wait for each
/// other, and tiles for them.
pub struct Ahead<'a> {
    place: Place<'a>,
    /// Blocks of source channels.
    blocks: &'a [Block],
    /// Input rows of each.
    rows: Range<usize>,
    asked: Cell<Asked>,
}

/// What was asked for.
#[derive(Clone, Copy, Default)]
struct Asked {
    /// Whole blocks.
    blocks: usize,
    /// Rows of the block after them.
    rows: usize,
    /// The next part to which more belongs.
    due: usize,
}

impl<'a> Ahead<'a> {
    /// Nothing was asked for yet.
    pub fn new(place: Place<'a>, blocks: &'a [Block]) -> Self {
        let rows = place.rows_to_load();
        Ahead { place, blocks, rows, asked: Cell::default() }
    }

    /// Asks the cache for what belongs to the first parts up to `part`, of `parts`, and was not asked for; `part` grows from call to
    /// call.
    #[inline(always)]
    pub fn ask(&self, sources: &[Source], (part, parts): (usize, usize)) {
        if part >= self.asked.get().due {
            self.ask_rows(sources, (part, parts));
        }
    }

    fn ask_rows(&self, sources: &[Source], (part, parts): (usize, usize)) {
        let mut asked = self.asked.get();
        let rows = self.rows.len();
        while part >= asked.due {
            let Some(&block) = self.blocks.get(asked.blocks) else {
                asked.due = parts;
                break;
            };
            let source = &sources[block.tensor];
            match self.place.values(source, block, self.rows.start + asked.rows) {
                Some(Values::Single(x)) => ask_lines(x, block.len, source.channels),
                Some(Values::Bf16(x)) => ask_lines(x, block.len, source.channels),
                None => {}
            }
            asked.rows += 1;
            if asked.rows == rows {
                (asked.blocks, asked.rows) = (asked.blocks + 1, 0);
            }
            let done = asked.blocks * rows + asked.rows;
            asked.due = done * parts / (self.blocks.len() * rows);
        }
        self.asked.set(asked);
    }
}

/// Asks the second-level cache for `row`, of which blocks of `len` values every `pitch` values will be read.
fn ask_lines<T>(row: &[T], len: usize, pitch: usize) {
    let line = 64 / size_of::<T>();
    // Blocks between which no line is left out are one. Loops without iterators, which divide to know how often they step.
    let (len, pitch) = if len + line > pitch { (row.len(), row.len()) } else { (len, pitch) };
    let mut block = 0;
    while block < row.len() {
        let mut at = block;
        while at < block + len {
            prefetch_to_read_later(row.as_ptr().wrapping_add(at));
            at += line;
        }
        block += pitch;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::conv::plan::{Map, Origin, Tile};

    #[test]
    fn every_row_is_asked_for_once_and_in_time() {
        let (channels, space) = (4, [6, 5, 7]);
        let x = vec![0.0; space.iter().product::<usize>() * channels];
        let source = Source { data: Values::Single(&x), channels, pending: None };
        let blocks = [0, 2].map(|first| Block { tensor: 0, first, len: 2 });
        let origin = Origin { n: 0, d: 2, h: 0, size: Tile { d: 2, h: 3 } };
        let map = Map::Gather { kernel: 3, stride: 1 };
        for parts in [1, 3, 40, 41, 1000] {
            let ahead = Ahead::new(Place { map, space, row: 9, origin: &origin, before: None }, &blocks);
            let all = 2 * 4 * 5;
            for part in 0..parts {
                ahead.ask(std::slice::from_ref(&source), (part, parts));
                let Asked { blocks, rows, .. } = ahead.asked.get();
                let asked = blocks * 20 + rows;
                assert_eq!(asked, ((part + 1) * all).div_ceil(parts), "part {part} of {parts}");
            }
        }
    }
}
