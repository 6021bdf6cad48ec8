//! The residual 3D U-Net (MONAI `UNet`: kernel 3, strides 2, two residual units, PReLU with one slope, bias).
//!
//! ```text
//! down i    x -> [conv s2 -> norm -> PReLU -> conv -> norm -> PReLU] + conv s2 (x)
//! bottom    the same with stride 1 and a 1x1x1 shortcut
//! up i      cat(down, inner) -> transposed conv s2 -> norm -> PReLU = z;  [conv -> norm -> PReLU](z) + z
//! top       the same with 2 channels, and the last conv has neither norm nor PReLU
//! ```
//! Kerfoot et al., "Left-Ventricle Quantification Using Residual U-Net", STACOM 2018. Norm and PReLU stay pending
//! until the next convolution loads its input, or are the convolution's own epilogue where the statistics are known;
//! residual sums are written once. The bias of a convolution before a norm cancels, so it takes no part in the forward
//! pass and its gradient is exactly 0; the running mean adds it.

mod forward;

pub use forward::{BatchStatistics, Mode, Probe};

use super::state_dict::{Array, StateDict, infer_net, names};
use crate::config::Net;
use crate::device::bf16::Operands;
use crate::device::cuda::{Buf, Cuda};
use crate::error::{Error, Result};
use crate::ops::norm_prelu::Running;
use crate::rng::Philox;
use crate::tensor::{Grads, Param, ParamId};
use std::collections::HashMap;
use std::sync::Arc;

/// Name of the Philox stream that initial weights are drawn from.
const INIT_STREAM: u64 = 0x494e_4954;

/// One batch norm's running statistics; `bias` is the convolution's before it.
#[derive(Clone, Debug)]
struct BatchNorm {
    running: Running,
    batches: i64,
    bias: ParamId,
}

/// conv or transposed conv -> norm -> PReLU.
#[derive(Clone, Debug)]
struct Unit {
    name: Arc<str>,
    weight: ParamId,
    bias: ParamId,
    gamma: Option<ParamId>,
    beta: Option<ParamId>,
    slope: ParamId,
    norm: Option<usize>,
}

/// A convolution with nothing after it.
#[derive(Clone, Debug)]
struct Conv {
    name: Arc<str>,
    weight: ParamId,
    bias: ParamId,
}

#[derive(Clone, Debug)]
struct Down {
    name: String,
    unit0: Unit,
    unit1: Unit,
    /// `None` for the bottom of a network whose last two levels have equal channels: the shortcut is the identity.
    residual: Option<Conv>,
}

#[derive(Clone, Debug)]
enum UpConv {
    Unit(Unit),
    Last(Conv),
}

#[derive(Clone, Debug)]
struct Up {
    name: String,
    transposed: Unit,
    conv: UpConv,
}

/// The network and its parameters, f32 masters in PyTorch's layouts.
#[derive(Clone, Debug)]
pub struct UNet {
    net: Net,
    /// In `named_parameters()` order.
    params: Vec<Param>,
    names: Vec<String>,
    norms: Vec<BatchNorm>,
    downs: Vec<Down>,
    bottom: Down,
    ups: Vec<Up>,
    operands: Operands,
}

impl UNet {
    /// A network with PyTorch's default initial distribution: weights and biases uniform within
    /// `+-1 / sqrt(shape[1] k^3)`, norms 1 and 0, PReLU 0.25; every value a function of `seed` alone.
    ///
    /// # Errors
    /// [`Error::Usage`] for fewer than two levels or a level without channels.
    pub fn new(net: &Net, seed: u64) -> Result<Self> {
        if net.channels.len() < 2 || net.channels.contains(&0) {
            let text =
                format!("channels {:?}: give at least two levels of at least one channel", net.channels);
            return Err(Error::Usage(text));
        }
        let mut net = Self::build(net);
        let mut bound = 0.0;
        for (index, (param, name)) in net.params.iter_mut().zip(&net.names).enumerate() {
            if param.shape.len() == 5 {
                // A bias follows its weight and shares its bound.
                bound = 1.0 / (param.shape[1..].iter().product::<usize>() as f64).sqrt();
            }
            let mut rng = Philox::keyed(seed, &[INIT_STREAM, index as u64]);
            for v in param.make_mut() {
                *v = match name.rsplit_once('.').map_or("", |n| n.0).rsplit('.').next() {
                    Some("A") => 0.25,
                    Some("N") => f32::from(u8::from(name.ends_with("weight"))),
                    _ => rng.range(-bound, bound) as f32,
                };
            }
        }
        Ok(net)
    }

