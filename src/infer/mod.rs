//! From a network to masks: windows, blending, inversion to the scanner's grid.
//!
//! read -> preprocess -> windows -> blend -> softmax -> inverse resample + argmax -> write

pub mod cuda;
pub mod evaluate;
pub mod first_level;
pub mod importance;
pub mod jobs;
pub mod pipeline;
pub mod predict;
pub mod sliding_window;
pub mod stages;

use std::sync::atomic::AtomicBool;

use crate::Result;
use crate::config::{Preprocess, Window};
use jobs::{Job, Style};
use pipeline::Statistics;
use predict::Predictor;

/// Segments every job where the network computes; `done` is told of each as it ends, in order. An error of one scan
/// does not keep the others.
///
/// When `stop` becomes true no further scan is begun, those under way are finished, and the answer is shorter.
pub fn segment(
    jobs: &[Job],
    predictor: &Predictor,
    numbers: (&Preprocess, &Window),
    style: Style,
    stop: &AtomicBool,
    done: impl FnMut(&Job, &Result<Statistics>) + Send,
) -> Vec<Result<Statistics>> {
    match predictor {
        Predictor::Host(network) => pipeline::segment(jobs, network, numbers, style, stop, done),
        Predictor::Device(cuda, network) => cuda::segment(jobs, (cuda, network), numbers, style, stop, done),
    }
}
