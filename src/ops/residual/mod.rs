//! The residual sum y = a + b of two activations, either of them lazy; dy goes to both.

mod cpu;
pub mod cuda;

pub use cpu::channel_sums;

use crate::device::bf16::Operands;
use crate::device::cuda::SelfTest;
use crate::device::nvtx::range;
use crate::error::{Error, Result};
use crate::ops::self_test::taped;
use crate::tensor::{Activation, Grads, Shape, Tape, Tensor, ValueId, Values, View, add_assign};

/// a + b, written out: in host memory as `stored` says, on a device in its precision.
///
/// # Errors
/// [`Error::Shape`] when their shapes differ, and those of the device.
pub fn add(tape: &mut Tape, a: &Activation, b: &Activation, stored: Operands) -> Result<Tensor> {
    if a.shape() != b.shape() {
        return Err(Error::Shape { op: "add", want: a.shape().to_string(), got: b.shape().to_string() });
    }
    let y = match (a.view(), b.view()) {
        (Some(a), Some(b)) => {
            let _range = range("residual");
            Tensor::on_device(a.shape, cuda::add(&a, Some(&b))?, None)
        }
        _ => cpu::sum(a, Some(b), stored),
    };
    let (id, a, b) = (y.id(), a.id(), b.id());
    tape.record(move |grads| {
        let dy = grads.take(id).ok_or_else(|| Error::Internal("add: no gradient arrived".into()))?;
        give(grads, a, dy.clone())?;
        give(grads, b, dy)
    });
    Ok(y)
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
        None => Ok(cpu::sum(x, None, Operands::Single)),
    }
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
            _ => match (sum.values(), grad.values()) {
                (Values::Single(_), Values::Single(_)) => {
                    add_assign(sum.make_mut(), grad.data());
                    sum
                }
                _ => cpu::sum(&sum.into(), Some(&grad.into()), Operands::Single),
            },
        },
    };
    grads.set(id, sum);
    Ok(())
}

/// A host tensor in f32.
pub fn single(x: &Tensor) -> Tensor {
    match x.values() {
        Values::Single(_) => x.clone(),
        Values::Bf16(_) => cpu::sum(&x.clone().into(), None, Operands::Single),
    }
}

/// See [`SelfTest`].
pub const SELF_TESTS: &[SelfTest] = &[SelfTest {
    name: "residual",
    run: |cuda| {
        let shape = Shape::new(2, [5, 6, 7], 16);
        taped(cuda, &[shape, shape], &[], |tape, xs, _| {
            Ok(vec![add(tape, &xs[0].clone().into(), &xs[1].clone().into(), Operands::Single)?.into()])
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
                let y = add(&mut Tape::off(), &operands[0], &operands[1], Operands::Single).unwrap();
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
