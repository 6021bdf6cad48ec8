//! Weights in the order in which the micro-kernels read them.

use super::Weights;
use super::plan::{Block, Class, LANES, MAX_TAPS, Map};
use super::tile::Element;
use super::transpose::transpose;
use crate::device::arena::Buffer;
use crate::device::bf16::pair;
use crate::device::cpu::vectorised;
use crate::device::list::List;
use crate::device::scratch::Scratch;
use rayon::prelude::*;

/// Packed weights, `[group][class][lane block]` and what a lane block's layout is.
pub struct Packed {
    data: Buffer,
    /// Start of (group, class), classes fastest.
    starts: List<usize>,
    classes: usize,
}

impl Packed {
    /// Has every (source block, lane block) of every class written by `write(out, [source, lane], class, scratch)`, in
    /// parallel; `floats(class, sources)` is the size of one lane block's weights of these source blocks.
    pub fn fill(
        groups: &[&[Block]],
        lanes: &[Block],
        classes: &[Class],
        floats: impl Fn(&Class, &[Block]) -> usize,
        write: impl Fn(&mut [f32], [&Block; 2], &Class, &mut Vec<f32>) + Sync,
    ) -> Self {
        let mut end = 0;
        let mut starts = List::of_one(end);
        for group in groups {
            for class in classes {
                end += lanes.len() * floats(class, group);
                starts.push(end);
            }
        }
        let mut data = Buffer::dirty(end);
        let mut rest = &mut data[..];
        let mut jobs = List::default();
        for group in groups {
            for class in classes {
                for lane in lanes {
                    for source in *group {
                        let (head, tail) = rest.split_at_mut(floats(class, &[*source]));
                        jobs.push((head, source, class, lane));
                        rest = tail;
                    }
                }
            }
        }
        jobs.par_iter_mut().for_each_init(Scratch::take, |scratch, (out, source, class, lane)| {
            write(out, [*source, *lane], class, scratch);
        });
        drop(jobs);
        Packed { data, starts, classes: classes.len() }
    }

    /// What was packed otherwise, as one group of source blocks and one class.
    pub fn from_buffer(data: Buffer) -> Self {
        Packed { starts: [0, data.len()].into_iter().collect(), data, classes: 1 }
    }

    /// Weights of one group of source blocks and one class: lane blocks follow each other.
    pub fn of(&self, group: usize, class: usize) -> &[f32] {
        let i = group * self.classes + class;
        &self.data[self.starts[i]..self.starts[i + 1]]
    }
}

/// Floats of one lane block of one class.
pub fn lane_block_floats(class: &Class, group: &[Block], element: Element) -> usize {
    let taps = class.rows.len() * element.of_taps(class.taps_w.len());
    taps * group.iter().map(|b| element.of(b.len)).sum::<usize>() * LANES
}

/// Packs to lane blocks of `[block of the group][row][tap along w][channel or pair of them][16 lanes]`, or pairs of taps;
/// `weights(source, head)` says where the weights of a pair lie. Lanes beyond a block's channels are 0.
pub fn pack<'a>(
    map: Map,
    classes: &[Class],
    groups: &[&[Block]],
    lanes: &[Block],
    element: Element,
    weights: &(dyn Fn(usize, usize) -> Weights<'a> + Sync),
) -> Packed {
    let floats = |class: &Class, group: &[Block]| lane_block_floats(class, group, element);
    Packed::fill(groups, lanes, classes, floats, |out, [source, lane], class, floats| {
        let w = weights(source.tensor, lane.tensor);
        if element == Element::Single {
            return gather(map, class, w, [source, lane], out);
        }
        floats.resize(lane_block_floats(class, &[*source], Element::Single), 0.0);
        gather(map, class, w, [source, lane], floats);
        let paired = if element == Element::Taps { class.taps_w.len() } else { source.len };
        pair_rows(floats, paired * LANES, out);
    })
}

/// `out` = the weights `w` between a source block and a lane block, `[row][tap along w][channel][16 lanes]`.
pub fn gather(map: Map, class: &Class, w: Weights, [source, lane]: [&Block; 2], out: &mut [f32]) {
    let kernel = map.kernel();
    let start = w.offset + source.first * w.source_stride + lane.first * w.head_stride;
    // (tap in the tensor, where its lanes of channel 0 go)
    let mut taps = [(0, 0); MAX_TAPS];
    let of_class =
        class.rows.iter().flat_map(|&(_, _, kd, kh)| class.taps_w.iter().map(move |&kw| (kd, kh, kw)));
    for ((i, to), (kd, kh, kw)) in taps.iter_mut().enumerate().zip(of_class) {
        let tap = (kd * kernel + kh) * kernel + kw;
        *to = (if w.mirrored { kernel.pow(3) - 1 - tap } else { tap }, i * source.len * LANES);
    }
    let taps = &taps[..class.rows.len() * class.taps_w.len()];
    // A pair's taps are neighbours in the tensor: where most of them are wanted, those of 16 lanes are transposed as two
    // squares, of the first 16 taps and of the last.
    if let Some(second) = taps.len().checked_sub(LANES).filter(|&second| second > 0) {
        let (mut by_lane, mut by_tap) = ([[0.0; LANES * LANES]; 2], [[0.0; LANES * LANES]; 2]);
        for channel in 0..source.len {
            let from = &w.data[start + channel * w.source_stride..];
            for (square, first) in by_lane.iter_mut().zip([0, second]) {
                for (l, to) in square.as_chunks_mut::<LANES>().0.iter_mut().take(lane.len).enumerate() {
                    to.copy_from_slice(&from[l * w.head_stride + first..][..LANES]);
                }
            }
            for (by_lane, by_tap) in by_lane.iter().zip(&mut by_tap) {
                transpose(by_lane, LANES, by_tap, LANES);
            }
            for &(tap, at) in taps {
                let (square, tap) = if tap < LANES { (0, tap) } else { (1, tap - second) };
                let lanes = &by_tap[square][tap * LANES..][..LANES];
                out[at + channel * LANES..][..LANES].copy_from_slice(lanes);
            }
        }
        return;
    }
    if lane.len < LANES {
        out.fill(0.0);
    }
    for channel in 0..source.len {
        for l in 0..lane.len {
            let from = &w.data[start + channel * w.source_stride + l * w.head_stride..];
            let to = &mut out[channel * LANES + l..];
            taps.iter().for_each(|&(tap, at)| to[at] = from[tap]);
        }
    }
}

vectorised! {
    /// Pairs of the vectors that follow each other in every `run_floats` of `x`, the last one of an odd number with 0: of the
    /// channels of a tap, or of taps.
    pub fn pair_rows(x: &[f32], run_floats: usize, out: &mut [f32]) {
        let pairs = x.chunks_exact(run_floats).flat_map(|run| run.chunks(2 * LANES));
        for (out, x) in out.chunks_exact_mut(LANES).zip(pairs) {
            let (even, odd) = x.split_at(LANES);
            match odd.len() {
                LANES => (0..LANES).for_each(|l| out[l] = pair(even[l], odd[l])),
                _ => (0..LANES).for_each(|l| out[l] = pair(even[l], 0.0)),
            }
        }
    }
}
