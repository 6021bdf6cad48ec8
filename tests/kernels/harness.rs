//! Devices to run a case on, inputs, and the comparison.

use crate::support;
use spleen_hpc::device::cuda::{Cuda, Precision};
use spleen_hpc::rng::Philox;
use std::sync::Arc;

/// Runs `case` on every precision and schedule there is: on the emulator three seeds each, in its plain order and two
/// shuffled ones; on a GPU once. Says so in a line where there is no device.
pub fn on_every_device(case: impl Fn(&Arc<Cuda>)) {
    for precision in [Precision::Half, Precision::Single] {
        on_devices(precision, &case);
    }
}

/// The same for kernels whose arithmetic does not depend on the storage of activations.
pub fn on_devices(precision: Precision, case: &dyn Fn(&Arc<Cuda>)) {
    for seed in 0..if support::native() { 1 } else { 3 } {
        let Some(cuda) = support::device(precision, seed) else { return };
        case(&cuda);
        cuda.synchronize().expect("the device works");
    }
}

/// Uniform in [-1, 1), rounded to what the device stores, so that the reference sees the same inputs.
pub fn uniform(precision: Precision, name: u64, len: usize) -> Vec<f32> {
    let mut rng = Philox::new(name, 0);
    (0..len).map(|_| stored(precision, rng.range(-1.0, 1.0) as f32)).collect()
}

/// `v` rounded to the precision.
pub fn stored(precision: Precision, v: f32) -> f32 {
    match precision {
        Precision::Half => half::f16::from_f32(v).to_f32(),
        Precision::Single => v,
    }
}

/// Fails unless the normalised mean square error, sum (got - want)^2 / sum want^2, is at most `allowed`; every value
/// must be a number. `why` says where an error of that size comes from.
pub fn assert_close(case: &str, got: &[f32], want: &[f64], allowed: f64, why: &str) {
    assert_eq!(got.len(), want.len(), "{case}: number of values");
    if let Some(i) = got.iter().position(|v| !v.is_finite()) {
        panic!("{case}: value {i} of {} is {} instead of {}", got.len(), got[i], want[i]);
    }
    let error = |i: usize| (f64::from(got[i]) - want[i]).powi(2);
    let total: f64 = (0..got.len()).map(error).sum();
    let norm: f64 = want.iter().map(|w| w * w).sum();
    let worst = (0..got.len()).max_by(|&a, &b| error(a).total_cmp(&error(b))).unwrap_or(0);
    let nmse = if total == 0.0 { 0.0 } else { total / norm };
    assert!(
        nmse <= allowed,
        "{case}: NMSE {nmse:.3e} > {allowed:.1e} ({why}); worst at {worst}: got {}, want {}",
        got[worst],
        want[worst]
    );
}
