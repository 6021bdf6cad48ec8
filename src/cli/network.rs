//! Weights from a file: what they are, how they were trained, and the network they make.

use std::path::Path;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use super::progress::Progress;
use crate::config::{Net, Overrides};
use crate::device::Device;
use crate::infer::predict::{Network, Predictor};
use crate::nn::UNet;
use crate::nn::checkpoint::{CheckpointMeta, Split};
use crate::nn::state_dict::{StateDict, infer_net};
use crate::nn::weights::{Metadata, read_with_metadata};
use crate::tensor::View;
use crate::{Error, Result};

/// A weight file of any kind, read and checked.
pub struct Trained {
    /// The arrays under MONAI's names.
    pub weights: StateDict,
    /// What the file says about itself; empty for MONAI's own files.
    pub metadata: Metadata,
    net: Net,
}

impl Trained {
    /// Reads `path`: MONAI's model.pt, a checkpoint, or plain safetensors.
    pub fn open(path: &Path) -> Result<Trained> {
        let (weights, metadata) = read_with_metadata(path)?;
        let net = infer_net(&weights)?;
        Ok(Trained { weights, metadata, net })
    }

    /// The numbers the weights were trained with, where the file says so.
    pub fn config(&self) -> Result<Overrides> {
        let origin = self.weights.origin();
        let refuse = |err| Error::file(origin, format!("its header cannot be read ({err}): make it again"));
        let config = match (self.metadata.get("meta"), self.metadata.get("config")) {
            (Some(meta), _) => serde_json::from_str::<CheckpointMeta>(meta).map_err(refuse)?.config,
            (None, Some(config)) => serde_json::from_str(config).map_err(refuse)?,
            (None, None) => return Ok(Overrides::default()),
        };
        Overrides::from_json(config, origin)
    }

    /// The layer no flag can argue with: what network the weights are for.
    pub fn fixed(&self) -> Overrides {
        Overrides {
            norm: Some(self.net.norm),
            channels: Some(self.net.channels.clone()),
            ..Overrides::default()
        }
    }

    /// Names of the cases the weights were trained on, where the file says so.
    pub fn learned_from(&self) -> Vec<String> {
        let split = match (self.metadata.get("meta"), self.metadata.get("split")) {
            (Some(meta), _) => serde_json::from_str::<CheckpointMeta>(meta).map(|meta| meta.split),
            (None, Some(split)) => serde_json::from_str::<Split>(split),
            (None, None) => return Vec::new(),
        };
        split.map_or_else(|_| Vec::new(), |split| split.train)
    }

    /// The network, ready to predict on `device`.
    ///
    /// # Errors
    /// When the device has not enough memory.
    pub fn network(&self, device: &Device) -> Result<Ready> {
        let mut net = UNet::from_state_dict(&self.weights)?;
        match device {
            Device::Cpu(operands) => net.set_operands(*operands),
            Device::Cuda(cuda) => net.place_for_inference(cuda)?,
        }
        Ok(Ready { net })
    }
}

/// A network where it computes.
pub struct Ready {
    net: UNet,
}

impl Ready {
    /// Runs `work` with it; the bar counts its windows.
    pub fn predict<R>(&self, progress: &Progress, work: impl FnOnce(&Predictor) -> R) -> R {
        let windows = AtomicUsize::new(0);
        let count = |n: usize| progress.note(format!("{} windows", windows.fetch_add(n, Relaxed) + n));
        match self.net.params()[0].cuda() {
            None => {
                let told = |windows| {
                    count(windows);
                    Ok(())
                };
                work(&Predictor::Host(Network::UNet(&self.net, &told)))
            }
            Some(cuda) => work(&Predictor::Device(cuda, &|x: &View| {
                let logits = self.net.infer_on_device(x)?;
                count(x.shape.n);
                Ok(logits)
            })),
        }
    }
}
