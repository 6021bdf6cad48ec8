//! Prints what the ledger holds.

use std::collections::BTreeMap;

use crate::ledger::{Ledger, Row};

/// Failures shown a group: enough to see the pattern of a bug.
const SHOWN: usize = 12;

/// One line a (group, tolerance): tensors, worst error and how much of its bound it uses, verdict.
pub fn print(ledger: &Ledger, groups: &[&'static str]) {
    println!(
        "\n{:<17} {:<34} {:>7} {:>10} {:>10} {:>7}  verdict",
        "group", "tolerance", "tensors", "worst", "allowed", "used"
    );
    for &group in groups {
        let mut by_tolerance: BTreeMap<&str, Vec<&Row>> = BTreeMap::new();
        for row in ledger.rows.iter().filter(|r| r.group == group) {
            by_tolerance.entry(row.tolerance.name).or_default().push(row);
        }
        for (tolerance, rows) in by_tolerance {
            let failed = rows.iter().filter(|r| !r.passed()).count();
            let ignored: usize = rows.iter().map(|r| r.ignored).sum();
            let verdict = if failed == 0 { "ok".to_owned() } else { format!("{failed} FAILED") };
            let ties = if ignored == 0 { String::new() } else { format!(" ({ignored} ties not compared)") };
            let measured = rows.iter().filter_map(|r| r.worst.as_ref().ok());
            let worst = measured.max_by(|a, b| a.fraction().total_cmp(&b.fraction()));
            let (error, bound, used) = worst.map_or(("-".into(), "-".into(), "-".into()), |d| {
                (number(d.error), number(d.bound), format!("{:.1}%", 100.0 * d.fraction()))
            });
            println!(
                "{group:<17} {tolerance:<34} {:>7} {error:>10} {bound:>10} {used:>7}  {verdict}{ties}",
                rows.len()
            );
        }
    }
    failures(ledger, groups);
    left_out(ledger);
}

fn number(v: f64) -> String {
    if v == 0.0 { "0".into() } else { format!("{v:.2e}") }
}

fn failures(ledger: &Ledger, groups: &[&'static str]) {
    for &group in groups {
        let failed: Vec<&Row> = ledger.rows.iter().filter(|r| r.group == group && !r.passed()).collect();
        for row in failed.iter().take(SHOWN) {
            let why = match &row.worst {
                Ok(d) => format!("{} (error {}, allowed {})", d.place, number(d.error), number(d.bound)),
                Err(why) => why.clone(),
            };
            println!("FAILED {group}: {} [{}]: {why}", row.what, row.tolerance.name);
        }
        if failed.len() > SHOWN {
            println!("FAILED {group}: ... and {} more", failed.len() - SHOWN);
        }
    }
}

fn left_out(ledger: &Ledger) {
    let mut by_reason: BTreeMap<(&str, &str), Vec<String>> = BTreeMap::new();
    for l in &ledger.left_out {
        by_reason.entry((l.group, &l.reason)).or_default().push(format!("{}: {}", l.file, l.name));
    }
    for ((group, reason), names) in by_reason {
        println!("not recomputed, {group}: {} tensors, such as {}: {reason}", names.len(), names[0]);
    }
}
