//! Loading an input tile with its halo, norm and PReLU applied on the way.

use super::narrow::transform_pairs;
use super::plan::{Block, Map, Origin};
use super::row::{copy_voxels, mapped_row, transform_row};
use super::transpose::transpose;
use super::{Source, halves};
use crate::device::bf16::{Operands, narrow, pair, widen};
use crate::device::cpu::{LINE, prefetch_to_read_later, vectorised};
use crate::tensor::Values;
use std::ops::Range;

/// Order of a tile's elements, 32 bits each: floats, or pairs of bfloat16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// row, w, channel: a voxel's elements are neighbours, voxels are `pitch` elements apart.
    Voxels {
        /// Elements a voxel.
        pitch: usize,
    },
    /// row, channel, w: neighbours along w are neighbours in memory. For outputs too thin to fill lanes with channels.
    ChannelRows,
}

impl Order {
    /// Elements of a row of `extent` voxels of `len` elements.
    pub fn row_floats(self, extent: usize, len: usize) -> usize {
        extent
            * match self {
                Order::Voxels { pitch } => pitch,
                Order::ChannelRows => len,
            }
    }
}

/// What an element of a tile is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// An f32.
    Single,
    /// Two neighbouring channels of a voxel, the second 0 if there is none.
    Channels,
    /// One channel of two voxels that neighbouring anchors read, the second 0 where the row has ended.
    Voxels,
    /// The only channel of two neighbouring voxels, as they lie in a row, which an anchor of stride 2 multiplies by two of its three
    /// taps; the third one's element has the next anchor's second voxel, which is multiplied by 0. If that is infinite or no
    /// number, so is this anchor's sum.
    Taps,
}

impl Element {
    /// What the gather core's voxels are made of.
    pub fn of_voxels(operands: Operands) -> Self {
        match operands {
            Operands::Single => Element::Single,
            Operands::Bf16 => Element::Channels,
        }
    }

    /// Elements of `channels` channels.
    pub fn of(self, channels: usize) -> usize {
        match self {
            Element::Channels => channels.div_ceil(2),
            Element::Single | Element::Voxels | Element::Taps => channels,
        }
    }

    /// Elements of `taps` neighbouring taps along w of a channel.
    pub fn of_taps(self, taps: usize) -> usize {
        if self == Element::Taps { taps.div_ceil(2) } else { taps }
    }
}

/// Where a tile lies in its source.
pub struct Place<'a> {
    /// Which input voxels an anchor reads.
    pub map: Map,
    /// (D, H, W) of the source.
    pub space: [usize; 3],
    /// Voxels of a row of the tile: those that its anchors read, or more.
    pub row: usize,
    /// Sample, first anchors and size.
    pub origin: &'a Origin,
    /// The tile that the buffer holds: planes that both read are moved instead of loaded.
    pub before: Option<&'a Origin>,
}

impl Place<'_> {
    /// The tile's anchors themselves, in a tensor of this (D, H, W) that lies on them.
    pub fn of_anchors(&self, space: [usize; 3]) -> Self {
        Place { map: Map::Gather { kernel: 1, stride: 1 }, space, row: space[2], before: None, ..*self }
    }

    /// Where the source of `c` channels has the tile's input row of this number, if the row lies in the volume.
    pub fn source_row(&self, index: usize, c: usize) -> Option<usize> {
        let (map, [sd, sh, sw], at) = (self.map, self.space, self.origin);
        let eh = map.extent(at.size.h);
        // Wrapping below 0 makes a coordinate huge, which the comparison rejects.
        let d = (at.d * map.stride() + index / eh).wrapping_sub(map.pad());
        let h = (at.h * map.stride() + index % eh).wrapping_sub(map.pad());
        (d < sd && h < sh).then(|| ((at.n * sd + d) * sh + h) * sw * c)
    }

    /// The input rows that [`load`] is going to read.
    pub fn rows_to_load(&self) -> Range<usize> {
        let (map, Origin { size, .. }) = (self.map, self.origin);
        let shared = self.before.map_or(0, |before| self.origin.shared_planes(map, before));
        let eh = map.extent(size.h);
        shared * eh..map.extent(size.d) * eh
    }

    /// What the source has of an input row from the block's first value to its last, if the row lies in the volume.
    pub fn values<'s>(&self, source: &Source<'s>, block: Block, index: usize) -> Option<Values<'s>> {
        let c = source.channels;
        let start = self.source_row(index, c)? + block.first;
        Some(source.data.part(start, (self.space[2] - 1) * c + block.len))
    }

    /// Asks the cache for the `part`-th of `parts` equal parts of what [`load`] is going to read of these channels.
    pub fn prefetch(&self, source: &Source, block: Block, (part, parts): (usize, usize)) {
        let Range { start, end } = self.rows_to_load();
        let rows = end - start;
        for index in part * rows / parts..(part + 1) * rows / parts {
            match self.values(source, block, start + index) {
                Some(Values::Single(x)) => prefetch_row(x, block.len, source.channels),
                Some(Values::Bf16(x)) => prefetch_row(x, block.len, source.channels),
                None => {}
            }
        }
    }
}

