//! The network's numbers: names, weight files, checkpoints.

mod archive;
pub mod checkpoint;
pub mod pickle;
pub mod pickle_class;
pub mod pt_read;
pub mod pt_write;
mod publish;
pub mod state_dict;
pub mod weights;
