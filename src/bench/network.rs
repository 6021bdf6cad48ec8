//! The network: a forward pass, a training step, a volume by windows, and the first window of a process.

use super::inputs::{Inputs, uniform};
use super::layers::{forward_flop, step_flop};
use super::{FORWARD_BATCH, SIDE, STEP_BATCH, VOLUME, Work, config};
use crate::Result;
use crate::device::bf16::Operands;
use crate::infer::predict::CLASSES;
use crate::infer::sliding_window::{self, Windows};
use crate::nn::UNet;
use crate::nn::weights::read_any;
use crate::train::trainer::Trainer;

/// Voxels of a patch.
const PATCH: usize = SIDE * SIDE * SIDE;

/// Logits of a batch of patches.
pub fn forward(operands: Operands) -> Result<Work> {
    let config = config();
    let mut net = UNet::new(&config.net, 1)?;
    net.set_operands(operands);
    let images = uniform(FORWARD_BATCH * PATCH);
    let flop = forward_flop(&config.net, FORWARD_BATCH, SIDE);
    Ok(Work::new(Some(flop), move || net.infer(&images, [FORWARD_BATCH, SIDE, SIDE, SIDE])))
}

/// Forward, DiceCE, backward and Adam.
pub fn step(operands: Operands) -> Result<Work> {
    let config = config();
    let mut trainer = Trainer::new(&config.net, config.loss, config.optim, 1)?;
    trainer.net.set_operands(operands);
    let images = uniform(STEP_BATCH * PATCH);
    let labels: Vec<u8> = images.iter().map(|&v| u8::from(v > 0.9)).collect();
    let flop = step_flop(&config.net, STEP_BATCH, SIDE);
    Ok(Work::new(Some(flop), move || trainer.step(&images, &labels, [STEP_BATCH, SIDE, SIDE, SIDE])))
}

/// Blended logits of a volume.
pub fn sliding_window(operands: Operands) -> Result<Work> {
    let config = config();
    let mut net = UNet::new(&config.net, 1)?;
    net.set_operands(operands);
    let volume = uniform(VOLUME.iter().product());
    let windows = Windows::new(VOLUME, &config.window).corners().len();
    let flop = forward_flop(&config.net, windows, SIDE);
    let [d, h, w] = config.window.roi;
    Ok(Work::new(Some(flop), move || {
        let mut predict = |x: &[f32], n: usize, _| net.infer(x, [n, d, h, w]);
        sliding_window::sliding_window(&volume, VOLUME, &config.window, CLASSES, &mut predict)
    }))
}

/// The network read and its first window's logits: of interest where nothing was done before in the process.
pub fn first_window(inputs: &Inputs) -> Result<Work> {
    let (path, image) = (inputs.network(), vec![0.5; PATCH]);
    Ok(Work::new(None, move || {
        let net = UNet::from_state_dict(&read_any(&path)?)?;
        net.infer(&image, [1, SIDE, SIDE, SIDE])
    }))
}
