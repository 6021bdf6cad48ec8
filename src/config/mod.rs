//! Every number of a run, in one place.
//!
//! A [`Config`] is a recipe with layers of [`Overrides`] over it: those of a TOML file, then those of the command
//! line. The parts are plain structs that the stages take by reference; nothing below `cli` reads a flag or a file.

mod overrides;
mod recipe;
mod validate;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use overrides::Overrides;
pub use validate::check_threads;

/// Everything that decides what a run computes.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Where the defaults came from.
    pub recipe: Recipe,
    /// Seed of every random stream.
    pub seed: u64,
    /// What computes.
    pub device: DeviceChoice,
    /// How a CUDA device computes.
    pub amp: Amp,
    /// CPU threads; 0 means one a core. Never changes a result.
    pub threads: usize,
    /// From a scan to the network's grid.
    pub preprocess: Preprocess,
    /// Patches of a training step.
    pub sampling: Sampling,
    /// The network.
    pub net: Net,
    /// What training minimises.
    pub loss: Loss,
    /// How it is minimised.
    pub optim: Optim,
    /// Inference by windows.
    pub window: Window,
    /// Length of the run, data split, scores.
    pub run: Run,
}

/// Cases of a run and their split, length, and what is scored.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// The data set, laid out like the Medical Segmentation Decathlon's.
    pub data: Option<PathBuf>,
    /// Passes over the training cases.
    pub epochs: usize,
    /// Epochs from one validation to the next.
    pub val_interval: usize,
    /// Cases at the end of the sorted list that validate, unless `folds` is set; `None`: the bundle's 9, or every
    /// fifth of a set that is too small for that.
    pub val_cases: Option<usize>,
    /// Number of cross-validation folds, at least 2, instead of the bundle's split.
    pub folds: Option<usize>,
    /// Which fold validates, 0-based.
    pub fold: usize,
    /// The label value that is the organ; `None`: the labels hold 0 and 1 only.
    pub label_value: Option<f32>,
    /// Precision of cached images.
    pub cache_dtype: CacheDtype,
    /// Surface distance in mm that still counts as agreement (normalised surface Dice). 3 by default, as the Medical
    /// Segmentation Decathlon scored the spleen (Antonelli et al., Nature Communications 2022).
    pub nsd_tolerance_mm: f64,
}

/// Precision of cached images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum CacheDtype {
    /// Half precision: 2 bytes a voxel, within 2^-12 of a [0, 1] image.
    F16,
    /// Single precision: exact, 4 bytes a voxel.
    F32,
}

/// What the user asked to compute on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceChoice {
    /// The fastest device that answers.
    Auto,
    /// The processor.
    Cpu,
    /// CUDA device of this number.
    Cuda(u32),
    /// The CUDA kernels run on the CPU, in a schedule drawn from this seed: for tests.
    #[cfg(emulated)]
    Emulated(u64),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.strip_prefix("cuda:").map(str::parse);
        #[cfg(emulated)]
        if let Some(seed) = text.strip_prefix("emulated:").map_or((text == "emulated").then_some("0"), Some) {
            let wrong = |_| format!("`{seed}` is no seed of an emulated device: say emulated:N");
            return seed.parse().map(DeviceChoice::Emulated).map_err(wrong);
        }
        match (text, number) {
            ("auto", _) => Ok(DeviceChoice::Auto),
            ("cpu", _) => Ok(DeviceChoice::Cpu),
            ("cuda", _) => Ok(DeviceChoice::Cuda(0)),
            (_, Some(Ok(number))) => Ok(DeviceChoice::Cuda(number)),
            _ => Err(format!("`{text}` is not a device: say auto, cpu, cuda or cuda:N")),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceChoice::Auto => f.write_str("auto"),
            DeviceChoice::Cpu => f.write_str("cpu"),
            DeviceChoice::Cuda(n) => write!(f, "cuda:{n}"),
            #[cfg(emulated)]
            DeviceChoice::Emulated(seed) => write!(f, "emulated:{seed}"),
        }
    }
}

/// Automatic mixed precision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Amp {
    /// On for a CUDA device, off for the CPU, as PyTorch's autocast is used.
    Auto,
    /// A CUDA device: fp16 storage and tensor cores. The CPU: bfloat16 products. Sums are f32 in both.
    On,
    /// f32 storage and arithmetic.
    Off,
}

