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

/// What the device and the CPU made of one thing.
#[derive(Clone, Debug)]
pub struct Compared {
    /// What it is: y, dx, dw.
    pub name: &'static str,
    /// The device's.
    pub got: Vec<f32>,
    /// The CPU's.
    pub want: Vec<f32>,
    /// The normalised mean square error, sum (got - want)^2 / sum want^2, that roundings explain.
    pub allowed: f64,
}

impl Compared {
    fn nmse(&self) -> f64 {
        let square = |v: f64| v * v;
        let pairs = self.got.iter().zip(&self.want);
        let error: f64 = pairs.map(|(g, w)| square(f64::from(*g) - f64::from(*w))).sum();
        let norm: f64 = self.want.iter().map(|w| square(f64::from(*w))).sum();
        if error == 0.0 { 0.0 } else { error / norm }
    }
}

/// The errors of all `values` as a text.
///
/// # Errors
/// [`Error::Gpu`] for the first whose error is above what is allowed, or that holds something that is not a number.
pub fn agree(values: &[Compared]) -> Result<String> {
    let mut said = Vec::new();
    for value in values {
        let (name, nmse, allowed) = (value.name, value.nmse(), value.allowed);
        // Not the other way round: NaN must fail.
        if !(value.got.len() == value.want.len() && nmse <= allowed) {
            let text = format!("{name} has NMSE {nmse:.1e} against the CPU, {allowed:.0e} is allowed");
            return Err(Error::Gpu(text));
        }
        said.push(if nmse == 0.0 { format!("{name} exact") } else { format!("{name} {nmse:.1e}") });
    }
    Ok(said.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compared(got: &[f32], allowed: f64) -> Compared {
        Compared { name: "y", got: got.to_vec(), want: vec![3.0, 4.0], allowed }
    }

    #[test]
    fn what_is_wrong_does_not_agree() {
        let said = agree(&[compared(&[3.0, 4.0], 0.0), compared(&[3.0, 3.5], 0.011)]).unwrap();
        assert_eq!(said, "y exact, y 1.0e-2");
        let err = agree(&[compared(&[3.0, 3.5], 0.009)]).unwrap_err().to_string();
        assert!(err.contains("y has NMSE 1.0e-2 against the CPU, 9e-3 is allowed"), "{err}");
        for broken in [&[3.0, f32::NAN][..], &[3.0, f32::INFINITY], &[3.0], &[3.0, 4.0, 5.0]] {
            assert!(agree(&[compared(broken, 1.0)]).is_err(), "{broken:?}");
        }
        let zero = Compared { name: "y", got: vec![1e-20], want: vec![0.0], allowed: 1.0 };
        assert!(agree(&[zero]).is_err());
    }
}
