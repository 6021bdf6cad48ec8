//! Training: optimizer, steps, validation, checkpoints.

pub mod optimizer;
pub mod trainer;
