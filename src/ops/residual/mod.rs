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
    for_chunks(y.make_mut(), [a, b], |y, [a, b], lanes| {
        // Maps of whole vectors: channels repeat after so many floats.
        let period = LANES * (1..=c).find(|n| (n * LANES).is_multiple_of(c)).expect("c of them do");
        lanes.clear();
        for (scale, shift, _) in [a.1, b.1].into_iter().flatten() {
            lanes.extend(scale.iter().cycle().take(period));
            lanes.extend(shift.iter().cycle().take(period));
        }
        let mut maps = lanes.chunks_exact(period);
        let [a, b] = [a, b].map(|(x, map)| {
            let repeated = map.map(|(_, _, slope)| {
                let mut next = || maps.next().expect("a scale and a shift a map");
                (next(), next(), slope)
            });
            (x, repeated)
        });
        add_mapped(y, a, b, period);
    });
    y
}

vectorised! {
    /// y = a + b, either mapped by scales, shifts and a slope if it has them, which repeat after `period` floats.
    fn add_mapped(y: &mut [f32], a: Chunk, b: Chunk, period: usize) {
        let (y, rest) = y.as_chunks_mut::<LANES>();
        let ((a_lanes, a_rest), (b_lanes, b_rest)) = (a.0.as_chunks::<LANES>(), b.0.as_chunks::<LANES>());
        let mut at = 0;
        for ((y, a_lanes), b_lanes) in y.iter_mut().zip(a_lanes).zip(b_lanes) {
            let (a, b) = (mapped(a_lanes, a.1, at), mapped(b_lanes, b.1, at));
            (0..LANES).for_each(|i| y[i] = a[i] + b[i]);
            at = if at + LANES == period { 0 } else { at + LANES };
        }
        if !rest.is_empty() {
            let pad = |x: &[f32]| std::array::from_fn(|i| x.get(i).copied().unwrap_or(0.0));
            let (a, b) = (mapped(&pad(a_rest), a.1, at), mapped(&pad(b_rest), b.1, at));
            rest.iter_mut().enumerate().for_each(|(i, y)| *y = a[i] + b[i]);
        }
    }
}

/// Sixteen values under the map's lanes from `at` on.
#[inline(always)]
fn mapped(x: &[f32; LANES], map: Affine, at: usize) -> [f32; LANES] {
    let Some((scale, shift, slope)) = map else { return *x };
    let (scale, shift) = (&scale[at..at + LANES], &shift[at..at + LANES]);
    let mut y = [0.0; LANES];
    for i in 0..LANES {
        let z = x[i] * scale[i] + shift[i];
        y[i] = if z > 0.0 { z } else { slope * z };
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Pending;

    /// Channels that fill vectors and that do not, maps of a sample each, on either side or none.
    #[test]
    fn sums_are_those_of_single_values() {
        for (c, space) in [
            (1, [2, 3, 7]),
            (2, [3, 5, 11]),
            (3, [4, 4, 4]),
            (16, [1, 1, 1]),
            (24, [3, 3, 5]),
            (32, [2, 2, 2]),
        ] {
            let shape = Shape::new(2, space, c);
            let value = |i: usize, k: f32| ((i as f32) * k).sin();
            let tensor =
                |k| Tensor::from_slice(shape, &(0..shape.len()).map(|i| value(i, k)).collect::<Vec<_>>());
            let pending = |k: f32, slope| {
                let lanes = |k| (0..2 * c).map(|i| value(i + 1, k)).collect();
                Pending { scale: lanes(k), shift: lanes(2.0 * k), slope }
            };
            let operand = |k: f32, slope: Option<f32>| match slope {
                Some(slope) => Activation::lazy(tensor(k), pending(0.3 * k, slope)),
                None => tensor(k).into(),
            };
            for slopes in [[None, None], [Some(0.25), None], [None, Some(-0.5)], [Some(0.1), Some(0.2)]] {
                let operands = [operand(0.7, slopes[0]), operand(1.3, slopes[1])];
                let y = add(&mut Tape::off(), &operands[0], &operands[1]).unwrap();
                for (i, y) in y.data().iter().enumerate() {
                    let sample = i / (shape.len() / 2);
                    let one = |x: &Activation| {
                        let value = x.raw().data()[i];
                        x.pending().map_or(value, |p| {
                            let (scale, shift) = p.of_sample(sample, c);
                            let z = value * scale[i % c] + shift[i % c];
                            if z > 0.0 { z } else { p.slope * z }
                        })
                    };
                    let want = one(&operands[0]) + one(&operands[1]);
                    assert_eq!(y.to_bits(), want.to_bits(), "{c} channels, {slopes:?}, value {i}");
                }
            }
        }
    }
}
