//! Adam and Novograd, element for element as torch and MONAI compute them.
//!
//! With g the gradient plus weight_decay w, t the 1-based step:
//! * Adam (torch.optim.Adam): m <- m + (1 - b1) (g - m); v <- b2 v + (1 - b2) g^2;
//!   w <- w - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps).
//! * Novograd (monai.optimizers.Novograd), v a scalar a tensor: n = sum g^2; v <- n while v = 0, else b2 v +
//!   (1 - b2) n; m <- b1 m + g / (sqrt(v) + eps) + weight_decay w; w <- w - lr m. No bias correction.
//!
//! Generic over the float type: f32 in the product, f64 to compare with a reference.

use crate::config::{Optim, Optimizer as Kind};
use crate::device::list::List;
use crate::tensor::Float;
use rayon::prelude::*;

/// The moments of one parameter tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments<T> {
    /// First moment, one an element.
    pub exp_avg: Vec<T>,
    /// Second moment: one an element (Adam) or one a tensor (Novograd).
    pub exp_avg_sq: Vec<T>,
}

/// An optimizer over tensors of fixed sizes.
#[derive(Clone, Debug)]
pub struct Optimizer<T> {
    config: Optim,
    /// Steps taken.
    pub step: u64,
    /// One entry a parameter, in order.
    pub moments: Vec<Moments<T>>,
}

/// Elements a task handles.
const CHUNK: usize = 1 << 14;

impl<T: Float> Optimizer<T> {
    /// Zero moments for tensors of the given sizes.
    pub fn new(config: Optim, lens: impl IntoIterator<Item = usize>) -> Self {
        let second = |len| match config.optimizer {
            Kind::Adam => len,
            Kind::Novograd => 1,
        };
        let zero =
            |len| Moments { exp_avg: vec![T::default(); len], exp_avg_sq: vec![T::default(); second(len)] };
        Optimizer { config, step: 0, moments: lens.into_iter().map(zero).collect() }
    }

    /// One step: `params[i]` moves against `grads[i]`.
    pub fn step<'a>(&mut self, params: impl IntoIterator<Item = &'a mut [T]>, grads: &[&[T]])
    where
        T: 'a,
    {
        self.step += 1;
        for ((w, g), m) in params.into_iter().zip(grads).zip(&mut self.moments) {
            match self.config.optimizer {
                Kind::Adam => adam(&self.config, self.step, w, g, m),
                Kind::Novograd => novograd(&self.config, w, g, m),
            }
        }
    }
}

fn adam<T: Float>(c: &Optim, step: u64, w: &mut [T], g: &[T], state: &mut Moments<T>) {
    let correction = |beta: f64| 1.0 - beta.powi(step as i32);
    let step_size = T::new(c.lr / correction(c.beta1));
    let root = T::new(correction(c.beta2).sqrt());
    let (one_minus_b1, b2, one_minus_b2) = (T::new(1.0 - c.beta1), T::new(c.beta2), T::new(1.0 - c.beta2));
    let (eps, decay) = (T::new(c.eps), T::new(c.weight_decay));
    w.par_chunks_mut(CHUNK)
        .zip(g.par_chunks(CHUNK))
        .zip(state.exp_avg.par_chunks_mut(CHUNK).zip(state.exp_avg_sq.par_chunks_mut(CHUNK)))
        .for_each(|((w, g), (m, v))| {
            for (((w, &g), m), v) in w.iter_mut().zip(g).zip(m).zip(v) {
                let g = g + decay * *w;
                *m += one_minus_b1 * (g - *m);
                *v = b2 * *v + one_minus_b2 * g * g;
                *w = *w - step_size * *m / (v.sqrt() / root + eps);
            }
        });
}

fn novograd<T: Float>(c: &Optim, w: &mut [T], g: &[T], state: &mut Moments<T>) {
    // Summed in f64 over fixed chunks: the same for any number of threads.
    let mut norms = List::of(0.0, g.len().div_ceil(CHUNK));
    norms.par_iter_mut().zip(g.par_chunks(CHUNK)).for_each(|(norm, g)| {
        *norm = g.iter().map(|g| g.to_f64() * g.to_f64()).sum();
    });
    let norm: f64 = norms.iter().sum();
    let v = &mut state.exp_avg_sq[0];
    *v =
        if *v == T::default() { T::new(norm) } else { T::new(v.to_f64() * c.beta2 + (1.0 - c.beta2) * norm) };
    let denominator = v.sqrt() + T::new(c.eps);
    let (b1, lr, decay) = (T::new(c.beta1), T::new(c.lr), T::new(c.weight_decay));
    w.par_chunks_mut(CHUNK).zip(g.par_chunks(CHUNK)).zip(state.exp_avg.par_chunks_mut(CHUNK)).for_each(
        |((w, g), m)| {
            for ((w, &g), m) in w.iter_mut().zip(g).zip(m) {
                *m = b1 * *m + (g / denominator + decay * *w);
                *w = *w - lr * *m;
            }
        },
    );
}
