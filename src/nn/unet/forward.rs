//! The forward pass, the same for every device: norm and PReLU stay pending, and a probe may watch.

use super::{Conv, Down, UNet, Unit, Up, UpConv};
use crate::device::nvtx::{Range, range};
use crate::error::{Error, Result};
use crate::ops::conv_transpose3d::conv_transpose3d;
use crate::ops::conv3d::{Filter, conv3d};
use crate::ops::norm_prelu::{Affine, Moments, Statistics, norm_prelu};
use crate::ops::residual::{add, materialize};
use crate::tensor::{Activation, Param, ParamId, Pending, Shape, Tape, Tensor, View};

/// Whether norms use the batch's statistics or the running ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Statistics of the batch.
    Train,
    /// Running statistics (batch norm); instance norm is the same in both.
    Eval,
}

/// What the forward pass of one training step leaves behind for [`UNet::update_running`].
pub type BatchStatistics = Vec<(usize, Moments)>;

/// Sees every module's output under MONAI's module name, materialised, in host memory.
pub type Probe<'p> = dyn FnMut(&str, Tensor) + 'p;

impl UNet {
    /// Logits (N, D, H, W, 2) of images `x` (N, D, H, W, 1), and the batch's statistics.
    ///
    /// # Errors
    /// [`Error::Shape`] when `x` has more than one channel or a side that is not a multiple of
    /// [`UNet::side_multiple`].
    pub fn forward(
        &self,
        tape: &mut Tape,
        x: Tensor,
        mode: Mode,
        probe: Option<&mut Probe>,
    ) -> Result<(Tensor, BatchStatistics)> {
        let (shape, multiple) = (x.shape(), self.side_multiple());
        if shape.c != 1 || shape.is_empty() || shape.space().iter().any(|s| s % multiple != 0) {
            return Err(Error::Shape {
                op: "unet",
                want: format!("[N, D, H, W, 1] with sides that are multiples of {multiple}"),
                got: shape.to_string(),
            });
        }
        tape.operands = self.operands;
        let mut run = Run { net: self, tape, mode, probe, statistics: Vec::new() };
        let logits = run.level(0, Activation::constant(x))?;
        // What comes after the network is no layer's.
        run.tape.set_layer("");
        Ok((logits, run.statistics))
    }

    /// Logits of `n` images without gradients; floats in (N, D, H, W) order, out (N, D, H, W, 2) in host memory,
    /// computed where the parameters are.
    ///
    /// # Errors
    /// As [`UNet::forward`].
    pub fn infer(&self, images: &[f32], [n, d, h, w]: [usize; 4]) -> Result<Tensor> {
        let x = self.beside_parameters(Tensor::from_slice(Shape::new(n, [d, h, w], 1), images))?;
        let run = || self.forward(&mut Tape::off(), x, Mode::Eval, None)?.0.to_host();
        match self.params[0].cuda() {
            Some(_) => run(),
            // On a thread of the pool: to any other every op would be handed over, and back.
            None => rayon::scope(|_| run()),
        }
    }

    /// Logits (N, D, H, W, 2) of windows (N, D, H, W, 1) on the device that the parameters are on, without waiting.
    ///
    /// # Errors
    /// As [`UNet::forward`].
    pub fn infer_on_device(&self, x: &View) -> Result<View> {
        let x = Tensor::on_device(x.shape, x.data.clone(), None);
        let logits = self.forward(&mut Tape::off(), x, Mode::Eval, None)?.0;
        logits.view().ok_or_else(|| Error::Internal("unet: logits are not on the device".into()))
    }

    /// `x` where the parameters are.
    ///
    /// # Errors
    /// When the device has not enough memory.
    pub fn beside_parameters(&self, x: Tensor) -> Result<Tensor> {
        self.params[0].cuda().map_or(Ok(x.clone()), |cuda| x.to_device(cuda))
    }
}

/// One forward pass.
struct Run<'a, 'p> {
    net: &'a UNet,
    tape: &'a mut Tape,
    mode: Mode,
    probe: Option<&'a mut Probe<'p>>,
    statistics: BatchStatistics,
}

