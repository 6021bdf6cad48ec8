//! The register tiles. P x Q accumulators of 16 lanes stay in registers over the whole reduction.
//!
//! AVX-512: up to 24 accumulators, Q weights and a broadcast of 32 registers; a reduction step is P broadcasts and Q
//! loads for P Q multiply-adds, so two FMA units stay busy from 12 accumulators on. (Of S sums it is S times as many of each.)
//! AVX2 holds 6 of these 16-lane accumulators in 12 of its 16 registers.
//!
//! A broadcast is a multiply-add's last operand: of products of bfloat16 that one alone may be a broadcast from memory, which
//! takes no instruction of its own where it is used once.
//!
//! What is done with the accumulators afterwards must be loops of constant length and one store each: an index that
//! is not a constant would put them all into memory, in the reduction too.

use super::plan::LANES;
use crate::device::lanes::Lanes;

/// The input of an output row's anchors, in the tile.
pub struct Reduction<'a> {
    /// (offset from the anchor's first input row, channels there) of every block and input row.
    pub rows: &'a [(usize, usize)],
    /// Taps along w.
    pub taps: usize,
    /// Floats between taps along w: a voxel's pitch (order "voxels").
    pub tap_pitch: usize,
    /// Floats between channels: a row's length (order "channel rows").
    pub channel_pitch: usize,
    /// Floats between neighbouring anchors' inputs (order "voxels").
    pub step: usize,
}

/// A STEP that is read from the [`Reduction`]: six voxels' addresses need no constants.
pub const ANY: usize = usize::MAX;

/// `acc[p][q]` = sum over rows, taps, channels of `tile[p * STEP + tap * tap_pitch + channel] * weights[q]`: P voxels by Q
/// lane blocks, from a tile of order "voxels".
///
/// # Safety
/// Every row, tap and channel of P voxels must lie in one tile buffer; `weights` must hold Q lane blocks of `q_stride`
/// floats; V's vector unit must exist.
#[inline(always)]
pub unsafe fn broadcast_voxels<V: Lanes, const P: usize, const Q: usize, const STEP: usize>(
    tile: *const f32,
    weights: *const f32,
    q_stride: usize,
    r: &Reduction,
) -> [[V; Q]; P] {
    let step = if STEP == ANY { r.step } else { STEP };
    let mut acc = [[V::zero(); Q]; P];
    let mut w = weights;
    for &(row, channels) in r.rows {
        // A voxel that fills its pitch is followed by the next tap's: one long run.
        let (runs, run) = if channels == r.tap_pitch { (1, r.taps * channels) } else { (r.taps, channels) };
        // SAFETY: in the tile and the packed weights by the caller's promise.
        unsafe {
            let mut x = tile.add(row);
            for _ in 0..runs {
                for c in 0..run {
                    let mut b = [V::zero(); Q];
                    for q in 0..Q {
                        b[q] = V::load(w.add(q * q_stride));
                    }
                    let x = x.add(c);
                    for p in 0..P {
                        let a = V::splat(x.add(p * step));
                        for q in 0..Q {
                            acc[p][q] = acc[p][q].fma(b[q], a);
                        }
                    }
                    w = w.add(LANES);
                }
                x = x.add(r.tap_pitch);
            }
        }
    }
    acc
}

/// `acc[s][p][q]` = sum over rows and channels of `tile[s * x_pitch + p * STEP + channel] * weights[s * w_pitch + q * q_pitch]`: S
/// sums of one tap by P voxels by Q lane blocks.
///
/// # Safety
/// As [`broadcast_voxels`], for every sum.
#[inline(always)]
pub unsafe fn broadcast_sums<V: Lanes, const P: usize, const Q: usize, const S: usize, const STEP: usize>(
    (tile, x_pitch): (*const f32, usize),
    (weights, w_pitch, q_pitch): (*const f32, usize, usize),
    rows: &[(usize, usize)],
) -> [[[V; Q]; P]; S] {
    let mut acc = [[[V::zero(); Q]; P]; S];
    let mut w = weights;
    for &(row, channels) in rows {
        for c in 0..channels {
            // SAFETY: in the tile and the packed weights by the caller's promise.
            unsafe {
                for s in 0..S {
                    let mut b = [V::zero(); Q];
                    for q in 0..Q {
                        b[q] = V::load(w.add(s * w_pitch + q * q_pitch));
                    }
                    let x = tile.add(row + s * x_pitch + c);
                    for p in 0..P {
                        let a = V::splat(x.add(p * STEP));
                        for q in 0..Q {
                            acc[s][p][q] = acc[s][p][q].fma(b[q], a);
                        }
                    }
                }
                w = w.add(LANES);
            }
        }
    }
    acc
}

