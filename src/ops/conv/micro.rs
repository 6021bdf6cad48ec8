//! The register tiles. P x Q accumulators of 16 lanes stay in registers over the whole reduction.
//!
//! AVX-512: 24 accumulators + Q weights + 1 broadcast of 32 registers; a reduction step is P broadcasts and Q loads
//! for P Q multiply-adds, so two FMA units stay busy from 12 accumulators on. AVX2 holds 6 of these 16-lane
//! accumulators in 12 of its 16 registers.

use crate::device::cpu::Lanes;

/// How an anchor's input rows lie in a tile of order "channel rows".
pub struct Reduction<'a> {
    /// Offset of each input row from the anchor's.
    pub rows: &'a [usize],
    /// Channels of the block.
    pub channels: usize,
    /// Floats from a channel's row to the next one's.
    pub pitch: usize,
    /// Taps along w.
    pub taps: usize,
}

/// acc[p][q] = sum over rows, channels, taps of tile[p * S + tap] * weights[q]: P voxels by Q lane blocks.
///
/// # Safety
/// `tile` and every row offset, channel and tap from it must lie in one tile buffer; `weights` must hold Q lane
/// blocks of `q_stride` floats; V's vector unit must exist.
#[inline(always)]
pub unsafe fn broadcast_voxels<V: Lanes, const P: usize, const Q: usize, const S: usize>(
    tile: *const f32,
    weights: *const f32,
    q_stride: usize,
    r: &Reduction,
) -> [[V; Q]; P] {
    let mut acc = [[V::zero(); Q]; P];
    let mut w = weights;
    for &row in r.rows {
        // SAFETY: in the tile and the packed weights by the caller's promise.
        unsafe {
            let mut x = tile.add(row);
            for _ in 0..r.channels {
                for tap in 0..r.taps {
                    let mut b = [V::zero(); Q];
                    for q in 0..Q {
                        b[q] = V::load(w.add(q * q_stride));
                    }
                    let x = x.add(tap);
                    for p in 0..P {
                        let a = V::splat(x.add(p * S));
                        for q in 0..Q {
                            acc[p][q] = acc[p][q].fma(a, b[q]);
                        }
                    }
                    w = w.add(super::plan::LANES);
                }
                x = x.add(r.pitch);
            }
        }
    }
    acc
}

/// acc[p][c] = sum over rows, channels, taps of tile[16 p + lane + tap] * weights[c]: 16 P voxels by C channels,
/// for outputs too thin to fill lanes with channels. Stride 1 only.
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
    for &row in r.rows {
        // SAFETY: in the tile and the packed weights by the caller's promise.
        unsafe {
            let mut x = tile.add(row);
            for _ in 0..r.channels {
                for tap in 0..r.taps {
                    let mut a = [V::zero(); P];
                    for p in 0..P {
                        a[p] = V::load(x.add(tap + 16 * p));
                    }
                    for c in 0..C {
                        let b = V::splat(w.add(c));
                        for p in 0..P {
                            acc[p][c] = acc[p][c].fma(a[p], b);
                        }
                    }
                    w = w.add(super::plan::LANES);
                }
                x = x.add(r.pitch);
            }
        }
    }
    acc
}

/// acc[p][q] = sum over tile rows and their voxels of x[p] * dy[q]: P (tap, channel) pairs by Q lane blocks.
///
/// `rows` are pairs of offsets: of the voxel 0 in `x`, and of voxel 0 in `dy`.
///
/// # Safety
/// For every pair and every v < `voxels`: `x + offset + v * x_pitch` has P readable floats, `dy + offset +
/// v * dy_pitch` 16 Q; V's vector unit must exist.
#[inline(always)]
pub unsafe fn outer_product<V: Lanes, const P: usize, const Q: usize>(
    (x, x_pitch): (*const f32, usize),
    (dy, dy_pitch): (*const f32, usize),
    rows: &[(usize, usize)],
    voxels: usize,
) -> [[V; Q]; P] {
    let mut acc = [[V::zero(); Q]; P];
    for &(x_row, dy_row) in rows {
        // SAFETY: readable by the caller's promise.
        unsafe {
            let (mut x, mut dy) = (x.add(x_row), dy.add(dy_row));
            for _ in 0..voxels {
                let mut b = [V::zero(); Q];
                for q in 0..Q {
                    b[q] = V::load(dy.add(q * super::plan::LANES));
                }
                for p in 0..P {
                    let a = V::splat(x.add(p));
                    for q in 0..Q {
                        acc[p][q] = acc[p][q].fma(a, b[q]);
                    }
                }
                x = x.add(x_pitch);
                dy = dy.add(dy_pitch);
            }
        }
    }
    acc
}
