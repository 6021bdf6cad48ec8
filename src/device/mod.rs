//! What computes: threads and vector units of the CPU, and the memory they write.

pub mod arena;
pub mod cpu;
pub mod cuda;
pub mod nvtx;
