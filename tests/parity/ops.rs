//! Single operations, forward and backward. The goldens are float64, the engine computes in float32.

use spleen_hpc::ops::conv_transpose3d::conv_transpose3d;
use spleen_hpc::ops::conv3d::{Filter, conv3d};
use spleen_hpc::ops::norm_prelu::{Affine, Moments, Running, Statistics, norm_prelu};
use spleen_hpc::ops::residual::materialize;
use spleen_hpc::tensor::{Activation, Grads, Param, ParamId, Tape, Tensor as Engine, ValueId};

use crate::Outcome;
use crate::golden::{File, Golden};
use crate::layout::{to_engine, to_torch};
use crate::ledger::Ledger;
use crate::place;
use crate::tensor::Tensor;
use crate::tolerance::{FLOAT32, parameter_gradient};

/// Every case of `ops`: an operation, by the start of its name, on `CASE.x`.
pub fn run(golden: &Golden, ledger: &mut Ledger) -> Outcome<()> {
    ledger.each_file(golden, "ops", |file, ledger| {
        for name in file.stems(".x") {
            let case = Case::read(file, name)?;
            match name {
                _ if name.starts_with("convT") => case.conv_transpose(ledger)?,
                _ if name.starts_with("conv") => case.conv(ledger)?,
                _ if name.starts_with("instance_norm") => {
                    case.norm(ledger, "", Statistics::Instance)?;
                }
                _ if name.starts_with("batch_norm") => case.batch_norm(ledger)?,
                _ if name.starts_with("prelu") => case.prelu(ledger)?,
                _ => return Err(format!("{name}: no operation has this name").into()),
            }
        }
        Ok(())
    });
    Ok(())
}

/// One operation's inputs; absent parameters are `None`.
struct Case<'g> {
    file: &'g File,
    name: &'g str,
    x: Engine,
    w: Option<Param>,
    b: Option<Param>,
    dy: Engine,
}

impl<'g> Case<'g> {
    fn read(file: &'g File, name: &'g str) -> Outcome<Self> {
        let param = |part: &str, id| {
            let tensor = file.tensor(&format!("{name}.{part}"));
            tensor.map(|t| place::param(Param::new(ParamId(id), t.shape.clone(), t.to_f32()))).transpose()
        };
        Ok(Case {
            file,
            name,
            x: to_engine(&file.need(&format!("{name}.x"))?)?,
            w: param("w", 0)?,
            b: param("b", 1)?,
            dy: to_engine(&file.need(&format!("{name}.dy"))?)?,
        })
    }

    fn weight(&self) -> Outcome<&Param> {
        self.w.as_ref().ok_or_else(|| format!("{} has no weight", self.name).into())
    }

    /// Compares `y` and, after the backward pass from `dy`, the gradients; `mode` stands before each name.
    fn check(&self, ledger: &mut Ledger, mode: &str, tape: Tape, x: ValueId, y: &Activation) -> Outcome<()> {
        let name = |part: &str| format!("{}.{mode}{part}", self.name);
        ledger.compare(self.file, &name("y"), &to_torch(&materialize(y)?)?, FLOAT32);
        let params = [&self.w, &self.b];
        let mut grads = Grads::new(params.map(|p| p.as_ref().map_or(0, |p| p.value.len())));
        grads.set(y.id(), self.dy.clone());
        for param in params.into_iter().flatten().filter(|p| p.cuda().is_some()) {
            param.device().grad().fill(0)?;
        }
        tape.backward(&mut grads)?;
        let dx = grads.take(x).ok_or("no gradient reached x")?;
        ledger.compare(self.file, &name("dx"), &to_torch(&dx)?, FLOAT32);
        let norm = |t: &Engine| -> Outcome<f64> {
            Ok(t.to_host()?.data().iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt())
        };
        let rms = norm(&self.x)? / (self.x.shape().len() as f64).sqrt();
        let sums = parameter_gradient(rms, norm(&self.dy)?);
        for (param, part) in params.iter().zip(["dw", "db"]) {
            if let Some(param) = param {
                let got = Tensor::new(&param.shape, &param.gradient(&grads)?);
                ledger.compare(self.file, &name(part), &got, sums);
            }
        }
        Ok(())
    }

    fn conv(&self, ledger: &mut Ledger) -> Outcome<()> {
        let (mut tape, x) = (Tape::recording(), Activation::from(self.x.clone()));
        // An axis of one voxel has the same output with either stride.
        let stride = if self.dy.shape().space() == self.x.shape().space() { 1 } else { 2 };
        let filter = Filter { weight: self.weight()?, bias: self.b.as_ref() };
        let y = conv3d(&mut tape, &x, &[filter], stride)?.remove(0);
        self.check(ledger, "", tape, x.id(), &y.into())
    }

    fn conv_transpose(&self, ledger: &mut Ledger) -> Outcome<()> {
        let (mut tape, x) = (Tape::recording(), Activation::from(self.x.clone()));
        let y = conv_transpose3d(&mut tape, &[&x], self.weight()?, self.b.as_ref())?;
        self.check(ledger, "", tape, x.id(), &y.into())
    }

    fn norm(&self, ledger: &mut Ledger, mode: &str, statistics: Statistics) -> Outcome<Moments> {
        let mut tape = Tape::recording();
        let affine = Affine { gamma: self.w.as_ref(), beta: self.b.as_ref(), slope: None };
        let (y, moments) = norm_prelu(&mut tape, &self.x, statistics, affine)?;
        self.check(ledger, mode, tape, self.x.id(), &y)?;
        Ok(moments)
    }

    /// Running statistics before the step.
    fn running(&self) -> Outcome<Running> {
        let read = |part| self.file.need(&format!("{}.{part}", self.name)).map(|t| t.to_f32());
        place::running(Running::new(read("running_mean0")?, read("running_var0")?))
    }

    fn batch_norm(&self, ledger: &mut Ledger) -> Outcome<()> {
        let moments = self.norm(ledger, "train_", Statistics::Batch)?;
        let mut running = self.running()?;
        let no_bias = Param::new(ParamId(2), vec![running.mean.len()], vec![0.0; running.mean.len()]);
        running.update(&moments, &place::param(no_bias)?)?;
        running.refresh()?;
        for (part, values) in [("running_mean1", &running.mean), ("running_var1", &running.var)] {
            let got = Tensor::new(&[values.len()], values);
            ledger.compare(self.file, &format!("{}.{part}", self.name), &got, FLOAT32);
        }
        let running = self.running()?;
        self.norm(ledger, "eval_", Statistics::Fixed { running: &running, bias: None })?;
        ledger.leave_out(self.file, &format!("{}.running_*0", self.name), "given, not computed");
        Ok(())
    }

    fn prelu(&self, ledger: &mut Ledger) -> Outcome<()> {
        let mut tape = Tape::recording();
        let affine = Affine { slope: Some(self.weight()?), ..Affine::default() };
        let (y, _) = norm_prelu(&mut tape, &self.x, Statistics::Identity, affine)?;
        self.check(ledger, "", tape, self.x.id(), &y)
    }
}