/// Asks the second-level cache for `row`, of which blocks of `len` values every `pitch` values will be read.
fn prefetch_row<T>(row: &[T], len: usize, pitch: usize) {
    let values = LINE / size_of::<T>();
    for block in row.chunks(pitch.max(values)) {
        let lines = block[..len.max(values).min(block.len())].chunks(values);
        lines.for_each(|line| prefetch_to_read_later(line.as_ptr()));
    }
}

/// Copies one channel block of a tile into `tile`, mapped by the source's pending norm and PReLU.
///
/// Voxels outside the volume become 0 *after* the map: PReLU(norm(0)) is not 0. Floats between a voxel's channels and
/// its pitch are left as they are: nobody reads them. `row` is scratch.
pub fn load(
    source: &Source,
    block: Block,
    place: &Place,
    (order, element): (Order, Element),
    tile: &mut [f32],
    row: &mut Vec<f32>,
) {
    let Place { map, row: ew, origin, before, .. } = *place;
    let (ed, eh) = (map.extent(origin.size.d), map.extent(origin.size.h));
    let plane = eh * order.row_floats(ew, element.of(block.len));
    let shared = before.map_or(0, |before| origin.shared_planes(map, before));
    if let Some(before) = before.filter(|_| shared > 0) {
        let first = before.size.d * map.stride();
        tile.copy_within(first * plane..(first + shared) * plane, 0);
    }
    load_rows(source, block, place, (order, element), shared * eh..ed * eh, &mut tile[shared * plane..], row);
}

/// The same for some of the tile's input rows: `out` takes the first of them first.
pub fn load_rows(
    source: &Source,
    block: Block,
    place: &Place,
    (order, element): (Order, Element),
    rows: Range<usize>,
    out: &mut [f32],
    row: &mut Vec<f32>,
) {
    let Place { map, space: [_, _, sw], row: ew, origin, .. } = *place;
    let (stride, pad) = (map.stride(), map.pad());
    let (c, len) = (source.channels, block.len);
    let inside_w = sw.min(ew - pad);
    let elements = element.of(len);
    let row_floats = order.row_floats(ew, elements);
    let (inside, span) = (pad..pad + inside_w, (inside_w - 1) * c + len);
    if let (Values::Bf16(x), Order::Voxels { pitch }) = (source.data, order)
        && (element != Element::Channels || len.is_multiple_of(2))
    {
        // Copies: a loop of their own is short.
        row.resize(ew * len, 0.0);
        let row = &mut bytemuck::cast_slice_mut(row)[..ew * len];
        for (index, out) in rows.zip(out.chunks_exact_mut(row_floats)) {
            match place.source_row(index, c) {
                Some(start) => {
                    let x = (&x[start + block.first..][..span], c);
                    place_halves(x, len, (element, stride), inside.clone(), (out, pitch), row);
                }
                None => out.fill(0.0),
            }
        }
        return;
    }
    let pending = source.affine(origin.n, block);
    // A mapped row, its channel rows, and what was widened.
    let is_bf16 = matches!(source.data, Values::Bf16(_));
    row.resize(2 * ew * len + if is_bf16 { span } else { 0 }, 0.0);
    let (row, rest) = row.split_at_mut(ew * len);
    let (channel_rows, widened) = rest.split_at_mut(ew * len);
    for (index, out) in rows.zip(out.chunks_exact_mut(row_floats)) {
        let Some(start) = place.source_row(index, c) else {
            out.fill(0.0);
            continue;
        };
        let x = match (source.data.part(start + block.first, span), order) {
            (Values::Single(x), _) => x,
            (Values::Bf16(x), Order::ChannelRows)
                if element == Element::Channels && len.is_multiple_of(2) =>
            {
                // Pairs of channels are elements as they lie there: rows of an even number of values begin at one.
                let pairs = if c == len {
                    bytemuck::cast_slice(x)
                } else {
                    copy_voxels(bytemuck::cast_slice_mut(row), len, x, c, len);
                    &row[..inside_w * elements]
                };
                for out in out.chunks_exact_mut(ew) {
                    out[..pad].fill(0.0);
                    out[inside.end..].fill(0.0);
                }
                transpose(pairs, elements, &mut out[pad..], ew);
                continue;
            }
            (Values::Bf16(x), _) => {
                widen(x, widened);
                &*widened
            }
        };
        match (order, element) {
            (Order::Voxels { pitch }, Element::Single) => {
                out[..pad * pitch].fill(0.0);
                out[inside.end * pitch..].fill(0.0);
                let out = &mut out[pad * pitch..inside.end * pitch];
                transform_row(out, pitch, x, c, len, pending);
            }
            (Order::Voxels { pitch }, Element::Channels) => {
                out[..pad * pitch].fill(0.0);
                out[inside.end * pitch..].fill(0.0);
                let out = &mut out[pad * pitch..inside.end * pitch];
                transform_pairs((out, pitch), (x, c), len, pending, row);
            }
            (Order::Voxels { .. }, Element::Taps) => {
                row[..pad].fill(0.0);
                row[inside.end..].fill(0.0);
                transform_row(&mut row[pad..inside.end], 1, x, c, 1, pending);
                let out: &mut [u16] = bytemuck::cast_slice_mut(out);
                narrow(row, &mut out[..ew]);
                // The last element's second voxel.
                out[ew] = 0;
            }
            (Order::Voxels { .. }, Element::Voxels) => {
                row[..pad * len].fill(0.0);
                row[inside.end * len..].fill(0.0);
                transform_row(&mut row[pad * len..inside.end * len], len, x, c, len, pending);
                pair_voxels(row, &row[(stride * len).min(row.len())..], out);
            }
            (Order::ChannelRows, _) => {
                let row = mapped_row(&mut row[..inside_w * len], x, c, len, pending);
                for out in out.chunks_exact_mut(ew) {
                    out[..pad].fill(0.0);
                    out[inside.end..].fill(0.0);
                }
                if element == Element::Channels {
                    // Channel rows first, then pairs of them.
                    transpose(row, len, channel_rows, ew);
                    let rows = channel_rows.chunks(2 * ew).take(elements);
                    for ((i, out), rows) in out.chunks_exact_mut(ew).enumerate().zip(rows) {
                        let (even, odd) = rows.split_at(ew);
                        let odd = if 2 * i + 1 < len { &odd[..inside_w] } else { &[] };
                        pair_voxels(&even[..inside_w], odd, &mut out[pad..]);
                    }
                } else {
                    transpose(row, len, &mut out[pad..], ew);
                }
            }
        }
    }
}

