//! From a network to masks: windows, blending, inversion to the scanner's grid.

pub mod importance;
pub mod sliding_window;
