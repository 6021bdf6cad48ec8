//! Norm and PReLU over rows of voxels: y = PReLU(scale x + shift), every step rounded by itself.

use super::plan::LANES;
use crate::device::cpu::{Simd, simd, vectorised};
#[cfg(target_arch = "x86_64")]
use crate::device::lanes::x86::{Avx2, Avx512};
use crate::device::lanes::{Lanes, Plain};

/// An affine map with a PReLU's slope: (scale, shift, slope), one scale and shift a channel.
pub type Affine<'a> = Option<(&'a [f32], &'a [f32], f32)>;

/// y of one value.
#[inline(always)]
pub fn mapped(x: f32, scale: f32, shift: f32, slope: f32) -> f32 {
    let z = x * scale + shift;
    if z > 0.0 { z } else { slope * z }
}

/// Voxels of `len` channels with nothing between them, taken from `x` every `x_pitch` floats and mapped if there is a map:
/// in `row`, which is as long, or `x` itself where nothing is to be done.
pub fn mapped_row<'a>(
    row: &'a mut [f32],
    x: &'a [f32],
    x_pitch: usize,
    len: usize,
    map: Affine,
) -> &'a [f32] {
    if map.is_none() && x_pitch == len {
        return x;
    }
    transform_row(row, len, x, x_pitch, len, map);
    row
}

/// `out` = the voxels of `x`, of `len` channels every `x_pitch` floats, every `out_pitch` floats, mapped if there is a map.
pub fn transform_row(out: &mut [f32], out_pitch: usize, x: &[f32], x_pitch: usize, len: usize, map: Affine) {
    let Some((scale, shift, slope)) = map else {
        return copy_voxels(out, out_pitch, x, x_pitch, len);
    };
    let dense = (out_pitch, x_pitch) == (len, len);
    if dense && LANES.is_multiple_of(len) {
        // A whole number of voxels fills the lanes.
        let repeat = |v: &[f32]| std::array::from_fn(|i| v[i & (len - 1)]);
        let map = (&repeat(scale), &repeat(shift), slope);
        let whole = out.len().min(x.len()) / LANES;
        map_vectors((&mut out[..whole * LANES], LANES), (&x[..whole * LANES], LANES), whole, map);
        let rest = out[whole * LANES..].iter_mut().zip(&x[whole * LANES..]).enumerate();
        rest.for_each(|(i, (out, x))| *out = mapped(*x, map.0[i], map.1[i], slope));
    } else if len.is_multiple_of(LANES) {
        let voxels = out.len().div_ceil(out_pitch).min(x.len().div_ceil(x_pitch));
        let blocks = scale.as_chunks().0.iter().zip(shift.as_chunks().0);
        for ((scale, shift), first) in blocks.zip((0..len).step_by(LANES)) {
            map_vectors(
                (&mut out[first..], out_pitch),
                (&x[first..], x_pitch),
                voxels,
                (scale, shift, slope),
            );
        }
    } else {
        map_voxels(out, out_pitch, x, x_pitch, (&scale[..len], &shift[..len], slope));
    }
}

vectorised! {
    /// Maps voxels of as many channels as `scale` and `shift` have.
    fn map_voxels(
        out: &mut [f32],
        out_pitch: usize,
        x: &[f32],
        x_pitch: usize,
        map: (&[f32], &[f32], f32),
    ) {
        let (scale, shift, slope) = map;
        for (out, x) in out.chunks_mut(out_pitch).zip(x.chunks(x_pitch)) {
            let values = out.iter_mut().zip(x).zip(scale.iter().zip(shift));
            values.for_each(|((out, x), (scale, shift))| *out = mapped(*x, *scale, *shift, slope));
        }
    }
}

/// Copies `len` values of every voxel from `x`, where voxels are `x_pitch` values apart, to `out`, where they are `out_pitch`.
pub fn copy_voxels<T: Copy>(out: &mut [T], out_pitch: usize, x: &[T], x_pitch: usize, len: usize) {
    if (out_pitch, x_pitch) == (len, len) {
        out[..x.len()].copy_from_slice(x);
        return;
    }
    let voxels = out.chunks_mut(out_pitch).zip(x.chunks(x_pitch));
    match len {
        // Of known length: vectors, not a call.
        16 => voxels.for_each(|(out, x)| out[..16].copy_from_slice(&x[..16])),
        32 => voxels.for_each(|(out, x)| out[..32].copy_from_slice(&x[..32])),
        _ => voxels.for_each(|(out, x)| out[..len].copy_from_slice(&x[..len])),
    }
}

/// Maps `vectors` times 16 values, from one to the next `x_pitch` floats apart and `out_pitch`.
fn map_vectors(
    (out, out_pitch): (&mut [f32], usize),
    (x, x_pitch): (&[f32], usize),
    vectors: usize,
    map: (&[f32; LANES], &[f32; LANES], f32),
) {
    let fits = |len: usize, pitch: usize| vectors == 0 || (vectors - 1) * pitch + LANES <= len;
    assert!(fits(out.len(), out_pitch) && fits(x.len(), x_pitch), "{vectors} vectors");
    let (out, x) = ((out.as_mut_ptr(), out_pitch), (x.as_ptr(), x_pitch));
    // SAFETY: lengths were just checked; `simd()` found the features.
    unsafe {
        match simd() {
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 => map_avx512(out, x, vectors, map),
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => map_avx2(out, x, vectors, map),
            _ => map_lanes::<Plain>(out, x, vectors, map),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,fma")]
unsafe fn map_avx512(
    out: (*mut f32, usize),
    x: (*const f32, usize),
    vectors: usize,
    map: (&[f32; LANES], &[f32; LANES], f32),
) {
    // SAFETY: handed on from the caller; the features are enabled here.
    unsafe { map_lanes::<Avx512>(out, x, vectors, map) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn map_avx2(
    out: (*mut f32, usize),
    x: (*const f32, usize),
    vectors: usize,
    map: (&[f32; LANES], &[f32; LANES], f32),
) {
    // SAFETY: handed on from the caller; the features are enabled here.
    unsafe { map_lanes::<Avx2>(out, x, vectors, map) }
}

/// See [`map_vectors`].
///
/// # Safety
/// The vectors must be readable and writable; V's vector unit exists.
#[inline(always)]
unsafe fn map_lanes<V: Lanes>(
    (out, out_pitch): (*mut f32, usize),
    (x, x_pitch): (*const f32, usize),
    vectors: usize,
    (scale, shift, slope): (&[f32; LANES], &[f32; LANES], f32),
) {
    // SAFETY: by the caller's promise.
    unsafe {
        let (scale, shift) = (V::load(scale.as_ptr()), V::load(shift.as_ptr()));
        let slope = V::splat(&raw const slope);
        for i in 0..vectors {
            let z = V::load(x.add(i * x_pitch)).mul(scale).add(shift);
            z.prelu(slope).store(out.add(i * out_pitch));
        }
    }
}
