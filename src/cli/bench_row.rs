//! The process of a row of `bench`: started, listened to and ended by the one that prints; and what it does itself.
//!
//! It answers with one line of JSON, a [`Report`] or a [`Failure`], and ends when its standard input does: the asker holds
//! the other end, so that nothing goes on after an asker that was killed.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{Outcome, say};
use crate::bench::inputs::Inputs;
use crate::bench::{Bench, Cost, measure};
use crate::{Error, Result};

/// Stands for the making of the inputs among the names of rows.
pub const INPUTS: &str = "inputs";

/// What the process of a row did.
#[derive(Default, Serialize, Deserialize)]
pub struct Report {
    /// Of each run; one, of no interest, where the process itself is what is timed.
    pub seconds: Vec<f64>,
    /// Of one run.
    pub costs: Vec<Cost>,
    /// The most memory it had resident; `None` where the system does not tell.
    pub peak_rss_mib: Option<f64>,
}

/// An [`Error`] on its way to the process that prints it.
#[derive(Serialize, Deserialize)]
struct Failure {
    what: String,
    exit_code: u8,
}

impl Failure {
    /// The same sentence and exit code.
    fn into_error(self) -> Error {
        match self.exit_code {
            2 => Error::Usage(self.what),
            _ => Error::Internal(self.what),
        }
    }
}

/// In the row's own process: does the row and says how it went.
pub fn answer(rows: &[Bench], name: &str, inputs: &Inputs) -> Outcome {
    end_with_asker();
    let done = match name {
        INPUTS => inputs.make().map(|()| Report::default()),
        _ => rows
            .iter()
            .find(|bench| bench.name == name)
            .ok_or_else(|| Error::Internal(format!("bench: no row is called {name}")))
            .and_then(|bench| report(bench, inputs)),
    };
    let answer = done.map_err(|err| Failure { what: err.to_string(), exit_code: err.exit_code() });
    say(serde_json::to_string(&answer).map_err(|err| Error::Internal(err.to_string()))?);
    Ok(ExitCode::SUCCESS)
}

/// Ends this process as soon as nobody holds the other end of its standard input.
fn end_with_asker() {
    std::thread::spawn(|| {
        // An input that cannot be read has ended, too.
        std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).ok();
        std::process::exit(super::INTERRUPTED.into());
    });
}

/// Measures a row, or does it once where the process is what is timed.
fn report(bench: &Bench, inputs: &Inputs) -> Result<Report> {
    let mut work = bench.prepare(inputs)?;
    let seconds =
        if bench.fresh_process { vec![work.once()?] } else { measure(|| work.once())?.into_seconds() };
    Ok(Report { seconds, costs: work.costs, peak_rss_mib: peak_rss_mib() })
}

/// The most memory this process had resident; `None` where the system does not tell as Linux does.
fn peak_rss_mib() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<f64>().ok()? / 1024.0)
}

/// The report of a new process for row `name`, and the time from its start to the report. It is ended when `stop` says
/// so.
///
/// # Errors
/// [`Error::Interrupted`], and what went wrong in that process.
pub fn ask(name: &str, inputs: &Path, threads: usize, stop: &AtomicBool) -> Result<(Report, Duration)> {
    let program = std::env::current_exe()
        .map_err(|err| Error::Internal(format!("bench: cannot find this program: {err}")))?;
    let mut command = Command::new(&program);
    command.args(["bench", "--row", name, "--inputs"]).arg(inputs);
    command.args(["--threads", &threads.to_string()]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let start = Instant::now();
    let mut child = Ended(command.spawn().map_err(Error::io(&program, "start"))?);
    let stdout = child.0.stdout.take().expect("asked for a pipe");
    // Waiting for a child closes its input, which would end it before it has ended by itself.
    let stdin = child.0.stdin.take();
    let (send, receive) = channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        let read = BufReader::new(stdout).read_line(&mut line);
        // Nobody listens any more when the row was given up.
        send.send((read.map(|_| line), start.elapsed())).ok();
    });
    let (line, wall) = loop {
        match receive.recv_timeout(Duration::from_millis(50)) {
            Ok((line, wall)) => break (line.unwrap_or_default(), wall),
            Err(RecvTimeoutError::Disconnected) => break (String::new(), start.elapsed()),
            Err(RecvTimeoutError::Timeout) if stop.load(Ordering::Relaxed) => return Err(Error::Interrupted),
            Err(RecvTimeoutError::Timeout) => {}
        }
    };
    let ended = child.0.wait();
    drop(stdin);
    // Ctrl-C in a terminal goes to both processes.
    if stop.load(Ordering::Relaxed) {
        return Err(Error::Interrupted);
    }
    let failed = || match &ended {
        Ok(status) => Error::Internal(format!("bench: {name} did not end well: {status}")),
        Err(err) => Error::Internal(format!("bench: {name} cannot be waited for: {err}")),
    };
    let answer: Result<Report, Failure> = serde_json::from_str(&line).map_err(|_| failed())?;
    Ok((answer.map_err(Failure::into_error)?, wall))
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