/// A row of a tile whose voxels `inside` are those of `x`, `x_pitch` values apart; the others are 0. `row` has room for all of
/// them.
fn place_halves(
    (x, x_pitch): (&[u16], usize),
    len: usize,
    (element, stride): (Element, usize),
    inside: Range<usize>,
    (out, pitch): (&mut [f32], usize),
    row: &mut [u16],
) {
    if element == Element::Voxels {
        row[..inside.start * len].fill(0);
        row[inside.end * len..].fill(0);
        copy_voxels(&mut row[inside.start * len..inside.end * len], len, x, x_pitch, len);
        return halves::pair_rows(row, &row[(stride * len).min(row.len())..], out);
    }
    if element == Element::Taps {
        let out: &mut [u16] = bytemuck::cast_slice_mut(out);
        out[..inside.start].fill(0);
        out[inside.end..row.len() + 1].fill(0);
        return copy_voxels(&mut out[inside], 1, x, x_pitch, 1);
    }
    out[..inside.start * pitch].fill(0.0);
    out[inside.end * pitch..].fill(0.0);
    let out = &mut out[inside.start * pitch..inside.end * pitch];
    match element {
        Element::Channels => copy_voxels(bytemuck::cast_slice_mut(out), 2 * pitch, x, x_pitch, len),
        _ => halves::widen_voxels(out, pitch, x, x_pitch, len),
    }
}

vectorised! {
    /// `out[v * pitch + i]` = channels 2 i and 2 i + 1 of voxel v of `x`.
    pub fn pair_channels(x: &[f32], len: usize, out: &mut [f32], pitch: usize) {
        if len == 1 && pitch == 1 {
            out.iter_mut().zip(x).for_each(|(o, &x)| *o = pair(x, 0.0));
            return;
        }
        if len == 2 * pitch {
            out.iter_mut().zip(x.chunks_exact(2)).for_each(|(o, x)| *o = pair(x[0], x[1]));
            return;
        }
        for (out, x) in out.chunks_mut(pitch).zip(x.chunks_exact(len)) {
            out.iter_mut().zip(x.chunks(2)).for_each(|(o, x)| *o = pair(x[0], x.get(1).map_or(0.0, |&x| x)));
        }
    }

    /// `out[i]` = `first[i]` and `second[i]`, or 0 where `second` has ended.
    fn pair_voxels(first: &[f32], second: &[f32], out: &mut [f32]) {
        for ((o, &first), &second) in out.iter_mut().zip(first).zip(second) {
            *o = pair(first, second);
        }
        let rest = second.len()..first.len();
        out[rest.clone()].iter_mut().zip(&first[rest]).for_each(|(o, &first)| *o = pair(first, 0.0));
    }

    /// `out[v * pitch + c]` = channel c of voxels 2 v and 2 v + 1 of `x`, or 0 where `x` has ended.
    pub fn pair_neighbours(x: &[f32], len: usize, out: &mut [f32], pitch: usize) {
        for (out, x) in out.chunks_mut(pitch).zip(x.chunks(2 * len)) {
            match (x.len(), len) {
                (32, 16) => (0..16).for_each(|c| out[c] = pair(x[c], x[16 + c])),
                (whole, _) if whole == 2 * len => (0..len).for_each(|c| out[c] = pair(x[c], x[len + c])),
                _ => (0..len).for_each(|c| out[c] = pair(x[c], 0.0)),
            }
        }
    }
}