/// `acc[p][c]` = sum over rows, taps, channels of `tile[16 p + lane + tap + channel * channel_pitch] * weights[c]`: 16 P
/// voxels by C channels, from a tile of order "channel rows". Stride 1 only.
///
/// # Safety
/// As [`broadcast_voxels`], with 16 P + taps floats readable from every row's position.
#[inline(always)]
pub unsafe fn lanes_of_voxels<V: Lanes, const P: usize, const C: usize>(
    tile: *const f32,
    weights: *const f32,
    r: &Reduction,
) -> [[V; C]; P] {
    let mut acc = [[V::zero(); C]; P];
    let mut w = weights;
    for &(row, channels) in r.rows {
        // SAFETY: in the tile and the packed weights by the caller's promise.
        unsafe {
            for tap in 0..r.taps {
                let mut x = tile.add(row + tap);
                for _ in 0..channels {
                    let mut a = [V::zero(); P];
                    for p in 0..P {
                        a[p] = V::load(x.add(16 * p));
                    }
                    for c in 0..C {
                        let b = V::splat(w.add(c));
                        for p in 0..P {
                            acc[p][c] = acc[p][c].fma(a[p], b);
                        }
                    }
                    w = w.add(LANES);
                    x = x.add(r.channel_pitch);
                }
            }
        }
    }
    acc
}

/// The same for a scatter along w: `acc[p][c]` of the outputs 2a, `acc[p][C + c]` of the outputs 2a + 1 of anchors a. An
/// output 2a reads input a, by `even`; an output 2a + 1 reads inputs a and a + 1, by `odd`'s taps 0 and 1. APART: one after the
/// other, for a unit that has too few registers for both.
///
/// # Safety
/// As [`lanes_of_voxels`]; `J` is 2 C.
#[inline(always)]
pub unsafe fn lanes_of_anchors<
    V: Lanes,
    const P: usize,
    const C: usize,
    const J: usize,
    const APART: bool,
>(
    tile: *const f32,
    weights: [*const f32; 2],
    r: &Reduction,
) -> [[V; J]; P] {
    let acc = [[V::zero(); J]; P];
    // SAFETY: handed on from the caller.
    unsafe {
        if APART {
            let acc = lanes_of_outputs::<V, P, C, J, true, false>(acc, tile, weights, r);
            lanes_of_outputs::<V, P, C, J, false, true>(acc, tile, weights, r)
        } else {
            lanes_of_outputs::<V, P, C, J, true, true>(acc, tile, weights, r)
        }
    }
}

/// Adds the sums of the outputs 2a, 2a + 1 or both, see [`lanes_of_anchors`].
///
/// # Safety
/// As [`lanes_of_anchors`].
#[inline(always)]
unsafe fn lanes_of_outputs<
    V: Lanes,
    const P: usize,
    const C: usize,
    const J: usize,
    const EVEN: bool,
    const ODD: bool,
>(
    mut acc: [[V; J]; P],
    tile: *const f32,
    [mut even, mut odd]: [*const f32; 2],
    r: &Reduction,
) -> [[V; J]; P] {
    for &(row, channels) in r.rows {
        // SAFETY: in the tile and the packed weights by the caller's promise.
        unsafe {
            let mut x = tile.add(row);
            for _ in 0..channels {
                let next = odd.add(channels * LANES);
                let mut a = [[V::zero(); 2]; P];
                for p in 0..P {
                    a[p] = [V::load(x.add(16 * p)), V::load(x.add(16 * p + 1))];
                }
                for c in 0..C {
                    let w = [V::splat(even.add(c)), V::splat(odd.add(c)), V::splat(next.add(c))];
                    for p in 0..P {
                        if EVEN {
                            acc[p][c] = acc[p][c].fma(a[p][0], w[0]);
                        }
                        if ODD {
                            acc[p][C + c] = acc[p][C + c].fma(a[p][0], w[1]).fma(a[p][1], w[2]);
                        }
                    }
                }
                even = even.add(LANES);
                odd = odd.add(LANES);
                x = x.add(r.channel_pitch);
            }
            // Past the taps of input a + 1, already used.
            odd = odd.add(channels * LANES);
        }
    }
    acc
}

/// Sums of products of neighbouring voxels along w, lane by lane: `acc[i][tap][j]` = sum over rows and their vectors of
/// `x[row + i * x_pitch + tap + lane] * dy[row + j * dy_pitch + lane]`, for I channels i of x and J channels j of dy. Elements
/// have BYTES bytes: a lane is one of f32, or a pair of bfloat16.
///
/// # Safety
/// For every pair of `rows` (offset in x, offset in dy), `vectors` times 64 bytes of each dy channel and two elements more of
/// each x channel must be readable; V's vector unit must exist.
#[inline(always)]
pub unsafe fn lanes_of_products<V: Lanes, const I: usize, const J: usize, const BYTES: usize>(
    (x, x_pitch): (*const u8, usize),
    (dy, dy_pitch): (*const u8, usize),
    rows: &[(usize, usize)],
    vectors: usize,
) -> [[[V; J]; 3]; I] {
    let mut acc = [[[V::zero(); J]; 3]; I];
    for &(x_row, dy_row) in rows {
        for v in 0..vectors {
            // SAFETY: readable by the caller's promise; loads need no alignment.
            unsafe {
                let (x, dy) = (x.add(x_row * BYTES + 64 * v), dy.add(dy_row * BYTES + 64 * v));
                let mut b = [V::zero(); J];
                for j in 0..J {
                    b[j] = V::load(dy.add(j * dy_pitch * BYTES).cast());
                }
                for i in 0..I {
                    for tap in 0..3 {
                        let a = V::load(x.add((i * x_pitch + tap) * BYTES).cast());
                        for j in 0..J {
                            acc[i][tap][j] = acc[i][tap][j].fma(a, b[j]);
                        }
                    }
                }
            }
        }
    }
    acc
}

