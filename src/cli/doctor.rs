//! `spleen-hpc doctor`

use std::num::NonZero;
use std::process::ExitCode;
use std::time::Instant;

use super::{Outcome, say};
use crate::config::{Amp, DeviceChoice};
use crate::device::cuda::kernel_cache::{KernelCache, in_parallel};
use crate::device::cuda::libcuda::{self, Presence};
use crate::device::cuda::nvrtc::{Entry, Module, Nvrtc, OLDEST_CAPABILITY, Target};
use crate::device::cuda::sources::{self, Source};
use crate::device::cuda::{Info, Precision};
use crate::device::{Device, choice, cpu};
use crate::ops;
use crate::{Error, Result};

/// What kernels are compiled for where there is no GPU to ask.
const USUAL: [&str; 2] = ["sm_80", "sm_90a"];
const PRECISIONS: [Precision; 2] = [Precision::Half, Precision::Single];

/// Say what this machine has to compute on, and try it
///
/// Lists processor, NVIDIA driver, GPUs, NVRTC (the CUDA compiler) and the folder of compiled kernels; compiles every
/// kernel anew; runs a small case of each op on the device and compares with the CPU. What is missing is no fault: the
/// CPU can do everything. The exit code is 1 when something that is there does not work.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  spleen-hpc doctor
  spleen-hpc doctor --arch sm_80,sm_100a -v     no GPU is needed to compile")]
pub struct Args {
    /// What to try: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// Compile for these chips instead of the GPU's [default: the GPU's, or sm_80,sm_90a without one]
    #[arg(long, value_name = "SM,SM,..", value_delimiter = ',')]
    arch: Vec<String>,
    /// Compile only these files of kernels/
    #[arg(long, value_name = "FILE.cu,..", value_delimiter = ',')]
    only: Vec<String>,
    /// List registers, stack, spills and shared memory of every kernel
    #[arg(short, long)]
    verbose: bool,
}

/// Whether all that is there works.
struct Findings {
    healthy: bool,
}

impl Findings {
    fn say(&self, what: &str, text: impl std::fmt::Display) {
        say(format_args!("{what:<10} {text}"));
    }

    fn broken(&mut self, what: &str, text: impl std::fmt::Display) {
        self.healthy = false;
        self.say(what, format_args!("BROKEN: {text}"));
    }
}

/// Examines and reports.
pub fn run(args: &Args) -> Outcome {
    let chosen = chosen(&args.only)?;
    let is_chip = |arch: &str| {
        let digits = arch.strip_prefix("sm_").map(|rest| rest.trim_end_matches(['a', 'f']));
        digits.is_some_and(|d| !d.is_empty() && d.bytes().all(|b| b.is_ascii_digit()))
    };
    if let Some(arch) = args.arch.iter().find(|arch| !is_chip(arch)) {
        return Err(Error::Usage(format!("--arch {arch}: chips are named like sm_80 or sm_90a")));
    }
    let mut findings = Findings { healthy: true };
    findings.say("program", format_args!("{} ({})", env!("CARGO_PKG_VERSION"), crate::COMMIT));
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    findings.say("cpu", format_args!("{}, {cores} cores", cpu::units()));
    let gpus = driver(&mut findings);
    let nvrtc = compiler(&mut findings);
    let cache = KernelCache::open();
    // For chips that are not here nobody will ask the folder.
    let kept = if gpus.is_empty() || !args.arch.is_empty() { KernelCache::none() } else { cache.clone() };
    match (cache.folder(), cache.size()) {
        (Some(folder), (files, bytes)) => {
            let mib = bytes as f64 / f64::from(1 << 20);
            findings.say(
                "cache",
                format_args!("{}: {files} compiled kernel files, {mib:.1} MiB", folder.display()),
            );
        }
        (None, _) => findings.say("cache", "none: there is no home folder"),
    }
    if let Some(nvrtc) = nvrtc {
        for target in targets(args, &gpus, nvrtc)? {
            compile(&mut findings, nvrtc, &kept, &target, (&chosen, args.verbose));
        }
    }
    try_device(&mut findings, args.device, &gpus);
    Ok(if findings.healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The driver and its GPUs.
fn driver(findings: &mut Findings) -> Vec<Info> {
    match libcuda::look() {
        Ok(Presence::NoDriver) => findings.say("driver", "none (there is no libcuda.so.1)"),
        Ok(Presence::NoGpu) => findings.say("driver", "finds no GPU"),
        Err(err) => findings.broken("driver", err),
        Ok(Presence::Ready) => match libcuda::version().and_then(|version| Ok((version, libcuda::gpus()?))) {
            Ok(((major, minor), gpus)) => {
                findings.say("driver", format_args!("of CUDA {major}.{minor}"));
                for (ordinal, gpu) in gpus.iter().enumerate() {
                    let Info { name, capability: (a, b), multiprocessors, memory, shared_per_block } = gpu;
                    let too_old =
                        if gpu.capability < OLDEST_CAPABILITY { ", too old for the kernels" } else { "" };
                    let (gib, kib) = (*memory as f64 / f64::from(1 << 30), shared_per_block >> 10);
                    findings.say(
                        &format!("cuda:{ordinal}"),
                        format_args!(
                            "{name}, compute capability {a}.{b}{too_old}, {multiprocessors} SMs, {gib:.1} GiB, {kib} KiB \
                             of shared memory a block"
                        ),
                    );
                }
                return gpus;
            }
            Err(err) => findings.broken("driver", err),
        },
    }
    Vec::new()
}

/// NVRTC, if it can compile.
fn compiler(findings: &mut Findings) -> Option<&'static Nvrtc> {
    match Nvrtc::look() {
        Ok(None) => findings.say("nvrtc", "none (the CUDA compiler: libnvrtc.so.13 or .12)"),
        Err(err) => findings.broken("nvrtc", err),
        Ok(Some(nvrtc)) => {
            let (major, minor) = nvrtc.version();
            findings.say("nvrtc", format_args!("{major}.{minor}, {}", nvrtc.path().display()));
            match nvrtc.check_install() {
                Ok(()) => return Some(nvrtc),
                Err(err) => findings.broken("nvrtc", err),
            }
        }
    }
    None
}

/// What to compile for: what was asked for, or the chips of the GPUs, or the usual ones.
fn targets(args: &Args, gpus: &[Info], nvrtc: &Nvrtc) -> Result<Vec<Target>> {
    if !args.arch.is_empty() {
        return Ok(args.arch.iter().map(|arch| Target::named(arch)).collect());
    }
    let chips = nvrtc.chips()?;
    let mut targets = Vec::new();
    for target in gpus.iter().filter_map(|gpu| Target::of(gpu.capability, &chips).ok()) {
        if !targets.contains(&target) {
            targets.push(target);
        }
    }
    Ok(if targets.is_empty() { USUAL.map(Target::named).to_vec() } else { targets })
}

/// The kernel files of these names; without a name all.
fn chosen(names: &[String]) -> Result<Vec<Source<'static>>> {
    if let Some(unknown) = names.iter().find(|name| sources::all().all(|source| source.file != **name)) {
        let files = sources::all().map(|source| source.file).collect::<Vec<_>>().join(", ");
        return Err(Error::Usage(format!("--only {unknown}: there is no such kernel file, but {files}")));
    }
    Ok(sources::all().filter(|source| names.is_empty() || names.iter().any(|n| n == source.file)).collect())
}

