//! Every CUDA kernel against a plain f64 reference that nothing else uses: on the emulator, or natively with
//! `SPLEEN_KERNEL_DEVICE=cuda`. One module an op; each has its cases and the argument for its tolerances.

mod conv3d;
mod conv_reference;
mod conv_transpose3d;
mod harness;
mod residual;
