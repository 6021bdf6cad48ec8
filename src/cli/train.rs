//! `spleen-hpc train`

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::cache::build;
use super::progress::{Progress, compact};
use super::settings::{Settings, choose_device, read_toml, resolve};
use super::{INTERRUPTED, Outcome, evaluate, interrupt, memory, phantom, say, tell};
use crate::config::{Config, Overrides, Run};
use crate::data::cache;
use crate::data::cache::CachedCase;
use crate::data::dataset::{Case, Split, training_cases};
use crate::data::publish;
use crate::data::sampler::warnings;
use crate::device::cuda::Cuda;
use crate::device::{Device, arena};
use crate::nn::checkpoint;
use crate::train::memory_plan::MemoryPlan;
use crate::train::run::{self as train, Place};
use crate::{Error, Result};

/// Train the network; without --data on phantoms it makes itself
///
/// Leaves in the run folder: best.safetensors (best validation Dice), last.safetensors (to resume from) and config.toml
/// (every number of the run, a --config for the next one). Ctrl-C and SIGTERM save and end the run; a machine that fails
/// takes at most the epochs since the last checkpoint, which the first epoch to end --save-interval after the one before
/// it writes.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  spleen-hpc train                                      a small run on synthetic scans: nothing is needed
  spleen-hpc train --data Task09_Spleen --run run       the README's recipe of bundle 0.3.6
  spleen-hpc train --data Task09_Spleen --recipe 0.5.9 --lr 1e-3 --folds 5 --fold 0
  spleen-hpc train --run run --resume --epochs 2000     go on where a run stopped")]
pub struct Args {
    /// Folder of the run's results
    #[arg(long, value_name = "DIR", default_value = "run")]
    run: PathBuf,
    /// Go on from the run folder's last checkpoint, with its numbers
    #[arg(long)]
    resume: bool,
    /// Folder of the preprocessed cases [default: DATA/.spleen-hpc-cache]
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Least seconds between two checkpoints; the end of a run, or its being stopped, always writes one
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    save_interval: Duration,
    #[command(flatten)]
    settings: Settings,
}

fn seconds(text: &str) -> std::result::Result<Duration, String> {
    let number = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    number.ok_or_else(|| "not a number of seconds".into())
}

/// Trains from the first epoch or from the last checkpoint.
pub fn run(args: &Args) -> Outcome {
    let last = args.run.join(train::LAST);
    match (args.resume, last.exists()) {
        (true, false) => {
            return Err(Error::file(&last, "there is no run to go on with: leave --resume out to begin one"));
        }
        (false, true) => {
            let what = "is the checkpoint of an earlier run: go on with --resume, or choose another --run";
            return Err(Error::file(&last, what));
        }
        _ => {}
    }
    let given = args.settings.given()?;
    let base = match (args.resume, &given.data) {
        (true, _) => read_toml(&args.run.join(train::CONFIG))?,
        (false, None) => small_run(),
        (false, Some(_)) => Overrides::default(),
    };
    if args.resume {
        refuse_other_course(&given, &base)?;
    }
    let mut config = resolve(&base, &given, &Overrides::default())?;
    let device = choose_device(&config)?;
    let data = config.run.data.take().map_or_else(|| phantom::for_run(&args.run), Ok)?;
    // Absolute, so that a run can be resumed from anywhere.
    let data = std::path::absolute(&data).map_err(Error::io(&data, "find"))?;
    config.run.data = Some(data.clone());

    let cases = training_cases(&data)?;
    let (train, val) = split(&config.run).apply(cases.len())?;
    memory::check_window(&config)?;
    if let Device::Cpu(_) = device {
        memory::check_step(&config, train.len())?;
    }
    publish::folder(&args.run)?;
    let dir = args.cache_dir.clone().map_or_else(|| cache::default_dir(&data), Ok)?;
    let mut picked: Vec<Case> = train.iter().chain(&val).map(|&i| cases[i].clone()).collect();
    let mut train_cached = build(&picked, &config, &dir)?;
    let (val_cases, val) = (picked.split_off(train.len()), train_cached.split_off(train.len()));
    let train = train_cached;
    for warning in warnings(train.iter().map(|c| (c.name(), c.candidates())), &config.sampling) {
        tell(format_args!("warning: {warning}"));
    }
    let resume = args.resume.then(|| checkpoint::load(&last)).transpose()?;
    let stop = interrupt::watch("the run is saved first")?;
    say(format_args!(
        "training on {} cases, validating on {}; results go to {}",
        train.len(),
        val.len(),
        args.run.display()
    ));
    let place = match &device {
        Device::Cpu(operands) => Place::Cpu(*operands),
        Device::Cuda(cuda) => plan_memory(cuda, &config, &train)?,
    };
    let run = train::Run {
        config: &config,
        dir: &args.run,
        train: Arc::new(train),
        val: &val,
        resume,
        stop,
        place,
        between_checkpoints: args.save_interval,
    };
    let mut screen = Screen::new(config.run.epochs);
    let summary = run.train(&mut |event| screen.show(event))?;
    screen.finish();
    if !summary.finished {
        say(format_args!(
            "stopped after {} steps; go on with: spleen-hpc train --run {} --resume",
            summary.step,
            args.run.display()
        ));
        return Ok(ExitCode::from(INTERRUPTED));
    }
    drop(val);
    arena::trim();
    if let Device::Cuda(cuda) = &device {
        cuda.trim()?;
    }
    scores(&args.run, &summary, (&val_cases, &device), &config, stop)
}

