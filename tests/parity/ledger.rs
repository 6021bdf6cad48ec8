//! What was compared, how far it was off, and what was left out and why.

use std::collections::BTreeSet;

use crate::Outcome;
use crate::golden::{File, Golden, fits};
use crate::hash;
use crate::output::Output;
use crate::tensor::Tensor;
use crate::tolerance::{SUM_ORDER, Tolerance};

/// The result of comparing one tensor.
pub struct Row {
    pub group: &'static str,
    /// `file: tensor`.
    pub what: String,
    pub tolerance: Tolerance,
    /// The deviation that uses up most of its bound, or why the tensors cannot be compared.
    pub worst: Result<Deviation, String>,
    /// Voxels of a mask that were not compared because they lie on a tie.
    pub ignored: usize,
}

/// One deviation and what it may be.
#[derive(Clone, Debug)]
pub struct Deviation {
    pub error: f64,
    pub bound: f64,
    /// Where, with both values.
    pub place: String,
}

impl Deviation {
    /// The part of the bound that is used up; 1 or less passes.
    pub fn fraction(&self) -> f64 {
        if self.error == 0.0 { 0.0 } else { self.error / self.bound }
    }
}

impl Row {
    pub fn passed(&self) -> bool {
        // A NaN fraction is a failure, so `<=` and not a negated `>`.
        self.worst.as_ref().is_ok_and(|d| d.fraction() <= 1.0)
    }
}

/// An output that is not recomputed.
pub struct LeftOut {
    pub group: &'static str,
    pub file: String,
    pub name: String,
    pub reason: String,
}

/// Collects rows; knows which outputs have been seen.
pub struct Ledger {
    pub group: &'static str,
    pub rows: Vec<Row>,
    pub left_out: Vec<LeftOut>,
    seen: BTreeSet<(String, String)>,
    pub output: Output,
}

impl Ledger {
    pub fn new(output: Output) -> Self {
        Ledger { group: "", rows: vec![], left_out: vec![], seen: BTreeSet::new(), output }
    }

    /// Runs `replay` for every file that fits; a file that cannot be replayed fails without stopping the others.
    pub fn each_file<'g>(
        &mut self,
        golden: &'g Golden,
        pattern: &str,
        mut replay: impl FnMut(&'g File, &mut Ledger) -> Outcome<()>,
    ) {
        for file in golden.files(pattern) {
            if let Err(e) = replay(file, self) {
                self.fail(&file.name, e.to_string());
            }
        }
    }

    /// Checks a whole recomputed tensor (torch or NIfTI axis order) against everything the file holds of it:
    /// the tensor, its digest, its samples. A name that the file does not have is no output of this folder.
    pub fn compare(&mut self, file: &File, name: &str, got: &Tensor, tolerance: Tolerance) {
        self.compare_except(file, name, got, tolerance, |_| false);
    }

    /// As [`Ledger::compare`], leaving out elements (C-order index) that a tie decides.
    pub fn compare_except(
        &mut self,
        file: &File,
        name: &str,
        got: &Tensor,
        tolerance: Tolerance,
        tie: impl Fn(usize) -> bool,
    ) {
        if !file.base_names().contains(name) {
            return;
        }
        self.seen.insert((file.name.clone(), name.to_owned()));
        let ties: Vec<usize> = (0..got.data.len()).filter(|&i| tie(i)).collect();
        let whole = file.tensor(name).map(|want| against_whole(got, &want, tolerance, &ties));
        let digest = file.tensor(&format!("{name}#digest"));
        let samples = file
            .tensor(&format!("{name}#samples"))
            .map(|want| against_samples(got, &want, digest.as_ref(), tolerance, &ties));
        let digest = digest.as_ref().map(|want| against_digest(got, want, tolerance, ties.len()));
        let checks = [whole, digest, samples].into_iter().flatten();
        let worst = checks.reduce(worse).unwrap_or_else(|| Err("its stored form is not readable".into()));
        let dtype = file.dtype(name).unwrap_or(got.dtype);
        self.output.keep(&file.name, name, got, dtype);
        self.push(format!("{}: {name}", file.name), tolerance, worst, ties.len());
    }

