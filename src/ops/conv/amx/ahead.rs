//! Asking the cache for the next halo tile while this one's sums are computed, in as few instructions as can be.
//!
//! The vector units have [`Place::prefetch`], which takes several times as many a line: three ways in fewer made their forward
//! passes 2 to 5 % slower on the CPU that could be measured (benches/RESULTS.md). Equal shares, as here, were not tried there.

use crate::device::cpu::{LINE, prefetch_to_read_later};
use crate::ops::conv::Source;
use crate::ops::conv::plan::Block;
use crate::ops::conv::tile::Place;
use crate::tensor::Values;
use std::cell::Cell;
use std::ops::Range;

/// What will be loaded after a group, of which the cache is asked for about as much with every sum of this one: many lines at
/// once would wait for each other, and tiles for them.
pub struct Ahead<'a> {
    place: Place<'a>,
    sources: &'a [Source<'a>],
    /// One after the other by sources.
    blocks: &'a [Block],
    /// Planes of the tile that are to be loaded.
    planes: Range<usize>,
    /// Lines for which nobody asked yet.
    left: Cell<usize>,
    /// Those that come next: the first, and its neighbours with it.
    next: Cell<(*const u8, usize)>,
    after: Cell<After>,
}

/// What comes after the next lines.
#[derive(Clone, Copy)]
struct After {
    runs: Runs,
    /// Planes before the runs', of one source after the other, and theirs.
    planes: usize,
}

/// Runs of neighbouring lines.
#[derive(Clone, Copy, Default)]
struct Runs {
    /// Address of the first.
    first: usize,
    /// Lines of each.
    lines: usize,
    count: usize,
    /// Bytes from one to the next.
    apart: usize,
}

impl<'a> Ahead<'a> {
    /// Nothing was asked for yet.
    pub fn new(place: Place<'a>, sources: &'a [Source<'a>], blocks: &'a [Block]) -> Self {
        let Range { start, end } = place.rows_to_load();
        let rows = place.map.extent(place.origin.size.h);
        let after = After { runs: Runs::default(), planes: 0 };
        let ahead = Ahead {
            place,
            sources,
            blocks,
            planes: start / rows..end / rows,
            left: Cell::new(0),
            next: Cell::new((std::ptr::null(), 0)),
            after: Cell::new(after),
        };
        ahead.left.set((0..ahead.number()).map(|plane| ahead.of_plane(plane).all()).sum());
        ahead
    }

    /// Lines for each of so many sums, if nobody asks after them.
    pub fn share(&self, sums: usize) -> usize {
        self.left.get().div_ceil(sums)
    }

    /// Asks the cache for the next `count` lines.
    #[inline(always)]
    pub fn ask(&self, count: usize) {
        let mut count = count.min(self.left.get());
        self.left.set(self.left.get() - count);
        loop {
            let (first, lines) = self.next.get();
            let now = count.min(lines);
            for i in 0..now {
                prefetch_to_read_later(first.wrapping_add(i * LINE));
            }
            self.next.set((first.wrapping_add(now * LINE), lines - now));
            count -= now;
            if count == 0 {
                return;
            }
            self.go_on();
        }
    }

    /// The next lines are those of the next run.
    #[inline(never)]
    fn go_on(&self) {
        let After { mut runs, mut planes } = self.after.get();
        if runs.count == 0 {
            runs = self.of_plane(planes);
            planes += 1;
        }
        if runs.count > 0 {
            self.next.set((std::ptr::without_provenance(runs.first), runs.lines));
            runs = Runs { first: runs.first.wrapping_add(runs.apart), count: runs.count - 1, ..runs };
        }
        self.after.set(After { runs, planes });
    }

    /// Number of planes of all sources.
    fn number(&self) -> usize {
        let sources = self.blocks.last().map_or(0, |last| last.tensor + 1 - self.blocks[0].tensor);
        sources * self.planes.len()
    }

    /// What lies in the volume of a plane, see [`After`].
    fn of_plane(&self, plane: usize) -> Runs {
        let tensor = self.blocks[0].tensor + plane / self.planes.len();
        let mut blocks = self.blocks.iter().filter(|block| block.tensor == tensor);
        let Some(&Block { first, len, .. }) = blocks.next() else { return Runs::default() };
        let len = blocks.next_back().map_or(len, |last| last.first + last.len - first);
        let source = &self.sources[tensor];
        let values =
            self.values(self.planes.start + plane % self.planes.len(), (first, len), source.channels);
        match source.data {
            Values::Single(x) => Runs::of(&x[values], len, source.channels),
            Values::Bf16(x) => Runs::of(&x[values], len, source.channels),
        }
    }

    /// Values of a plane of the tile, which has whole rows, in a source of `c` channels: from channel `first` of the first voxel to
    /// the last of `len` channels of the last one.
    fn values(&self, plane: usize, (first, len): (usize, usize), c: usize) -> Range<usize> {
        let Place { map, space: [_, sh, sw], origin: at, .. } = self.place;
        let (rows, h) = (map.extent(at.size.h), at.h * map.stride());
        let above = map.pad().saturating_sub(h);
        let inside = rows.min((sh + map.pad()).saturating_sub(h)).saturating_sub(above);
        match self.place.source_row(plane * rows + above, c) {
            Some(start) if inside > 0 => start + first..start + (inside * sw - 1) * c + first + len,
            _ => 0..0,
        }
    }
}

impl Runs {
    /// Those of the first `len` of every `pitch` values. What lies between them belongs to them if it is less than a line.
    fn of<T>(values: &[T], len: usize, pitch: usize) -> Self {
        let [all, len, apart] = [values.len(), len, pitch].map(|values| values * size_of::<T>());
        if all == 0 {
            return Runs::default();
        }
        let (count, len) = if len + LINE > apart { (1, all) } else { (all.div_ceil(apart), len) };
        let address = values.as_ptr().addr();
        let before = address % LINE;
        // Runs that begin elsewhere in a line may end in one more.
        let more = if count > 1 && !apart.is_multiple_of(LINE) { LINE - 1 } else { 0 };
        Runs { first: address - before, lines: (before + len + more).div_ceil(LINE), count, apart }
    }

