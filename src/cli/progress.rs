//! A bar with an ETA on a terminal, plain lines elsewhere; both on stderr.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::tell;

/// Progress of a known number of units.
pub struct Progress {
    bar: ProgressBar,
    /// What is counted, for the plain lines; `None` on a terminal.
    plain: Option<&'static str>,
}

impl Progress {
    /// `total` units of `what` ("cases prepared"); without a terminal a line a tenth of them.
    pub fn new(total: usize, what: &'static str) -> Self {
        if !std::io::stderr().is_terminal() {
            return Progress { bar: ProgressBar::hidden(), plain: Some(what) };
        }
        let bar = ProgressBar::new(total as u64);
        let style = ProgressStyle::with_template(
            "{bar:24} {pos}/{len} {prefix}  {elapsed_precise}, {eta_precise} left  {wide_msg}",
        );
        bar.set_style(style.expect("a constant template that a test draws"));
        bar.set_prefix(what);
        bar.enable_steady_tick(Duration::from_millis(200));
        Progress { bar, plain: None }
    }

    /// A bar and nothing else: where there is no terminal, the caller's own lines tell how far it is.
    pub fn bar_only(total: usize, what: &'static str) -> Self {
        Progress { plain: None, ..Progress::new(total, what) }
    }

    /// `done` of `total` units are done.
    pub fn set(&self, done: usize, total: usize) {
        self.bar.set_position(done as u64);
        let tenth = |done: usize| 10 * done / total.max(1);
        if let Some(what) = self.plain
            && tenth(done) > tenth(done.saturating_sub(1))
        {
            tell(format_args!("{done}/{total} {what}"));
        }
    }

    /// A note beside the bar; nothing where there is no bar.
    pub fn note(&self, text: String) {
        self.bar.set_message(text);
    }

    /// Runs `print` with the bar out of the way.
    pub fn suspend<T>(&self, print: impl FnOnce() -> T) -> T {
        self.bar.suspend(print)
    }

    /// Takes the bar off the screen.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// `8s`, `3m05s`, `2h07m`, `4d01h`.
pub fn compact(time: Duration) -> String {
    let s = time.as_secs();
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m{:02}s", s / 60, s % 60),
        3600..86400 => format!("{}h{:02}m", s / 3600, s / 60 % 60),
        _ => format!("{}d{:02}h", s / 86400, s / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_two_units() {
        let seconds = [0, 59, 60, 3599, 3600, 86399, 86400, 1_000_000];
        let texts = seconds.map(|s| compact(Duration::from_secs(s)));
        assert_eq!(texts, ["0s", "59s", "1m00s", "59m59s", "1h00m", "23h59m", "1d00h", "11d13h"]);
    }
}
