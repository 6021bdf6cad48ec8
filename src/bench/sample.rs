//! Repeats work and keeps the times.

use std::hint::black_box;
use std::time::Instant;

use super::Cost;
use crate::Result;

/// Fewest runs of a row: a median needs three.
const MIN_RUNS: usize = 3;
/// Most runs of a row.
const MAX_RUNS: usize = 100;
/// A row that has its fewest runs ends after this many seconds of measured time.
const SECONDS: f64 = 2.0;

/// Something that can be done again and again.
pub struct Work {
    /// What the layers of one run cost; empty where FLOP are not the measure.
    pub costs: Vec<Cost>,
    once: Box<dyn FnMut() -> Result<f64>>,
}

impl Work {
    /// Times `work`; its result is dropped after the clock has stopped.
    pub fn new<R>(costs: Vec<Cost>, mut work: impl FnMut() -> Result<R> + 'static) -> Self {
        Self::with_setup(costs, || (), move |()| work())
    }

    /// Times `work` on what `setup` makes before the clock starts.
    pub fn with_setup<T, R>(
        costs: Vec<Cost>,
        mut setup: impl FnMut() -> T + 'static,
        mut work: impl FnMut(T) -> Result<R> + 'static,
    ) -> Self {
        let once = move || {
            let input = setup();
            let start = Instant::now();
            let result = black_box(work(black_box(input))?);
            let seconds = start.elapsed().as_secs_f64();
            drop(result);
            Ok(seconds)
        };
        Work { costs, once: Box::new(once) }
    }

    /// Does it once; the seconds it took.
    ///
    /// # Errors
    /// Those of the work.
    pub fn once(&mut self) -> Result<f64> {
        (self.once)()
    }
}

/// Seconds of several runs of one work; never empty.
#[derive(Clone, Debug)]
pub struct Samples {
    /// Ascending.
    sorted: Vec<f64>,
}

impl Samples {
    /// Of at least one run.
    pub fn new(mut seconds: Vec<f64>) -> Self {
        assert!(!seconds.is_empty(), "a row has at least one run");
        seconds.sort_by(f64::total_cmp);
        Samples { sorted: seconds }
    }

    /// The middle one, or the mean of the middle two.
    pub fn median(&self) -> f64 {
        let (s, n) = (&self.sorted, self.sorted.len());
        (s[(n - 1) / 2] + s[n / 2]) / 2.0
    }

    /// The fastest.
    pub fn min(&self) -> f64 {
        self.sorted[0]
    }

    /// All of them, ascending.
    pub fn into_seconds(self) -> Vec<f64> {
        self.sorted
    }

    /// How many.
    pub fn runs(&self) -> usize {
        self.sorted.len()
    }
}

/// Runs `once` until there are enough times to tell a median: 3 runs at least, then up to 2 seconds or 100 runs. The
/// first run of all warms caches and buffers and is not counted.
///
/// # Errors
/// The first error of a run.
pub fn measure(mut once: impl FnMut() -> Result<f64>) -> Result<Samples> {
    once()?;
    let mut seconds = Vec::new();
    while seconds.len() < MIN_RUNS || (seconds.len() < MAX_RUNS && seconds.iter().sum::<f64>() < SECONDS) {
        seconds.push(once()?);
    }
    Ok(Samples::new(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_the_middle() {
        let odd = Samples::new(vec![3.0, 1.0, 2.0]);
        assert_eq!((odd.median(), odd.min(), odd.runs()), (2.0, 1.0, 3));
        assert_eq!(Samples::new(vec![4.0, 1.0, 2.0, 3.0]).median(), 2.5);
        assert_eq!(Samples::new(vec![7.0]).median(), 7.0);
    }

    /// Fast work is repeated often, slow work thrice, and the warm-up is in neither.
    #[test]
    fn runs_follow_the_time_they_take() {
        for (seconds, want) in [(1e-6, 100), (0.5, 4), (10.0, 3)] {
            let mut calls = 0;
            let samples = measure(|| {
                calls += 1;
                Ok(if calls == 1 { 1e9 } else { seconds })
            });
            let samples = samples.unwrap();
            assert_eq!((samples.runs(), calls), (want, want + 1));
            assert_eq!(samples.median(), seconds);
        }
    }
}
