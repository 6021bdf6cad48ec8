//! What a user may change: one struct that is the flags and the keys of the TOML file at once.

use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize};

use super::*;
use crate::{Error, Result};

/// Numbers given by a flag or by a key of the same name in a TOML file; `None` leaves the layer below.
///
/// Help headings name the stage a number belongs to; a verb that lacks the stage refuses its flags.
#[derive(Clone, Debug, Default, PartialEq, clap::Args, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
pub struct Overrides {
    /// Whose numbers are the defaults: the README of bundle 0.3.6, its config, or that of 0.5.9 [default: seed]
    #[arg(long, value_enum, help_heading = "General")]
    pub recipe: Option<Recipe>,
    /// Seed of every random stream [default: 123]
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub seed: Option<u64>,
    /// What computes: auto, cpu, cuda or cuda:N [default: auto]
    #[arg(long, help_heading = "General")]
    pub device: Option<DeviceChoice>,
    /// Mixed precision: fp16 on a CUDA device, bfloat16 products on the CPU, f32 sums; auto is on for CUDA, off for the
    /// CPU [default: auto]
    #[arg(long, value_enum, help_heading = "General")]
    pub amp: Option<Amp>,
    /// CPU threads, 0 for one a core; never changes a result [default: 0]
    #[arg(long, value_name = "N", help_heading = "General")]
    pub threads: Option<usize>,

