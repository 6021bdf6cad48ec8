//! `spleen-hpc bench`

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use glob::Pattern;
use serde::{Deserialize, Serialize};

use super::settings::use_threads;
use super::{Outcome, interrupt, say};
use crate::bench::inputs::Inputs;
use crate::bench::{Bench, COPY, COPY_BYTES, PEAK, Samples, benches, measure};
use crate::config::DeviceChoice;
use crate::device::cpu::units;
use crate::{Error, Result};

/// Time this machine on the work that training and inference consist of
///
/// Rows: the peak of fused multiply-adds in f32 and the bandwidth of a copy (bytes read plus bytes written); a forward
/// pass of 4 patches of 96^3, a training step of 2, a sliding window over 256 x 256 x 128 voxels, each in f32 and in
/// bfloat16 (_bf16: --amp on); preprocessing,
/// post-processing and the whole inference of a synthetic CT of 512 x 512 x 90 voxels, from file to file; the start of
/// a process until its first window is predicted; and every convolution of the network at 4 patches, pass by pass.
///
/// Each row runs in a process of its own, so that its peak memory (inputs included) is its own: once to warm up, then
/// until 2 seconds or 100 runs, 3 at least. A start needs a new process each time. FLOP are two for each multiply-add
/// of the network's convolutions, their rate is that of the median (the peak's that of its fastest run), and the share
/// is of the peak in f32 on as many threads, for bfloat16 too. All rows take about 4 minutes on 2 cores.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  spleen-hpc bench
  spleen-hpc bench --only forward_b4_96_f32 step_b2_96_f32 --threads 1
  spleen-hpc bench --only 'layer_*_fprop' --json")]
pub struct Args {
    /// What computes; rows are timed on the CPU only
    #[arg(long, default_value = "cpu")]
    device: DeviceChoice,
    /// Time only these rows; `*` and `?` stand for any characters
    #[arg(long, value_name = "NAME", num_args = 1.., value_delimiter = ',')]
    only: Vec<String>,
    /// Print the names of the rows and time nothing
    #[arg(long)]
    list: bool,
    /// CPU threads; 0 means one a core
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Print one JSON object a row and line (JSON lines) instead of a table; what does not apply is null
    #[arg(long)]
    json: bool,
    /// Folder for the synthetic scan and network: what is missing is made, and all is kept [default: a temporary one]
    #[arg(long, value_name = "DIR")]
    inputs: Option<PathBuf>,
    /// Do this row here and report to the process that asked
    #[arg(long, hide = true, value_name = "NAME", requires = "inputs")]
    row: Option<String>,
}

/// What the process of a row reports.
#[derive(Serialize, Deserialize)]
struct Report {
    seconds: Vec<f64>,
    flop: Option<f64>,
    peak_rss_mib: Option<f64>,
}

/// A row as it is printed; keys in this order.
#[derive(Serialize)]
struct Row<'a> {
    name: &'a str,
    seconds_median: f64,
    seconds_min: f64,
    runs: usize,
    gflops: Option<f64>,
    /// Of the peak on as many threads, 0 to 1.
    share_of_peak: Option<f64>,
    peak_rss_mib: Option<f64>,
    gbytes_per_second: Option<f64>,
}

/// Runs of a row whose every run is a process.
const STARTS: usize = 10;

