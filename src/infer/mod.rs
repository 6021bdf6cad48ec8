//! From a network to masks: windows, blending, inversion to the scanner's grid.
//!
//! read -> preprocess -> windows -> blend -> softmax -> inverse resample + argmax -> write

pub mod cuda;
pub mod evaluate;
pub mod importance;
pub mod jobs;
pub mod pipeline;
pub mod predict;
pub mod sliding_window;
pub mod stages;
