//! The network: a forward pass, a training step, a volume by windows, and the first window of a process.

use super::inputs::{Inputs, uniform};
use super::layers::{forward_costs, step_costs};
use super::{SIDE, VOLUME, Work, config};
use crate::Result;
use crate::config::Net;
use crate::device::bf16::Operands;
use crate::infer::predict::Network;
use crate::infer::sliding_window::Windows;
use crate::nn::UNet;
use crate::nn::weights::read_any;
use crate::train::trainer::Trainer;

/// Prepares work on `n` patches of `side`^3.
pub type Prepare = fn(net: &Net, n: usize, side: usize, operands: Operands) -> Result<Work>;

/// Logits of a batch of patches.
pub fn forward(net: &Net, n: usize, side: usize, operands: Operands) -> Result<Work> {
    let costs = forward_costs(net, n, side);
    let mut net = UNet::new(net, 1)?;
    net.set_operands(operands);
    let images = uniform(n * side.pow(3));
    Ok(Work::new(costs, move || net.infer(&images, [n, side, side, side])))
}

/// Forward, DiceCE, backward and Adam.
pub fn step(net: &Net, n: usize, side: usize, operands: Operands) -> Result<Work> {
    let (config, costs) = (config(), step_costs(net, n, side));
    let mut trainer = Trainer::new(net, config.loss, config.optim, 1)?;
    trainer.net.set_operands(operands);
    let images = uniform(n * side.pow(3));
    let labels: Vec<u8> = images.iter().map(|&v| u8::from(v > 0.9)).collect();
    Ok(Work::new(costs, move || trainer.step(&images, &labels, [n, side, side, side])))
}

/// Blended logits of a volume.
pub fn sliding_window(operands: Operands) -> Result<Work> {
    let config = config();
    let mut net = UNet::new(&config.net, 1)?;
    net.set_operands(operands);
    let volume = uniform(VOLUME.iter().product());
    let windows = Windows::new(VOLUME, &config.window).corners().len();
    let costs = forward_costs(&config.net, windows, SIDE);
    Ok(Work::new(costs, move || Network::UNet(&net, &|_| Ok(())).logits(&volume, VOLUME, &config.window)))
}

/// The network read and its first window's logits: of interest where nothing was done before in the process.
pub fn first_window(inputs: &Inputs) -> Result<Work> {
    let (path, image) = (inputs.network(), vec![0.5; SIDE.pow(3)]);
    Ok(Work::new(Vec::new(), move || {
        let net = UNet::from_state_dict(&read_any(&path)?)?;
        net.infer(&image, [1, SIDE, SIDE, SIDE])
    }))
}
