//! Logits in mixed precision: their largest and mean deviation from the float32 golden, which is 1e-6 from float64,
//! at most those of torch's CPU autocast (`eval.lowprec_maxabs`), and the number of voxels that change sides, within
//! its counting noise.

use spleen_hpc::device::bf16::Operands;
use spleen_hpc::device::cpu;
use spleen_hpc::nn::Mode;
use spleen_hpc::tensor::Tape;

use crate::golden::{File, Golden};
use crate::layout::{to_engine, to_torch};
use crate::ledger::Ledger;
use crate::output::Output;
use crate::tensor::Tensor;
use crate::tolerance::Tolerance;
use crate::{Outcome, network};

/// The device's half precision.
pub fn fp16(golden: &Golden, ledger: &mut Ledger) -> Outcome<()> {
    compare(golden, ledger, "torch's fp16 autocast", 3, Operands::Single)
}

/// The CPU's bfloat16 operands on the vector unit in use.
pub fn bf16_on_vectors(golden: &Golden, ledger: &mut Ledger) -> Outcome<()> {
    cpu::use_simd(cpu::simd());
    compare(golden, ledger, "torch's bf16 autocast", 0, Operands::Bf16)
}

/// The same on the best unit, then on AMX, which is emulated where there is none. Recomputed tensors that are written out
/// are the float32 ones.
pub fn bf16(golden: &Golden, ledger: &mut Ledger) -> Outcome<()> {
    let mut own = Ledger::new(Output::new(None));
    own.group = ledger.group;
    bf16_on_vectors(golden, &mut own)?;
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    {
        crate::amx_emulator::turn_on();
        let before = crate::amx_emulator::emulated_products();
        compare(golden, &mut own, "torch's bf16 autocast (AMX)", 0, Operands::Bf16)?;
        let after = crate::amx_emulator::emulated_products();
        if !cpu::amx() || after.is_some() && after <= before {
            return Err("AMX was on, but no product of tiles was seen".into());
        }
    }
    cpu::obey_environment()?;
    ledger.rows.append(&mut own.rows);
    Ok(())
}

/// `first` is the place of the kind's three values in the yardstick.
fn compare(
    golden: &Golden,
    ledger: &mut Ledger,
    yardstick: &'static str,
    first: usize,
    operands: Operands,
) -> Outcome<()> {
    ledger.each_file(golden, "unet_*", |file, ledger| {
        let values = file.need("eval.lowprec_maxabs")?.data;
        let [max, mean, disagreement] = values[first..first + 3] else {
            return Err("eval.lowprec_maxabs has not six values".into());
        };
        let mut net = network::for_evaluation(file)?;
        net.set_operands(operands);
        let x = to_engine(&file.need("x")?)?;
        let logits = to_torch(&net.forward(&mut Tape::off(), x, Mode::Eval, None)?.0)?;
        let bound = Tolerance { dot: f64::INFINITY, ..Tolerance::abs(yardstick, max) };
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
