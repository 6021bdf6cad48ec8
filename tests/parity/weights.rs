//! torch.save files: every entry of their state_dicts, and the network's logits with them.

use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use spleen_hpc::nn::UNet;
use spleen_hpc::nn::state_dict::{Array, ArrayData, StateDict};
use spleen_hpc::nn::weights::from_bytes;

use crate::Outcome;
use crate::golden::Golden;
use crate::ledger::Ledger;
use crate::network;
use crate::tensor::Tensor;
use crate::tolerance::{EXACT, FLOAT32};
use crate::unet::compare_logits;

pub fn run(golden: &Golden, ledger: &mut Ledger) -> Outcome<()> {
    ledger.each_file(golden, "weights", |file, ledger| {
        let names: Vec<&str> = file.base_names().into_iter().collect();
        let mut files: Vec<&str> = names
            .iter()
            .filter_map(|n| n.split_once(".sd.").or(n.split_once(".eval_logits")))
            .map(|n| n.0)
            .collect();
        files.sort_unstable();
        files.dedup();
        for stem in files {
            let weights = match read(golden, stem) {
                Ok(weights) => weights,
                Err(why) => {
                    ledger.fail(&format!("{}: {stem}", file.name), why.to_string());
                    continue;
                }
            };
            for (name, array) in weights.iter() {
                ledger.compare(file, &format!("{stem}.sd.{name}"), &tensor(array), EXACT);
            }
            let logits = format!("{stem}.eval_logits");
            if names.contains(&logits.as_str()) {
                let net = UNet::from_state_dict(&weights)?;
                let x = network::hash_inputs(file)?.into_iter().next().ok_or("index.json names no input")?;
                compare_logits(file, &logits, &network::evaluate(&net, &x)?, FLOAT32, ledger);
            }
        }
        Ok(())
    });
    Ok(())
}

/// The weights of `pt/<stem>.pt`, also gzipped; a short stem may be the end of the file's name.
pub fn read(golden: &Golden, stem: &str) -> Outcome<StateDict> {
    let dir = glob::Pattern::escape(&golden.dir.to_string_lossy());
    let find =
        |pattern: String| -> Outcome<Option<PathBuf>> { Ok(glob::glob(&pattern)?.next().transpose()?) };
    let path = match find(format!("{dir}/pt/{stem}.pt*"))? {
        Some(path) => path,
        None => find(format!("{dir}/pt/*{stem}.pt*"))?.ok_or_else(|| format!("no pt/{stem}.pt"))?,
    };
    Ok(from_bytes(&path, &unpacked(&path)?)?)
}

fn unpacked(path: &Path) -> Outcome<Vec<u8>> {
    let mut bytes = std::fs::read(path)?;
    if path.extension().is_some_and(|e| e == "gz") {
        let packed = std::mem::take(&mut bytes);
        MultiGzDecoder::new(&packed[..]).read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}

fn tensor(array: &Array) -> Tensor {
    match &array.data {
        ArrayData::F32(v) => Tensor::new(&array.shape, v),
        ArrayData::I64(v) => Tensor::new(&array.shape, v),
    }
}
