//! Small cases that an op computes on a device and on the CPU, for `spleen-hpc doctor`: they prove that driver, compiler
//! and device work together, not that the op is right (tests/kernels does).

use super::Cuda;
use crate::error::{Error, Result};
use std::sync::Arc;

/// A case of an op.
#[derive(Clone, Copy)]
pub struct SelfTest {
    /// The op, and which of its kernels where there are several.
    pub name: &'static str,
    /// Computes it and compares; says how well they agree.
    pub run: fn(&Arc<Cuda>) -> Result<String>,
}

/// The normalised mean square error, sum (got - want)^2 / sum want^2, as a text.
///
/// # Errors
/// [`Error::Gpu`] when it is above `allowed`, or something is not a number.
pub fn agree(got: &[f32], want: &[f32], allowed: f64) -> Result<String> {
    let square = |v: f64| v * v;
    let error: f64 = got.iter().zip(want).map(|(g, w)| square(f64::from(*g) - f64::from(*w))).sum();
    let norm: f64 = want.iter().map(|w| square(f64::from(*w))).sum();
    let nmse = if error == 0.0 { 0.0 } else { error / norm };
    // Not the other way round: NaN must fail.
    if got.len() == want.len() && nmse <= allowed {
        return Ok(if nmse == 0.0 {
            "exact".into()
        } else {
            format!("NMSE {nmse:.1e}, {allowed:.0e} is allowed")
        });
    }
    Err(Error::Gpu(format!("NMSE {nmse:.1e} against the CPU, {allowed:.0e} is allowed")))
}
