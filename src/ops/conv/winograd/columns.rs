//! Register tiles of several sums of each tile: a column of them, whose outputs along an axis are what is stored.

use super::super::micro::broadcast_sums;
use super::super::plan::LANES;
use super::filtering::{Filtering, MOST};
use crate::device::lanes::Lanes;

/// Sums of a column of a [`Filtering::FOUR`], along h or, of cubes, along d, which a register tile holds: what it stores are their
/// outputs along that axis.
pub const COLUMN: usize = 4;

/// Stores the outputs of [`COLUMN`] sums, along h or, of cubes, along d, of P tiles of Q lane blocks: number o of tile p of block q at
/// `m + o * pitch + (q * chunk + p) * 16`.
///
/// # Safety
/// As [`broadcast_sums`]; `m` must have room for them.
#[inline(always)]
pub unsafe fn column<F: Filtering, V: Lanes, const P: usize, const Q: usize>(
    x: (*const f32, usize),
    w: (*const f32, usize, usize),
    rows: &[(usize, usize)],
    (m, chunk, pitch): (*mut f32, usize, usize),
) {
    // SAFETY: by the caller's promise.
    unsafe {
        let acc = broadcast::<V, P, Q, COLUMN>(x, w, rows);
        for q in 0..Q {
            for p in 0..P {
                let mut sums = [V::zero(); MOST];
                for s in 0..COLUMN {
                    sums[s] = acc[s][p][q];
                }
                let outputs = F::outputs(sums);
                for o in 0..F::OUTPUTS {
                    outputs[o].store(m.add(o * pitch + (q * chunk + p) * LANES));
                }
            }
        }
    }
}

/// [`column`] of cubes where not all sums have registers at once: first those in the middle, of which each output has the sum or the
/// difference.
///
/// # Safety
/// As [`column`].
#[inline(always)]
pub unsafe fn column_by_halves<V: Lanes, const P: usize, const Q: usize>(
    (x, x_pitch): (*const f32, usize),
    (w, w_pitch, q_pitch): (*const f32, usize, usize),
    rows: &[(usize, usize)],
    (m, chunk, pitch): (*mut f32, usize, usize),
) {
    // SAFETY: by the caller's promise; sums 1 and 2, then 0 and 3.
    unsafe {
        let inner =
            broadcast::<V, P, Q, 2>((x.add(x_pitch), x_pitch), (w.add(w_pitch), w_pitch, q_pitch), rows);
        for q in 0..Q {
            for p in 0..P {
                let m = m.add((q * chunk + p) * LANES);
                let [s1, s2] = [inner[0][p][q], inner[1][p][q]];
                s1.add(s2).store(m);
                s1.sub(s2).store(m.add(pitch));
            }
        }
        let outer = broadcast::<V, P, Q, 2>((x, 3 * x_pitch), (w, 3 * w_pitch, q_pitch), rows);
        for q in 0..Q {
            for p in 0..P {
                let m = m.add((q * chunk + p) * LANES);
                outer[0][p][q].add(V::load(m)).store(m);
                V::load(m.add(pitch)).add(outer[1][p][q]).store(m.add(pitch));
            }
        }
    }
}

/// [`broadcast_sums`] of tiles side by side.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn broadcast<V: Lanes, const P: usize, const Q: usize, const S: usize>(
    x: (*const f32, usize),
    w: (*const f32, usize, usize),
    rows: &[(usize, usize)],
) -> [[[V; Q]; P]; S] {
    // SAFETY: handed on from the caller.
    unsafe {
        if V::OPERANDS == 8 {
            broadcast_sums::<V, P, Q, S, 8>(x, w, rows)
        } else {
            broadcast_sums::<V, P, Q, S, 16>(x, w, rows)
        }
    }
}
