//! The network, its parameters and its files.

pub mod state_dict;
pub mod unet;

pub use unet::{Mode, UNet};