/// Measures and prints.
pub fn run(args: &Args) -> Outcome {
    let all = benches();
    if let (Some(name), Some(folder)) = (&args.row, &args.inputs) {
        use_threads(args.threads)?;
        return report(find(&all, name)?, &Inputs::new(folder));
    }
    if !matches!(args.device, DeviceChoice::Cpu | DeviceChoice::Auto) {
        return Err(Error::Usage(format!(
            "--device {}: bench times the CPU only; for a GPU see Profiling in the README",
            args.device
        )));
    }
    let chosen = choose(&all, &args.only)?;
    if args.list {
        chosen.iter().for_each(|bench| say(&bench.name));
        return Ok(ExitCode::SUCCESS);
    }
    use_threads(args.threads)?;
    let stop = interrupt::watch("the row under way is given up")?;
    let temporary = match &args.inputs {
        Some(_) => None,
        None => Some(tempfile::tempdir().map_err(Error::io(std::env::temp_dir(), "write in"))?),
    };
    let folder = args.inputs.clone().or(temporary.as_ref().map(|t| t.path().to_owned()));
    let inputs = Inputs::new(folder.expect("given or temporary"));
    if chosen.iter().any(|bench| bench.reads_files) {
        inputs.make()?;
    }
    let rows = Rows { args, inputs: &inputs, stop };
    if !args.json {
        say(format_args!("cpu: {}, {} threads", units(), rayon::current_num_threads()));
        say(format_args!(
            "{:<34} {:>11} {:>11} {:>5} {:>14} {:>8} {:>9}",
            "row", "median, ms", "min, ms", "runs", "rate", "of peak", "peak, MiB"
        ));
    }
    let mut peak = None;
    let has_flop = |bench: &&Bench| bench.name != COPY && !bench.fresh_process;
    if chosen.iter().any(has_flop) {
        let (samples, report) = rows.measure(find(&all, PEAK)?)?;
        peak = report.flop.map(|flop| flop / samples.min() / 1e9);
        if chosen[0].name == PEAK {
            print(args, &Row::new(PEAK, &samples, &report, peak));
        }
    }
    for bench in chosen.into_iter().filter(|bench| bench.name != PEAK) {
        let (samples, report) = rows.measure(bench)?;
        print(args, &Row::new(&bench.name, &samples, &report, peak));
    }
    Ok(ExitCode::SUCCESS)
}

/// The rows that `--only` names, in their own order; all where it names none.
fn choose<'a>(all: &'a [Bench], only: &[String]) -> Result<Vec<&'a Bench>> {
    let mut patterns = Vec::new();
    for name in only {
        let pattern = Pattern::new(name)
            .map_err(|err| Error::Usage(format!("--only {name}: not a pattern of names: {err}")))?;
        if !all.iter().any(|bench| pattern.matches(&bench.name)) {
            return Err(unknown(all, name));
        }
        patterns.push(pattern);
    }
    let wanted = |b: &&Bench| patterns.is_empty() || patterns.iter().any(|p| p.matches(&b.name));
    Ok(all.iter().filter(wanted).collect())
}

fn find<'a>(all: &'a [Bench], name: &str) -> Result<&'a Bench> {
    all.iter().find(|bench| bench.name == name).ok_or_else(|| unknown(all, name))
}

fn unknown(all: &[Bench], name: &str) -> Error {
    let names: Vec<&str> = all.iter().map(|bench| bench.name.as_str()).collect();
    Error::Usage(format!("--only {name}: no row has that name; there are {}", names.join(", ")))
}

/// In the row's own process: measures it, or does it once where the process is what is timed, and says how it went.
fn report(bench: &Bench, inputs: &Inputs) -> Outcome {
    let mut work = bench.prepare(inputs)?;
    let seconds =
        if bench.fresh_process { vec![work.once()?] } else { measure(|| work.once())?.into_seconds() };
    let report = Report { seconds, flop: work.flop, peak_rss_mib: peak_rss_mib() };
    say(serde_json::to_string(&report).map_err(|err| Error::Internal(err.to_string()))?);
    Ok(ExitCode::SUCCESS)
}

/// The most memory this process had resident; `None` where the system does not tell as Linux does.
fn peak_rss_mib() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<f64>().ok()? / 1024.0)
}

/// What all rows share.
struct Rows<'a> {
    args: &'a Args,
    inputs: &'a Inputs,
    stop: &'a AtomicBool,
}

