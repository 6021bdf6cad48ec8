//! The forward pass, the same for every device: norm and PReLU stay pending, and a probe may watch.
//!
//! Inference with batch norm on the CPU knows the norms beforehand: every convolution finishes its output, residual sum
//! included. With bfloat16 operands on the CPU residual sums are stored as bfloat16, in training as well: convolutions read
//! nothing else of them. (Where the last two levels have equal channels the bottom's shortcut is such a sum itself: as in
//! torch's autocast, it is rounded.) Neither under a probe, which is shown what lies between: with bfloat16 operands it sees
//! values that were rounded less often.

use super::{Conv, Down, UNet, Unit, Up, UpConv};
use crate::device::bf16::Operands;
use crate::device::list::List;
use crate::device::nvtx::{Range, range};
use crate::error::{Error, Result};
use crate::ops::conv::Epilogue;
use crate::ops::conv_transpose3d::{conv_transpose3d, conv_transpose3d_finished};
use crate::ops::conv3d::{Filter, conv3d, conv3d_finished};
use crate::ops::norm_prelu::{Affine, Moments, Statistics, fixed, norm_prelu};
use crate::ops::residual::{add, materialize};
use crate::tensor::{Activation, Param, ParamId, Pending, Shape, Tape, Tensor, ValuesMut, View};
use rayon::prelude::*;
use std::fmt::Arguments;
use std::sync::Arc;

/// Whether norms use the batch's statistics or the running ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Statistics of the batch.
    Train,
    /// Running statistics (batch norm); instance norm is the same in both.
    Eval,
}

/// What the forward pass of one training step leaves behind for [`UNet::update_running`].
pub type BatchStatistics = List<(usize, Moments)>;

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
        let known = mode == Mode::Eval && !self.norms.is_empty();
        let bare = probe.is_none() && x.view().is_none();
        let finishes = known && !tape.is_recording() && bare;
        let stored = if bare { self.operands } else { Operands::Single };
        let mut run = Run { net: self, tape, mode, finishes, stored, probe, statistics: List::default() };
        let logits = run.level(0, Activation::constant(x))?;
        // What comes after the network is no layer's.
        run.tape.set_layer(Arc::default());
        Ok((logits.raw().clone(), run.statistics))
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

    /// Whether what the first level makes of an image is known piece by piece: on the CPU, with norms that are known
    /// beforehand.
    pub fn has_first_level(&self) -> bool {
        !self.norms.is_empty() && self.params[0].cuda().is_none()
    }

    /// The first level's output (N, D/2, H/2, W/2, C) of images (N, D, H, W, 1) of even sides, in inference; between its two
    /// convolutions the rows (H) and columns (W) in `guards` become 0, as beyond the edge of an image.
    ///
    /// # Errors
    /// [`Error::Internal`] when the network has no such level by itself.
    pub fn first_level(&self, x: Tensor, guards: [&[usize]; 2]) -> Result<Tensor> {
        // As in `infer`.
        rayon::scope(|_| {
            let tape = &mut Tape::off();
            let (mut run, down) = self.pieces(tape)?;
            let (a0, shortcut) = run.unit0(down, Activation::constant(x), 2)?;
            let mut a0 = a0.into_raw();
            clear(&mut a0, guards);
            Ok(run.unit1(down, a0.into(), &shortcut)?.into_raw())
        })
    }

    /// Logits (N, D, H, W, 2) of windows whose first level made `skip` (N, D/2, H/2, W/2, C): what [`UNet::infer`] does after
    /// that level.
    ///
    /// # Errors
    /// As [`UNet::first_level`], and [`Error::Shape`] when sides are not half of a multiple of [`UNet::side_multiple`].
    pub fn infer_from_first_level(&self, skip: Tensor) -> Result<Tensor> {
        let (shape, multiple) = (skip.shape(), self.side_multiple() / 2);
        let channels = self.net.channels[0];
        if shape.c != channels || shape.is_empty() || shape.space().iter().any(|s| s % multiple != 0) {
            return Err(Error::Shape {
                op: "unet",
                want: format!("[N, D, H, W, {channels}] with sides that are multiples of {multiple}"),
                got: shape.to_string(),
            });
        }
        rayon::scope(|_| Ok(self.pieces(&mut Tape::off())?.0.below(0, skip.into())?.into_raw()))
    }

    /// A forward pass that can be done in pieces, and its first level.
    fn pieces<'a>(&'a self, tape: &'a mut Tape) -> Result<(Run<'a, 'a>, &'a Down)> {
        let down = self.downs.first().filter(|_| self.has_first_level());
        let down = down
            .ok_or_else(|| Error::Internal("unet: no first level that is a function of the image".into()))?;
        tape.operands = self.operands;
        let stored = self.operands;
        let run = Run {
            net: self,
            tape,
            mode: Mode::Eval,
            finishes: true,
            stored,
            probe: None,
            statistics: List::default(),
        };
        Ok((run, down))
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
    /// Whether convolutions finish their outputs.
    finishes: bool,
    /// What residual sums, and finished outputs, are stored as.
    stored: Operands,
    probe: Option<&'a mut Probe<'p>>,
    statistics: BatchStatistics,
}

