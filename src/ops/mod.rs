//! One op a file: its maths, its checks, its tape entry, its CPU code. Nothing else in the crate lists ops.

pub mod conv;
pub mod conv3d;
pub mod conv_transpose3d;
pub mod dice_ce;
pub mod norm_prelu;
pub mod residual;

use crate::device::cuda::SelfTest;

/// The cases by which `spleen-hpc doctor` tries a device.
pub fn self_tests() -> Vec<SelfTest> {
    [residual::cuda::SELF_TESTS].concat()
}