    /// Voxel size in mm that scans are resampled to, along right, anterior, superior; one number or three [default:
    /// 1.5,1.5,2]
    #[arg(long, value_name = "MM", value_parser = one_or_three::<f64>, help_heading = "Preprocessing")]
    #[serde(deserialize_with = "one_or_three_in_toml")]
    pub spacing: Option<[f64; 3]>,
    /// The HU mapped to 0 and to 1, clipped outside [default: -57,164]
    #[arg(long, value_name = "LOW,HIGH", value_parser = pair::<f32>, allow_hyphen_values = true,
          help_heading = "Preprocessing")]
    pub hu_window: Option<[f32; 2]>,
    /// Crop to the bounding box of scaled intensity > 0 [seed: true; 0.3.6, 0.5.9: false]
    #[arg(long, value_name = "true|false", help_heading = "Preprocessing")]
    pub crop_foreground: Option<bool>,
    /// The label value that is the organ [default: 1, and labels with other values than 0 and 1 are refused]
    #[arg(long, value_name = "X", help_heading = "Labels and scores")]
    pub label_value: Option<f32>,
    /// Precision of cached images [default: f16]
    #[arg(long, value_enum, help_heading = "Cache")]
    pub cache_dtype: Option<CacheDtype>,

    /// Patch in voxels, one number or three, multiples of 16 with five levels [default: 96]
    #[arg(long, value_name = "VOXELS", value_parser = one_or_three::<usize>, help_heading = "Patches")]
    #[serde(deserialize_with = "one_or_three_in_toml")]
    pub patch: Option<[usize; 3]>,
    /// Weight of patches centred on the organ [default: 1]
    #[arg(long, value_name = "X", help_heading = "Patches")]
    pub pos: Option<f64>,
    /// Weight of patches centred elsewhere in the body [default: 1]
    #[arg(long, value_name = "X", help_heading = "Patches")]
    pub neg: Option<f64>,
    /// Patches drawn from a volume each time it comes up [default: 4]
    #[arg(long, value_name = "N", help_heading = "Patches")]
    pub samples_per_volume: Option<usize>,
    /// Volumes a step; times the patches a volume this is the batch [default: 2]
    #[arg(long, value_name = "N", help_heading = "Patches")]
    pub volumes_per_step: Option<usize>,
    /// Largest random intensity shift, 0 for none [seed: 0.1; 0.3.6, 0.5.9: 0]
    #[arg(long, value_name = "X", help_heading = "Patches")]
    pub shift_offset: Option<f32>,
    /// Probability of a shift a patch [seed: 0.5; 0.3.6, 0.5.9: 0]
    #[arg(long, value_name = "P", help_heading = "Patches")]
    pub shift_prob: Option<f64>,

    /// Normalisation layers [default: batch]
    #[arg(long, value_enum, help_heading = "Network")]
    pub norm: Option<Norm>,
    /// Channels of each level, top to bottom [default: 16,32,64,128,256]
    #[arg(long, value_name = "N,N,..", value_delimiter = ',', help_heading = "Network")]
    pub channels: Option<Vec<usize>>,

    /// Weight of the Dice loss [seed, 0.3.6: 1; 0.5.9: 0.5]
    #[arg(long, value_name = "X", help_heading = "Loss")]
    pub lambda_dice: Option<f64>,
    /// Weight of the cross entropy [seed, 0.3.6: 1; 0.5.9: 0.5]
    #[arg(long, value_name = "X", help_heading = "Loss")]
    pub lambda_ce: Option<f64>,
    /// Count the background channel in the Dice loss [default: true]
    #[arg(long, value_name = "true|false", help_heading = "Loss")]
    pub include_background: Option<bool>,
    /// Square prediction and truth in the denominator of the Dice loss [default: true]
    #[arg(long, value_name = "true|false", help_heading = "Loss")]
    pub squared_pred: Option<bool>,
    /// Sum over the batch before the ratio of the Dice loss [default: true]
    #[arg(long, value_name = "true|false", help_heading = "Loss")]
    pub batch_dice: Option<bool>,
    /// Added to numerator and denominator of the Dice loss [default: 1e-5]
    #[arg(long, value_name = "X", help_heading = "Loss")]
    pub smooth: Option<f64>,

    /// Algorithm [seed, 0.3.6: adam; 0.5.9: novograd]
    #[arg(long, value_enum, help_heading = "Optimizer")]
    pub optimizer: Option<Optimizer>,
    /// Learning rate, constant over the run [seed, 0.3.6: 1e-4; 0.5.9: 2e-3]
    #[arg(long, value_name = "X", help_heading = "Optimizer")]
    pub lr: Option<f64>,
    /// Decay of the first moment [default: 0.9]
    #[arg(long, value_name = "X", help_heading = "Optimizer")]
    pub beta1: Option<f64>,
    /// Decay of the second moment [seed, 0.3.6: 0.999; 0.5.9: 0.98]
    #[arg(long, value_name = "X", help_heading = "Optimizer")]
    pub beta2: Option<f64>,
    /// Added to the root of the second moment [default: 1e-8]
    #[arg(long, value_name = "X", help_heading = "Optimizer")]
    pub eps: Option<f64>,
    /// L2 term added to the gradient [default: 0]
    #[arg(long, value_name = "X", help_heading = "Optimizer")]
    pub weight_decay: Option<f64>,

    /// Window in voxels, one number or three, multiples of 16 with five levels [default: 96]
    #[arg(long, value_name = "VOXELS", value_parser = one_or_three::<usize>, help_heading = "Sliding window")]
    #[serde(deserialize_with = "one_or_three_in_toml")]
    pub roi: Option<[usize; 3]>,
    /// Overlap of neighbouring windows, 0 <= X < 1 [default: 0.5]
    #[arg(long, value_name = "X", help_heading = "Sliding window")]
    pub overlap: Option<f64>,
    /// Windows a forward pass [default: 4]
    #[arg(long, value_name = "N", help_heading = "Sliding window")]
    pub sw_batch: Option<usize>,
    /// How overlapping windows are weighted [default: constant]
    #[arg(long, value_enum, help_heading = "Sliding window")]
    pub blend: Option<Blend>,

    /// Passes over the training cases [seed: 1260; 0.3.6: 100; 0.5.9: 800]
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub epochs: Option<usize>,
    /// Epochs from one validation to the next [seed, 0.3.6: 5; 0.5.9: 1]
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub val_interval: Option<usize>,

    /// Data set: imagesTr and labelsTr with one .nii.gz a case, or dataset.json
    #[arg(long, value_name = "DIR", help_heading = "Cases")]
    pub data: Option<PathBuf>,
    /// Cases at the end of the sorted list that validate [default: 9, a fifth of a set below 45]
    #[arg(long, value_name = "N", help_heading = "Split")]
    pub val_cases: Option<usize>,
    /// Cross-validation in this many folds instead of --val-cases
    #[arg(long, value_name = "K", help_heading = "Split")]
    pub folds: Option<usize>,
    /// Which fold validates, counted from 0 [default: 0]
    #[arg(long, value_name = "I", help_heading = "Split")]
    pub fold: Option<usize>,
    /// Surface distance in mm that counts as agreement [default: 3, the Decathlon's for the spleen]
    #[arg(long, value_name = "MM", help_heading = "Labels and scores")]
    pub nsd_tolerance: Option<f64>,
}

