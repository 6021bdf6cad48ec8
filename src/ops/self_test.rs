//! What the ops' small cases for `spleen-hpc doctor` share: inputs, tolerances, and a taped op run on both sides.

use super::residual::materialize;
use crate::device::cuda::{Act, Compared, Cuda, Precision, agree};
use crate::error::{Error, Result};
use crate::rng::Philox;
use crate::tensor::{Activation, Grads, Param, ParamId, Shape, Tape, Tensor};
use half::f16;
use std::sync::Arc;

/// The NMSE of sums in f32, the devices' in another order than the CPU's: 2^-24 of the terms, which cancel to a hundredth
/// of their size at worst (dslope is a single sum), squared.
pub const SUMS: f64 = 1e-10;

/// The NMSE of what a device stores as activations. In fp16 the result is rounded, and perhaps a value on the way to it,
/// each by 2^-11 of itself at most: (2 2^-11)^2. In f32 only its sums differ.
pub fn stored(cuda: &Cuda) -> f64 {
    match cuda.precision() {
        Precision::Half => 1e-6,
        Precision::Single => SUMS,
    }
}

/// Uniform in [-1, 1), rounded to what fp16 holds: device and CPU compute with the same numbers.
pub fn uniform(name: u64, len: usize) -> Vec<f32> {
    let mut rng = Philox::new(name, 0);
    (0..len).map(|_| f16::from_f64(rng.range(-1.0, 1.0)).to_f32()).collect()
}

/// Activations with these values.
///
/// # Errors
/// Those of the device.
pub fn upload(cuda: &Arc<Cuda>, values: &[f32]) -> Result<Act> {
    let act = cuda.act(values.len())?;
    act.upload(values)?;
    Ok(act)
}

/// Runs `op` forward and backward on the CPU and on the device and compares its outputs (y), the gradients of its inputs
/// (dx) and of its parameters, given as the name of the gradient and the parameter's shape.
///
/// # Errors
/// Those of `op` and the device, and [`Error::Gpu`] where they do not agree.
pub fn taped(
    cuda: &Arc<Cuda>,
    inputs: &[Shape],
    params: &[(&'static str, &[usize])],
    op: impl Fn(&mut Tape, &[Tensor], &[Param]) -> Result<Vec<Activation>>,
) -> Result<String> {
    let xs: Vec<_> =
        (0..).zip(inputs).map(|(i, &shape)| Tensor::from_slice(shape, &uniform(i, shape.len()))).collect();
    let mut ws: Vec<_> = params
        .iter()
        .enumerate()
        .map(|(i, (_, shape))| {
            let value = uniform(100 + i as u64, shape.iter().product());
            Param::new(ParamId(i), shape.to_vec(), value)
        })
        .collect();
    let want = values(&op, &xs, &ws, Ok)?;
    let xs = xs.iter().map(|x| x.to_device(cuda)).collect::<Result<Vec<_>>>()?;
    for w in &mut ws {
        let grad = cuda.buffer(w.value.len())?;
        grad.fill(0)?;
        w.place(cuda.buffer(w.value.len())?, Some(grad))?;
    }
    let got = values(&op, &xs, &ws, |dy| dy.to_device(cuda))?;
    let outputs = want.len() - xs.len() - ws.len();
    let names = std::iter::repeat_n("y", outputs).chain(std::iter::repeat_n("dx", xs.len()));
    let allowed = std::iter::repeat_n(stored(cuda), outputs + xs.len());
    let compared: Vec<_> = names
        .zip(allowed)
        .chain(params.iter().map(|&(name, _)| (name, SUMS)))
        .zip(got.into_iter().zip(want))
        .map(|((name, allowed), (got, want))| Compared { name, got, want, allowed })
        .collect();
    agree(&compared)
}

/// Outputs, then gradients of inputs, then of parameters, where the gradients of the outputs are given.
fn values(
    op: &impl Fn(&mut Tape, &[Tensor], &[Param]) -> Result<Vec<Activation>>,
    xs: &[Tensor],
    ws: &[Param],
    place: impl Fn(Tensor) -> Result<Tensor>,
) -> Result<Vec<Vec<f32>>> {
    let mut tape = Tape::recording();
    let ys = op(&mut tape, xs, ws)?;
    let mut grads = Grads::new(ws.iter().map(|w| w.value.len()));
    let mut values = Vec::new();
    for (i, y) in (0..).zip(&ys) {
        values.push(materialize(y)?.to_host()?.data().to_vec());
        let dy = Tensor::from_slice(y.shape(), &uniform(200 + i, y.shape().len()));
        grads.set(y.id(), place(dy)?);
    }
    tape.backward(&mut grads)?;
    for x in xs {
        let dx =
            grads.take(x.id()).ok_or_else(|| Error::Internal("self-test: no gradient arrived".into()))?;
        values.push(dx.to_host()?.data().to_vec());
    }
    for w in ws {
        values.push(w.gradient(&grads)?);
    }
    Ok(values)
}