/// `acc[r P + p][q]` = sum over tile rows and their voxels of `x[groups[r] + p] * dy[q]`: R groups, at most three, of P
/// neighbouring (tap, channel) pairs by Q lane blocks; `RP` is R P.
///
/// `rows` are pairs of offsets: of the voxel 0 in `x`, and of voxel 0 in `dy`.
///
/// # Safety
/// For every pair and every v < `voxels`: `x + offset + v * x_pitch` has P readable floats in each group, `dy + offset +
/// v * dy_pitch` 16 Q; V's vector unit must exist.
#[inline(always)]
pub unsafe fn outer_product<V: Lanes, const P: usize, const RP: usize, const Q: usize>(
    (x, x_pitch, groups): (*const f32, usize, [usize; 3]),
    (dy, dy_pitch): (*const f32, usize),
    rows: &[(usize, usize)],
    voxels: usize,
) -> [[V; Q]; RP] {
    let mut acc = [[V::zero(); Q]; RP];
    for &(x_row, dy_row) in rows {
        // SAFETY: readable by the caller's promise.
        unsafe {
            let (mut x, mut dy) = (x.add(x_row), dy.add(dy_row));
            for _ in 0..voxels {
                let mut b = [V::zero(); Q];
                for q in 0..Q {
                    b[q] = V::load(dy.add(q * LANES));
                }
                for p in 0..RP {
                    let a = V::splat(x.add(groups[p / P] + p % P));
                    for q in 0..Q {
                        acc[p][q] = acc[p][q].fma(b[q], a);
                    }
                }
                x = x.add(x_pitch);
                dy = dy.add(dy_pitch);
            }
        }
    }
    acc
}

/// Writes the accumulators of [`outer_product`], r P + p, to `sum`'s rows r `group` + `row` + p, from `lane` on, or adds them; rows have
/// `width` floats.
///
/// # Safety
/// V's vector unit must exist.
#[inline(always)]
pub unsafe fn store_rows<V: Lanes, const P: usize, const RP: usize, const Q: usize>(
    acc: [[V; Q]; RP],
    sum: &mut [f32],
    (row, group): (usize, usize),
    (lane, width): (usize, usize),
    adds: bool,
) {
    let last = (RP / P - 1) * group + row + P - 1;
    let sum = sum[..last * width + lane + Q * LANES].as_mut_ptr();
    for p in 0..RP {
        let row = p / P * group + row + p % P;
        for q in 0..Q {
            // SAFETY: the last row was checked to have Q lane blocks from `lane` on. Through pointers: with a check of each the loops
            // stay loops, which puts all accumulators into memory.
            unsafe {
                let to = sum.add(row * width + lane + q * LANES);
                let sum = if adds { V::load(to).add(acc[p][q]) } else { acc[p][q] };
                sum.store(to);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::lanes::Plain;

    /// On any CPU: where there are registers for several sums, tests of whole layers compare units.
    #[test]
    fn several_sums_have_the_bits_of_each_by_itself() {
        const P: usize = 6;
        const Q: usize = 2;
        const S: usize = 4;
        const STEP: usize = 16;
        let values = |len: usize| (0..len).map(|i| (i * 37 % 101) as f32 / 7.0 - 6.0).collect::<Vec<_>>();
        let rows = [(0, 8), (STEP * P, 16), (2 * STEP * P, 3)];
        let (x_pitch, w_pitch) = (4 * STEP * P, 27 * LANES);
        let (x, w) = (values(S * x_pitch), values(Q * S * w_pitch));
        // SAFETY: all rows of P voxels, and all channels' weights, of every sum and lane block; plain Rust needs no feature.
        let sums = unsafe {
            let w = (w.as_ptr(), w_pitch, S * w_pitch);
            broadcast_sums::<Plain, P, Q, S, STEP>((x.as_ptr(), x_pitch), w, &rows)
        };
        for (s, sum) in sums.iter().enumerate() {
            let reduction = Reduction { rows: &rows, taps: 1, tap_pitch: STEP, channel_pitch: 0, step: STEP };
            let (x, w) = (x[s * x_pitch..].as_ptr(), w[s * w_pitch..].as_ptr());
            // SAFETY: as above.
            let alone = unsafe { broadcast_voxels::<Plain, P, Q, STEP>(x, w, S * w_pitch, &reduction) };
            for (got, want) in sum.as_flattened().iter().zip(alone.as_flattened()) {
                let [mut a, mut b] = [[0.0f32; LANES]; 2];
                // SAFETY: sixteen floats each.
                unsafe {
                    got.store(a.as_mut_ptr());
                    want.store(b.as_mut_ptr());
                }
                assert_eq!(a.map(f32::to_bits), b.map(f32::to_bits), "sum {s}");
            }
        }
    }
}