/// One line a key: the field of [`Overrides`] and the number of [`Config`] it stands for. All that goes through every key is
/// made from it, and the struct literal does not compile when a key is missing.
macro_rules! keys {
    ($($key:ident => $($part:ident).+;)+) => {
        impl Overrides {
            /// Puts the given numbers over those of `config`.
            pub fn apply(&self, config: &mut Config) {
                $(if let Some(value) = &self.$key {
                    config.$($part).+ = value.clone().into();
                })+
            }

            /// These numbers, and those of `below` where these are silent.
            pub fn or(self, below: Overrides) -> Overrides {
                Overrides { $($key: self.$key.or(below.$key),)+ }
            }

            /// All numbers of `config`, as a layer that reproduces it.
            pub fn of(config: &Config) -> Overrides {
                Overrides { $($key: config.$($part).+.clone().into(),)+ }
            }
        }
    };
}

keys! {
    recipe => recipe;
    seed => seed;
    device => device;
    amp => amp;
    threads => threads;
    spacing => preprocess.spacing_mm;
    hu_window => preprocess.hu_window;
    crop_foreground => preprocess.crop_foreground;
    label_value => run.label_value;
    cache_dtype => run.cache_dtype;
    patch => sampling.patch;
    pos => sampling.pos;
    neg => sampling.neg;
    samples_per_volume => sampling.samples_per_volume;
    volumes_per_step => sampling.volumes_per_step;
    shift_offset => sampling.shift_offset;
    shift_prob => sampling.shift_prob;
    norm => net.norm;
    channels => net.channels;
    lambda_dice => loss.lambda_dice;
    lambda_ce => loss.lambda_ce;
    include_background => loss.include_background;
    squared_pred => loss.squared_pred;
    batch_dice => loss.batch;
    smooth => loss.smooth;
    optimizer => optim.optimizer;
    lr => optim.lr;
    beta1 => optim.beta1;
    beta2 => optim.beta2;
    eps => optim.eps;
    weight_decay => optim.weight_decay;
    roi => window.roi;
    overlap => window.overlap;
    sw_batch => window.batch;
    blend => window.blend;
    epochs => run.epochs;
    val_interval => run.val_interval;
    data => run.data;
    val_cases => run.val_cases;
    folds => run.folds;
    fold => run.fold;
    nsd_tolerance => run.nsd_tolerance_mm;
}

