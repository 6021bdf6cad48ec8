//! The network, its parameters and its files.

mod archive;
pub mod checkpoint;
pub mod pickle;
pub mod pickle_class;
pub mod pt_read;
pub mod pt_write;
pub mod state_dict;
pub mod unet;
pub mod weights;

pub use unet::{Mode, UNet};
