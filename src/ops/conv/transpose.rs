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
    // SAFETY: `simd()` found the unit; lengths were just checked.
    unsafe { transpose_on(simd(), x, len, out, pitch) }
}

/// [`transpose()`] of two channels or more.
///
/// # Safety
/// The CPU must have the unit; voxels and channel rows must fit.
#[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables))]
unsafe fn transpose_on(unit: Simd, x: &[f32], len: usize, out: &mut [f32], pitch: usize) {
    let voxels = x.len() / len;
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    {
        /// Whole steps of voxels by a function of them.
        macro_rules! whole {
            ($step:literal, $voxels:expr) => {
                while done + $step <= voxels {
                    // SAFETY: the unit exists; so many voxels are left in `x`, and `out` is long enough.
                    unsafe { $voxels(x.as_ptr().add(done * len), out.as_mut_ptr().add(done)) };
                    done += $step;
                }
            };
        }
        match (unit, len) {
            (Simd::Avx512, 2) => whole!(16, |x, out| avx512::voxels_2(x, out, pitch)),
            (Simd::Avx512, 8) => whole!(16, |x, out| avx512::voxels_8(x, out, pitch)),
            (Simd::Avx512, 16) => whole!(16, |x, out| avx512::voxels_16(x, out, pitch)),
            (Simd::Avx2, 2) => whole!(8, |x, out| avx2::voxels_2(x, out, pitch)),
            (Simd::Avx2, _) if len.is_multiple_of(8) => {
                whole!(8, |x, out| avx2::voxels_8n(x, len, out, pitch));
            }
            _ => {}
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
mod avx2 {
    use std::arch::x86_64::*;

    /// Eight voxels of two channels.
    ///
    /// # Safety
    /// AVX2 must be present, 16 floats of `x` readable, 8 of `out` and of `out + pitch` writable.
    #[target_feature(enable = "avx2")]
    pub unsafe fn voxels_2(x: *const f32, out: *mut f32, pitch: usize) {
        // SAFETY: by the caller's promise.
        unsafe {
            let (a, b) = (_mm256_loadu_ps(x), _mm256_loadu_ps(x.add(8)));
            // Voxels 0, 1, 4, 5 and 2, 3, 6, 7: of each half of both.
            let (even, odd) = (_mm256_shuffle_ps::<0x88>(a, b), _mm256_shuffle_ps::<0xdd>(a, b));
            for (i, channel) in [even, odd].into_iter().enumerate() {
                let in_order = _mm256_permute4x64_pd::<0xd8>(_mm256_castps_pd(channel));
                _mm256_storeu_pd(out.add(i * pitch).cast(), in_order);
            }
        }
    }

    /// Eight voxels of `len` channels, a multiple of eight.
    ///
    /// # Safety
    /// AVX2 must be present, 8 `len` floats of `x` readable, 8 of `out + c * pitch` writable for every channel c.
    #[target_feature(enable = "avx2")]
    pub unsafe fn voxels_8n(x: *const f32, len: usize, out: *mut f32, pitch: usize) {
        for first in (0..len).step_by(8) {
            // SAFETY: by the caller's promise.
            unsafe {
                // Channels 0 to 4 of voxel v in the lower half of low[v], of voxel 4 + v in the upper one; 4 to 8 in high[v].
                let (mut low, mut high) = ([_mm256_setzero_ps(); 4], [_mm256_setzero_ps(); 4]);
                for v in 0..4 {
                    let (x, after) = (x.add(v * len + first), x.add((4 + v) * len + first));
                    low[v] = _mm256_loadu2_m128(after, x);
                    high[v] = _mm256_loadu2_m128(after.add(4), x.add(4));
                }
                for (half, rows) in [low, high].into_iter().enumerate() {
                    for (i, channel) in quarters(rows).into_iter().enumerate() {
                        _mm256_storeu_ps(out.add((first + 4 * half + i) * pitch), channel);
                    }
                }
            }
        }
    }

    /// Transposes the 4 x 4 floats in each half of four rows.
    #[target_feature(enable = "avx2")]
    fn quarters([r0, r1, r2, r3]: [__m256; 4]) -> [__m256; 4] {
        let low = (_mm256_unpacklo_ps(r0, r1), _mm256_unpacklo_ps(r2, r3));
        let high = (_mm256_unpackhi_ps(r0, r1), _mm256_unpackhi_ps(r2, r3));
        [
            _mm256_shuffle_ps::<0x44>(low.0, low.1),
            _mm256_shuffle_ps::<0xee>(low.0, low.1),
            _mm256_shuffle_ps::<0x44>(high.0, high.1),
            _mm256_shuffle_ps::<0xee>(high.0, high.1),
        ]
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
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
        for unit in [Simd::Avx512, Simd::Avx2, Simd::Portable].into_iter().filter(|&unit| unit >= simd()) {
            for (voxels, len) in [
                (16, 2),
                (37, 2),
                (7, 2),
                (16, 16),
                (50, 16),
                (33, 5),
                (16, 8),
                (47, 8),
                (6, 8),
                (21, 24),
                (24, 32),
            ] {
                let x: Vec<f32> = (0..voxels * len).map(|i| i as f32).collect();
                let pitch = voxels + 3;
                let mut out = vec![-1.0; len * pitch];
                // SAFETY: `simd()` is the best unit there is, and there is room.
                unsafe { transpose_on(unit, &x, len, &mut out, pitch) };
                let mut of_this_unit = vec![-1.0; len * pitch];
                transpose(&x, len, &mut of_this_unit, pitch);
                assert_eq!(of_this_unit, out, "{unit:?} {voxels} {len}");
                for (i, &o) in out.iter().enumerate() {
                    let (c, v) = (i / pitch, i % pitch);
                    let want = if v < voxels { (v * len + c) as f32 } else { -1.0 };
                    assert_eq!(o, want, "{unit:?} {voxels} {len} {i}");
                }
            }
        }
    }

    #[test]
    fn one_channel_is_copied() {
        let mut out = [0.0; 6];
        transpose(&[1.0, 2.0, 3.0], 1, &mut out, 6);
        assert_eq!(out, [1.0, 2.0, 3.0, 0.0, 0.0, 0.0]);
    }
}
