//! `spleen-hpc import` and `spleen-hpc export`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::network::Trained;
use super::{Outcome, say};
use crate::config::Overrides;
use crate::nn::pt_write::{Wrap, write_pt};
use crate::nn::weights::{Metadata, write_safetensors};
use crate::{Error, Result};

/// Turn MONAI's model.pt into safetensors under the same names
///
/// Reads torch.save files, bare or {"model": ...}, without executing anything in them. `infer` and `evaluate` also
/// take a .pt directly.
#[derive(clap::Args)]
#[command(after_help = "Example:
  spleen-hpc import model.pt --out spleen.safetensors")]
pub struct ImportArgs {
    /// The weight file: .pt or safetensors
    #[arg(value_name = "FILE")]
    weights: PathBuf,
    /// The safetensors file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// Turn a checkpoint into weights for PyTorch: .pt for MONAI's CheckpointLoader, or safetensors
///
/// Only the network's weights are kept, under MONAI's names; the optimizer's state stays behind.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  spleen-hpc export run/best.safetensors --out model.pt
  spleen-hpc export run/best.safetensors --out weights.safetensors")]
pub struct ExportArgs {
    /// A checkpoint, or weights of any kind
    #[arg(value_name = "FILE")]
    weights: PathBuf,
    /// The file to write; its ending, .pt or .safetensors, says which kind
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Write {"model": weights} instead of the bare state_dict the bundle saves (.pt only)
    #[arg(long)]
    wrap: bool,
}

/// Any weight file to safetensors.
pub fn import(args: &ImportArgs) -> Outcome {
    if ending(&args.out) != "safetensors" {
        return Err(Error::Usage(format!("--out {} must end in .safetensors", args.out.display())));
    }
    let trained = open(&args.weights, &args.out)?;
    save_safetensors(&trained, &args.out)?;
    say(format_args!("{} arrays are in {}", trained.weights.len(), args.out.display()));
    say(format_args!("next: spleen-hpc infer --weights {} SCAN.nii.gz --out masks", args.out.display()));
    Ok(ExitCode::SUCCESS)
}

/// Any weight file to what PyTorch reads.
pub fn export(args: &ExportArgs) -> Outcome {
    let kind = ending(&args.out);
    if !matches!(kind.as_str(), "pt" | "safetensors") || args.wrap && kind != "pt" {
        let endings = if args.wrap { ".pt with --wrap" } else { ".pt or .safetensors" };
        return Err(Error::Usage(format!("--out {} must end in {endings}", args.out.display())));
    }
    let trained = open(&args.weights, &args.out)?;
    match kind.as_str() {
        "pt" => write_pt(&args.out, &trained.weights, if args.wrap { Wrap::Model } else { Wrap::Bare })?,
        _ => save_safetensors(&trained, &args.out)?,
    }
    say(format_args!("{} arrays are in {}", trained.weights.len(), args.out.display()));
    Ok(ExitCode::SUCCESS)
}

/// Reads the weights, and refuses to replace them by what is made of them.
fn open(weights: &Path, out: &Path) -> Result<Trained> {
    if let (Ok(from), Ok(to)) = (weights.canonicalize(), out.canonicalize())
        && from == to
    {
        return Err(Error::Usage(format!("--out {} is the input: choose another name", out.display())));
    }
    Trained::open(weights)
}

/// The weights with the config they were trained with, where it is known.
fn save_safetensors(trained: &Trained, out: &Path) -> Result<()> {
    let mut metadata =
        Metadata::from([("commit".into(), crate::COMMIT.into()), ("format".into(), "pt".into())]);
    let config = trained.config()?;
    if config != Overrides::default() {
        metadata.insert("config".into(), config.to_json().to_string());
    }
    write_safetensors(out, &trained.weights, &metadata)
}

fn ending(path: &Path) -> String {
    path.extension().unwrap_or_default().to_string_lossy().to_lowercase()
}
