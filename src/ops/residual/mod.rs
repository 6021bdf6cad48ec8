//! The residual sum y = a + b of two activations, either of them lazy; dy goes to both.

pub mod cuda;

use crate::device::arena::Buffer;
use crate::error::{Error, Result};
use crate::ops::conv::transform_row;
use crate::tensor::{Activation, Tape, Tensor};
use rayon::prelude::*;

/// Floats a task handles: 64 KB, so that both operands and the sum stay in L2.
const CHUNK: usize = 1 << 14;

/// a + b, written out.
///
/// # Errors
/// [`Error::Shape`] when their shapes differ.
pub fn add(tape: &mut Tape, a: &Activation, b: &Activation) -> Result<Tensor> {
    if a.shape() != b.shape() {
        return Err(Error::Shape { op: "add", want: a.shape().to_string(), got: b.shape().to_string() });
    }
    let mut y = materialize(a);
    let c = a.shape().c;
    for_chunks(y.make_mut(), b, |y, x, map| {
        let mut mapped = vec![0.0; y.len()];
        transform_row(&mut mapped, x, c, c, map);
        y.iter_mut().zip(mapped).for_each(|(y, m)| *y += m);
    });
    let (id, a, b) = (y.id(), a.id(), b.id());
    tape.record(move |grads| {
        let dy = grads.take(id).ok_or_else(|| Error::Internal("add: no gradient arrived".into()))?;
        grads.add(a, dy.clone());
        grads.add(b, dy);
        Ok(())
    });
    Ok(y)
}

/// The value of an activation with nothing pending: what its consumers see as they load it.
pub fn materialize(x: &Activation) -> Tensor {
    let mut y = Tensor::new(x.shape(), Buffer::dirty(x.shape().len()));
    let c = x.shape().c;
    for_chunks(y.make_mut(), x, |y, x, map| transform_row(y, x, c, c, map));
    y
}

/// Runs `f(chunk of y, the same chunk of x, x's map)` over whole voxels of one sample at a time.
fn for_chunks(
    y: &mut [f32],
    x: &Activation,
    f: impl Fn(&mut [f32], &[f32], Option<(&[f32], &[f32], f32)>) + Sync,
) {
    let shape = x.shape();
    let sample = shape.voxels() * shape.c;
    let chunk = (CHUNK / shape.c).max(1) * shape.c;
    y.par_chunks_mut(sample).zip(x.raw().data().par_chunks(sample)).enumerate().for_each(
        |(n, (y, x_sample))| {
            let map = x.pending().map(|p| {
                let (scale, shift) = p.of_sample(n, shape.c);
                (scale, shift, p.slope)
            });
            y.par_chunks_mut(chunk).zip(x_sample.par_chunks(chunk)).for_each(|(y, x)| f(y, x, map))
        },
    )
}

/// Sum of every channel over all voxels and samples, in f64 over fixed chunks: the gradient of a bias.
pub fn channel_sums(x: &Tensor) -> Vec<f32> {
    let c = x.shape().c;
    let chunk = (CHUNK / c).max(1) * c;
    let partials: Vec<Vec<f64>> = x
        .data()
        .par_chunks(chunk)
        .map(|x| {
            let mut sum = vec![0.0; c];
            x.chunks_exact(c).for_each(|v| sum.iter_mut().zip(v).for_each(|(s, v)| *s += f64::from(*v)));
            sum
        })
        .collect();
    (0..c).map(|c| partials.iter().map(|p| p[c]).sum::<f64>() as f32).collect()
}
