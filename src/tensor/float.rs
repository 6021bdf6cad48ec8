//! The floats that losses and optimizers run in: f32 in the product, f64 where a reference is wanted.

use std::ops::{Add, AddAssign, Div, Mul, Sub};

/// f32 or f64.
pub trait Float:
    Copy
    + Send
    + Sync
    + Default
    + PartialEq
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + AddAssign
    + 'static
{
    /// Rounds from f64.
    fn new(v: f64) -> Self;
    /// To f64, exactly.
    fn to_f64(self) -> f64;
    /// Square root.
    fn sqrt(self) -> Self;
    /// e^-|self|.
    fn exp_minus_abs(self) -> Self;
}

/// The reference's own.
fn exp_minus_abs_f64(x: f64) -> f64 {
    (-x.abs()).exp()
}

/// Rounded once.
#[inline(always)]
fn exp_minus_abs_f32(x: f32) -> f32 {
    exp_minus_abs(x.into()) as f32
}

/// e^-|x|, or e^-700 where it is less, which is 0 in f32; no number of what is none. Its relative error is below 3e-10, which
/// moves hardly one f32 in a hundred to its neighbour. Without a branch or a call: loops over it become vectors.
///
/// e^x = 2^n e^r with r = x - n ln 2 of at most ln 2 / 2, e^r by its series to r^8.
#[inline(always)]
fn exp_minus_abs(x: f64) -> f64 {
    /// Added to a small number, it leaves that number's integer in the lowest bits.
    const ROUND: f64 = 1.5 * (1_u64 << 52) as f64;
    let x = -x.abs();
    // Not `max`, which would drop a NaN.
    let x = if x < -700.0 { -700.0 } else { x };
    let shifted = x * std::f64::consts::LOG2_E + ROUND;
    let r = x - (shifted - ROUND) * std::f64::consts::LN_2;
    let series =
        [1.0 / 40_320.0, 1.0 / 5_040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    let mut sum = 0.0;
    for i in 0..series.len() {
        sum = sum * r + series[i];
    }
    sum * f64::from_bits((shifted.to_bits() << 52).wrapping_add(1.0_f64.to_bits()))
}

macro_rules! float {
    ($t:ty, $exp_minus_abs:path) => {
        impl Float for $t {
            fn new(v: f64) -> Self {
                v as $t
            }
            fn to_f64(self) -> f64 {
                self.into()
            }
            fn sqrt(self) -> Self {
                <$t>::sqrt(self)
            }
            #[inline(always)]
            fn exp_minus_abs(self) -> Self {
                $exp_minus_abs(self)
            }
        }
    };
}

float!(f32, exp_minus_abs_f32);
float!(f64, exp_minus_abs_f64);

#[cfg(test)]
mod tests {
    use super::*;

    /// Beside the exponential of f64, whose error is below 1e-15. Less than 1.2e-7 of f32, an ulp, is its rounding and ours.
    #[test]
    fn exponentials_are_those_of_f64() {
        for i in 0..200_000 {
            let x = i as f32 * 5e-4 - 50.0;
            let (got, want) = (f64::from(x.exp_minus_abs()), (-f64::from(x).abs()).exp());
            assert!((exp_minus_abs(x.into()) / want - 1.0).abs() < 3e-10, "{x}");
            assert!((got / want - 1.0).abs() < 6.1e-8, "{x}: {got} instead of {want}");
        }
        assert_eq!(0.0f32.exp_minus_abs(), 1.0);
        assert_eq!([200.0f32, f32::MAX, f32::NEG_INFINITY].map(Float::exp_minus_abs), [0.0; 3]);
        assert!(f32::NAN.exp_minus_abs().is_nan());
        // A denormal.
        assert_eq!(100.0f32.exp_minus_abs(), (-100.0f64).exp() as f32);
    }
}