    /// The network a state dict describes, with its values.
    ///
    /// # Errors
    /// When names or shapes are not those of a MONAI UNet of this family.
    pub fn from_state_dict(weights: &StateDict) -> Result<Self> {
        let mut net = Self::build(&infer_net(weights)?);
        net.load(weights)?;
        Ok(net)
    }

    /// All structure, values 0.
    fn build(net: &Net) -> Self {
        let mut b = Builder { params: Vec::new(), names: Vec::new(), norms: Vec::new(), ids: HashMap::new() };
        for (name, shape) in names(net) {
            if !["running_mean", "running_var", "num_batches_tracked"].iter().any(|s| name.ends_with(s)) {
                let id = ParamId(b.params.len());
                let value = vec![0.0; shape.iter().product()];
                b.params.push(Param::new(id, shape, value));
                b.ids.insert(name.clone(), id);
                b.names.push(name);
            }
        }
        let levels = net.channels.len() - 1;
        let prefix = |level: usize| format!("model.{}", "1.submodule.".repeat(level));
        let downs = (0..levels).map(|i| b.down(&format!("{}0", prefix(i)))).collect();
        let bottom = b.down(prefix(levels).trim_end_matches('.'));
        let ups = (0..levels).map(|i| b.up(&format!("{}2", prefix(i)), i == 0)).collect();
        UNet {
            net: net.clone(),
            params: b.params,
            names: b.names,
            norms: b.norms,
            downs,
            bottom,
            ups,
            operands: Operands::Single,
        }
    }

    /// Replaces every value by the one of the same name.
    ///
    /// # Errors
    /// When a name is missing, unexpected or of another shape.
    pub fn load(&mut self, weights: &StateDict) -> Result<()> {
        weights.check(&self.net)?;
        for (param, name) in self.params.iter_mut().zip(&self.names) {
            param.value = weights.expect_f32(name, &param.shape)?.clone();
        }
        for r in &mut self.norms {
            let norm = norm_name(&self.names[r.bias.0]);
            let shape = &self.params[r.bias.0].shape;
            r.running.mean = weights.expect_f32(&format!("{norm}.running_mean"), shape)?.to_vec();
            r.running.var = weights.expect_f32(&format!("{norm}.running_var"), shape)?.to_vec();
            r.batches = weights.expect_i64(&format!("{norm}.num_batches_tracked"), &[])?[0];
        }
        Ok(())
    }

    /// Every value under MONAI's name, in MONAI's order.
    pub fn state_dict(&self) -> StateDict {
        let mut values: HashMap<String, Array> = HashMap::new();
        for (param, name) in self.params.iter().zip(&self.names) {
            values.insert(name.clone(), Array::f32(param.shape.to_vec(), param.value.clone()));
        }
        for r in &self.norms {
            let norm = norm_name(&self.names[r.bias.0]);
            let floats = |v: &[f32]| Array::f32(vec![v.len()], v.to_vec());
            values.insert(format!("{norm}.running_mean"), floats(&r.running.mean));
            values.insert(format!("{norm}.running_var"), floats(&r.running.var));
            values.insert(format!("{norm}.num_batches_tracked"), Array::i64(vec![], vec![r.batches]));
        }
        let mut dict = StateDict::new("the network in memory");
        for (name, _) in names(&self.net) {
            let array = values.remove(&name).expect("names() lists what build() made");
            dict.insert(name, array).expect("names() lists each name once");
        }
        dict
    }

    /// Whether every running statistic in host memory is a number.
    pub fn statistics_are_finite(&self) -> bool {
        let statistics = self.norms.iter().flat_map(|r| r.running.mean.iter().chain(&r.running.var));
        statistics.copied().all(f32::is_finite)
    }

    /// What was built.
    pub fn net(&self) -> &Net {
        &self.net
    }

    /// What its convolutions multiply while it is in host memory, in inference and training. A device has a precision
    /// of its own.
    pub fn set_operands(&mut self, operands: Operands) {
        self.operands = operands;
    }

    /// Parameters in `named_parameters()` order.
    pub fn params(&self) -> &[Param] {
        &self.params
    }

    /// The same for writing.
    pub fn params_mut(&mut self) -> &mut [Param] {
        &mut self.params
    }

    /// Their names.
    pub fn param_names(&self) -> &[String] {
        &self.names
    }

    /// Zero gradients for all parameters.
    pub fn grads(&self) -> Grads {
        Grads::new(self.params.iter().map(|p| p.value.len()))
    }

    /// Input sides must be multiples of this.
    pub fn side_multiple(&self) -> usize {
        1 << (self.net.channels.len() - 1)
    }

