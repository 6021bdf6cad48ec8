//! MONAI's UNet in libtorch, op for op as its modules run: conv, batch norm, PReLU, cat and add each by themselves,
//! NCDHW.

use spleen_hpc::nn::UNet;
use spleen_hpc::nn::state_dict::ArrayData;
use spleen_hpc::{Error, Result};
use std::collections::HashMap;
use tch::{Device, Kind, Tensor, nn};

/// The network, its values those of one of ours.
pub struct Net {
    pub variables: nn::VarStore,
    values: HashMap<String, Tensor>,
    levels: usize,
}

impl Net {
    /// The same network with the same values.
    pub fn new(ours: &UNet) -> Result<Self> {
        let variables = nn::VarStore::new(Device::Cpu);
        let mut values = HashMap::new();
        for (name, array) in ours.state_dict().iter() {
            let ArrayData::F32(data) = &array.data else { continue };
            let shape: Vec<i64> = array.shape.iter().map(|&n| n as i64).collect();
            let tensor = Tensor::from_slice(data).reshape(&shape);
            // The names of variables may not have dots.
            let (root, variable) = (variables.root(), name.replace('.', "_"));
            let place = if name.contains("running") {
                root.zeros_no_train(&variable, &shape)
            } else {
                root.zeros(&variable, &shape)
            };
            tch::no_grad(|| place.shallow_clone().copy_(&tensor));
            values.insert(name.to_owned(), place);
        }
        if values.contains_key("model.0.conv.unit0.adn.N.running_mean") {
            return Ok(Net { variables, values, levels: ours.net().channels.len() - 1 });
        }
        Err(Error::Internal("the peer has batch norm only".into()))
    }

    /// Logits (N, 2, D, H, W) of images (N, 1, D, H, W).
    pub fn forward(&self, x: &Tensor, train: bool) -> Tensor {
        self.level(0, x, train)
    }

    fn level(&self, level: usize, x: &Tensor, train: bool) -> Tensor {
        let prefix = format!("model.{}", "1.submodule.".repeat(level));
        if level == self.levels {
            return self.down(prefix.trim_end_matches('.'), x, 1, train);
        }
        let skip = self.down(&format!("{prefix}0"), x, 2, train);
        let inner = self.level(level + 1, &skip, train);
        let both = Tensor::cat(&[skip, inner], 1);
        let up = format!("{prefix}2");
        let name = format!("{up}.0.conv");
        let z = both.conv_transpose3d(
            self.value(&format!("{name}.weight")),
            Some(self.value(&format!("{name}.bias"))),
            [2, 2, 2],
            [1, 1, 1],
            [1, 1, 1],
            1,
            [1, 1, 1],
        );
        let z = self.norm_prelu(&format!("{up}.0"), &z, train);
        let unit = format!("{up}.1.conv.unit0");
        let y = self.conv(&format!("{unit}.conv"), &z, 1);
        let y = if level == 0 { y } else { self.norm_prelu(&unit, &y, train) };
        y + z
    }

    fn down(&self, name: &str, x: &Tensor, stride: i64, train: bool) -> Tensor {
        let residual = self.conv(&format!("{name}.residual"), x, stride);
        let mut y = x.shallow_clone();
        for (unit, stride) in [("unit0", stride), ("unit1", 1)] {
            let unit = format!("{name}.conv.{unit}");
            y = self.norm_prelu(&unit, &self.conv(&format!("{unit}.conv"), &y, stride), train);
        }
        y + residual
    }

    fn conv(&self, name: &str, x: &Tensor, stride: i64) -> Tensor {
        let weight = self.value(&format!("{name}.weight"));
        let padding = (weight.size()[2] - 1) / 2;
        let bias = Some(self.value(&format!("{name}.bias")));
        x.conv3d(weight, bias, [stride; 3], [padding; 3], [1, 1, 1], 1)
    }

    fn norm_prelu(&self, unit: &str, x: &Tensor, train: bool) -> Tensor {
        let norm = |part: &str| Some(self.value(&format!("{unit}.adn.N.{part}")));
        let (weight, bias, mean, var) =
            (norm("weight"), norm("bias"), norm("running_mean"), norm("running_var"));
        x.batch_norm(weight, bias, mean, var, train, 0.1, 1e-5, false)
            .prelu(self.value(&format!("{unit}.adn.A.weight")))
    }

    fn value(&self, name: &str) -> &Tensor {
        self.values.get(name).unwrap_or_else(|| panic!("MONAI's UNet has an array {name}"))
    }
}

/// MONAI's DiceCELoss(to_onehot_y, softmax, squared_pred, batch), in f32; `label` is (N, 1, D, H, W) of 0 and 1.
pub fn dice_ce(logits: &Tensor, label: &Tensor) -> Tensor {
    const SMOOTH: f64 = 1e-5;
    const PER_CHANNEL: [i64; 4] = [0, 2, 3, 4];
    let logits = logits.to_kind(Kind::Float);
    let p = logits.softmax(1, Kind::Float);
    let g = Tensor::cat(&[label * -1.0 + 1.0, label.shallow_clone()], 1);
    let sum = |x: Tensor| x.sum_dim_intlist(&PER_CHANNEL[..], false, Kind::Float);
    let dice: Tensor = (sum(&p * &g) * 2.0 + SMOOTH) / (sum(&p * &p) + sum(&g * &g) + SMOOTH);
    let classes = label.squeeze_dim(1).to_kind(Kind::Int64);
    dice.mean(Kind::Float) * -1.0
        + 1.0
        + logits.cross_entropy_loss::<Tensor>(&classes, None, tch::Reduction::Mean, -100, 0.0)
}
