//! Class probabilities of a preprocessed volume.

use std::sync::Arc;

use rayon::prelude::*;

use super::cuda::DeviceNetwork;
use super::first_level::Shared;
use super::sliding_window::sliding_window;
use crate::Result;
use crate::config::Window;
use crate::device::arena::Buffer;
use crate::device::cpu::vectorised;
use crate::device::cuda::Cuda;
use crate::nn::UNet;
use crate::tensor::{Float, Tensor};

/// Voxels a task handles.
const CHUNK: usize = 1 << 14;

/// Background and organ.
pub const CLASSES: usize = 2;

/// A network in inference mode, where it computes.
pub enum Predictor<'a> {
    /// In host memory.
    Host(Network<'a>),
    /// On a device.
    Device(&'a Arc<Cuda>, &'a DeviceNetwork<'a>),
}

/// A network in inference mode in host memory.
#[derive(Clone, Copy)]
pub enum Network<'a> {
    /// MONAI's U-Net. The function hears before every batch how many windows it has, and may end it all.
    UNet(&'a UNet, &'a (dyn Fn(usize) -> Result<()> + Sync)),
    /// Any other.
    Function(&'a Function<'a>),
}

/// (N,D,H,W) intensities and that shape in, (N,D,H,W,2) logits out.
pub type Function<'a> = dyn Fn(&[f32], [usize; 4]) -> Result<Tensor> + Sync + 'a;

impl Network<'_> {
    /// Blended logits (D,H,W,2) of an `image` of `shape` = (D,H,W).
    ///
    /// # Errors
    /// Those of the network, and [`crate::Error::Shape`] for logits of the wrong size.
    pub fn logits(&self, image: &[f32], shape: [usize; 3], window: &Window) -> Result<Buffer> {
        let [d, h, w] = window.roi;
        let predict = |windows: &[f32], n: usize| match self {
            Network::UNet(net, told) => {
                told(n)?;
                net.infer(windows, [n, d, h, w])
            }
            Network::Function(function) => function(windows, [n, d, h, w]),
        };
        if let Network::UNet(net, told) = self
            && let Some(shared) = Shared::new(net, shape, window).filter(Shared::is_worth_it)
        {
            return shared.sliding_window(image, CLASSES, told);
        }
        sliding_window(image, shape, window, CLASSES, &mut |windows, n, _| predict(windows, n))
    }
}

/// Probabilities of background and organ a voxel, (D,H,W,2), of an `image` of `shape` = (D,H,W): logits are blended
/// first and go through the softmax once, as in the bundle.
///
/// # Errors
/// As [`Network::logits`].
pub fn probabilities(network: &Network, image: &[f32], shape: [usize; 3], window: &Window) -> Result<Buffer> {
    let mut logits = network.logits(image, shape, window)?;
    softmax(&mut logits);
    Ok(logits)
}

/// The mask that probabilities (D,H,W,2) stand for on their own grid; a tie is background.
pub fn argmax(probabilities: &[f32]) -> Vec<u8> {
    probabilities.par_chunks_exact(CLASSES).map(|p| u8::from(p[1] > p[0])).collect()
}

/// Logits (.., 2) to probabilities, in place: exp(x - max) / sum, in float32 as torch does; one of the two
/// exponentials is that of 0.
pub fn softmax(logits: &mut [f32]) {
    logits.par_chunks_mut(CLASSES * CHUNK).for_each(softmax_voxels);
}

vectorised! {
    /// The same for a task's voxels.
    fn softmax_voxels(logits: &mut [f32]) {
        for x in logits.as_chunks_mut::<CLASSES>().0 {
            // exp(max - max) is 1, or not a number where the network overflowed.
            let large = if x[0].max(x[1]).is_finite() { 1.0 } else { f32::NAN };
            let small = (x[0] - x[1]).exp_minus_abs();
            let sum = large + small;
            let (large, small) = (large / sum, small / sum);
            *x = if x[1] > x[0] { [small, large] } else { [large, small] };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Blend;
    use crate::tensor::Shape;

    #[test]
    fn probabilities_are_the_logistic_of_the_difference() {
        let image = [-90.0, -1.5, 0.0, 0.25, 3.0, 200.0];
        let window = Window { roi: [2, 4, 4], overlap: 0.5, batch: 2, blend: Blend::Constant };
        let network = |x: &[f32], shape: [usize; 4]| {
            assert_eq!(x.len(), shape.iter().product::<usize>());
            let logits: Vec<f32> = x.iter().flat_map(|v| [0.5 * v, 1.5 * v]).collect();
            let [n, d, h, w] = shape;
            Ok(Tensor::from_slice(Shape::new(n, [d, h, w], CLASSES), &logits))
        };
        let p = probabilities(&Network::Function(&network), &image, [1, 2, 3], &window).unwrap();
        for (p, x) in p.chunks(2).zip(image) {
            let organ = 1.0 / (1.0 + f64::from(-x).exp());
            // exp, sum and quotient: a few float32 roundings of a number below 1.
            assert!((f64::from(p[1]) - organ).abs() < 3e-7, "{x}: {} {organ}", p[1]);
            assert!((p[0] + p[1] - 1.0).abs() < 2e-7);
        }
        assert_eq!(argmax(&p), [0, 0, 0, 1, 1, 1], "a tie is background");
        for overflowed in [[f32::INFINITY, 0.0], [0.0, f32::INFINITY], [f32::NAN, 0.0], [0.0, f32::NAN]] {
            let mut p = overflowed;
            softmax(&mut p);
            assert!(p.iter().all(|p| p.is_nan()), "{overflowed:?}: {p:?}, torch has NaN");
        }
    }
}
