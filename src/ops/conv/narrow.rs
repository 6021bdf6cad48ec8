//! Rows of voxels to pairs of bfloat16, of channels or of neighbours, norm and PReLU applied on the way.

use super::halves;
use super::row::{Affine, mapped_row};
use super::tile::{pair_channels, pair_neighbours};
#[cfg(target_arch = "x86_64")]
use crate::device::cpu::{Simd, simd_of_pairs};
use crate::tensor::Values;

/// `out[v * pitch + i]` = channels 2 i and 2 i + 1, mapped if there is a map, of voxel v of `x`, whose voxels are
/// `x_pitch` floats apart and have `len` channels. `row` is scratch.
pub fn transform_pairs(
    (out, pitch): (&mut [f32], usize),
    (x, x_pitch): (&[f32], usize),
    len: usize,
    map: Affine,
    row: &mut [f32],
) {
    #[cfg(target_arch = "x86_64")]
    if len == 2 * pitch && x_pitch == len && matches!(len, 2 | 4 | 8) && simd_of_pairs() == Simd::Avx512 {
        // A whole number of voxels fills 16 lanes.
        let repeated = map.map(|(scale, shift, slope)| {
            let repeat = |v: &[f32]| std::array::from_fn::<f32, 16, _>(|i| v[i & (len - 1)]);
            (repeat(scale), repeat(shift), slope)
        });
        let repeated = repeated.as_ref().map(|(scale, shift, slope)| (&scale[..], &shift[..], *slope));
        let sixteens = out.len() / 8;
        assert!(x.len() >= 16 * sixteens, "{sixteens} x 16 values");
        // SAFETY: the CPU has the features; lengths were just checked.
        unsafe { x86::voxels_16((out.as_mut_ptr(), 8), (x.as_ptr(), 16), sixteens, repeated) };
        let (out, x) = (&mut out[8 * sixteens..], &x[16 * sixteens..]);
        if !out.is_empty() {
            let row = mapped_row(&mut row[..2 * out.len()], &x[..2 * out.len()], len, len, map);
            pair_channels(row, len, out, pitch);
        }
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if len == 2 * pitch && len.is_multiple_of(16) && simd_of_pairs() == Simd::Avx512 {
        let voxels = out.len() / pitch;
        assert!(voxels == 0 || x.len() >= (voxels - 1) * x_pitch + len, "{voxels} voxels");
        assert!(
            map.is_none_or(|(scale, shift, _)| scale.len() == len && shift.len() == len),
            "{len} channels"
        );
        for first in (0..len).step_by(16) {
            let map = map.map(|(scale, shift, slope)| (&scale[first..], &shift[first..], slope));
            // SAFETY: the CPU has the features; lengths were just checked.
            unsafe {
                let (out, x) = (out[first / 2..].as_mut_ptr(), x[first..].as_ptr());
                x86::voxels_16((out, pitch), (x, x_pitch), voxels, map);
            }
        }
        return;
    }
    let row = mapped_row(&mut row[..out.len() / pitch * len], x, x_pitch, len, map);
    pair_channels(row, len, out, pitch);
}

/// `out[i * pitch + c]` = channel c of voxels 2 i and 2 i + 1, or 0 where there is no second one, mapped if there is a map, of
/// `x`, whose voxels are `x_pitch` values apart and have `len` channels. `row` is scratch.
pub fn transform_neighbours(
    (out, pitch): (&mut [f32], usize),
    (x, x_pitch): (Values, usize),
    len: usize,
    map: Affine,
    row: &mut Vec<f32>,
) {
    let x = match x {
        Values::Single(x) => x,
        // Never with a map.
        Values::Bf16(x) => return halves::pair_neighbours(out, pitch, x, x_pitch, len),
    };
    let voxels = (x.len() + x_pitch - len) / x_pitch;
    #[cfg(target_arch = "x86_64")]
    if len == 16 && voxels > 0 && simd_of_pairs() == Simd::Avx512 {
        assert!(out.len() >= (voxels.div_ceil(2) - 1) * pitch + 16, "{voxels} voxels");
        assert!(map.is_none_or(|(scale, shift, _)| scale.len() == 16 && shift.len() == 16), "16 channels");
        // SAFETY: the CPU has the features; lengths were just checked.
        unsafe { x86::neighbours_16((out.as_mut_ptr(), pitch), (x.as_ptr(), x_pitch), voxels, map) };
        return;
    }
    row.resize(voxels * len, 0.0);
    pair_neighbours(mapped_row(row, x, x_pitch, len, map), len, out, pitch);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Affine;
    use std::arch::x86_64::*;

    /// The 16 values from `x` on, mapped. Not fused: as every other copy of the map.
    ///
    /// # Safety
    /// The CPU must have AVX-512F; 16 floats of `x` and of the map must be readable.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn mapped(x: *const f32, map: Affine) -> __m512 {
        // SAFETY: by the caller's promise.
        unsafe {
            let x = _mm512_loadu_ps(x);
            let Some((scale, shift, slope)) = map else { return x };
            let (scale, shift) = (_mm512_loadu_ps(scale.as_ptr()), _mm512_loadu_ps(shift.as_ptr()));
            let z = _mm512_add_ps(_mm512_mul_ps(x, scale), shift);
            let rest = _mm512_cmp_ps_mask::<_CMP_NGT_UQ>(z, _mm512_setzero_ps());
            _mm512_mask_mul_ps(z, rest, _mm512_set1_ps(slope), z)
        }
    }

    /// Sixteen channels of each voxel. The instruction rounds as [`crate::device::bf16::round`] does: to nearest even,
    /// denormals to 0, NaN to quiet ones.
    ///
    /// # Safety
    /// The CPU must have AVX-512F and AVX512_BF16; every voxel 16 readable floats, 8 writable ones, and the map 16 of both.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub unsafe fn voxels_16(
        (out, pitch): (*mut f32, usize),
        (x, x_pitch): (*const f32, usize),
        voxels: usize,
        map: Affine,
    ) {
        // SAFETY: by the caller's promise.
        unsafe {
            for v in 0..voxels {
                let pairs = _mm512_cvtneps_pbh(mapped(x.add(v * x_pitch), map));
                _mm256_storeu_ps(out.add(v * pitch), std::mem::transmute::<__m256bh, __m256>(pairs));
            }
        }
    }

    /// Sixteen channels of two voxels each, side by side; of the last voxel of an odd number and 0.
    ///
    /// # Safety
    /// As [`voxels_16`], with 16 writable floats for every two voxels.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub unsafe fn neighbours_16(
        (out, pitch): (*mut f32, usize),
        (x, x_pitch): (*const f32, usize),
        voxels: usize,
        map: Affine,
    ) {
        // SAFETY: by the caller's promise.
        unsafe {
            let narrow = |v: usize| {
                let halves = _mm512_cvtneps_pbh(mapped(x.add(v * x_pitch), map));
                _mm512_cvtepu16_epi32(std::mem::transmute::<__m256bh, __m256i>(halves))
            };
            for first in (0..voxels).step_by(2) {
                let second = if first + 1 < voxels { narrow(first + 1) } else { _mm512_setzero_si512() };
                let both = _mm512_or_si512(narrow(first), _mm512_slli_epi32::<16>(second));
                _mm512_storeu_si512(out.add(first / 2 * pitch).cast(), both);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::bf16::pair;

    /// Some of two channels fill no vector.
    const VOXELS: usize = 21;

    #[test]
    fn every_value_is_mapped_and_rounded_as_one_by_one() {
        let special =
            [0.0, -0.0, 1e-40, -1e-40, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1.0 + f32::EPSILON];
        let (scale, shift): (Vec<f32>, Vec<f32>) =
            (0..32).map(|i| (1.0 - i as f32 / 7.0, if i % 3 == 0 { 0.0 } else { 0.1 * i as f32 })).unzip();
        for (len, pitch, x_pitch) in [
            (16, 8, 16),
            (32, 16, 48),
            (5, 8, 5),
            (1, 1, 1),
            (16, 8, 40),
            (2, 1, 2),
            (4, 2, 4),
            (8, 4, 8),
            (2, 1, 6),
        ] {
            let x: Vec<f32> = (0..VOXELS * x_pitch)
                .map(|i| if i % 5 == 0 { special[i / 5 % 8] } else { (i as f32).sin() * 1e3 })
                .collect();
            for slope in [None, Some(0.25)] {
                let map: Affine = slope.map(|slope| (&scale[..len], &shift[..len], slope));
                let mut out = vec![0.0; VOXELS * pitch];
                transform_pairs((&mut out, pitch), (&x, x_pitch), len, map, &mut vec![0.0; VOXELS * len]);
                let value = |v: usize, c: usize| {
                    let x = if c < len { x[v * x_pitch + c] } else { 0.0 };
                    match map {
                        Some((scale, shift, slope)) if c < len => {
                            let z = x * scale[c] + shift[c];
                            if z > 0.0 { z } else { slope * z }
                        }
                        _ => x,
                    }
                };
                for (i, out) in out.iter().enumerate() {
                    let (v, c) = (i / pitch, 2 * (i % pitch));
                    let want = if c < len { pair(value(v, c), value(v, c + 1)) } else { 0.0 };
                    assert_eq!(out.to_bits(), want.to_bits(), "{len} channels, voxel {v}, channel {c}");
                }
            }
        }
    }

    #[test]
    fn neighbours_are_mapped_and_rounded_as_one_by_one() {
        let special = [0.0, -0.0, 1e-40, f32::INFINITY, f32::NAN, 1.0 + f32::EPSILON];
        let scale: Vec<f32> = (0..16).map(|i| 1.0 - i as f32 / 7.0).collect();
        let shift: Vec<f32> = (0..16).map(|i| 0.1 * (i % 3) as f32).collect();
        for (len, pitch, x_pitch, voxels) in
            [(16, 16, 16, 8), (16, 32, 40, 7), (16, 16, 16, 1), (5, 16, 6, 9)]
        {
            let x: Vec<f32> = (0..(voxels - 1) * x_pitch + len)
                .map(|i| if i % 5 == 0 { special[i / 5 % 6] } else { (i as f32).sin() * 1e3 })
                .collect();
            for slope in [None, Some(0.25)] {
                let map: Affine = slope.map(|slope| (&scale[..len], &shift[..len], slope));
                let mut out = vec![0.0; voxels.div_ceil(2) * pitch];
                let row = (Values::Single(&x), x_pitch);
                transform_neighbours((&mut out, pitch), row, len, map, &mut Vec::new());
                let value = |v: usize, c: usize| {
                    if v == voxels {
                        return 0.0;
                    }
                    let x = x[v * x_pitch + c];
                    map.map_or(x, |(scale, shift, slope)| {
                        let z = x * scale[c] + shift[c];
                        if z > 0.0 { z } else { slope * z }
                    })
                };
                for (i, out) in out.iter().enumerate().filter(|(i, _)| i % pitch < len) {
                    let (v, c) = (2 * (i / pitch), i % pitch);
                    let want = pair(value(v, c), value(v + 1, c));
                    assert_eq!(out.to_bits(), want.to_bits(), "{len} channels, voxel {v}, channel {c}");
                }
            }
        }
    }
}