/// A convolution and what comes after it.
#[derive(Clone, Copy)]
enum Layer<'a> {
    /// Norm and PReLU.
    Unit(&'a Unit),
    /// Nothing: a residual unit's own convolution.
    Shortcut(&'a Conv),
    /// Nothing: it makes the logits.
    Last(&'a Conv),
}

impl<'a> Run<'a, '_> {
    fn param(&self, id: ParamId) -> &'a Param {
        &self.net.params[id.0]
    }

    /// Until this is dropped, what runs is of the module `name`, as MONAI calls it; so is its backward pass.
    fn module(&mut self, name: &Arc<str>) -> Range {
        self.tape.set_layer(name.clone());
        range(name)
    }

    fn level(&mut self, i: usize, x: Activation) -> Result<Activation> {
        let net = self.net;
        let Some(down) = net.downs.get(i) else {
            return self.down(&net.bottom, x, 1);
        };
        let skip = self.down(down, x, 2)?;
        self.below(i, skip)
    }

    /// Level `i` from what its way down has made.
    fn below(&mut self, i: usize, skip: Activation) -> Result<Activation> {
        let net = self.net;
        let down = &net.downs[i];
        let inner = self.level(i + 1, skip.clone())?;
        if self.probe.is_some() {
            let name = format!("{}1", down.name.trim_end_matches('0'));
            self.show(format_args!("{name}(SkipConnection)"), || concat(skip.raw(), inner.raw()))?;
        }
        self.up(&net.ups[i], &skip, &inner)
    }

    fn down(&mut self, down: &'a Down, x: Activation, stride: usize) -> Result<Activation> {
        let (a0, shortcut) = self.unit0(down, x, stride)?;
        self.unit1(down, a0, &shortcut)
    }

    /// The first unit of a way down, and the shortcut.
    fn unit0(&mut self, down: &'a Down, x: Activation, stride: usize) -> Result<(Activation, Activation)> {
        let _module = self.module(&down.unit0.name);
        let unit0 = (Layer::Unit(&down.unit0), None);
        Ok(match &down.residual {
            None => (self.conv(&x, unit0, stride)?, x),
            Some(conv) => {
                let shortcut = (Layer::Shortcut(conv), None);
                // Of one kernel size they read one tile.
                if self.param(conv.weight).shape[2] == self.param(down.unit0.weight).shape[2] {
                    let [a0, shortcut] = self.convs(&x, [unit0, shortcut], stride)?;
                    (a0, shortcut)
                } else {
                    (self.conv(&x, unit0, stride)?, self.conv(&x, shortcut, stride)?)
                }
            }
        })
    }

    /// The second unit, plus the shortcut.
    fn unit1(&mut self, down: &'a Down, a0: Activation, shortcut: &Activation) -> Result<Activation> {
        let _module = self.module(&down.unit1.name);
        let y = self.conv(&a0, (Layer::Unit(&down.unit1), Some(shortcut)), 1)?;
        self.show(format_args!("{}(ResidualUnit)", down.name), || Ok(y.raw().clone()))?;
        Ok(y)
    }

    fn up(&mut self, up: &'a Up, skip: &Activation, inner: &Activation) -> Result<Activation> {
        let module = self.module(&up.transposed.name);
        let layer = Layer::Unit(&up.transposed);
        let weight = self.filter(layer).weight;
        let z = if self.finishes {
            let map = self.map(layer)?;
            let epilogue = self.epilogue((layer, None), map.as_ref());
            let operands = self.tape.operands;
            conv_transpose3d_finished(&[skip, inner], weight, None, epilogue, operands)?.into()
        } else {
            let z = conv_transpose3d(self.tape, &[skip, inner], weight, None)?;
            self.finish((layer, None), z)?
        };
        drop(module);
        let (layer, name) = match &up.conv {
            UpConv::Unit(unit) => (Layer::Unit(unit), &unit.name),
            UpConv::Last(conv) => (Layer::Last(conv), &conv.name),
        };
        let _module = self.module(name);
        let y = self.conv(&z, (layer, Some(&z)), 1)?;
        self.show(format_args!("{}(ResidualUnit)", up.name), || Ok(y.raw().clone()))?;
        Ok(y)
    }

    /// One layer of `x`, plus an activation if there is one.
    fn conv(
        &mut self,
        x: &Activation,
        layer: (Layer<'a>, Option<&Activation>),
        stride: usize,
    ) -> Result<Activation> {
        let [y] = self.convs(x, [layer], stride)?;
        Ok(y)
    }

    /// Several layers of `x` side by side, each plus an activation if there is one.
    fn convs<const N: usize>(
        &mut self,
        x: &Activation,
        layers: [(Layer<'a>, Option<&Activation>); N],
        stride: usize,
    ) -> Result<[Activation; N]> {
        let outs: List<Activation> = if self.finishes {
            let maps = layers.iter().map(|l| self.map(l.0)).collect::<Result<Vec<_>>>()?;
            let finished = layers.iter().zip(&maps);
            let finished: Vec<_> =
                finished.map(|(&l, map)| (self.filter(l.0), self.epilogue(l, map.as_ref()))).collect();
            let outs = conv3d_finished(x, &finished, stride, self.tape.operands)?;
            outs.into_iter().map(Activation::from).collect()
        } else {
            let filters = layers.map(|(layer, _)| self.filter(layer));
            let outs = conv3d(self.tape, x, &filters, stride)?;
            layers.into_iter().zip(outs).map(|(layer, c)| self.finish(layer, c)).collect::<Result<_>>()?
        };
        outs.try_into().map_err(|_| Error::Internal("unet: not one output a layer".into()))
    }

    fn filter(&self, layer: Layer) -> Filter<'a> {
        match layer {
            Layer::Unit(unit) => Filter { weight: self.param(unit.weight), bias: None },
            Layer::Shortcut(conv) | Layer::Last(conv) => {
                Filter { weight: self.param(conv.weight), bias: Some(self.param(conv.bias)) }
            }
        }
    }

    /// Norm and PReLU of a layer that has them, from the running statistics.
    fn map(&self, layer: Layer) -> Result<Option<Pending>> {
        let Layer::Unit(unit) = layer else { return Ok(None) };
        let norm = unit.norm.map(|n| &self.net.norms[n]);
        let norm = norm.ok_or_else(|| Error::Internal(format!("{}: no running statistics", unit.name)))?;
        let channels = norm.running.mean.len();
        fixed(channels, &norm.running, self.param(unit.bias), self.affine(unit)).map(Some)
    }

    fn epilogue<'e>(
        &self,
        (layer, plus): (Layer, Option<&'e Activation>),
        map: Option<&'e Pending>,
    ) -> Epilogue<'e> {
        Epilogue { map, plus, stored: self.stored(layer) }
    }

    /// What the output of a layer is stored as when it is finished.
    fn stored(&self, layer: Layer) -> Operands {
        match layer {
            Layer::Last(_) => Operands::Single,
            Layer::Unit(_) | Layer::Shortcut(_) => self.stored,
        }
    }

    fn affine(&self, unit: &Unit) -> Affine<'a> {
        Affine {
            gamma: unit.gamma.map(|id| self.param(id)),
            beta: unit.beta.map(|id| self.param(id)),
            slope: Some(self.param(unit.slope)),
        }
    }

    /// What comes after a layer's convolution, and the sum with an activation if there is one.
    fn finish(&mut self, (layer, plus): (Layer, Option<&Activation>), c: Tensor) -> Result<Activation> {
        let y = match layer {
            Layer::Unit(unit) => self.norm(unit, c)?,
            Layer::Shortcut(conv) | Layer::Last(conv) => {
                self.show(format_args!("{}", conv.name), || Ok(c.clone()))?;
                c.into()
            }
        };
        match plus {
            None => Ok(y),
            Some(plus) => Ok(add(self.tape, &y, plus, self.stored(layer))?.into()),
        }
    }

    /// Norm and PReLU after a unit's convolution.
    fn norm(&mut self, unit: &Unit, c: Tensor) -> Result<Activation> {
        let affine = self.affine(unit);
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
            let with_bias = Pending {
                scale: List::of(1.0, channels),
                shift: bias.value.iter().copied().collect(),
                slope: 1.0,
            };
            self.show(format_args!("{}.conv", unit.name), || {
                materialize(&Activation::lazy(c.clone(), with_bias))
            })?;
            let p = y.pending().expect("norm_prelu makes lazy activations");
            let norm = Pending { scale: p.scale.clone(), shift: p.shift.clone(), slope: 1.0 };
            self.show(format_args!("{}.adn.N", unit.name), || materialize(&Activation::lazy(c, norm)))?;
            self.show(format_args!("{}.adn.A", unit.name), || materialize(&y))?;
        }
        Ok(y)
    }

    fn show(&mut self, module: Arguments, value: impl FnOnce() -> Result<Tensor>) -> Result<()> {
        if let Some(probe) = &mut self.probe {
            probe(&module.to_string(), value()?.to_host()?);
        }
        Ok(())
    }
}

