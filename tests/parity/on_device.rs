//! The same goldens through the CUDA engine: in f32 to the tolerances of the CPU, and in mixed precision to the
//! deviation that torch's own autocast has.
//!
//! On the emulator the networks are those of few channels, except in mixed precision; `SPLEEN_NIGHTLY=1` takes the full
//! ones everywhere.

use spleen_hpc::device::cuda::Precision;

use crate::golden::Golden;
use crate::ledger::Ledger;
use crate::output::Output;
use crate::{Outcome, autocast, inverse, loss, nightly, ops, place, support, sw, table, unet};

/// Tables for the groups whose name contains `filter`; true if everything holds. Says so where there is no device.
pub fn replay(golden: &Golden, filter: &str) -> Outcome<bool> {
    let groups: Vec<&Group> = GROUPS.iter().filter(|g| g.name.contains(filter)).collect();
    if groups.is_empty() {
        return Ok(true);
    }
    let mut ledger = Ledger::new(Output::new(None));
    for group in &groups {
        let Some(cuda) = support::device(group.precision, 0) else { return Ok(true) };
        let start = std::time::Instant::now();
        ledger.group = group.name;
        if let Err(e) = place::on_device(&cuda, || (group.run)(golden, &mut ledger)) {
            ledger.fail(group.name, e.to_string());
        }
        println!("{} on {cuda:?}: {:.1} s", group.name, start.elapsed().as_secs_f64());
    }
    ledger.left_out.clear();
    table::print(&ledger, &groups.iter().map(|g| g.name).collect::<Vec<_>>());
    let failed = ledger.rows.iter().filter(|r| !r.passed()).count();
    println!("on a device: {} passed, {failed} failed", ledger.rows.len() - failed);
    Ok(failed == 0)
}

struct Group {
    name: &'static str,
    precision: Precision,
    run: fn(&Golden, &mut Ledger) -> Outcome<()>,
}

const GROUPS: &[Group] = &[
    Group { name: "cuda ops", precision: Precision::Single, run: ops::run },
    Group { name: "cuda loss", precision: Precision::Single, run: loss::run },
    Group { name: "cuda inverse", precision: Precision::Single, run: inverse::on_device },
    Group { name: "cuda sw", precision: Precision::Single, run: windows },
    Group { name: "cuda unet", precision: Precision::Single, run: networks },
    Group { name: "cuda amp", precision: Precision::Half, run: autocast::fp16 },
];

/// The sliding window.
fn windows(golden: &Golden, ledger: &mut Ledger) -> Outcome<()> {
    sw::on_device(golden, ledger, nightly())
}

/// Activations, loss, gradients, trained parameters and evaluation of the networks there is time for.
fn networks(golden: &Golden, ledger: &mut Ledger) -> Outcome<()> {
    ledger.each_file(golden, "unet_*", |file, ledger| {
        if file.name.contains("full") && !nightly() {
            return Ok(());
        }
        unet::in_brief(file, ledger)
    });
    Ok(())
}
