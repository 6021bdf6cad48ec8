//! The network of a golden file: hash weights, recorded running statistics, inputs by hash.

use std::sync::Arc;

use serde_json::Value;
use spleen_hpc::config::{Net, Norm};
use spleen_hpc::nn::state_dict::{Array, StateDict};
use spleen_hpc::nn::{Mode, UNet};
use spleen_hpc::tensor::Tape;

use crate::Outcome;
use crate::golden::File;
use crate::hash::hash_tensor;
use crate::layout::{to_engine, to_torch};
use crate::place;
use crate::tensor::Tensor;

/// Scales and offsets of hash numbers for parameters that are no convolution's.
pub struct HashInit {
    pub slope: (f64, f64),
    pub norm_weight: (f64, f64),
    pub norm_bias: (f64, f64),
}

/// Head of MANIFEST.md: everything varies, so that everything shows.
pub const VARIED: HashInit = HashInit { slope: (0.05, 0.25), norm_weight: (0.2, 1.0), norm_bias: (0.1, 0.0) };

/// convergence/README.md: torch's initial values.
pub const DEFAULT: HashInit = HashInit { slope: (0.0, 0.25), norm_weight: (0.0, 1.0), norm_bias: (0.0, 0.0) };

/// The network that `norm` and `channels` of index.json (or of a run) describe, with hash weights.
pub fn build(params: &Value, seed: u64, init: &HashInit) -> Outcome<UNet> {
    let norm = match params["norm"].as_str() {
        Some("batch") => Norm::Batch,
        Some("instance") => Norm::Instance,
        other => return Err(format!("index.json: norm {other:?} is no norm of this program").into()),
    };
    let channels = params["channels"].as_array().ok_or("index.json gives no channels")?;
    let channels = channels.iter().filter_map(Value::as_u64).map(|c| c as usize).collect();
    let mut net = UNet::new(&Net { norm, channels }, 0)?;
    let names = net.param_names().to_vec();
    let mut bound = 0.0;
    for (param, name) in net.params_mut().iter_mut().zip(&names) {
        if param.shape.len() == 5 {
            // A bias follows its weight and shares its bound.
            bound = 1.0 / (param.shape[1..].iter().product::<usize>() as f64).sqrt();
        }
        let (scale, offset) = match name {
            _ if name.ends_with("adn.A.weight") => init.slope,
            _ if name.ends_with("adn.N.weight") => init.norm_weight,
            _ if name.ends_with("adn.N.bias") => init.norm_bias,
            _ => (bound, 0.0),
        };
        param.value = Arc::new(hash_tensor(name, &param.shape, seed, scale, offset).to_f32());
    }
    Ok(net)
}

/// The network of a `unet_*` file.
pub fn of_file(file: &File) -> Outcome<UNet> {
    build(&file.params, file.seed()?, &VARIED)
}

/// The same with the running statistics `evalbuf.*`.
pub fn for_evaluation(file: &File) -> Outcome<UNet> {
    let mut net = of_file(file)?;
    let mut weights = StateDict::new(&file.name);
    for (name, array) in net.state_dict().iter() {
        let recorded = file.tensor(&format!("evalbuf.{name}"));
        let array = recorded.map_or(array.clone(), |t| Array::f32(t.shape.clone(), t.to_f32()));
        weights.insert(name, array)?;
    }
    net.load(&weights)?;
    place::network(&net)
}

/// Logits (N, C, D, H, W) in eval mode.
pub fn evaluate(net: &UNet, x: &Tensor) -> Outcome<Tensor> {
    to_torch(&net.forward(&mut Tape::off(), to_engine(x)?, Mode::Eval, None)?.0)
}

/// `hash_inputs` of index.json whose shape is known: name and values.
pub fn hash_inputs(file: &File) -> Outcome<Vec<Tensor>> {
    let mut inputs = Vec::new();
    for input in file.params["hash_inputs"].as_array().into_iter().flatten() {
        let name = input["name"].as_str().ok_or("an input of index.json has no name")?;
        let shape: Vec<usize> = serde_json::from_value(input["shape"].clone())?;
        let number = |key: &str, default| input[key].as_f64().unwrap_or(default);
        inputs.push(hash_tensor(name, &shape, file.seed()?, number("scale", 1.0), number("offset", 0.0)));
    }
    Ok(inputs)
}

/// Convolutions whose bias a norm cancels: its true gradient is 0, and what optimizers make of rounding noise
/// cannot be compared.
pub fn bias_is_cancelled(net: &UNet, name: &str) -> bool {
    name.strip_suffix("conv.bias")
        .is_some_and(|unit| net.param_names().contains(&format!("{unit}adn.A.weight")))
}