impl Rows<'_> {
    /// Times of one row, and the rest of what its processes said.
    fn measure(&self, bench: &Bench) -> Result<(Samples, Report)> {
        if !bench.fresh_process {
            let (report, _) = self.in_process(&bench.name)?;
            return Ok((Samples::new(report.seconds.clone()), report));
        }
        // Brings the program into the page cache, as any earlier use of it would have.
        let (report, _) = self.in_process(&bench.name)?;
        let starts: Vec<f64> =
            (0..STARTS).map(|_| Ok(self.in_process(&bench.name)?.1.as_secs_f64())).collect::<Result<_>>()?;
        Ok((Samples::new(starts), report))
    }

    /// The report of a new process, and the time from its start to the report.
    fn in_process(&self, name: &str) -> Result<(Report, Duration)> {
        let program = std::env::current_exe()
            .map_err(|err| Error::Internal(format!("bench: cannot find this program: {err}")))?;
        let mut command = Command::new(&program);
        command.args(["bench", "--row", name, "--inputs"]).arg(self.inputs.folder());
        command.args(["--threads", &self.args.threads.to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let start = Instant::now();
        let mut child = Ended(command.spawn().map_err(Error::io(&program, "start"))?);
        let stdout = child.0.stdout.take().expect("asked for a pipe");
        let (send, receive) = channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            let read = BufReader::new(stdout).read_line(&mut line);
            // Nobody listens any more when the row was given up.
            send.send((read.map(|_| line), start.elapsed())).ok();
        });
        let failed = || Error::Internal(format!("bench: {name} did not end well"));
        let (line, wall) = loop {
            match receive.recv_timeout(Duration::from_millis(50)) {
                Ok((line, wall)) => break (line.unwrap_or_default(), wall),
                Err(RecvTimeoutError::Disconnected) => return Err(failed()),
                Err(RecvTimeoutError::Timeout) if self.stop.load(Ordering::Relaxed) => {
                    return Err(Error::Interrupted);
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        };
        let done = child.0.wait().is_ok_and(|status| status.success());
        // Ctrl-C in a terminal goes to both processes.
        if self.stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        let report = serde_json::from_str(&line).ok().filter(|_| done).ok_or_else(failed)?;
        Ok((report, wall))
    }
}

/// A process that does not outlive its owner.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // Fails for one that has ended, which is what is wanted.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

impl<'a> Row<'a> {
    fn new(name: &'a str, samples: &Samples, report: &Report, peak: Option<f64>) -> Self {
        let seconds = if name == PEAK { samples.min() } else { samples.median() };
        let gflops = report.flop.map(|flop| flop / seconds / 1e9);
        Row {
            name,
            seconds_median: samples.median(),
            seconds_min: samples.min(),
            runs: samples.runs(),
            gflops,
            share_of_peak: gflops.zip(peak).map(|(rate, peak)| rate / peak),
            peak_rss_mib: report.peak_rss_mib,
            gbytes_per_second: (name == COPY).then_some(COPY_BYTES / seconds / 1e9),
        }
    }
}

fn print(args: &Args, row: &Row) {
    if args.json {
        say(serde_json::to_string(row).expect("numbers and a name are JSON"));
        return;
    }
    let rate = match (row.gflops, row.gbytes_per_second) {
        (Some(rate), _) => format!("{rate:.1} GFLOP/s"),
        (None, Some(rate)) => format!("{rate:.1} GB/s"),
        (None, None) => String::new(),
    };
    let share = row.share_of_peak.map_or(String::new(), |share| format!("{:.1} %", 100.0 * share));
    let peak = row.peak_rss_mib.map_or(String::new(), |mib| format!("{mib:.0}"));
    let line = format!(
        "{:<34} {:>11.3} {:>11.3} {:>5} {rate:>14} {share:>8} {peak:>9}",
        row.name,
        1e3 * row.seconds_median,
        1e3 * row.seconds_min,
        row.runs
    );
    say(line.trim_end());
}