/// Where the training cases will be, by a plan of the device's memory that is told on stderr.
fn plan_memory(cuda: &Arc<Cuda>, config: &Config, train: &[CachedCase]) -> Result<Place> {
    let shapes: Vec<[usize; 3]> = train.iter().map(CachedCase::shape).collect();
    let cases = (&shapes[..], config.run.cache_dtype);
    let free = cuda.driver().free_memory()?;
    let plan = MemoryPlan::new(&config.net, &config.sampling, cuda.precision(), cases, free);
    tell(plan);
    Ok(Place::Cuda { cuda: cuda.clone(), resident: plan.resident })
}

/// Refuses what would make the checkpoint another run's: its state fits one optimizer and its place in the epoch one
/// size of a step.
fn refuse_other_course(given: &Overrides, run: &Overrides) -> Result<()> {
    fn other<T: PartialEq>(given: &Option<T>, run: &Option<T>) -> bool {
        given.is_some() && given != run
    }
    for (flag, other) in [
        ("--recipe", other(&given.recipe, &run.recipe)),
        ("--optimizer", other(&given.optimizer, &run.optimizer)),
        ("--volumes-per-step", other(&given.volumes_per_step, &run.volumes_per_step)),
        ("--norm", other(&given.norm, &run.norm)),
        ("--channels", other(&given.channels, &run.channels)),
    ] {
        if other {
            return Err(Error::Usage(format!("--resume goes on with the run's own {flag}: leave it out")));
        }
    }
    Ok(())
}

/// Scores the best weights on the validation scans themselves, leaves masks, and says what to do next.
fn scores(
    run: &Path,
    summary: &train::Summary,
    (cases, device): (&[Case], &Device),
    config: &Config,
    stop: &AtomicBool,
) -> Outcome {
    let weights = summary.weights.display();
    if let Some((dice, epoch)) = summary.best {
        say(format_args!("best validation Dice on the network's grid: {dice:.4} in epoch {epoch}"));
    }
    let outcome = match cases {
        [] => ExitCode::SUCCESS,
        _ => {
            let masks = run.join("masks");
            evaluate::score(cases, (&summary.weights, device), config, &run.join("eval"), Some(&masks), stop)?
        }
    };
    say(format_args!("weights: {weights}"));
    if !cases.is_empty() {
        say(format_args!("masks:   {}", run.join("masks").display()));
        say(format_args!("scores:  {}", run.join("eval").display()));
    }
    say(format_args!("next:    spleen-hpc infer --weights {weights} --out masks YOUR_SCANS"));
    Ok(outcome)
}

/// The run on the screen: a bar over all steps, and a line an epoch.
struct Screen {
    bar: Option<Progress>,
    epochs: usize,
    begun: Instant,
    /// Steps that were done before this call.
    before: Option<usize>,
    done: usize,
    total: usize,
}

impl Screen {
    fn new(epochs: usize) -> Self {
        Screen { bar: None, epochs, begun: Instant::now(), before: None, done: 0, total: 0 }
    }

    fn show(&mut self, event: &train::Event) {
        match *event {
            train::Event::Step { epoch, done, total, loss } => {
                self.before.get_or_insert(done - 1);
                (self.done, self.total) = (done, total);
                let bar = self.bar.get_or_insert_with(|| Progress::bar_only(total, "steps"));
                bar.note(format!("epoch {epoch}/{} loss {loss:.4}", self.epochs));
                bar.set(done, total);
            }
            train::Event::Validation { epoch } => {
                if let Some(bar) = &self.bar {
                    bar.note(format!("epoch {epoch}/{} validates", self.epochs));
                }
            }
            train::Event::Epoch { epoch, loss, dice, best, patches_per_s } => {
                // Columns stay where they are in epochs that are not validated.
                let dice = dice.map_or(String::new(), |dice| {
                    format!("val Dice {dice:.4}{}", if best { " best" } else { "" })
                });
                let (width, all, eta) = (self.epochs.to_string().len(), self.epochs, self.eta());
                let line = format!(
                    "epoch {epoch:>width$}/{all}  loss {loss:.4}  {dice:<20}  {patches_per_s:>8.1} patches/s  ETA {eta}"
                );
                match &self.bar {
                    Some(bar) => bar.suspend(|| say(&line)),
                    None => say(&line),
                }
            }
        }
    }

    /// What is left at the pace so far, validation included.
    fn eta(&self) -> String {
        let steps = self.done - self.before.unwrap_or(0);
        let seconds =
            self.begun.elapsed().as_secs_f64() / steps.max(1) as f64 * (self.total - self.done) as f64;
        compact(Duration::from_secs_f64(seconds.ceil()))
    }

    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish();
        }
    }
}

/// Numbers for the small phantoms on a few cores: the whole run takes minutes. Patches and windows are half as large
/// as the bundle's, like the patients; ten times its learning rate suits a run a thirtieth as long.
fn small_run() -> Overrides {
    Overrides {
        patch: Some([48; 3]),
        roi: Some([48; 3]),
        lr: Some(1e-3),
        epochs: Some(60),
        val_interval: Some(5),
        ..Overrides::default()
    }
}

/// The split that the numbers of a run ask for.
pub fn split(run: &Run) -> Split {
    match run.folds {
        Some(folds) => Split::Fold { folds, fold: run.fold },
        None => Split::Last(run.val_cases),
    }
}
