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
    /// e^self.
    fn exp(self) -> Self;
}

macro_rules! float {
    ($t:ty) => {
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
            fn exp(self) -> Self {
                <$t>::exp(self)
            }
        }
    };
}

float!(f32);
float!(f64);