/// Makes rows (H) and columns (W) of `x` 0.
fn clear(x: &mut Tensor, guards: [&[usize]; 2]) {
    let shape = x.shape();
    match x.make_values_mut() {
        ValuesMut::Single(x) => clear_values(x, shape, guards),
        ValuesMut::Bf16(x) => clear_values(x, shape, guards),
    }
}

fn clear_values<T: Copy + Default + Send>(x: &mut [T], shape: Shape, [rows, columns]: [&[usize]; 2]) {
    let row = shape.w * shape.c;
    x.par_chunks_mut(shape.h * row).for_each(|plane| {
        rows.iter().for_each(|h| plane[h * row..][..row].fill(T::default()));
        for x in plane.chunks_exact_mut(row) {
            columns.iter().for_each(|w| x[w * shape.c..][..shape.c].fill(T::default()));
        }
    });
}

/// Channel concatenation, for probes only: the network reads both tensors in place.
fn concat(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (a, b) = (a.to_host()?, b.to_host()?);
    let (ca, cb) = (a.shape().c, b.shape().c);
    let voxels = a.data().chunks(ca).zip(b.data().chunks(cb));
    let values: Vec<f32> = voxels.flat_map(|(a, b)| a.iter().chain(b)).copied().collect();
    Ok(Tensor::from_slice(a.shape().with_channels(ca + cb), &values))
}
