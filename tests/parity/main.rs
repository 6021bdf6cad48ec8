//! Replays a folder of goldens made by MONAI and PyTorch through the library and says how far it is off.
//!
//! `cargo test --test parity [-- GROUP]`. `SPLEEN_GOLDEN` names another folder of the same layout,
//! `SPLEEN_PARITY_OUT` a folder that receives every recomputed tensor.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[path = "../amx_emulator/mod.rs"]
mod amx_emulator;
mod autocast;
mod case;
mod convergence;
mod crop;
mod end_to_end;
mod forced;
mod golden;
mod hash;
mod inverse;
mod layout;
mod ledger;
mod loss;
mod metrics;
mod network;
mod on_device;
mod ops;
mod optim;
mod output;
mod place;
mod prep;
mod self_check;
#[path = "../support/mod.rs"]
mod support;
mod sw;
mod sw_net;
mod table;
mod tensor;
mod tolerance;
mod unet;
mod unet_eval;
mod unet_train;
mod weights;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use golden::Golden;
use ledger::Ledger;

/// A result whose error is only ever shown.
pub type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// A part of the folder and the code that replays it.
struct Group {
    name: &'static str,
    /// Name patterns of the files that it accounts for.
    files: &'static [&'static str],
    run: fn(&Golden, &mut Ledger) -> Outcome<()>,
}

const GROUPS: &[Group] = &[
    Group { name: "prep", files: &["prep_*"], run: prep::run },
    Group { name: "crop", files: &["crop"], run: crop::run },
    Group { name: "ops", files: &["ops"], run: ops::run },
    Group { name: "loss", files: &["loss"], run: loss::run },
    Group { name: "metrics", files: &["metrics"], run: metrics::run },
    Group { name: "optim", files: &["optim"], run: optim::run },
    Group { name: "unet", files: &["unet_*"], run: unet::run },
    Group { name: "autocast", files: &[], run: autocast::bf16 },
    Group { name: "sw", files: &["sw"], run: sw::run },
    Group { name: "inverse", files: &["inverse_*"], run: inverse::run },
    Group { name: "weights", files: &["weights"], run: weights::run },
    Group { name: "convergence", files: &["convergence/*"], run: convergence::run },
];

fn main() -> ExitCode {
    let Some(filter) = filter() else { return ExitCode::SUCCESS };
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/golden");
    let dir = std::env::var_os("SPLEEN_GOLDEN").map_or(default, PathBuf::from);
    if !dir.is_dir() {
        println!("skipped: parity: there is no golden folder {}", dir.display());
        return ExitCode::SUCCESS;
    }
    match replay(&dir, &filter) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            println!("parity: {e}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the groups whose name contains `filter`; true if everything holds.
fn replay(dir: &Path, filter: &str) -> Outcome<bool> {
    self_check::run()?;
    let golden = Golden::open(dir)?;
    println!("replaying {} ({} files)", dir.display(), golden.files.len());
    let mut ledger =
        Ledger::new(output::Output::new(std::env::var_os("SPLEEN_PARITY_OUT").map(PathBuf::from)));
    let mut ran = vec![];
    for group in GROUPS.iter().filter(|g| g.name.contains(filter)) {
        let start = std::time::Instant::now();
        ledger.group = group.name;
        if let Err(e) = (group.run)(&golden, &mut ledger) {
            ledger.fail(group.name, e.to_string());
        }
        ledger.account_for(&golden, group.files);
        ledger.output.write_files()?;
        ran.push(group.name);
        println!("{}: {:.1} s", group.name, start.elapsed().as_secs_f64());
    }
    if filter.is_empty() {
        ledger.group = "(none)";
        ran.push(ledger.group);
        let orphans = golden
            .files
            .iter()
            .filter(|f| !GROUPS.iter().flat_map(|g| g.files).any(|p| golden::fits(p, &f.name)));
        for file in orphans {
            ledger.fail(&file.name, "no group replays this file".into());
        }
    }
    ledger.output.write_left_out(&ledger.left_out, &ledger.rows)?;
    table::print(&ledger, &ran);
    let passed = ledger.rows.iter().filter(|r| r.passed()).count();
    let failed = ledger.rows.len() - passed;
    let forced = forced::replay(&golden, filter)?;
    let on_device = on_device::replay(&golden, filter)?;
    println!("{passed} passed, {failed} failed, {} skipped", ledger.left_out.len());
    Ok(failed == 0 && forced && on_device)
}

/// Whether there is time for everything.
fn nightly() -> bool {
    std::env::var_os("SPLEEN_NIGHTLY").is_some()
}

/// The test filter among the arguments that `cargo test` passes to every harness; None when only asked to list.
fn filter() -> Option<String> {
    let mut args = std::env::args().skip(1);
    let mut filter = String::new();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--list" => return None,
            "--test-threads" | "--skip" | "--color" | "--format" | "--logfile" => drop(args.next()),
            flag if flag.starts_with('-') => {}
            name => filter = name.to_owned(),
        }
    }
    Some(filter)
}
