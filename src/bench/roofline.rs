//! The least time that work can take: the longer of its FLOP at the measured peak and its bytes at the measured speed
//! of a copy.

use serde::{Deserialize, Serialize};

/// What one pass of one layer cannot do without.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Floating-point operations, two a multiply-add.
    pub flop: f64,
    /// What it reads and writes, each byte once.
    pub bytes: f64,
}

/// What a machine can do.
#[derive(Clone, Copy, Debug)]
pub struct Roof {
    /// FLOP a second, operands in registers.
    pub flops: f64,
    /// Bytes a second, read and written both counted, between memory and registers.
    pub bandwidth: f64,
}

impl Roof {
    /// Seconds that layers take one after another, each at its own bound. Data that a cache keeps from one layer to the
    /// next is counted as if memory did, so a chain of small layers can be faster.
    pub fn seconds(&self, costs: &[Cost]) -> f64 {
        costs.iter().map(|cost| (cost.flop / self.flops).max(cost.bytes / self.bandwidth)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_layer_has_its_own_bound() {
        let roof = Roof { flops: 10.0, bandwidth: 2.0 };
        let (computes, moves) = (Cost { flop: 30.0, bytes: 4.0 }, Cost { flop: 5.0, bytes: 8.0 });
        assert_eq!(roof.seconds(&[computes]), 3.0);
        assert_eq!(roof.seconds(&[moves]), 4.0);
        assert_eq!(roof.seconds(&[computes, moves]), 7.0);
        assert_eq!(roof.seconds(&[]), 0.0);
    }
}
