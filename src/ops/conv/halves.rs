//! Rows of bfloat16 voxels: nothing is left to be done to their values, they are only put where a tile wants them.

use crate::device::bf16::{widen, widened};
use crate::device::cpu::vectorised;

/// Two bfloat16 in the room of a float, `even` in the lower half.
#[inline(always)]
fn both(even: u16, odd: u16) -> f32 {
    f32::from_bits(u32::from(even) | u32::from(odd) << 16)
}

vectorised! {
    /// `out[v * pitch + c]` = channel c of voxel v of `x`, whose voxels are `x_pitch` values apart and have `len` channels.
    pub fn widen_voxels(out: &mut [f32], pitch: usize, x: &[u16], x_pitch: usize, len: usize) {
        if (pitch, x_pitch) == (len, len) {
            return widen(x, out);
        }
        for (out, x) in out.chunks_mut(pitch).zip(x.chunks(x_pitch)) {
            // Of known length: vectors.
            let (out_blocks, out_rest) = out[..len].as_chunks_mut::<16>();
            let (blocks, rest) = x[..len].as_chunks::<16>();
            for (out, x) in out_blocks.iter_mut().zip(blocks) {
                (0..16).for_each(|c| out[c] = widened(x[c]));
            }
            out_rest.iter_mut().zip(rest).for_each(|(out, &x)| *out = widened(x));
        }
    }

    /// `out[i]` = `first[i]` and `second[i]`, or 0 where `second` has ended.
    pub fn pair_rows(first: &[u16], second: &[u16], out: &mut [f32]) {
        let (paired, rest) = out.split_at_mut(second.len());
        for ((out, &first), &second) in paired.iter_mut().zip(first).zip(second) {
            *out = both(first, second);
        }
        rest.iter_mut().zip(&first[second.len()..]).for_each(|(out, &first)| *out = both(first, 0));
    }

    /// `out[i * pitch + c]` = channel c of voxels 2 i and 2 i + 1 of `x`, or 0 where it has ended.
    pub fn pair_neighbours(out: &mut [f32], pitch: usize, x: &[u16], x_pitch: usize, len: usize) {
        for (out, x) in out.chunks_mut(pitch).zip(x.chunks(2 * x_pitch)) {
            let first = &x[..len];
            match (x.get(x_pitch..x_pitch + len), len) {
                (Some(second), 16) => (0..16).for_each(|c| out[c] = both(first[c], second[c])),
                (Some(second), _) => (0..len).for_each(|c| out[c] = both(first[c], second[c])),
                (None, _) => (0..len).for_each(|c| out[c] = both(first[c], 0)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::bf16::narrowed;

    #[test]
    fn every_value_lands_in_its_place() {
        for (voxels, len, x_pitch, pitch) in
            [(1, 1, 1, 1), (7, 16, 16, 16), (8, 16, 48, 32), (5, 32, 32, 32), (6, 5, 9, 16), (3, 20, 21, 20)]
        {
            let value = |v: usize, c: usize| if v < voxels { (v * 32 + c) as f32 } else { 0.0 };
            let x: Vec<u16> = (0..(voxels - 1) * x_pitch + len)
                .map(|i| if i % x_pitch < len { narrowed(value(i / x_pitch, i % x_pitch)) } else { 0x7fc0 })
                .collect();
            let each = || (0..voxels).flat_map(|v| (0..len).map(move |c| (v, c)));
            let mut out = vec![0.0; voxels * pitch];
            widen_voxels(&mut out, pitch, &x, x_pitch, len);
            each().for_each(|(v, c)| assert_eq!(out[v * pitch + c], value(v, c), "voxel {v}, channel {c}"));
            let pair = |v: usize, w: usize, c: usize| both(narrowed(value(v, c)), narrowed(value(w, c)));
            pair_neighbours(&mut out, pitch, &x, x_pitch, len);
            for (v, c) in each().filter(|(v, _)| v % 2 == 0) {
                let got = out[v / 2 * pitch + c];
                assert_eq!(got.to_bits(), pair(v, v + 1, c).to_bits(), "voxel {v}, channel {c}");
            }
            if x_pitch == len {
                pair_rows(&x, &x[len..], &mut out[..voxels * len]);
                each().for_each(|(v, c)| {
                    assert_eq!(
                        out[v * len + c].to_bits(),
                        pair(v, v + 1, c).to_bits(),
                        "voxel {v}, channel {c}"
                    );
                });
            }
        }
    }
}
