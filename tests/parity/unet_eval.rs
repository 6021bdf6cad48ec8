//! The U-Net in evaluation: running statistics as recorded, activations, and inputs of other sizes.

use spleen_hpc::nn::Mode;
use spleen_hpc::tensor::Tape;

use crate::Outcome;
use crate::golden::File;
use crate::layout::{channels_first, to_engine, to_torch};
use crate::ledger::Ledger;
use crate::network;
use crate::tolerance::FLOAT32;
use crate::unet::compare_logits;

/// `eval.*` and `evalact.*`.
pub fn on_training_input(file: &File, ledger: &mut Ledger) -> Outcome<()> {
    let net = network::for_evaluation(file)?;
    let x = to_engine(&file.need("x")?)?;
    let (logits, _) = net.forward(
        &mut Tape::off(),
        x,
        Mode::Eval,
        Some(&mut |module: &str, value| {
            let act = channels_first(value.shape(), value.data());
            ledger.compare(file, &format!("evalact.{module}"), &act, FLOAT32)
        }),
    )?;
    compare_logits(file, "eval.logits", &to_torch(&logits)?, FLOAT32, ledger);
    Ok(())
}

/// `eval.*`, `evalact.*` and `eval<D>x<H>x<W>.logits`.
pub fn run(file: &File, ledger: &mut Ledger) -> Outcome<()> {
    on_training_input(file, ledger)?;
    let net = network::for_evaluation(file)?;
    for x in network::hash_inputs(file)? {
        let names = size_names(&x.shape[2..]);
        if let Some(name) = names.iter().find(|n| file.base_names().contains(n.as_str())) {
            compare_logits(file, name, &network::evaluate(&net, &x)?, FLOAT32, ledger);
        }
    }
    ledger.leave_out(file, "eval.lowprec_maxabs", "a yardstick of other precisions");
    Ok(())
}

/// `eval96.logits` stands for a cube, `eval112x64x80.logits` for any box.
fn size_names(space: &[usize]) -> Vec<String> {
    let sides: Vec<String> = space.iter().map(usize::to_string).collect();
    let mut names = vec![format!("eval{}.logits", sides.join("x"))];
    if sides.iter().all(|s| *s == sides[0]) {
        names.push(format!("eval{}.logits", sides[0]));
    }
    names
}
