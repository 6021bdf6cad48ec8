//! Synthetic inputs: random numbers, and the files that the rows of a scan read.

use std::path::{Path, PathBuf};

use super::config;
use crate::data::phantom::{PhantomConfig, case};
use crate::data::{nifti, nifti_write, publish};
use crate::nn::UNet;
use crate::nn::weights::{Metadata, write_safetensors};
use crate::rng::Philox;
use crate::{Error, Result};

/// Bias of the background's logit: as it is drawn, an untrained network takes half of the scan for spleen; with this one
/// 7 of 1000 voxels of the phantom, as many as a spleen has.
const BACKGROUND_BIAS: f32 = 0.25;

/// Voxels of the scan.
const SCAN: [usize; 3] = [512, 512, 90];

/// A folder with a scan, its label and a network.
#[derive(Clone, Debug)]
pub struct Inputs {
    folder: PathBuf,
}

impl Inputs {
    /// The files in `folder`, which need not be there yet.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Inputs { folder: folder.into() }
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A phantom's CT of 512 x 512 x 90 voxels, int16.
    pub fn ct(&self) -> PathBuf {
        self.folder.join("ct.nii.gz")
    }

    /// Its label.
    pub fn label(&self) -> PathBuf {
        self.folder.join("label.nii.gz")
    }

    /// The bundle's network with initial weights, one bias excepted.
    pub fn network(&self) -> PathBuf {
        self.folder.join("network.safetensors")
    }

    /// Makes the files that are not there.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn make(&self) -> Result<()> {
        publish::folder(&self.folder)?;
        for path in [self.ct(), self.label()].iter().filter(|path| path.exists()) {
            let shape = nifti::read_header(path)?.shape;
            if shape != SCAN {
                let what =
                    format!("has {shape:?} voxels, bench times {SCAN:?}: name another folder for --inputs");
                return Err(Error::file(path, what));
            }
        }
        if !(self.ct().exists() && self.label().exists()) {
            let (ct, label) = case(&PhantomConfig { full: true, ..PhantomConfig::default() }, 0);
            if !self.ct().exists() {
                nifti_write::write_volume(self.ct(), &ct)?;
            }
            if !self.label().exists() {
                nifti_write::write_volume(self.label(), &label)?;
            }
        }
        if !self.network().is_file() {
            let mut net = UNet::new(&config().net, 1)?;
            let last = net.params_mut().last_mut();
            let bias = last.ok_or_else(|| Error::Internal("bench: a network without parameters".into()))?;
            bias.make_mut()[0] = BACKGROUND_BIAS;
            write_safetensors(&self.network(), &net.state_dict(), &Metadata::new())?;
        }
        Ok(())
    }
}

/// `len` numbers from 0 to 1, always the same.
pub fn uniform(len: usize) -> Vec<f32> {
    let mut rng = Philox::new(1, len as u64);
    (0..len).map(|_| rng.uniform() as f32).collect()
}