impl TryFrom<String> for DeviceChoice {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<DeviceChoice> for String {
    fn from(device: DeviceChoice) -> String {
        device.to_string()
    }
}

/// Which version of the bundle's recipe the defaults come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub enum Recipe {
    /// Bundle 0.3.6 as its README describes it: foreground crop, intensity shift, 1260 epochs.
    #[serde(rename = "seed")]
    #[value(name = "seed")]
    Seed,
    /// Bundle 0.3.6 exactly: Adam 1e-4, DiceCE 1/1, 100 epochs.
    #[serde(rename = "0.3.6")]
    #[value(name = "0.3.6")]
    V036,
    /// Bundle 0.5.9 exactly: Novograd 2e-3, DiceCE 0.5/0.5, 800 epochs.
    #[serde(rename = "0.5.9")]
    #[value(name = "0.5.9")]
    V059,
}

/// Deterministic preprocessing: orientation RAS, spacing, intensity, foreground crop.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Preprocess {
    /// Target voxel size in mm along RAS x, y, z (MONAI `Spacingd` pixdim).
    pub spacing_mm: [f64; 3],
    /// HU mapped to 0 and 1, clipped outside (MONAI `ScaleIntensityRanged` a_min, a_max).
    pub hu_window: [f32; 2],
    /// Crop to the bounding box of scaled intensity > 0 (MONAI `CropForegroundd`, margin 0).
    pub crop_foreground: bool,
}

/// Random patches and their augmentation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Patch size in voxels (D, H, W).
    pub patch: [usize; 3],
    /// Weight of foreground centres (MONAI `RandCropByPosNegLabeld` pos).
    pub pos: f64,
    /// Weight of background centres.
    pub neg: f64,
    /// Patches drawn from one volume (MONAI num_samples).
    pub samples_per_volume: usize,
    /// Volumes a step (MONAI DataLoader batch_size).
    pub volumes_per_step: usize,
    /// Largest intensity shift (MONAI `RandShiftIntensityd` offsets); 0 switches it off.
    pub shift_offset: f32,
    /// Probability of a shift per patch.
    pub shift_prob: f64,
}

/// Normalisation layers of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Norm {
    /// BatchNorm3d, affine, running statistics: the bundle's.
    Batch,
    /// InstanceNorm3d without parameters: MONAI's default.
    Instance,
}

/// The residual U-Net (MONAI `UNet` with strides 2, kernel 3, two residual units).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Net {
    /// Normalisation layers.
    pub norm: Norm,
    /// Channels of each level, top to bottom; at least two levels.
    pub channels: Vec<usize>,
}

/// Dice + cross entropy (MONAI `DiceCELoss` with softmax and one-hot).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Loss {
    /// Weight of the Dice term.
    pub lambda_dice: f64,
    /// Weight of the cross entropy.
    pub lambda_ce: f64,
    /// Whether the background channel takes part in the Dice term.
    pub include_background: bool,
    /// Squares p and g in the denominator.
    pub squared_pred: bool,
    /// Sums over the batch before the ratio.
    pub batch: bool,
    /// Added to numerator and denominator.
    pub smooth: f64,
}

/// Optimizer algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Optimizer {
    /// torch.optim.Adam.
    Adam,
    /// monai.optimizers.Novograd.
    Novograd,
}

/// Optimizer and learning rate.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Optim {
    /// Algorithm.
    pub optimizer: Optimizer,
    /// Learning rate; constant over a run.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// L2 term added to the gradient.
    pub weight_decay: f64,
}

/// How overlapping windows are weighted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Blend {
    /// Every voxel of a window counts 1.
    Constant,
    /// MONAI's Gaussian importance map, sigma 0.125 of the window.
    Gaussian,
}

/// Sliding-window inference (MONAI `SlidingWindowInferer`).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Window {
    /// Window size in voxels (D, H, W).
    pub roi: [usize; 3],
    /// Overlap of neighbouring windows, 0 <= overlap < 1.
    pub overlap: f64,
    /// Windows a forward pass.
    pub batch: usize,
    /// Weighting.
    pub blend: Blend,
}
