//! spleen-hpc trains and runs a 3D residual U-Net that segments the spleen in CT.
//!
//! The modules stand in the order in which data flows; a module uses only itself and those above it.
#![deny(missing_docs)]

pub mod error;
pub mod rng;

pub mod config;

pub mod data;

pub mod device;

pub mod tensor;

pub mod ops;

pub mod nn;

pub mod metrics;

pub mod infer;

pub mod report;

pub mod train;

pub mod bench;

pub mod cli;

pub use error::{Error, Result};

/// The commit this program was built from, or `unknown` outside a git checkout.
pub const COMMIT: &str = env!("SPLEEN_COMMIT");
