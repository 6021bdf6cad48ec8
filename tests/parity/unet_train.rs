//! The U-Net in training: activations, loss, gradients, running statistics, and the parameters after steps of Adam.

use spleen_hpc::config::{Loss, Optimizer};
use spleen_hpc::nn::state_dict::ArrayData;
use spleen_hpc::nn::{Mode, UNet};
use spleen_hpc::ops::dice_ce;
use spleen_hpc::tensor::{Tape, Tensor as Engine};
use spleen_hpc::train::trainer::Trainer;

use crate::Outcome;
use crate::golden::File;
use crate::layout::{channels_first, to_engine, to_torch};
use crate::ledger::Ledger;
use crate::network::bias_is_cancelled;
use crate::place;
use crate::tensor::Tensor;
use crate::tolerance::{
    FLOAT32, LOSS_NET, STATISTICS, Tolerance, gradient, parameters, step_losses, trained_statistics,
};
use crate::unet::compare_logits;
use crate::{loss, optim};

/// The loss of index.json's params, absent ones as MONAI's defaults.
fn loss_of(file: &File) -> Loss {
    let flag = |name: &str, default| file.params[name].as_bool().unwrap_or(default);
    let number = |name: &str, default| file.params[name].as_f64().unwrap_or(default);
    let d = loss::DEFAULT;
    Loss {
        lambda_dice: number("lambda_dice", d.lambda_dice),
        lambda_ce: number("lambda_ce", d.lambda_ce),
        include_background: flag("include_background", d.include_background),
        squared_pred: flag("squared_pred", d.squared_pred),
        batch: flag("batch", d.batch),
        smooth: number("smooth", d.smooth),
    }
}

/// One forward pass with all activations and one backward pass.
pub fn forward_backward(file: &File, net: &UNet, ledger: &mut Ledger) -> Outcome<()> {
    let net = &place::network(net)?;
    let x = to_engine(&file.need("x")?)?;
    let labels = file.need("label")?.to_u8();
    let mut tape = Tape::recording();
    let (logits, statistics) = net.forward(
        &mut tape,
        x,
        Mode::Train,
        Some(&mut |module: &str, value| {
            let act = channels_first(value.shape(), value.data());
            ledger.compare(file, &format!("act.{module}"), &act, FLOAT32)
        }),
    )?;
    compare_logits(file, "train.logits", &to_torch(&logits)?, FLOAT32, ledger);
    let value = loss_on_tape(&mut tape, &logits, &labels, &loss_of(file))?;
    // [torch float32, torch float64]
    ledger.compare(file, "loss", &Tensor::new(&[2], &[value; 2]), LOSS_NET);
    let mut grads = net.grads();
    tape.backward(&mut grads)?;
    let yardstick = file.need("grad_maxabs_f32_f64")?;
    if yardstick.shape != [net.params().len(), 2] {
        return Err(format!("grad_maxabs_f32_f64 has shape {:?}", yardstick.shape).into());
    }
    for (i, (param, name)) in net.params().iter().zip(net.param_names()).enumerate() {
        let got = Tensor::new(&param.shape, &param.gradient(&grads)?);
        let cancelled = bias_is_cancelled(net, name);
        let bound = gradient(cancelled, yardstick.data[2 * i], yardstick.data[2 * i + 1]);
        ledger.compare(file, &format!("grad.{name}"), &got, bound);
    }
    let mut after = net.clone();
    after.update_running(&statistics)?;
    after.count_batch();
    after.refresh()?;
    compare_buffers(file, "buf1", &after, STATISTICS, ledger);
    Ok(())
}

/// The loss, wherever the logits are; on a device without a scale.
fn loss_on_tape(tape: &mut Tape, logits: &Engine, labels: &[u8], p: &Loss) -> Outcome<f64> {
    let Some(cuda) = place::current() else { return Ok(dice_ce::loss(tape, logits, labels, p)?.loss) };
    let one = cuda.upload(&[1.0f32])?;
    let value = dice_ce::loss_on_device(tape, logits, &cuda.upload(labels)?, p, &one)?;
    Ok(value.values.download()?[0].into())
}

/// As many steps of Adam as the file has recorded.
pub fn steps(file: &File, net: &UNet, ledger: &mut Ledger) -> Outcome<()> {
    let step_of = |name: &str| name.strip_prefix("adam")?.split_once('.')?.0.parse().ok();
    let mut recorded: Vec<usize> = file.base_names().into_iter().filter_map(step_of).collect();
    recorded.sort_unstable();
    recorded.dedup();
    let curve = file.tensor("adam_losses").map_or(0, |t| t.data.len());
    let Some(last) = recorded.last().copied().into_iter().chain([curve]).max().filter(|&n| n > 0) else {
        return Ok(());
    };
    let lr = serde_json::json!({ "lr": file.params["adam_lr"] });
    let config = optim::config(Optimizer::Adam, &lr)?;
    let mut trainer = Trainer::with_network(net.clone(), loss_of(file), config);
    if let Some(cuda) = place::current() {
        trainer = trainer.on_device(&cuda)?;
    }
    let x = file.need("x")?;
    let [n, _, d, h, w] = x.shape[..] else { return Err("x is not (N, 1, D, H, W)".into()) };
    let (images, labels) = (x.to_f32(), file.need("label")?.to_u8());
    let weights = net.params().iter().map(|p| p.value.len()).sum();
    let mut losses = Vec::new();
    for step in 1..=last {
        losses.push(trainer.step(&images, &labels, [n, d, h, w])?);
        if recorded.binary_search(&step).is_ok() {
            trainer.refresh()?;
            compare_parameters(file, step, &trainer.net, ledger)?;
            compare_buffers(
                file,
                &format!("adam{step}.buf"),
                &trainer.net,
                trained_statistics(weights),
                ledger,
            );
        }
    }
    losses.truncate(curve);
    ledger.compare(file, "adam_losses", &Tensor::new(&[curve], &losses), step_losses(weights));
    Ok(())
}

fn compare_parameters(file: &File, step: usize, net: &UNet, ledger: &mut Ledger) -> Outcome<()> {
    // [max, mean] a parameter; of the first step only.
    let yardstick = if step == 1 { file.need("adam1_maxabs_f32_f64")?.data } else { Vec::new() };
    for (i, (param, name)) in net.params().iter().zip(net.param_names()).enumerate() {
        let golden = format!("adam{step}.{name}");
        if bias_is_cancelled(net, name) {
            ledger.leave_out(file, &golden, "its true gradient is 0: Adam makes steps of rounding noise");
        } else {
            let got = Tensor::new(&param.shape, &param.value);
            let deviation = yardstick.get(2 * i).copied().unwrap_or(0.0);
            let bound = parameters(step, param.value.len(), deviation);
            ledger.compare(file, &golden, &got, bound);
        }
    }
    Ok(())
}

/// State as `PREFIX.<name>`: running statistics, of which alone the file has such names.
fn compare_buffers(file: &File, prefix: &str, net: &UNet, tolerance: Tolerance, ledger: &mut Ledger) {
    for (name, array) in net.state_dict().iter() {
        if let ArrayData::F32(values) = &array.data {
            ledger.compare(file, &format!("{prefix}.{name}"), &Tensor::new(&array.shape, values), tolerance);
        }
    }
}
