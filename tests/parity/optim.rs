//! Optimizers on toy tensors: `RUN.p<k>_<step>` is parameter k after that step with gradients `g<k>_<step>`.

use serde_json::Value;
use spleen_hpc::config::{Optim, Optimizer as Kind};
use spleen_hpc::tensor::Float;
use spleen_hpc::train::optimizer::Optimizer;

use crate::Outcome;
use crate::golden::{File, Golden};
use crate::ledger::Ledger;
use crate::tensor::{Elem, Tensor};
use crate::tolerance::{OPTIM_F32, Tolerance, float64_parameters};

/// Every run of `optim`.
pub fn run(golden: &Golden, ledger: &mut Ledger) -> Outcome<()> {
    ledger.each_file(golden, "optim", |file, ledger| {
        let mut runs: Vec<&str> = file.stems("_init").filter_map(|n| Some(n.split_once(".p")?.0)).collect();
        runs.dedup();
        for run in runs {
            let family = &run[..run.find(|c: char| c.is_ascii_digit()).unwrap_or(run.len())];
            let params = [run, family].map(|n| &file.params[n]).into_iter().find(|p| p.is_object());
            let config = match (family, params) {
                ("adam", Some(p)) => config(Kind::Adam, p)?,
                ("novograd", Some(p)) => config(Kind::Novograd, p)?,
                ("adam" | "novograd", None) => {
                    return Err(format!("index.json has no params of {run}").into());
                }
                _ => {
                    ledger.leave_out(file, &format!("{run}.*"), "not an optimizer of this program");
                    continue;
                }
            };
            if run[family.len()..].starts_with("64") {
                replay(file, run, config, |t| t.data.clone(), float64_parameters(config.lr), ledger)?;
            } else {
                replay(file, run, config, Tensor::to_f32, OPTIM_F32, ledger)?;
            }
        }
        Ok(())
    });
    Ok(())
}

/// An optimizer from `lr`, `betas`, `eps` and `weight_decay`, absent ones as torch's and MONAI's defaults.
pub fn config(kind: Kind, params: &Value) -> Outcome<Optim> {
    let number = |name: &str| params[name].as_f64();
    let beta2 = match kind {
        Kind::Adam => 0.999,
        Kind::Novograd => 0.98,
    };
    Ok(Optim {
        optimizer: kind,
        lr: number("lr").ok_or("an optimizer of index.json has no lr")?,
        beta1: params["betas"][0].as_f64().unwrap_or(0.9),
        beta2: params["betas"][1].as_f64().unwrap_or(beta2),
        eps: number("eps").unwrap_or(1e-8),
        weight_decay: number("weight_decay").unwrap_or(0.0),
    })
}

/// Steps all parameters of a run together, as long as there are gradients.
fn replay<T: Float + Elem>(
    file: &File,
    run: &str,
    config: Optim,
    read: impl Fn(&Tensor) -> Vec<T>,
    tolerance: Tolerance,
    ledger: &mut Ledger,
) -> Outcome<()> {
    let initial = |k: usize| file.tensor(&format!("{run}.p{k}_init"));
    let initial: Vec<Tensor> = (0..).map_while(initial).collect();
    let mut params: Vec<Vec<T>> = initial.iter().map(&read).collect();
    let mut optimizer = Optimizer::new(config, params.iter().map(Vec::len));
    for step in 0.. {
        let gradient = |k: usize| file.tensor(&format!("g{k}_{step}"));
        let gradients: Vec<Vec<T>> = (0..params.len()).map_while(gradient).map(|g| read(&g)).collect();
        if gradients.len() < params.len() {
            break;
        }
        let gradients: Vec<&[T]> = gradients.iter().map(Vec::as_slice).collect();
        optimizer.step(params.iter_mut().map(Vec::as_mut_slice), &gradients);
        for (k, (value, initial)) in params.iter().zip(&initial).enumerate() {
            let got = Tensor::new(&initial.shape, value);
            ledger.compare(file, &format!("{run}.p{k}_{step}"), &got, tolerance);
        }
    }
    Ok(())
}
