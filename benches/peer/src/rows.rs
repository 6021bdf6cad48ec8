//! libtorch's side of the rows that `spleen-hpc bench` has of the network, under the same names.

use crate::shim::{Geometry, autocast, convolution_backward};
use crate::unet::{Net, dice_ce};
use spleen_hpc::bench::inputs::uniform;
use spleen_hpc::bench::layers::{Layer, PASSES, Pass, layers};
use spleen_hpc::bench::{FORWARD_BATCH, SIDE, STEP_BATCH, Work, config, layer_row};
use spleen_hpc::nn::UNet;
use spleen_hpc::{Error, Result};
use tch::nn::OptimizerConfig;
use tch::{Kind, Tensor, nn};

/// Prepares the work of a row.
type Prepare = Box<dyn Fn() -> Result<Work>>;

/// Every row, by name.
pub fn rows() -> Vec<(String, Prepare)> {
    let mut rows: Vec<(String, Prepare)> = vec![
        ("forward_b4_96_f32".into(), Box::new(|| forward(false))),
        ("forward_b4_96_bf16".into(), Box::new(|| forward(true))),
        ("step_b2_96_f32".into(), Box::new(|| step(false))),
        ("step_b2_96_bf16".into(), Box::new(|| step(true))),
    ];
    for layer in layers(&config().net) {
        for pass in PASSES.into_iter().filter(|&pass| layer.has(pass)) {
            let (name, layer) = (layer_row(&layer.name, pass), layer.clone());
            rows.push((name, Box::new(move || Ok(layer_work(&layer, pass)))));
        }
    }
    rows
}

fn random(shape: &[usize]) -> Tensor {
    let shape: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
    Tensor::from_slice(&uniform(shape.iter().product::<i64>() as usize)).reshape(&shape)
}

fn network() -> Result<Net> {
    Net::new(&UNet::new(&config().net, 1)?)
}

fn forward(bf16: bool) -> Result<Work> {
    let net = network()?;
    let x = random(&[FORWARD_BATCH, 1, SIDE, SIDE, SIDE]);
    Ok(Work::new(Vec::new(), move || {
        let run = || tch::no_grad(|| net.forward(&x, false));
        Ok(if bf16 { autocast(run) } else { run() })
    }))
}

fn step(bf16: bool) -> Result<Work> {
    let net = network()?;
    let failed = |err: tch::TchError| Error::Internal(err.to_string());
    let mut adam = nn::Adam::default().build(&net.variables, config().optim.lr).map_err(failed)?;
    let x = random(&[STEP_BATCH, 1, SIDE, SIDE, SIDE]);
    let label = x.gt(0.9).to_kind(Kind::Float);
    Ok(Work::new(Vec::new(), move || {
        adam.zero_grad();
        let run = || dice_ce(&net.forward(&x, true), &label);
        let loss = if bf16 { autocast(run) } else { run() };
        loss.backward();
        adam.step();
        Ok(loss.double_value(&[]))
    }))
}

/// One pass of a layer, filter after filter where it has two, on the concatenation where it reads two inputs (which
/// is not timed here).
fn layer_work(layer: &Layer, pass: Pass) -> Work {
    let at =
        |space: [usize; 3], channels: usize| random(&[FORWARD_BATCH, channels, space[0], space[1], space[2]]);
    let x = at(layer.input_space([SIDE; 3]), layer.inputs.iter().sum());
    let weights: Vec<Tensor> = layer.weights.iter().map(|w| random(w)).collect();
    let outputs = |w: &[usize; 5]| if layer.transposed { w[1] } else { w[0] };
    let dys: Vec<Tensor> =
        layer.weights.iter().map(|w| at(layer.output_space([SIDE; 3]), outputs(w))).collect();
    // MONAI's convolutions have a bias before a norm, too.
    let biases: Vec<Tensor> = layer.weights.iter().map(|w| random(&[outputs(w)])).collect();
    let stride = if layer.transposed { 2 } else { layer.stride as i64 };
    let padding = (layer.weights[0][2] as i64 - 1) / 2;
    let geometry = Geometry { stride, padding, transposed: layer.transposed };
    Work::new(Vec::new(), move || {
        for ((weight, bias), dy) in weights.iter().zip(&biases).zip(&dys) {
            match pass {
                Pass::Fprop if geometry.transposed => drop(x.conv_transpose3d(
                    weight,
                    Some(bias),
                    [stride; 3],
                    [padding; 3],
                    [1, 1, 1],
                    1,
                    [1, 1, 1],
                )),
                Pass::Fprop => drop(x.conv3d(weight, Some(bias), [stride; 3], [padding; 3], [1, 1, 1], 1)),
                Pass::Dgrad => convolution_backward(dy, &x, weight, geometry, false)?,
                Pass::Wgrad => convolution_backward(dy, &x, weight, geometry, true)?,
            }
        }
        Ok(())
    })
}

/// The largest difference of the two networks' logits on one patch, over the largest logit: whether they are one
/// network.
pub fn disagreement() -> Result<f64> {
    let ours = UNet::new(&config().net, 1)?;
    let theirs = Net::new(&ours)?;
    let patch = uniform(SIDE * SIDE * SIDE);
    let logits = ours.infer(&patch, [1, SIDE, SIDE, SIDE])?;
    let shape = [1, SIDE as i64, SIDE as i64, SIDE as i64];
    let ours = Tensor::from_slice(logits.data()).reshape([shape[0], shape[1], shape[2], shape[3], 2]);
    let x = Tensor::from_slice(&patch).reshape([1, 1, shape[1], shape[2], shape[3]]);
    let theirs = tch::no_grad(|| theirs.forward(&x, false)).permute([0, 2, 3, 4, 1]);
    let worst = (&ours - &theirs).abs().max().double_value(&[]);
    Ok(worst / theirs.abs().max().double_value(&[]))
}
