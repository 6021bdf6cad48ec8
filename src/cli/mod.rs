//! The command line: flags in, exit code out, every failure one sentence on stderr.

mod bench;
mod bench_row;
mod cache;
mod doctor;
mod evaluate;
mod infer;
mod interrupt;
mod memory;
mod network;
mod phantom;
mod progress;
mod settings;
mod train;
mod weights;

use std::fmt::Display;
use std::io::Write;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::Result;
use crate::device::cpu;

/// The exit code of a shell's command that Ctrl-C ended.
const INTERRUPTED: u8 = 130;

/// Trains and runs a 3D residual U-Net that segments the spleen in CT, number for number as MONAI's
/// spleen_ct_segmentation bundle does.
#[derive(Parser)]
#[command(
    name = "spleen-hpc",
    version = concat!(env!("CARGO_PKG_VERSION"), " (", env!("SPLEEN_COMMIT"), ")"),
    arg_required_else_help = true,
    after_help = "Exit codes: 0 done, 2 the input or a flag is at fault, 1 something failed inside, 130 interrupted."
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    Train(train::Args),
    Evaluate(evaluate::Args),
    Infer(infer::Args),
    Phantom(phantom::Args),
    Cache(cache::Args),
    Import(weights::ImportArgs),
    Export(weights::ExportArgs),
    Bench(bench::Args),
    Doctor(doctor::Args),
}

/// Parses the process's arguments, does what they say, and reports a failure on stderr.
pub fn run() -> ExitCode {
    let mut command = settings::hide_foreign_flags(Cli::command());
    let matches = command.get_matches_mut();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|err| err.exit());
    let ready = settings::refuse_foreign_flags(&matches, &command).and_then(|()| cpu::obey_environment());
    let done = ready.and_then(|_| match cli.verb {
        Verb::Train(args) => train::run(&args),
        Verb::Evaluate(args) => evaluate::run(&args),
        Verb::Infer(args) => infer::run(&args),
        Verb::Phantom(args) => phantom::run(&args),
        Verb::Cache(args) => cache::run(&args),
        Verb::Import(args) => weights::import(&args),
        Verb::Export(args) => weights::export(&args),
        Verb::Bench(args) => bench::run(&args),
        Verb::Doctor(args) => doctor::run(&args),
    });
    done.unwrap_or_else(|err| {
        tell(format_args!("error: {err}"));
        ExitCode::from(err.exit_code())
    })
}

/// Prints a line of results. A reader that has gone away (`| head`) is no failure of the work.
fn say(line: impl Display) {
    writeln!(std::io::stdout(), "{line}").ok();
}

/// Prints a line for the user, on stderr. One that is closed or full does not end the work either.
fn tell(line: impl Display) {
    writeln!(std::io::stderr(), "{line}").ok();
}

/// What a verb leaves for the shell.
type Outcome = Result<ExitCode>;
