//! Loading an input tile with its halo, norm and PReLU applied on the way.

use super::Source;
use super::plan::{Block, Map, Tile};
use multiversion::multiversion;

/// Order of a tile's floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// row, channel, w: neighbours along w are neighbours in memory. For [`super::correlate()`].
    ChannelRows,
    /// row, w, channel. For [`super::wgrad()`].
    Voxels,
}

/// Where a tile lies in its source.
pub struct Place<'a> {
    /// Which input voxels an anchor reads.
    pub map: Map,
    /// (D, H, W) of the source.
    pub space: [usize; 3],
    /// Anchors along W.
    pub anchors_w: usize,
    /// Sample, first anchor along D and H, size.
    pub origin: &'a (usize, usize, usize, Tile),
}

/// Copies one channel block of a tile into `tile`, mapped by the source's pending norm and PReLU.
///
/// Voxels outside the volume become 0 *after* the map: PReLU(norm(0)) is not 0. A row has `pitch` floats a channel
/// (channel rows) or `extent(W) * len` floats (voxels); `row` is scratch.
pub fn load(
    source: &Source,
    block: Block,
    place: &Place,
    order: Order,
    pitch: usize,
    tile: &mut [f32],
    row: &mut Vec<f32>,
) {
    let Place { map, space: [sd, sh, sw], anchors_w, origin: &(n, d0, h0, size) } = *place;
    let (stride, pad) = (map.stride(), map.pad());
    let (ed, eh, ew) = (map.extent(size.d), map.extent(size.h), map.extent(anchors_w));
    let (c, len) = (source.channels, block.len);
    let inside_w = sw.min(ew - pad);
    let row_floats = match order {
        Order::ChannelRows => len * pitch,
        Order::Voxels => ew * len,
    };
    let pending = source.pending.map(|p| {
        let (scale, shift) = p.of_sample(n, c);
        (&scale[block.first..block.first + len], &shift[block.first..block.first + len], p.slope)
    });
    row.resize(inside_w * len, 0.0);
    for (index, out) in tile.chunks_exact_mut(row_floats).take(ed * eh).enumerate() {
        // Wrapping below 0 makes a coordinate huge, which the comparison rejects.
        let d = (d0 * stride + index / eh).wrapping_sub(pad);
        let h = (h0 * stride + index % eh).wrapping_sub(pad);
        if d >= sd || h >= sh {
            out.fill(0.0);
            continue;
        }
        let start = (((n * sd + d) * sh + h) * sw) * c + block.first;
        match order {
            Order::ChannelRows => {
                transform_row(row, &source.data[start..], len, c, pending);
                for (channel, out) in out.chunks_exact_mut(pitch).enumerate() {
                    out[..pad].fill(0.0);
                    out[pad + inside_w..].fill(0.0);
                    let values = row[channel..].iter().step_by(len);
                    out[pad..pad + inside_w].iter_mut().zip(values).for_each(|(o, &v)| *o = v);
                }
            }
            Order::Voxels => {
                out[..pad * len].fill(0.0);
                out[(pad + inside_w) * len..].fill(0.0);
                transform_row(
                    &mut out[pad * len..(pad + inside_w) * len],
                    &source.data[start..],
                    len,
                    c,
                    pending,
                );
            }
        }
    }
}

/// `out` = voxels of `len` channels, taken from `x` every `pitch` floats, mapped by (scale, shift, slope) if given.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
pub fn transform_row(
    out: &mut [f32],
    x: &[f32],
    len: usize,
    pitch: usize,
    map: Option<(&[f32], &[f32], f32)>,
) {
    let voxels = out.chunks_exact_mut(len).zip(x.chunks(pitch));
    match map {
        None => voxels.for_each(|(out, x)| out.copy_from_slice(&x[..len])),
        Some((scale, shift, slope)) => {
            let (scale, shift) = (&scale[..len], &shift[..len]);
            for (out, x) in voxels {
                let x = &x[..len];
                for i in 0..len {
                    let z = x[i] * scale[i] + shift[i];
                    out[i] = if z > 0.0 { z } else { slope * z };
                }
            }
        }
    }
}
