//! The residual sum y = a + b of two activations, either of them lazy; dy goes to both.

pub mod cuda;

use crate::device::arena::Buffer;
use crate::device::cpu::vectorised;
use crate::device::cuda::SelfTest;
use crate::device::nvtx::range;
use crate::error::{Error, Result};
use crate::ops::conv::{Affine, transform_row};
use crate::ops::self_test::taped;
use crate::tensor::{Activation, Grads, Shape, Tape, Tensor, ValueId, View, add_assign};
use rayon::prelude::*;

/// Floats a task handles: 64 KB, so that both operands and the sum stay in L2.
const CHUNK: usize = 1 << 14;

/// a + b, written out.
///
/// # Errors
/// [`Error::Shape`] when their shapes differ, and those of the device.
pub fn add(tape: &mut Tape, a: &Activation, b: &Activation) -> Result<Tensor> {
    if a.shape() != b.shape() {
        return Err(Error::Shape { op: "add", want: a.shape().to_string(), got: b.shape().to_string() });
    }
    let y = match (a.view(), b.view()) {
        (Some(a), Some(b)) => {
            let _range = range("residual");
            Tensor::on_device(a.shape, cuda::add(&a, Some(&b))?, None)
        }
        _ => add_on_host(a, b),
    };
    let (id, a, b) = (y.id(), a.id(), b.id());
    tape.record(move |grads| {
        let dy = grads.take(id).ok_or_else(|| Error::Internal("add: no gradient arrived".into()))?;
        give(grads, a, dy.clone())?;
        give(grads, b, dy)
    });
    Ok(y)
}

fn add_on_host(a: &Activation, b: &Activation) -> Tensor {
    let mut y = Tensor::new(a.shape(), Buffer::dirty(a.shape().len()));
    let c = a.shape().c;
    for_chunks(y.make_mut(), [a, b], |y, [(a, map_a), (b, map_b)], mapped| {
        transform_row(y, c, a, c, c, map_a);
        let b = match map_b {
            None => b,
            Some(_) => {
                mapped.resize(y.len(), 0.0);
                transform_row(mapped, c, b, c, c, map_b);
                mapped
            }
        };
        y.iter_mut().zip(b).for_each(|(y, b)| *y += b);
    });
    y
}

/// The value of an activation with nothing pending: what its consumers see as they load it.
///
/// # Errors
/// Those of the device.
pub fn materialize(x: &Activation) -> Result<Tensor> {
    match x.view() {
        Some(view) => {
            let _range = range("materialize");
            Ok(Tensor::on_device(view.shape, cuda::materialize(&view)?, None))
        }
        None => Ok(materialize_on_host(x)),
    }
}

fn materialize_on_host(x: &Activation) -> Tensor {
    let mut y = Tensor::new(x.shape(), Buffer::dirty(x.shape().len()));
    let c = x.shape().c;
    for_chunks(y.make_mut(), [x], |y, [(x, map)], _| transform_row(y, c, x, c, c, map));
    y
}

/// Adds `grad` to the gradient of a value: a value with several consumers gets the sum of theirs.
///
/// # Errors
/// Those of the device.
pub fn give(grads: &mut Grads, id: ValueId, grad: Tensor) -> Result<()> {
    let sum = match grads.take(id) {
        None => grad,
        Some(mut sum) => match (sum.device(), grad.device()) {
            // Both gradients of a residual sum may be one tensor, so neither is written to.
            (Some(a), Some(b)) => {
                let _range = range("gradient sum");
                let (a, b) = (View::plain(a.clone(), sum.shape()), View::plain(b.clone(), sum.shape()));
                Tensor::on_device(sum.shape(), cuda::add(&a, Some(&b))?, None)
            }
            _ => {
                add_assign(sum.make_mut(), grad.data());
                sum
            }
        },
    };
    grads.set(id, sum);
    Ok(())
}

/// A chunk of an activation's stored values and the map of its sample.
type Chunk<'a> = (&'a [f32], Affine<'a>);

/// Runs `f(chunk of y, the same chunk of each x, scratch)` over whole voxels of one sample at a time; all have one shape.
fn for_chunks<const N: usize>(
    y: &mut [f32],
    x: [&Activation; N],
    f: impl Fn(&mut [f32], [Chunk; N], &mut Vec<f32>) + Sync,
) {
    let shape = x[0].shape();
    let sample = shape.voxels() * shape.c;
    let chunk = (CHUNK / shape.c).max(1) * shape.c;
    y.par_chunks_mut(sample).enumerate().for_each(|(n, y)| {
        y.par_chunks_mut(chunk).enumerate().for_each_init(Vec::new, |scratch, (i, y)| {
            let start = n * sample + i * chunk;
            let chunks = x.map(|x| {
                let map = x.pending().map(|p| {
                    let (scale, shift) = p.of_sample(n, shape.c);
                    (scale, shift, p.slope)
                });
                (&x.raw().data()[start..start + y.len()], map)
            });
            f(y, chunks, scratch);
        });
    })
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
            if LANES.is_multiple_of(c) {
                lane_sums(x).iter().enumerate().for_each(|(i, s)| sum[i % c] += s);
            } else {
                x.chunks_exact(c).for_each(|v| sum.iter_mut().zip(v).for_each(|(s, v)| *s += f64::from(*v)));
            }
            sum
        })
        .collect();
    (0..c).map(|c| partials.iter().map(|p| p[c]).sum::<f64>() as f32).collect()
}

/// Sums that [`lane_sums`] keeps: a whole number of voxels of 1, 2, 4, 8 or 16 channels.
const LANES: usize = 16;

vectorised! {
    /// Every sixteenth value, summed.
    fn lane_sums(x: &[f32]) -> [f64; LANES] {
        let mut sums = [0.0; LANES];
        let (whole, rest) = x.as_chunks::<LANES>();
        for x in whole {
            for i in 0..LANES {
                sums[i] += f64::from(x[i]);
            }
        }
        rest.iter().zip(&mut sums).for_each(|(x, s)| *s += f64::from(*x));
        sums
    }
}

/// See [`SelfTest`].
pub const SELF_TESTS: &[SelfTest] = &[SelfTest {
    name: "residual",
    run: |cuda| {
        let shape = Shape::new(2, [5, 6, 7], 16);
        taped(cuda, &[shape, shape], &[], |tape, xs, _| {
            Ok(vec![add(tape, &xs[0].clone().into(), &xs[1].clone().into())?.into()])
        })
    },
}];
