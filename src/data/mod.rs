//! From files to patches: host only, never sees a tensor.

pub mod volume;