impl Overrides {
    /// Reads a TOML text; `origin` is the file that errors name.
    ///
    /// # Errors
    /// [`Error::File`] for what is not TOML, an unknown key or a value of the wrong type.
    pub fn from_toml(text: &str, origin: &Path) -> Result<Overrides> {
        toml::from_str(text).map_err(|err: toml::de::Error| {
            let line = 1 + err.span().map_or(0, |span| text[..span.start].matches('\n').count());
            let what = err.message().lines().next().unwrap_or("not TOML");
            // The list of all keys would bury the one that is wrong.
            let what = match what.split_once(", expected one of") {
                Some((unknown, _)) if unknown.starts_with("unknown field") => {
                    format!("{}; `spleen-hpc train --help` lists the keys", unknown.replace("field", "key"))
                }
                _ => what.to_owned(),
            };
            Error::file(origin, format!("line {line}: {what}"))
        })
    }

    /// The given keys as a JSON object, for the headers of binary files and for reports.
    pub fn to_json(&self) -> serde_json::Value {
        let mut json = serde_json::to_value(self).expect("flat numbers and names always make JSON");
        if let Some(keys) = json.as_object_mut() {
            keys.retain(|_, value| !value.is_null());
        }
        json
    }

    /// Reads what [`Overrides::to_json`] made; `origin` is the file that errors name.
    ///
    /// # Errors
    /// [`Error::File`] for an unknown key or a value of the wrong type.
    pub fn from_json(json: serde_json::Value, origin: &Path) -> Result<Overrides> {
        serde_json::from_value(json)
            .map_err(|err| Error::file(origin, format!("its record of the config cannot be read ({err})")))
    }

    /// The given keys as TOML, one a line, in the order of the help text.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("flat numbers and names always make TOML")
    }
}

impl Config {
    /// The recipe, with `layers` over it, later ones winning; the recipe is the last one that a layer names.
    ///
    /// # Errors
    /// [`Error::Usage`] when numbers make no sense or do not fit each other.
    pub fn resolve(layers: &[&Overrides]) -> Result<Config> {
        let recipe = layers.iter().rev().find_map(|layer| layer.recipe).unwrap_or(Recipe::Seed);
        let mut config = Config::for_recipe(recipe);
        layers.iter().for_each(|layer| layer.apply(&mut config));
        config.recipe = recipe;
        config.validate()?;
        Ok(config)
    }

    /// The resolved numbers as a TOML file that `--config` takes.
    pub fn to_toml(&self) -> String {
        Overrides::of(self).to_toml()
    }

    /// What decides a result, for its header; not where files lie, what computed it (which rounds in its own way) or how
    /// many threads did, so that equal results are equal bytes. [`Overrides::from_json`] reads it.
    pub fn record(&self) -> serde_json::Value {
        Overrides { data: None, device: None, amp: None, threads: None, ..Overrides::of(self) }.to_json()
    }
}

/// `a` or `a,b,c` on the command line.
fn one_or_three<T: FromStr + Copy>(text: &str) -> Result<[T; 3], String> {
    let wrong = || format!("`{text}` is neither a number nor three with commas between them");
    let numbers: Vec<T> =
        text.split(',').map(|part| part.trim().parse()).collect::<Result<_, _>>().map_err(|_| wrong())?;
    match numbers[..] {
        [a] => Ok([a; 3]),
        [a, b, c] => Ok([a, b, c]),
        _ => Err(wrong()),
    }
}

/// `a,b` on the command line.
fn pair<T: FromStr + Copy>(text: &str) -> Result<[T; 2], String> {
    let numbers = text.split(',').map(|part| part.trim().parse()).collect::<Result<Vec<T>, _>>();
    match numbers.as_deref() {
        Ok(&[a, b]) => Ok([a, b]),
        _ => Err(format!("`{text}` is not two numbers with a comma between them")),
    }
}

/// A number or an array of three in TOML.
fn one_or_three_in_toml<'de, D, T>(deserializer: D) -> Result<Option<[T; 3]>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Copy,
{
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected one number or an array of three")]
    enum OneOrThree<T> {
        One(T),
        Three([T; 3]),
    }
    Ok(Some(match OneOrThree::deserialize(deserializer)? {
        OneOrThree::One(a) => [a; 3],
        OneOrThree::Three(all) => all,
    }))
}
