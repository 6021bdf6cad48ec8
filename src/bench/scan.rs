//! A scan's way: file to the network's grid, probabilities to a mask on disk, and all of it.

use std::sync::atomic::AtomicBool;

use super::inputs::Inputs;
use super::layers::forward_costs;
use super::{SIDE, Work, config};
use crate::data::{nifti, nifti_write, preprocess as transforms, scan};
use crate::device::bf16::Operands;
use crate::infer::jobs::{Style, jobs};
use crate::infer::pipeline::segment;
use crate::infer::predict::{Network, softmax};
use crate::infer::sliding_window::Windows;
use crate::nn::UNet;
use crate::nn::weights::read_any;
use crate::{Error, Result};

/// Logits of spleen and background where the label says spleen; the other way round elsewhere.
const SURE: f32 = 4.0;

/// Voxels from one that is wrongly taken for spleen to the next: 600 of them all over the grid.
const STRAY: usize = 20_011;

/// .nii.gz to intensities on the network's grid, without a label.
pub fn preprocess(inputs: &Inputs) -> Result<Work> {
    let (path, config) = (inputs.ct(), config().preprocess);
    Ok(Work::new(Vec::new(), move || scan::read(&path, &config)))
}

/// Logits on the network's grid to a u8 mask on the scan's grid in a .nii.gz: softmax, inverse resampling, argmax,
/// deflate. The logits are those of a network that has found the phantom's spleen, and a stray voxel here and there.
pub fn postprocess(inputs: &Inputs) -> Result<Work> {
    let config = config().preprocess;
    let file = nifti::read(inputs.ct())?;
    let label = nifti::label_from(&nifti::read(inputs.label())?.volume, None, inputs.label())?;
    let prepared = transforms::preprocess(&file.volume, Some(&label), &config)?;
    let label = prepared.label.ok_or_else(|| Error::Internal("bench: the label is lost".into()))?;
    let organ = |(at, &l): (usize, &u8)| l == 1 || at.is_multiple_of(STRAY);
    let voxels = label.data.iter().enumerate().map(organ);
    let logits: Vec<f32> = voxels.flat_map(|o| if o { [-SURE, SURE] } else { [SURE, -SURE] }).collect();
    let (header, geometry, path) = (file.header, prepared.geometry, inputs.folder().join("post.nii.gz"));
    let setup = move || logits.clone();
    Ok(Work::with_setup(Vec::new(), setup, move |mut probabilities| {
        softmax(&mut probabilities);
        let mask = geometry.invert_argmax(bytemuck::cast_slice(&probabilities))?;
        nifti_write::write_mask(&path, &header, &mask)
    }))
}

/// .nii.gz to mask as `spleen-hpc infer` does it, the network already in memory.
pub fn infer(inputs: &Inputs, operands: Operands) -> Result<Work> {
    let config = config();
    let mut net = UNet::from_state_dict(&read_any(&inputs.network())?)?;
    net.set_operands(operands);
    let jobs = jobs(&[inputs.ct()], &inputs.folder().join("masks"), Style::Mask)?;
    let header = nifti::read_header(inputs.ct())?;
    let geometry = transforms::Geometry::plan(header.shape, &header.affine, config.preprocess.spacing_mm)?;
    let windows = Windows::new(geometry.prepared_shape(), &config.window).corners().len();
    Ok(Work::new(forward_costs(&config.net, windows, SIDE), move || {
        let network = Network::UNet(&net, &|_| Ok(()));
        let numbers = (&config.preprocess, &config.window);
        let results = segment(&jobs, &network, numbers, Style::Mask, &AtomicBool::new(false), |_, _| {});
        results.into_iter().collect::<Result<Vec<_>>>()
    }))
}
