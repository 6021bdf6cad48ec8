//! Training: optimizer, steps, validation, checkpoints.

pub mod device_engine;
pub mod feed;
pub mod memory_plan;
pub mod optimizer;
pub mod run;
mod staging;
pub mod trainer;
