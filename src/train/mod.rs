//! Training: optimizer, steps, validation, checkpoints.

pub mod memory_plan;
pub mod optimizer;
pub mod run;
pub mod trainer;
