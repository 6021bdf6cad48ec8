//! The U-Net: `unet_*` files, their initial values and what both modes share.

use crate::Outcome;
use crate::golden::{File, Golden};
use crate::ledger::Ledger;
use crate::network;
use crate::tensor::Tensor;
use crate::tolerance::{EXACT, Tolerance};
use crate::{unet_eval, unet_train};

/// Every network file.
pub fn run(golden: &Golden, ledger: &mut Ledger) -> Outcome<()> {
    ledger.each_file(golden, "unet_*", |file, ledger| {
        let net = network::of_file(file)?;
        for (param, name) in net.params().iter().zip(net.param_names()) {
            let got = Tensor::new(&param.shape, &param.value);
            ledger.compare(file, &format!("init.{name}"), &got, EXACT);
        }
        unet_train::forward_backward(file, &net, ledger)?;
        unet_train::steps(file, &net, ledger)?;
        unet_eval::run(file, ledger)?;
        ledger.leave_out(file, "*_maxabs*", "torch's own deviation, used as a yardstick only");
        for twin in ["train.logits64", "act64.*", "grad64.*", "adam*_64.*", "adam_losses64"] {
            ledger.leave_out(file, twin, "float64 twin of a float32 result: the network computes in float32");
        }
        Ok(())
    });
    Ok(())
}

/// One network wherever it computes: activations, loss, gradients, evaluation, and trained parameters of a small one.
pub fn in_brief(file: &File, ledger: &mut Ledger) -> Outcome<()> {
    let net = network::of_file(file)?;
    unet_train::forward_backward(file, &net, ledger)?;
    if file.name.contains("small") {
        unet_train::steps(file, &net, ledger)?;
    }
    unet_eval::on_training_input(file, ledger)
}

/// Compares `name` and its strided forms `name_s<step>`.
pub fn compare_logits(file: &File, name: &str, got: &Tensor, tolerance: Tolerance, ledger: &mut Ledger) {
    ledger.compare(file, name, got, tolerance);
    let prefix = format!("{name}_s");
    for strided in file.base_names().into_iter().filter(|n| n.starts_with(&prefix)) {
        if let Ok(step) = strided[prefix.len()..].parse() {
            ledger.compare(file, strided, &got.strided(step), tolerance);
        }
    }
}