/// Compiles the chosen kernel files at both precisions, those in the cache too, which keeps them for the self-tests and
/// for work to come.
fn compile(
    findings: &mut Findings,
    nvrtc: &Nvrtc,
    cache: &KernelCache,
    target: &Target,
    (chosen, verbose): (&[Source], bool),
) {
    let jobs: Vec<_> =
        chosen.iter().flat_map(|source| PRECISIONS.map(|precision| (*source, precision))).collect();
    let begun = Instant::now();
    let made = in_parallel(&jobs, |(source, precision)| cache.compile(nvrtc, source, *precision, target));
    let seconds = begun.elapsed().as_secs_f64();
    let (mut modules, mut warning): (Vec<Module>, _) = (Vec::new(), None);
    let before = findings.healthy;
    for made in made {
        match made {
            Ok(made) => {
                modules.push(made.module);
                warning = warning.or(made.warning);
            }
            Err(err) => findings.broken("kernels", err),
        }
    }
    if let Some(warning) = warning {
        findings.say("cache", warning);
    }
    let entries: Vec<Entry> = modules.into_iter().flat_map(|module| module.entries).collect();
    let spilling = entries.iter().filter(|e| e.stack + e.spill_stores + e.spill_loads > 0).count();
    let spills = if spilling > 0 { format!(", {spilling} of them spill registers") } else { String::new() };
    let failed = if findings.healthy == before { "" } else { "; some do not compile" };
    findings.say(
        "kernels",
        format_args!(
            "{} modules with {} kernels{spills} compiled for {target} in {seconds:.1} s{failed}",
            jobs.len(),
            entries.len()
        ),
    );
    if verbose {
        say(format_args!("  {:<44} {:>9} {:>6} {:>9} {:>6}", "", "registers", "stack", "spills", "shared"));
        for Entry { name, registers, stack, spill_stores, spill_loads, shared } in entries {
            let spills = format!("{spill_stores}/{spill_loads}");
            say(format_args!("  {name:<44} {registers:>9} {stack:>6} {spills:>9} {shared:>6}"));
        }
    }
}

/// Runs the ops' small cases on the device, where there is one.
fn try_device(findings: &mut Findings, choice: DeviceChoice, gpus: &[Info]) {
    // Both precisions of a GPU; a CPU only says what it is.
    for amp in [Amp::Auto, Amp::Off] {
        let (device, why) = match choice::resolve(choice, amp) {
            Ok(resolved) => resolved,
            Err(err) => return findings.broken("device", err),
        };
        let Device::Cuda(cuda) = device else {
            // A GPU that could be used if the rest were there is what `auto` should have taken.
            let usable = gpus.iter().any(|gpu| gpu.capability >= OLDEST_CAPABILITY);
            if usable && choice == DeviceChoice::Auto {
                findings.broken("device", why);
            } else {
                findings.say("device", why);
            }
            return;
        };
        findings.say("device", why);
        for test in ops::self_tests() {
            match (test.run)(&cuda) {
                Ok(agreement) => findings.say("self-test", format_args!("{}: {agreement}", test.name)),
                Err(err) => findings.broken("self-test", format_args!("{}: {err}", test.name)),
            }
        }
    }
}
