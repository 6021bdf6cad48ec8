//! `spleen-hpc bench`

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use glob::Pattern;
use serde::Serialize;

use super::bench_row::{self, Report};
use super::settings::use_threads;
use super::{Outcome, interrupt, say};
use crate::bench::inputs::Inputs;
use crate::bench::{Bench, COPY, Cost, PEAK_BF16, PEAK_F32, Roof, Samples, benches};
use crate::config::DeviceChoice;
use crate::device::cpu::units;
use crate::{Error, Result};

/// Time this machine on the work that training and inference consist of
///
/// Rows: the peaks of multiply-adds of f32 and of bfloat16 operands, and the bandwidth of a copy (bytes read plus bytes
/// written); a forward pass of 4 patches of 96^3, a training step of 2, a sliding window over 256 x 256 x 128 voxels, each
/// in f32 and in bfloat16 (_bf16: --amp on); preprocessing, post-processing and the whole inference of a synthetic CT of
/// 512 x 512 x 90 voxels, from file to file; the start of a process until its first window is predicted; and every
/// convolution of the network at 4 patches, pass by pass. Rows scale_* are timed only when --only names them: a forward
/// pass and a training step against the patch's side, the batch and the channels of the first level, so that work which
/// grows faster than its FLOP shows as a falling rate.
///
/// Each row runs in a process of its own, so that its peak memory (inputs included) is its own: once to warm up, then
/// until 2 seconds or 100 runs, 3 at least. A start needs a new process each time. FLOP are two for each multiply-add
/// of the network's convolutions; their rate is that of the median, the peaks' and the copy's that of the fastest run.
/// Shares are of what as many threads reach: of the peak of the row's operands, and of the roofline, where each
/// convolution takes the longer of its FLOP at that peak and its input, output and weights in f32, once each, at the
/// copy's speed. A convolution that is computed with fewer multiply-adds than its definition has can pass 100 %. All rows
/// but scale_* take about 4 minutes on 2 cores, those another 3.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  spleen-hpc bench
  spleen-hpc bench --only forward_b4_96_f32 step_b2_96_f32 --threads 1
  spleen-hpc bench --only 'layer_*_fprop' --json
  spleen-hpc bench --only 'scale_step_*_f32'")]
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

/// A row as it is printed; keys in this order.
#[derive(Serialize)]
struct Row<'a> {
    name: &'a str,
    seconds_median: f64,
    seconds_min: f64,
    runs: usize,
    gflops: Option<f64>,
    /// Of the peak of the same operands on as many threads; above 1 where multiply-adds are saved.
    share_of_peak: Option<f64>,
    /// The roofline's seconds over the median, as the share of the peak; `None` for the roofs themselves.
    share_of_roofline: Option<f64>,
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
        return bench_row::answer(&all, name, &Inputs::new(folder));
    }
    if !matches!(args.device, DeviceChoice::Cpu | DeviceChoice::Auto) {
        return Err(Error::Usage(format!(
            "--device {}: bench times the CPU only; for a GPU see Benchmarking in the README",
            args.device
        )));
    }
    let chosen = choose(&all, &args.only)?;
    if args.list {
        // Where nothing is named, the list is what could be.
        let listed = if args.only.is_empty() { all.iter().collect() } else { chosen };
        listed.iter().for_each(|bench| say(&bench.name));
        return Ok(ExitCode::SUCCESS);
    }
    use_threads(args.threads)?;
    let stop = interrupt::watch("the row under way is given up")?;
    let temporary = match &args.inputs {
        Some(_) => None,
        None => Some(tempfile::tempdir().map_err(Error::io(std::env::temp_dir(), "write in"))?),
    };
    let folder = args.inputs.clone().or(temporary.as_ref().map(|t| t.path().to_owned()));
    let rows = Rows { args, inputs: folder.expect("given or temporary"), stop };
    if chosen.iter().any(|bench| bench.reads_files) {
        rows.ask(bench_row::INPUTS)?;
    }
    if !args.json {
        say(format_args!("cpu: {}, {} threads", units(), rayon::current_num_threads()));
        say(format_args!(
            "{:<34} {:>11} {:>11} {:>5} {:>14} {:>8} {:>8} {:>9}",
            "row", "median, ms", "min, ms", "runs", "rate", "of peak", "of roof", "peak, MiB"
        ));
    }
    let wanted = |bench: &Bench| chosen.iter().any(|other| other.name == bench.name);
    let mut roofs = Roofs::new();
    for bench in all.iter().filter(|bench| is_roof(bench)) {
        if wanted(bench) || chosen.iter().any(|other| is_needed(bench, other)) {
            let measured = rows.measure(bench)?;
            let amount = if bench.name == COPY { |cost: &Cost| cost.bytes } else { |cost: &Cost| cost.flop };
            roofs.insert(bench.name.clone(), measured.rate(bench, amount));
            if wanted(bench) {
                print(args, &Row::new(bench, &measured, &roofs));
            }
        }
    }
    for bench in chosen.into_iter().filter(|bench| !is_roof(bench)) {
        print(args, &Row::new(bench, &rows.measure(bench)?, &roofs));
    }
    Ok(ExitCode::SUCCESS)
}