impl<'a> Run<'a, '_> {
    fn param(&self, id: ParamId) -> &'a Param {
        &self.net.params[id.0]
    }

    /// Until this is dropped, what runs is of the module `name`, as MONAI calls it; so is its backward pass.
    fn module(&mut self, name: &str) -> Range {
        self.tape.set_layer(name);
        range(name)
    }

    fn level(&mut self, i: usize, x: Activation) -> Result<Tensor> {
        let net = self.net;
        let Some(down) = net.downs.get(i) else {
            return self.down(&net.bottom, x, 1);
        };
        let skip = self.down(down, x, 2)?;
        let inner = self.level(i + 1, skip.clone().into())?;
        if self.probe.is_some() {
            let name = format!("{}1", down.name.trim_end_matches('0'));
            self.show(&format!("{name}(SkipConnection)"), || concat(&skip, &inner))?;
        }
        self.up(&net.ups[i], skip, inner)
    }

    fn down(&mut self, down: &Down, x: Activation, stride: usize) -> Result<Tensor> {
        let module = self.module(&down.unit0.name);
        let filter = Filter { weight: self.param(down.unit0.weight), bias: None };
        let shortcut = down
            .residual
            .as_ref()
            .map(|r| Filter { weight: self.param(r.weight), bias: Some(self.param(r.bias)) });
        let (main, shortcut): (Tensor, Activation) = match shortcut {
            None => (single(conv3d(self.tape, &x, &[filter], stride)?), x),
            Some(shortcut) if shortcut.weight.shape[2] == filter.weight.shape[2] => {
                let mut both = conv3d(self.tape, &x, &[filter, shortcut], stride)?;
                let shortcut = both.pop().expect("two filters, two outputs");
                (single(both), shortcut.into())
            }
            Some(shortcut) => (
                single(conv3d(self.tape, &x, &[filter], stride)?),
                single(conv3d(self.tape, &x, &[shortcut], stride)?).into(),
            ),
        };
        if let Some(residual) = &down.residual {
            self.show(&residual.name, || materialize(&shortcut))?;
        }
        let a0 = self.finish(&down.unit0, main)?;
        drop(module);
        let _module = self.module(&down.unit1.name);
        let filter = Filter { weight: self.param(down.unit1.weight), bias: None };
        let c1 = single(conv3d(self.tape, &a0, &[filter], 1)?);
        let a1 = self.finish(&down.unit1, c1)?;
        let y = add(self.tape, &a1, &shortcut)?;
        self.show(&format!("{}(ResidualUnit)", down.name), || Ok(y.clone()))?;
        Ok(y)
    }

    fn up(&mut self, up: &Up, skip: Tensor, inner: Tensor) -> Result<Tensor> {
        let module = self.module(&up.transposed.name);
        let weight = self.param(up.transposed.weight);
        let z = conv_transpose3d(self.tape, &[&skip.into(), &inner.into()], weight, None)?;
        let z = self.finish(&up.transposed, z)?;
        drop(module);
        let (UpConv::Unit(Unit { name, .. }) | UpConv::Last(Conv { name, .. })) = &up.conv;
        let _module = self.module(name);
        let branch = match &up.conv {
            UpConv::Unit(unit) => {
                let filter = Filter { weight: self.param(unit.weight), bias: None };
                let c = single(conv3d(self.tape, &z, &[filter], 1)?);
                self.finish(unit, c)?
            }
            UpConv::Last(conv) => {
                let filter = Filter { weight: self.param(conv.weight), bias: Some(self.param(conv.bias)) };
                let c = single(conv3d(self.tape, &z, &[filter], 1)?);
                self.show(&conv.name, || Ok(c.clone()))?;
                c.into()
            }
        };
        let y = add(self.tape, &branch, &z)?;
        self.show(&format!("{}(ResidualUnit)", up.name), || Ok(y.clone()))?;
        Ok(y)
    }

    /// Norm and PReLU after a unit's convolution.
    fn finish(&mut self, unit: &Unit, c: Tensor) -> Result<Activation> {
        let affine = Affine {
            gamma: unit.gamma.map(|id| self.param(id)),
            beta: unit.beta.map(|id| self.param(id)),
            slope: Some(self.param(unit.slope)),
        };
        let bias = self.param(unit.bias);
        let norm = unit.norm.map(|n| &self.net.norms[n]);
        let (y, moments) = match (norm, self.mode) {
            (None, _) => norm_prelu(self.tape, &c, Statistics::Instance, affine)?,
            (Some(_), Mode::Train) => norm_prelu(self.tape, &c, Statistics::Batch, affine)?,
            (Some(norm), Mode::Eval) => {
                let statistics = Statistics::Fixed { running: &norm.running, bias: Some(bias) };
                norm_prelu(self.tape, &c, statistics, affine)?
            }
        };
        if let (Some(n), Mode::Train) = (unit.norm, self.mode) {
            self.statistics.push((n, moments));
        }
        if self.probe.is_some() {
            let (c, y) = (c.to_host()?, y.to_host()?);
            let channels = c.shape().c;
            let with_bias = Pending { scale: vec![1.0; channels], shift: bias.value.to_vec(), slope: 1.0 };
            self.show(&format!("{}.conv", unit.name), || {
                materialize(&Activation::lazy(c.clone(), with_bias))
            })?;
            let p = y.pending().expect("norm_prelu makes lazy activations");
            let norm = Pending { scale: p.scale.clone(), shift: p.shift.clone(), slope: 1.0 };
            self.show(&format!("{}.adn.N", unit.name), || materialize(&Activation::lazy(c, norm)))?;
            self.show(&format!("{}.adn.A", unit.name), || materialize(&y))?;
        }
        Ok(y)
    }

    fn show(&mut self, module: &str, value: impl FnOnce() -> Result<Tensor>) -> Result<()> {
        if let Some(probe) = &mut self.probe {
            probe(module, value()?.to_host()?);
        }
        Ok(())
    }
}

fn single(mut outputs: Vec<Tensor>) -> Tensor {
    outputs.pop().expect("one filter, one output")
}

/// Channel concatenation, for probes only: the network reads both tensors in place.
fn concat(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (a, b) = (a.to_host()?, b.to_host()?);
    let (ca, cb) = (a.shape().c, b.shape().c);
    let voxels = a.data().chunks(ca).zip(b.data().chunks(cb));
    let values: Vec<f32> = voxels.flat_map(|(a, b)| a.iter().chain(b)).copied().collect();
    Ok(Tensor::from_slice(a.shape().with_channels(ca + cb), &values))
}
