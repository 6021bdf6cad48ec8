//! Every CUDA kernel against a plain f64 reference that nothing else uses: on the emulator, or natively with
//! `SPLEEN_TEST_DEVICE=cuda`. One module an op; each has its cases and the argument for its tolerances.

mod conv3d;
mod conv_reference;
mod conv_transpose3d;
mod dice_ce;
mod harness;
mod norm_prelu;
mod optimizer;
mod patch;
mod resample;
mod residual;
mod same_bits;
mod segment;
#[path = "../support/mod.rs"]
mod support;
mod wgrad;
mod wgrad_plan;
mod window;
