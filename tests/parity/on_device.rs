//! The same goldens through the CUDA engine: in f32 to the tolerances of the CPU, and in mixed precision to the
//! deviation that torch's own autocast has (`eval.lowprec_maxabs`).
//!
//! On the emulator the networks are those of few channels, except in mixed precision; `SPLEEN_NIGHTLY=1` takes the full
//! ones everywhere.

use spleen_hpc::device::cuda::Precision;
use spleen_hpc::nn::Mode;
use spleen_hpc::tensor::Tape;

use crate::golden::{File, Golden};
use crate::layout::{to_engine, to_torch};
use crate::ledger::Ledger;
use crate::output::Output;
use crate::tensor::Tensor;
use crate::tolerance::Tolerance;
use crate::{Outcome, inverse, loss, network, ops, place, support, sw, table, unet_eval, unet_train};

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
    Group { name: "cuda amp", precision: Precision::Half, run: mixed_precision },
];

fn nightly() -> bool {
    std::env::var_os("SPLEEN_NIGHTLY").is_some()
}

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
        let net = network::of_file(file)?;
        unet_train::forward_backward(file, &net, ledger)?;
        if file.name.contains("small") {
            unet_train::steps(file, &net, ledger)?;
        }
        unet_eval::on_training_input(file, ledger)
    });
    Ok(())
}

/// Logits in mixed precision: their largest and mean deviation from the float32 golden, which is 1e-6 from float64,
/// at most those of torch's autocast, and the number of voxels that change sides, within its counting noise.
fn mixed_precision(golden: &Golden, ledger: &mut Ledger) -> Outcome<()> {
    ledger.each_file(golden, "unet_*", |file, ledger| {
        let yardstick = file.need("eval.lowprec_maxabs")?.data;
        let [_, _, _, max, mean, disagreement] = yardstick[..] else {
            return Err("eval.lowprec_maxabs has not six values".into());
        };
        let net = network::for_evaluation(file)?;
        let x = to_engine(&file.need("x")?)?;
        let logits = to_torch(&net.forward(&mut Tape::off(), x, Mode::Eval, None)?.0)?;
        let bound = Tolerance { dot: f64::INFINITY, ..Tolerance::abs("torch's fp16 autocast", max) };
        let (name, got) = stored_logits(file, &logits)?;
        ledger.compare(file, name, &got, bound.and_mean(mean));
        let want = file.need(name)?;
        let side = |t: &Tensor| -> Vec<bool> {
            let samples = t.data.chunks(t.data.len() / t.shape[0]);
            samples
                .flat_map(|s| {
                    let (background, organ) = s.split_at(s.len() / 2);
                    organ.iter().zip(background).map(|(o, b)| o > b).collect::<Vec<_>>()
                })
                .collect()
        };
        let (got, want) = (side(&got), side(&want));
        // Few voxels lie that near the border: a number n of them is only known to sqrt(n).
        let changed = got.iter().zip(&want).filter(|(a, b)| a != b).count() as f64;
        let expected = disagreement * want.len() as f64;
        if changed > expected + 3.0 * expected.sqrt() {
            let why = format!("{changed} of {} voxels change sides, {expected:.1} in torch", want.len());
            ledger.fail(&file.name, why);
        }
        Ok(())
    });
    Ok(())
}

/// The logits as the file holds them: whole, or every second voxel.
fn stored_logits(file: &File, logits: &Tensor) -> Outcome<(&'static str, Tensor)> {
    if file.tensor("eval.logits").is_some() {
        return Ok(("eval.logits", logits.clone()));
    }
    Ok(("eval.logits_s2", logits.strided(2)))
}