    /// Compares two tensors where the golden one is not in a safetensors file (a saved NIfTI, a JSON curve).
    pub fn compare_with(
        &mut self,
        what: &str,
        got: &Tensor,
        want: &Tensor,
        tolerance: Tolerance,
        tie: impl Fn(usize) -> bool,
    ) {
        let ties: Vec<usize> = (0..got.data.len()).filter(|&i| tie(i)).collect();
        self.push(what.to_owned(), tolerance, against_whole(got, want, tolerance, &ties), ties.len());
    }

    /// Outputs of `file` that fit `pattern` are not recomputed, for this reason.
    pub fn leave_out(&mut self, file: &File, pattern: &str, reason: &str) {
        let names = file.base_names().into_iter().filter(|n| fits(pattern, n) && !file.is_input(n));
        let names: Vec<String> = names.map(str::to_owned).collect();
        for name in names {
            if self.seen.insert((file.name.clone(), name.clone())) {
                let (file, reason) = (file.name.clone(), reason.to_owned());
                self.left_out.push(LeftOut { group: self.group, file, name, reason });
            }
        }
    }

    /// Something that could not be recomputed at all.
    pub fn fail(&mut self, what: &str, why: String) {
        self.push(what.to_owned(), Tolerance::abs("replayed", 0.0), Err(why), 0);
    }

    /// Every output of the files that is neither compared nor excused is a failure.
    pub fn account_for(&mut self, golden: &Golden, patterns: &[&str]) {
        for file in golden.files.iter().filter(|f| patterns.iter().any(|p| fits(p, &f.name))) {
            for name in file.base_names() {
                let key = (file.name.clone(), name.to_owned());
                if !file.is_input(name) && !self.seen.contains(&key) {
                    self.fail(
                        &format!("{}: {name}", file.name),
                        "not recomputed, and no reason given".into(),
                    );
                }
            }
        }
    }

    fn push(&mut self, what: String, tolerance: Tolerance, worst: Result<Deviation, String>, ignored: usize) {
        self.rows.push(Row { group: self.group, what, tolerance, worst, ignored });
    }
}

type Check = Result<Deviation, String>;

/// What is known of a golden tensor's size, from itself or from its digest.
struct Scale {
    n: f64,
    max: f64,
    norm: f64,
    sum_abs: f64,
}

impl Scale {
    fn of(d: &[f64]) -> Self {
        Scale { n: d[0], max: d[4].abs().max(d[5].abs()), norm: d[3].sqrt(), sum_abs: d[2] }
    }

    /// The largest allowed deviation of one element.
    fn element(&self, t: Tolerance) -> f64 {
        (t.max + t.rel * self.max).min(t.norm * self.norm).min(t.mean * self.n)
    }
}

fn worse(a: Check, b: Check) -> Check {
    match (a, b) {
        // A NaN fraction must win, so the comparison is written to be false for it.
        (Ok(a), Ok(b)) => Ok(if a.fraction() >= b.fraction() || a.fraction().is_nan() { a } else { b }),
        (Err(e), _) | (_, Err(e)) => Err(e),
    }
}

/// |a - b|, where equal infinities and two NaN agree and anything else non-finite is infinitely wrong.
fn distance(got: f64, want: f64) -> f64 {
    if got == want || got.is_nan() && want.is_nan() {
        return 0.0;
    }
    let d = (got - want).abs();
    if d.is_finite() { d } else { f64::INFINITY }
}

fn deviation(got: f64, want: f64, bound: f64, place: impl FnOnce() -> String) -> Deviation {
    let error = distance(got, want);
    let place = if error > 0.0 { format!("{}: want {want:e}, got {got:e}", place()) } else { String::new() };
    Deviation { error, bound, place }
}

