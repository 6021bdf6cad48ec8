//! Voxels to channel rows: the transpose that outputs of few channels need.

use crate::device::cpu::{Simd, simd};

/// `out[c * pitch + v]` = `x[v * len + c]`.
pub fn transpose(x: &[f32], len: usize, out: &mut [f32], pitch: usize) {
    assert!(len > 0, "at least one channel");
    let voxels = x.len() / len;
    assert!(out.len() >= (len - 1) * pitch + voxels, "channel rows fit");
    if len == 1 {
        return out[..voxels].copy_from_slice(x);
    }
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if simd() == Simd::Avx512 && matches!(len, 2 | 8 | 16) {
        while done + 16 <= voxels {
            // SAFETY: `simd()` found AVX-512F; 16 voxels are left in `x`, and `out` was just seen to be long enough.
            unsafe {
                let (x, out) = (x.as_ptr().add(done * len), out.as_mut_ptr().add(done));
                match len {
                    2 => x86::voxels_2(x, out, pitch),
                    8 => x86::voxels_8(x, out, pitch),
                    _ => x86::voxels_16(x, out, pitch),
                }
            }
            done += 16;
        }
    }
    if done == voxels {
        return;
    }
    for (c, out) in out.chunks_mut(pitch).take(len).enumerate() {
        let values = x[c..].iter().step_by(len).skip(done);
        out[done..].iter_mut().zip(values).for_each(|(o, &v)| *o = v);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// Sixteen voxels of two channels.
    ///
    /// # Safety
    /// AVX-512F must be present, 32 floats of `x` readable, 16 of `out` and of `out + pitch` writable.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn voxels_2(x: *const f32, out: *mut f32, pitch: usize) {
        let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        // SAFETY: by the caller's promise.
        unsafe {
            let (a, b) = (_mm512_loadu_ps(x), _mm512_loadu_ps(x.add(16)));
            _mm512_storeu_ps(out, _mm512_permutex2var_ps(a, even, b));
            _mm512_storeu_ps(out.add(pitch), _mm512_permutex2var_ps(a, odd, b));
        }
    }

    /// Transposes the 4 x 4 floats in each quarter of four rows.
    #[target_feature(enable = "avx512f")]
    fn quarters([r0, r1, r2, r3]: [__m512; 4]) -> [__m512; 4] {
        let low = (_mm512_unpacklo_ps(r0, r1), _mm512_unpacklo_ps(r2, r3));
        let high = (_mm512_unpackhi_ps(r0, r1), _mm512_unpackhi_ps(r2, r3));
        let low = (_mm512_castps_pd(low.0), _mm512_castps_pd(low.1));
        let high = (_mm512_castps_pd(high.0), _mm512_castps_pd(high.1));
        [
            _mm512_castpd_ps(_mm512_unpacklo_pd(low.0, low.1)),
            _mm512_castpd_ps(_mm512_unpackhi_pd(low.0, low.1)),
            _mm512_castpd_ps(_mm512_unpacklo_pd(high.0, high.1)),
            _mm512_castpd_ps(_mm512_unpackhi_pd(high.0, high.1)),
        ]
    }

    /// Sixteen voxels of eight channels.
    ///
    /// # Safety
    /// AVX-512F must be present, 128 floats of `x` readable, 16 of `out + c * pitch` writable for every channel c.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn voxels_8(x: *const f32, out: *mut f32, pitch: usize) {
        // SAFETY: by the caller's promise.
        unsafe {
            // Voxel v in the lower half of row v, voxel v + 8 in the upper one.
            let mut row = [_mm512_setzero_pd(); 8];
            for v in 0..8 {
                let low = _mm512_castpd256_pd512(_mm256_loadu_pd(x.add(8 * v).cast()));
                row[v] = _mm512_insertf64x4::<1>(low, _mm256_loadu_pd(x.add(8 * v + 64).cast()));
            }
            let [r0, r1, r2, r3, r4, r5, r6, r7] = row;
            let [r0, r1, r2, r3] =
                [_mm512_castpd_ps(r0), _mm512_castpd_ps(r1), _mm512_castpd_ps(r2), _mm512_castpd_ps(r3)];
            let [r4, r5, r6, r7] =
                [_mm512_castpd_ps(r4), _mm512_castpd_ps(r5), _mm512_castpd_ps(r6), _mm512_castpd_ps(r7)];
            // In the quarters of a[j]: channels j, 4 + j of voxels 0 .. 4, then of 8 .. 12; b[j]: of the other eight.
            let (a, b) = (quarters([r0, r1, r2, r3]), quarters([r4, r5, r6, r7]));
            let even = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
            let odd = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
            for j in 0..4 {
                let (a, b) = (_mm512_castps_pd(a[j]), _mm512_castps_pd(b[j]));
                _mm512_storeu_pd(out.add(j * pitch).cast(), _mm512_permutex2var_pd(a, even, b));
                _mm512_storeu_pd(out.add((4 + j) * pitch).cast(), _mm512_permutex2var_pd(a, odd, b));
            }
        }
    }

    /// Sixteen voxels of sixteen channels: pairs of rows are interleaved four times, by 1, 2, 4 and 8 floats.
    ///
    /// # Safety
    /// AVX-512F must be present, 256 floats of `x` readable, 16 of `out + c * pitch` writable for every channel c.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn voxels_16(x: *const f32, out: *mut f32, pitch: usize) {
        // SAFETY: by the caller's promise.
        unsafe {
            let row: [__m512; 16] = std::array::from_fn(|v| _mm512_loadu_ps(x.add(16 * v)));
            // In each quarter q of a[4 i + j]: channel 4 q + j of voxels 4 i .. 4 i + 4.
            let mut a = [_mm512_setzero_ps(); 16];
            for i in 0..4 {
                let rows = [row[4 * i], row[4 * i + 1], row[4 * i + 2], row[4 * i + 3]];
                a[4 * i..4 * i + 4].copy_from_slice(&quarters(rows));
            }
            for j in 0..4 {
                // Quarters 0 and 1, then 2 and 3, of voxels 0 .. 8 and 8 .. 16.
                let [a0, a1, a2, a3] = [a[j], a[4 + j], a[8 + j], a[12 + j]];
                let (first, second) =
                    (_mm512_shuffle_f32x4::<0x44>(a0, a1), _mm512_shuffle_f32x4::<0x44>(a2, a3));
                let (third, fourth) =
                    (_mm512_shuffle_f32x4::<0xee>(a0, a1), _mm512_shuffle_f32x4::<0xee>(a2, a3));
                let channel = |c: usize| out.add((4 * c + j) * pitch);
                _mm512_storeu_ps(channel(0), _mm512_shuffle_f32x4::<0x88>(first, second));
                _mm512_storeu_ps(channel(1), _mm512_shuffle_f32x4::<0xdd>(first, second));
                _mm512_storeu_ps(channel(2), _mm512_shuffle_f32x4::<0x88>(third, fourth));
                _mm512_storeu_ps(channel(3), _mm512_shuffle_f32x4::<0xdd>(third, fourth));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lands_in_its_channel() {
        for (voxels, len) in [(1, 1), (16, 2), (37, 2), (16, 16), (50, 16), (33, 5), (16, 8), (47, 8), (5, 1)]
        {
            let x: Vec<f32> = (0..voxels * len).map(|i| i as f32).collect();
            let pitch = voxels + 3;
            let mut out = vec![-1.0; len * pitch];
            transpose(&x, len, &mut out, pitch);
            for (i, &o) in out.iter().enumerate() {
                let (c, v) = (i / pitch, i % pitch);
                assert_eq!(o, if v < voxels { (v * len + c) as f32 } else { -1.0 }, "{voxels} {len} {i}");
            }
        }
    }
}
