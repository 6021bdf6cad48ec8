//! Every CUDA kernel against a plain f64 reference that nothing else uses: on the emulator, or natively with
//! `SPLEEN_KERNEL_DEVICE=cuda`. One module an op; each has its cases and the argument for its tolerances.

mod harness;
mod resample;
mod residual;
mod segment;
mod window;