    /// Moves the running statistics towards those of a training batch.
    ///
    /// # Errors
    /// Those of the device.
    pub fn update_running(&mut self, batch: &BatchStatistics) -> Result<()> {
        for (index, moments) in batch {
            let norm = &mut self.norms[*index];
            norm.running.update(moments, &self.params[norm.bias.0])?;
        }
        Ok(())
    }

    /// Counts a training batch (torch's `num_batches_tracked`).
    pub fn count_batch(&mut self) {
        self.norms.iter_mut().for_each(|norm| norm.batches += 1);
    }

    /// Moves parameter i to `place(i)`, its value and where its gradient goes, and the running statistics beside them.
    ///
    /// # Errors
    /// When the device has not enough memory.
    pub fn place(&mut self, place: impl Fn(usize) -> Result<(Buf<f32>, Option<Buf<f32>>)>) -> Result<()> {
        for (i, param) in self.params.iter_mut().enumerate() {
            let (value, grad) = place(i)?;
            param.place(value, grad)?;
        }
        let cuda = self.params[0].cuda().expect("just placed").clone();
        self.norms.iter_mut().try_for_each(|norm| norm.running.place(&cuda))
    }

    /// Moves everything to a device, for inference.
    ///
    /// # Errors
    /// When the device has not enough memory.
    pub fn place_for_inference(&mut self, cuda: &Arc<Cuda>) -> Result<()> {
        let lens: Vec<usize> = self.params.iter().map(|p| p.value.len()).collect();
        self.place(|i| Ok((cuda.buffer(lens[i])?, None)))
    }

    /// Makes the values in host memory what the device has; waits for it.
    ///
    /// # Errors
    /// What went wrong on the device.
    pub fn refresh(&mut self) -> Result<()> {
        self.params.iter_mut().try_for_each(Param::refresh)?;
        self.refresh_statistics()
    }

    /// The same of the running statistics alone.
    ///
    /// # Errors
    /// What went wrong on the device.
    pub fn refresh_statistics(&mut self) -> Result<()> {
        self.norms.iter_mut().try_for_each(|norm| norm.running.refresh())
    }

    /// Forgets what kernels made of the parameters on a device: to be called when these have changed.
    pub fn forget_packed(&self) {
        self.params.iter().filter(|p| p.cuda().is_some()).for_each(|p| p.device().forget_packed());
    }
}

/// "….conv.bias" -> "….adn.N".
fn norm_name(bias: &str) -> String {
    format!("{}adn.N", bias.trim_end_matches("conv.bias"))
}

struct Builder {
    params: Vec<Param>,
    names: Vec<String>,
    norms: Vec<BatchNorm>,
    ids: HashMap<String, ParamId>,
}

impl Builder {
    fn id(&self, name: String) -> ParamId {
        self.ids[&name]
    }

    fn conv(&self, name: &str) -> Conv {
        let id = |kind| self.id(format!("{name}.{kind}"));
        Conv { name: name.into(), weight: id("weight"), bias: id("bias") }
    }

    fn unit(&mut self, name: &str) -> Unit {
        let bias = self.id(format!("{name}.conv.bias"));
        let gamma = self.ids.get(&format!("{name}.adn.N.weight")).copied();
        let norm = gamma.map(|gamma| {
            let c = self.params[gamma.0].value.len();
            let running = Running::new(vec![0.0; c], vec![1.0; c]);
            self.norms.push(BatchNorm { running, batches: 0, bias });
            self.norms.len() - 1
        });
        Unit {
            weight: self.id(format!("{name}.conv.weight")),
            bias,
            gamma,
            beta: self.ids.get(&format!("{name}.adn.N.bias")).copied(),
            slope: self.id(format!("{name}.adn.A.weight")),
            norm,
            name: name.into(),
        }
    }

    fn down(&mut self, name: &str) -> Down {
        let residual = format!("{name}.residual");
        Down {
            unit0: self.unit(&format!("{name}.conv.unit0")),
            unit1: self.unit(&format!("{name}.conv.unit1")),
            residual: self.ids.contains_key(&format!("{residual}.weight")).then(|| self.conv(&residual)),
            name: name.to_owned(),
        }
    }

    fn up(&mut self, name: &str, top: bool) -> Up {
        let unit0 = format!("{name}.1.conv.unit0");
        Up {
            name: format!("{name}.1"),
            transposed: self.unit(&format!("{name}.0")),
            conv: if top {
                UpConv::Last(self.conv(&format!("{unit0}.conv")))
            } else {
                UpConv::Unit(self.unit(&unit0))
            },
        }
    }
}