    /// Lines of all of them.
    fn all(&self) -> usize {
        self.lines * self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::conv::plan::{Map, Origin, Tile};
    use std::collections::BTreeSet;

    /// The lines of bytes that lie at `values`.
    fn lines_of<T>(values: &[T]) -> impl Iterator<Item = usize> {
        let Range { start, end } = values.as_ptr_range();
        (start.addr()..end.addr()).map(|byte| byte / LINE)
    }

    #[test]
    fn what_will_be_loaded_is_asked_for_in_time() {
        let (channels, space) = ([4, 96], [6, 5, 7]);
        let voxels: usize = 2 * space.iter().product::<usize>();
        let (single, half) = (vec![0.0; voxels * channels[0]], vec![0; voxels * channels[1]]);
        let data = [Values::Single(&single), Values::Bf16(&half)];
        let sources: Vec<Source> = data
            .into_iter()
            .zip(channels)
            .map(|(data, channels)| Source { data, channels, pending: None })
            .collect();
        let size = Tile { d: 2, h: 3 };
        let at = |n, d, h| Origin { n, d, h, size };
        let block = |tensor, first, len| Block { tensor, first, len };
        let all = [block(0, 0, 4), block(1, 0, 32), block(1, 32, 32), block(1, 64, 32)];
        // The first tile, one after it of which two planes are there, and two that read beyond the volume; all channels, and
        // groups that hold some.
        for (map, origin, before) in [
            (Map::Gather { kernel: 3, stride: 1 }, at(0, 0, 0), None),
            (Map::Gather { kernel: 3, stride: 1 }, at(1, 2, 0), Some(at(1, 0, 0))),
            (Map::Gather { kernel: 3, stride: 2 }, at(1, 1, 0), None),
            (Map::Scatter, at(0, 4, 3), None),
        ] {
            for blocks in [&all[..], &all[..2], &all[2..], &all[3..]] {
                let place = || Place { map, space, row: 9, origin: &origin, before: before.as_ref() };
                let mut want = BTreeSet::new();
                for &block in blocks {
                    let (source, c) = (&sources[block.tensor], channels[block.tensor]);
                    for values in place().rows_to_load().filter_map(|row| place().values(source, block, row))
                    {
                        match values {
                            Values::Single(x) => {
                                x.chunks(c).for_each(|x| want.extend(lines_of(&x[..block.len])))
                            }
                            Values::Bf16(x) => {
                                x.chunks(c).for_each(|x| want.extend(lines_of(&x[..block.len])))
                            }
                        }
                    }
                }
                for sums in [1, 3, 40, 1000] {
                    let ahead = Ahead::new(place(), &sources, blocks);
                    let all = ahead.left.get();
                    let mut got = BTreeSet::new();
                    for plane in 0..ahead.number() {
                        let Runs { first, lines, count, apart } = ahead.of_plane(plane);
                        for run in 0..count {
                            got.extend((0..lines).map(|line| (first + run * apart) / LINE + line));
                        }
                    }
                    assert!(got.is_superset(&want), "{map:?} {origin:?} {blocks:?}");
                    let more = got.len() - want.len();
                    assert!(
                        more <= want.len() / 2,
                        "{map:?} {origin:?} {blocks:?}: {more} of {} more",
                        want.len()
                    );
                    for sum in 0..sums {
                        let share = ahead.share(sums - sum);
                        assert!(share <= all.div_ceil(sums), "{share} of {all} in {sums}");
                        ahead.ask(share);
                        let (After { runs, planes }, (_, next)) = (ahead.after.get(), ahead.next.get());
                        let begun: usize =
                            (0..planes).map(|plane| ahead.of_plane(plane)).map(|runs| runs.all()).sum();
                        assert_eq!(all - ahead.left.get(), begun - runs.all() - next, "{sum} of {sums}");
                    }
                    assert_eq!(ahead.left.get(), 0, "{sums} sums");
                }
            }
        }
    }
}
