//! One op a file: its maths, its checks, its tape entry, its CPU code. Nothing else in the crate lists ops.

pub mod conv;
pub mod conv3d;
pub mod conv_transpose3d;
pub mod dice_ce;
pub mod norm_prelu;
pub mod optimizer;
pub mod patch;
pub mod resample;
pub mod residual;
mod self_test;
pub mod window;

use crate::device::cuda::SelfTest;

/// The cases by which `spleen-hpc doctor` tries a device.
pub fn self_tests() -> Vec<SelfTest> {
    [
        conv3d::SELF_TESTS,
        conv_transpose3d::SELF_TESTS,
        dice_ce::SELF_TESTS,
        norm_prelu::SELF_TESTS,
        optimizer::SELF_TESTS,
        patch::SELF_TESTS,
        resample::SELF_TESTS,
        residual::SELF_TESTS,
        window::SELF_TESTS,
    ]
    .concat()
}
