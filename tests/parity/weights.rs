//! Weight files of torch: every entry of the state_dict, and what the network makes of a volume with them.

use std::io::Read;
use std::path::{Path, PathBuf};

use spleen_hpc::nn::state_dict::{ArrayData, StateDict};
use spleen_hpc::nn::{UNet, weights};

use crate::Outcome;
use crate::golden::Golden;
use crate::ledger::Ledger;
use crate::network;
use crate::tensor::Tensor;
use crate::tolerance::{EXACT, FLOAT32};
use crate::unet::compare_logits;

/// `STEM.sd.<name>` and `STEM.eval_logits`, where STEM is the name, or the end of the name, of a file in `pt/`.
pub fn run(golden: &Golden, ledger: &mut Ledger) -> Outcome<()> {
    ledger.each_file(golden, "weights", |file, ledger| {
        let stem =
            |n: &'static str| file.base_names().into_iter().filter_map(move |b| Some(b.split_once(n)?.0));
        let mut stems: Vec<&str> = stem(".sd.").chain(stem(".eval_logits")).collect();
        stems.sort_unstable();
        stems.dedup();
        for stem in stems {
            let path = find(&golden.dir, stem)?;
            let weights = read(&path)?;
            for (name, array) in weights.iter() {
                let got = match &array.data {
                    ArrayData::F32(v) => Tensor::new(&array.shape, v),
                    ArrayData::I64(v) => Tensor::new(&array.shape, v),
                };
                ledger.compare(file, &format!("{stem}.sd.{name}"), &got, EXACT);
            }
            let logits = format!("{stem}.eval_logits");
            if file.base_names().contains(logits.as_str()) {
                let net = UNet::from_state_dict(&weights)?;
                let x = network::hash_inputs(file)?.into_iter().next().ok_or("index.json names no input")?;
                compare_logits(file, &logits, &network::evaluate(&net, &x)?, FLOAT32, ledger);
            }
        }
        Ok(())
    });
    Ok(())
}

/// The weight file of a stem: `STEM.pt[.gz]`, else the one whose name ends so.
fn find(dir: &Path, stem: &str) -> Outcome<PathBuf> {
    let pattern = format!("{}/pt/*.pt*", glob::Pattern::escape(&dir.to_string_lossy()));
    let files = glob::glob(&pattern)?.collect::<Result<Vec<_>, _>>()?;
    let base = |p: &PathBuf| p.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let named = |fit: fn(&str, &str) -> bool| {
        files.iter().find(|p| base(p).split_once(".pt").is_some_and(|(name, _)| fit(name, stem)))
    };
    let found =
        named(|name, stem| name == stem).or_else(|| named(|name, stem| name.ends_with(&format!("_{stem}"))));
    Ok(found.ok_or_else(|| format!("there is no file pt/{stem}.pt"))?.clone())
}

/// A weight file, inflated first if its name says so.
pub fn read(path: &Path) -> Outcome<StateDict> {
    if path.extension().is_none_or(|e| e != "gz") {
        return Ok(weights::read_any(path)?);
    }
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(std::fs::File::open(path)?).read_to_end(&mut bytes)?;
    Ok(weights::from_bytes(path, &bytes)?)
}