fn against_whole(got: &Tensor, want: &Tensor, t: Tolerance, ties: &[usize]) -> Check {
    if got.shape != want.shape {
        return Err(format!("shape: want {:?}, got {:?}", want.shape, got.shape));
    }
    let finite: Vec<f64> = want.data.iter().copied().filter(|v| v.is_finite()).collect();
    let scale = Scale::of(&hash::digest(&finite));
    let bound = scale.element(t);
    let is_tie = |i: &usize| ties.binary_search(i).is_ok();
    let errors =
        || (0..want.data.len()).filter(|i| !is_tie(i)).map(|i| (i, distance(got.data[i], want.data[i])));
    let Some((at, _)) = errors().max_by(|a, b| a.1.total_cmp(&b.1)) else {
        return Ok(deviation(0.0, 0.0, bound, String::new));
    };
    let place = || format!("element {:?}", unravel(at, &want.shape));
    let mut worst = Ok(deviation(got.data[at], want.data[at], bound, place));
    let n = want.data.len() as f64;
    if t.mean.is_finite() {
        let mean = errors().map(|e| e.1).sum::<f64>() / n;
        worst = worse(worst, Ok(deviation(mean, 0.0, t.mean, || "mean deviation".into())));
    }
    if t.norm.is_finite() {
        let norm = errors().map(|e| e.1 * e.1).sum::<f64>().sqrt();
        worst =
            worse(worst, Ok(deviation(norm, 0.0, t.norm * scale.norm, || "norm of the deviation".into())));
    }
    worst
}

fn against_samples(
    got: &Tensor,
    want: &Tensor,
    digest: Option<&Tensor>,
    t: Tolerance,
    ties: &[usize],
) -> Check {
    // A sample of a larger tensor has a smaller norm and maximum, so the digest's scale is used where there is one.
    let scale = Scale::of(digest.map_or(&hash::digest(&want.data)[..], |d| &d.data[..]));
    let bound = scale.element(t);
    if want.data.len() > got.data.len() {
        return Err(format!("{} samples of {} values", want.data.len(), got.data.len()));
    }
    hash::samples(&got.data, want.data.len())
        .zip(&want.data)
        .filter(|((at, _), _)| ties.binary_search(at).is_err())
        .map(|((at, g), &w)| Ok(deviation(g, w, bound, || format!("sample {:?}", unravel(at, &got.shape)))))
        .reduce(worse)
        .unwrap_or_else(|| Ok(deviation(0.0, 0.0, bound, String::new)))
}

fn against_digest(got: &Tensor, want: &Tensor, t: Tolerance, ties: usize) -> Check {
    let [have, want] = [&hash::digest(&got.data)[..], &want.data[..]];
    if want.len() != 8 || have[0] != want[0] {
        return Err(format!("number of values: want {}, got {}", want[0], have[0]));
    }
    let scale = Scale::of(want);
    let element = scale.element(t);
    // Elements on a tie may differ by the whole range of the tensor.
    let tie = ties as f64 * (want[5] - want[4]);
    let mean = element.min(t.mean);
    let sum = scale.n * mean + SUM_ORDER * scale.sum_abs + tie;
    let squares = (2.0 * scale.max + element) * (scale.n * mean + tie) + SUM_ORDER * want[3];
    let extreme = if ties > 0 { f64::INFINITY } else { element };
    // Deviations of random sign add up to their size times sqrt(n/3) against a probe in [-1, 1).
    let dot = (t.dot * scale.norm).max(t.spread * scale.n.sqrt()) + tie;
    let bounds = [0.0, sum, sum, squares, extreme, extreme, dot, dot];
    const NAMES: [&str; 8] =
        ["count", "sum", "sum of |x|", "sum of squares", "minimum", "maximum", "<x, probe1>", "<x, probe2>"];
    (1..8)
        .map(|i| Ok(deviation(have[i], want[i], bounds[i], || format!("digest, {}", NAMES[i]))))
        .reduce(worse)
        .expect("seven numbers")
}

fn unravel(mut at: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for (i, n) in index.iter_mut().zip(shape).rev() {
        (*i, at) = (at % n, at / n);
    }
    index
}
