//! Results that must not depend on the schedule.

use spleen_hpc::device::cuda::Precision;
use std::cell::RefCell;
use std::collections::HashMap;

/// The first result of each case, which all later ones must equal bit for bit.
#[derive(Default)]
pub struct SameBits(RefCell<HashMap<(Precision, String), Vec<u32>>>);

impl SameBits {
    /// Compares `values` with those of the same case on the device's earlier schedules.
    pub fn check(&self, precision: Precision, case: &str, values: &[f32]) {
        let bits: Vec<u32> = values.iter().map(|v| v.to_bits()).collect();
        let mut seen = self.0.borrow_mut();
        let first = seen.entry((precision, case.into())).or_insert_with(|| bits.clone());
        assert!(*first == bits, "{case} {precision:?}: another schedule gave other bits");
    }
}
