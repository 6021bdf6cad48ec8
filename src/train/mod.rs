//! Training: optimizer, steps, validation, checkpoints.

pub mod optimizer;
pub mod run;
pub mod trainer;