/// The rows that `--only` names, in their own order; where it names none, all that need not be named.
fn choose<'a>(all: &'a [Bench], only: &[String]) -> Result<Vec<&'a Bench>> {
    let mut patterns = Vec::new();
    for name in only {
        let pattern = Pattern::new(name)
            .map_err(|err| Error::Usage(format!("--only {name}: not a pattern of names: {err}")))?;
        if !all.iter().any(|bench| pattern.matches(&bench.name)) {
            let what = format!("--only {name}: no row has that name; `spleen-hpc bench --list` has them all");
            return Err(Error::Usage(what));
        }
        patterns.push(pattern);
    }
    let wanted = |b: &&Bench| match patterns.is_empty() {
        true => !b.by_name,
        false => patterns.iter().any(|p| p.matches(&b.name)),
    };
    Ok(all.iter().filter(wanted).collect())
}

/// What all rows share.
struct Rows<'a> {
    args: &'a Args,
    inputs: PathBuf,
    stop: &'a AtomicBool,
}

impl Rows<'_> {
    fn measure(&self, bench: &Bench) -> Result<Measured> {
        // Of a start, it brings the program into the page cache, as any earlier use of it would have.
        let (report, _) = self.ask(&bench.name)?;
        let seconds = match bench.fresh_process {
            true => (0..STARTS).map(|_| Ok(self.ask(&bench.name)?.1.as_secs_f64())).collect::<Result<_>>()?,
            false => report.seconds.clone(),
        };
        Ok(Measured { samples: Samples::new(seconds), report })
    }

    /// The report of a new process, and the time from its start to the report.
    fn ask(&self, name: &str) -> Result<(Report, Duration)> {
        bench_row::ask(name, &self.inputs, self.args.threads, self.stop)
    }
}

/// Times of one row, and the rest of what its processes said.
struct Measured {
    samples: Samples,
    report: Report,
}

impl Measured {
    /// The time that counts: a roof is what the machine can do at best.
    fn seconds(&self, bench: &Bench) -> f64 {
        if is_roof(bench) { self.samples.min() } else { self.samples.median() }
    }

    /// So much of its costs a second.
    fn rate(&self, bench: &Bench, amount: fn(&Cost) -> f64) -> f64 {
        self.report.costs.iter().map(amount).sum::<f64>() / self.seconds(bench)
    }
}

/// FLOP or bytes a second of the roofs that were measured, by name.
type Roofs = BTreeMap<String, f64>;

fn is_roof(bench: &Bench) -> bool {
    [PEAK_F32, PEAK_BF16, COPY].contains(&bench.name.as_str())
}

/// Whether the shares of `row` are of `roof`.
fn is_needed(roof: &Bench, row: &Bench) -> bool {
    !is_roof(row) && row.peak.is_some_and(|peak| [peak, COPY].contains(&roof.name.as_str()))
}

impl<'a> Row<'a> {
    fn new(bench: &'a Bench, measured: &Measured, roofs: &Roofs) -> Self {
        let Measured { samples, report } = measured;
        let (flops, bandwidth) =
            (measured.rate(bench, |cost| cost.flop), measured.rate(bench, |cost| cost.bytes));
        let peak = bench.peak.and_then(|peak| roofs.get(peak));
        let roof = peak.zip(roofs.get(COPY)).filter(|_| !is_roof(bench));
        let least = roof.map(|(&flops, &bandwidth)| Roof { flops, bandwidth }.seconds(&report.costs));
        Row {
            name: &bench.name,
            seconds_median: samples.median(),
            seconds_min: samples.min(),
            runs: samples.runs(),
            gflops: bench.peak.map(|_| flops / 1e9),
            share_of_peak: peak.map(|peak| flops / peak),
            share_of_roofline: least.map(|least| least / measured.seconds(bench)),
            peak_rss_mib: report.peak_rss_mib,
            gbytes_per_second: (bench.name == COPY).then_some(bandwidth / 1e9),
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
    let percent = |share: Option<f64>| share.map_or(String::new(), |share| format!("{:.1} %", 100.0 * share));
    let (of_peak, of_roof) = (percent(row.share_of_peak), percent(row.share_of_roofline));
    let peak = row.peak_rss_mib.map_or(String::new(), |mib| format!("{mib:.0}"));
    let line = format!(
        "{:<34} {:>11.3} {:>11.3} {:>5} {rate:>14} {of_peak:>8} {of_roof:>8} {peak:>9}",
        row.name,
        1e3 * row.seconds_median,
        1e3 * row.seconds_min,
        row.runs
    );
    say(line.trim_end());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_sizes_are_timed_only_where_they_are_named() {
        let all = benches();
        let scaled = |only: &[&str]| {
            let only: Vec<String> = only.iter().map(|&name| name.to_owned()).collect();
            let chosen = choose(&all, &only).unwrap();
            (chosen.len(), chosen.iter().filter(|bench| bench.name.starts_with("scale_")).count())
        };
        let (without, none) = scaled(&[]);
        let (with, some) = scaled(&["*"]);
        assert!(none == 0 && some > 0 && without + some == with);
        assert_eq!(scaled(&["scale_step_b?_96_c16_f32"]), (4, 4));
    }
}
