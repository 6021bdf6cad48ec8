//! What a user waits for, ready to be timed: peaks of the machine, the network and its layers, a scan's way through.
//!
//! Sizes are those of the bundle: channels 16 to 256, patches of 96^3, scans of 512 x 512 x 90; rows `scale_*` vary them.
//! Multiply-adds are counted from the network's own weights, two FLOP each; norms, PReLU and sums are not counted.
//!
//! A [`Bench`] is a name and a way to prepare [`Work`]; whoever measures repeats the work with [`measure`], or in
//! turn with another program's.

pub mod inputs;
pub mod layers;
mod network;
mod peaks;
mod roofline;
mod sample;
mod scaling;
mod scan;

pub use roofline::{Cost, Roof};
pub use sample::{Samples, Work, measure};

use inputs::Inputs;
use layers::{PASSES, Pass, layers};

use crate::Result;
use crate::config::{Config, Recipe};
use crate::device::bf16::Operands::{self, Bf16, Single};

/// Patches of a forward pass, and of each layer's passes.
pub const FORWARD_BATCH: usize = 4;
/// Patches of a training step.
pub const STEP_BATCH: usize = 2;
/// Side of a patch and of a window.
pub const SIDE: usize = 96;
/// The volume of the sliding window's row.
pub const VOLUME: [usize; 3] = [256, 256, 128];
/// Name of the row that rows in f32 take their share of.
pub const PEAK_F32: &str = "peak_fma_f32";
/// Name of the row that rows in bfloat16 take their share of.
pub const PEAK_BF16: &str = "peak_bf16";
/// Name of the row whose speed is bytes.
pub const COPY: &str = "copy_bandwidth";

/// Prepares the work of a row.
type Prepare = Box<dyn Fn(&Inputs) -> Result<Work>>;

/// One row.
pub struct Bench {
    /// Its name.
    pub name: String,
    /// Whether it reads the files of [`Inputs`].
    pub reads_files: bool,
    /// Whether its time is that of a process, from its start to the end of the work, each run another process.
    pub fresh_process: bool,
    /// The row that its FLOP take their share of; `None` where FLOP are not the measure.
    pub peak: Option<&'static str>,
    /// Whether it is timed only where it is asked for by name.
    pub by_name: bool,
    prepare: Prepare,
}

impl Bench {
    fn new(name: impl Into<String>, prepare: impl Fn(&Inputs) -> Result<Work> + 'static) -> Self {
        Bench {
            name: name.into(),
            reads_files: false,
            fresh_process: false,
            peak: None,
            by_name: false,
            prepare: Box::new(prepare),
        }
    }

    fn with_files(name: &str, prepare: impl Fn(&Inputs) -> Result<Work> + 'static) -> Self {
        Bench { reads_files: true, ..Bench::new(name, prepare) }
    }

    /// A row whose FLOP are those of convolutions of these operands.
    fn in_dtype(self, operands: Operands) -> Self {
        let peak = match operands {
            Single => PEAK_F32,
            Bf16 => PEAK_BF16,
        };
        Bench { peak: Some(peak), ..self }
    }

    /// Makes what the work needs in memory.
    ///
    /// # Errors
    /// Files of `inputs` that cannot be read.
    pub fn prepare(&self, inputs: &Inputs) -> Result<Work> {
        (self.prepare)(inputs)
    }
}

/// The numbers of every row: the bundle's.
pub fn config() -> Config {
    Config::for_recipe(Recipe::V036)
}

/// How names of rows end.
fn dtype(operands: Operands) -> &'static str {
    match operands {
        Single => "f32",
        Bf16 => "bf16",
    }
}

/// Every row, in the order in which they are printed.
pub fn benches() -> Vec<Bench> {
    let net = config().net;
    let forward = |o| move |_: &Inputs| network::forward(&config().net, FORWARD_BATCH, SIDE, o);
    let step = |o| move |_: &Inputs| network::step(&config().net, STEP_BATCH, SIDE, o);
    let window = |o| move |_: &Inputs| network::sliding_window(o);
    let infer = |o| move |inputs: &Inputs| scan::infer(inputs, o);
    let mut rows = vec![
        Bench::new(PEAK_F32, |_| Ok(peaks::fma(Single))).in_dtype(Single),
        Bench::new(PEAK_BF16, |_| Ok(peaks::fma(Bf16))).in_dtype(Bf16),
        Bench::new(COPY, |_| Ok(peaks::copy())),
        Bench::new("forward_b4_96_f32", forward(Single)).in_dtype(Single),
        Bench::new("forward_b4_96_bf16", forward(Bf16)).in_dtype(Bf16),
        Bench::new("step_b2_96_f32", step(Single)).in_dtype(Single),
        Bench::new("step_b2_96_bf16", step(Bf16)).in_dtype(Bf16),
        Bench::new("sliding_window_256x256x128_f32", window(Single)).in_dtype(Single),
        Bench::new("sliding_window_256x256x128_bf16", window(Bf16)).in_dtype(Bf16),
        Bench::with_files("preprocess_512x512x90", scan::preprocess),
        Bench::with_files("postprocess_512x512x90", scan::postprocess),
        Bench::with_files("infer_512x512x90_f32", infer(Single)).in_dtype(Single),
        Bench::with_files("infer_512x512x90_bf16", infer(Bf16)).in_dtype(Bf16),
        Bench { fresh_process: true, ..Bench::with_files("start_to_first_window", network::first_window) },
    ];
    for layer in layers(&net) {
        for pass in PASSES.into_iter().filter(|&pass| layer.has(pass)) {
            let (name, layer) = (layer_row(&layer.name, pass), layer.clone());
            let row = Bench::new(name, move |_| Ok(layer.work(pass, FORWARD_BATCH, [SIDE; 3])));
            rows.push(row.in_dtype(Single));
        }
    }
    rows.extend(scaling::benches());
    rows
}

/// The row of a layer's pass.
pub fn layer_row(layer: &str, pass: Pass) -> String {
    format!("layer_{layer}_{pass}")
}
