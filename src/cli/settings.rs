//! Flags, TOML file and recipe become one [`Config`].

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::parser::ValueSource;
use clap::{ArgMatches, Command};

use super::tell;
use crate::config::{Config, Overrides, check_threads};
use crate::device::bf16::Operands;
use crate::device::cpu::{Simd, simd_of_pairs};
use crate::device::cuda::{Prepared, sources};
use crate::device::{Device, choice};
use crate::{Error, Result};

/// The numbers of a run, as every verb that computes takes them.
#[derive(clap::Args)]
pub struct Settings {
    /// TOML file whose keys are the flags' names, such as `lr = 1e-3`; flags win
    #[arg(long, value_name = "FILE", help_heading = "General")]
    config: Option<PathBuf>,
    #[command(flatten)]
    flags: Overrides,
}

impl Settings {
    /// What the user gave: flags over the TOML file.
    pub fn given(&self) -> Result<Overrides> {
        let file = self.config.as_deref().map_or_else(|| Ok(Overrides::default()), read_toml)?;
        Ok(self.flags.clone().or(file))
    }
}

/// recipe < `base` < `given` < `fixed`. Sets the number of threads of the process.
///
/// `base` is what the verb knows better than a recipe, such as the config that its weights were trained with; naming
/// another recipe than its own drops it, for then it is that recipe's numbers that are wanted. `fixed` is what is
/// not the user's to choose, such as the network that the weights are for.
pub fn resolve(base: &Overrides, given: &Overrides, fixed: &Overrides) -> Result<Config> {
    let nothing = Overrides::default();
    let other = given.recipe.is_some() && base.recipe.is_some() && given.recipe != base.recipe;
    let base = if other { &nothing } else { base };
    let config = Config::resolve(&[base, given, fixed])?;
    use_threads(config.threads)?;
    Ok(config)
}

/// Sets the number of threads of the process; 0 means one a core.
pub fn use_threads(threads: usize) -> Result<()> {
    if threads == 0 {
        return Ok(());
    }
    check_threads(threads)?;
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .map_err(|err| Error::Internal(format!("cannot start {threads} threads: {err}")))
}

/// The data set of a verb that cannot do without.
///
/// # Errors
/// [`Error::Usage`] where neither flag nor file names one.
pub fn data(config: &Config) -> Result<&Path> {
    let missing = || Error::Usage("--data DIR is needed: a folder with imagesTr and labelsTr".into());
    config.run.data.as_deref().ok_or_else(missing)
}

/// The layer in a TOML file.
pub fn read_toml(path: &Path) -> Result<Overrides> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path, "read"))?;
    Overrides::from_toml(&text, path)
}

/// The device that `config` means, with its kernels compiled; says on stderr which and why.
///
/// # Errors
/// [`Error::Usage`] where one was asked for that cannot be had, and kernels that do not compile.
pub fn choose_device(config: &Config) -> Result<Device> {
    let (device, why) = choice::resolve(config.device, config.amp)?;
    tell(format_args!("device: {why}"));
    if matches!(device, Device::Cpu(Operands::Bf16)) && simd_of_pairs() != Simd::Avx512 {
        tell("warning: without AVX-512 BF16 this CPU is faster with --amp off");
    }
    if let Device::Cuda(cuda) = &device {
        // All at once and in parallel: one after another, as they are first used, they would take minutes.
        let begun = Instant::now();
        let files: Vec<&str> = sources::all().map(|source| source.file).collect();
        let Prepared { compiled, warning, .. } = cuda.prepare(&files)?;
        if compiled > 0 {
            let seconds = begun.elapsed().as_secs_f64();
            tell(format_args!("kernels: {compiled} files compiled in {seconds:.1} s"));
        }
        warning.iter().for_each(|warning| tell(format_args!("warning: {warning}")));
    }
    Ok(device)
}

/// The headings of [`Overrides`] that a verb has no use for: hidden in its help and refused on its command line.
/// A TOML file may hold any key, so that one file serves all verbs.
fn foreign_headings(verb: &str) -> &'static [&'static str] {
    match verb {
        "infer" => &[
            "Cases",
            "Split",
            "Cache",
            "Labels and scores",
            "Patches",
            "Network",
            "Loss",
            "Optimizer",
            "Training",
        ],
        "evaluate" => &["Cache", "Patches", "Network", "Loss", "Optimizer", "Training"],
        "cache" => &["Network", "Patches", "Loss", "Optimizer", "Sliding window", "Training", "Split"],
        _ => &[],
    }
}

/// Takes the foreign flags of each verb out of its help.
pub fn hide_foreign_flags(mut command: Command) -> Command {
    let verbs: Vec<String> = command.get_subcommands().map(|verb| verb.get_name().to_owned()).collect();
    for verb in verbs {
        let foreign = foreign_headings(&verb);
        command = command.mut_subcommand(verb, |verb| {
            verb.mut_args(|arg| {
                let hide = arg.get_help_heading().is_some_and(|heading| foreign.contains(&heading));
                if hide { arg.hide(true) } else { arg }
            })
        });
    }
    command
}

/// Refuses a foreign flag that was given all the same: silence would look like consent.
pub fn refuse_foreign_flags(matches: &ArgMatches, command: &Command) -> Result<()> {
    let Some((verb, given)) = matches.subcommand() else { return Ok(()) };
    let arguments = command.find_subcommand(verb).into_iter().flat_map(Command::get_arguments);
    for arg in arguments {
        let foreign = arg.get_help_heading().is_some_and(|heading| foreign_headings(verb).contains(&heading));
        if foreign && given.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine) {
            let flag = arg.get_long().unwrap_or_default();
            return Err(Error::Usage(format!("`spleen-hpc {verb}` has no use for --{flag}: leave it out")));
        }
    }
    Ok(())
}
