//! The goldens of operations and networks on the vector units that the replay before has not taken, forced as the
//! environment variable `SPLEEN_SIMD` forces them: in f32 to the same tolerances, in bfloat16 to the same yardstick.
//!
//! `SPLEEN_NIGHTLY=1` adds the full networks' larger inputs and their steps of Adam.

use spleen_hpc::device::cpu::{Simd, obey_environment, simd, use_simd};

use crate::golden::Golden;
use crate::ledger::Ledger;
use crate::output::Output;
use crate::{Outcome, autocast, nightly, ops, table, unet};

/// Tables for the groups whose name contains `filter`, unless the environment already forces a unit on all groups; true
/// if everything holds. Says so where the machine lacks a unit.
pub fn replay(golden: &Golden, filter: &str) -> Outcome<bool> {
    if std::env::var_os("SPLEEN_SIMD").is_some_and(|unit| !unit.is_empty()) {
        return Ok(true);
    }
    let best = simd();
    let mut ledger = Ledger::new(Output::new(None));
    let mut ran = vec![];
    for unit in UNITS.iter().filter(|unit| unit.simd != best) {
        let groups = || unit.groups.iter().filter(|(name, _)| name.contains(filter));
        if groups().next().is_some() && use_simd(unit.simd) != unit.simd {
            println!("skipped: {}: this machine has {best}", unit.simd);
            continue;
        }
        for (name, run) in groups() {
            let start = std::time::Instant::now();
            ledger.group = name;
            if let Err(e) = run(golden, &mut ledger) {
                ledger.fail(name, e.to_string());
            }
            ran.push(*name);
            println!("{name}: {:.1} s", start.elapsed().as_secs_f64());
        }
    }
    obey_environment()?;
    if ran.is_empty() {
        return Ok(true);
    }
    ledger.left_out.clear();
    table::print(&ledger, &ran);
    let failed = ledger.rows.iter().filter(|r| !r.passed()).count();
    println!("on forced vector units: {} passed, {failed} failed", ledger.rows.len() - failed);
    Ok(failed == 0)
}

struct Unit {
    simd: Simd,
    groups: [(&'static str, Run); 3],
}

type Run = fn(&Golden, &mut Ledger) -> Outcome<()>;

const UNITS: [Unit; 3] = [
    Unit {
        simd: Simd::Avx512,
        groups: [
            ("avx512 ops", ops::run),
            ("avx512 unet", networks),
            ("avx512 autocast", autocast::bf16_on_vectors),
        ],
    },
    Unit {
        simd: Simd::Avx2,
        groups: [
            ("avx2 ops", ops::run),
            ("avx2 unet", networks),
            ("avx2 autocast", autocast::bf16_on_vectors),
        ],
    },
    Unit {
        simd: Simd::Portable,
        groups: [
            ("portable ops", ops::run),
            ("portable unet", networks),
            ("portable autocast", autocast::bf16_on_vectors),
        ],
    },
];

/// Activations, loss, gradients and evaluation of all networks, trained parameters of those of few channels.
fn networks(golden: &Golden, ledger: &mut Ledger) -> Outcome<()> {
    if nightly() {
        return unet::run(golden, ledger);
    }
    ledger.each_file(golden, "unet_*", unet::in_brief);
    Ok(())
}
