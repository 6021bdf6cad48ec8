//! Sliding window with the network: `net.*` of `sw`.

use spleen_hpc::config::Window;
use spleen_hpc::infer::predict::{CLASSES, Network};
use spleen_hpc::nn::UNet;
use spleen_hpc::tensor::{Shape, View};

use crate::golden::{File, Golden};
use crate::layout::channels_first;
use crate::ledger::Ledger;
use crate::sw::{blended_on_device, parse};
use crate::tensor::Tensor;
use crate::tolerance::{BLENDED_LOGITS, EXACT, MARGIN, MASK_TIE};
use crate::unet::compare_logits;
use crate::{Outcome, network, place};

/// Blended logits and their argmax for every window setting, by the network that index.json names.
pub fn run_net(golden: &Golden, file: &File, ledger: &mut Ledger) -> Outcome<()> {
    let Some(volume) = file.tensor("net.input") else { return Ok(()) };
    let described = file.params["net"].as_str().unwrap_or_default();
    let source = described.split([':', ' ']).next().unwrap_or_default();
    let source = golden.file(source).ok_or_else(|| format!("sw: there is no network file `{source}`"))?;
    let net = network::for_evaluation(source)?;
    for case in file.stems(".windows").filter(|case| case.starts_with("net.")) {
        let window = parse(&case["net.".len()..])?;
        let logits = blended(&net, &volume, &window)?;
        compare_logits(file, &format!("{case}.logits"), &logits, BLENDED_LOGITS, ledger);
        mask(file, case, &logits, ledger);
    }
    Ok(())
}

/// Blended logits (1, C, D, H, W) of a volume (1, 1, D, H, W).
pub fn blended(net: &UNet, volume: &Tensor, window: &Window) -> Outcome<Tensor> {
    let [1, 1, d, h, w] = volume.shape[..] else {
        return Err(format!("shape {:?} is not one volume", volume.shape).into());
    };
    let shape = Shape::new(1, [d, h, w], CLASSES);
    if let Some(cuda) = place::current() {
        let network = |x: &View| net.infer_on_device(x);
        let logits = blended_on_device(&cuda, &network, &volume.to_f32(), [d, h, w], window)?;
        return Ok(channels_first(shape, &logits));
    }
    let logits = Network::UNet(net, &|_| Ok(())).logits(&volume.to_f32(), [d, h, w], window)?;
    Ok(channels_first(shape, &logits))
}

/// `argmax_bits`, eight voxels a byte, and `min_margin`.
fn mask(file: &File, case: &str, logits: &Tensor, ledger: &mut Ledger) {
    let (background, organ) = logits.data.split_at(logits.data.len() / 2);
    let margins: Vec<f64> = organ.iter().zip(background).map(|(o, b)| o - b).collect();
    let byte = |m: &[f64]| m.iter().enumerate().map(|(i, &m)| u8::from(m > 0.0) << (7 - i)).sum::<u8>();
    let bytes: Vec<u8> = margins.chunks(8).map(byte).collect();
    let undecided: Vec<bool> = margins.chunks(8).map(|m| m.iter().any(|m| m.abs() < MASK_TIE)).collect();
    let bits = Tensor::new(&[bytes.len()], &bytes);
    ledger.compare_except(file, &format!("{case}.argmax_bits"), &bits, EXACT, |i| undecided[i]);
    let least = margins.iter().fold(f64::INFINITY, |least, m| least.min(m.abs()));
    ledger.compare(file, &format!("{case}.min_margin"), &Tensor::new(&[1], &[least]), MARGIN);
}
