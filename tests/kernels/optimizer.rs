//! Adam, Novograd and the gradient scaler against `Optimizer::<f64>` on the unscaled gradients.

use crate::harness::{assert_close, on_devices, on_every_device, uniform};
use spleen_hpc::config::{Optim, Optimizer as Kind};
use spleen_hpc::device::cuda::{Cuda, Precision};
use spleen_hpc::ops::optimizer::cuda::{DeviceOptimizer, Scaling, State};
use spleen_hpc::train::optimizer::Optimizer;
use std::cell::RefCell;
use std::sync::Arc;

/// More tensors than warps of a block, one with more chunks than lanes of a warp, every length of tail.
const LENS: [usize; 11] = [1, 2, 3, 16, 6912, 33_001, 4096, 5, 140_007, 4, 1];

fn config(optimizer: Kind, weight_decay: f64) -> Optim {
    let beta2 = if optimizer == Kind::Adam { 0.999 } else { 0.98 };
    Optim { optimizer, lr: 1e-2, beta1: 0.9, beta2, eps: 1e-8, weight_decay }
}

fn values(lens: &[usize]) -> Vec<Vec<f32>> {
    lens.iter().enumerate().map(|(i, &len)| uniform(Precision::Single, 100 + i as u64, len)).collect()
}

/// Gradients of a step. Those of tensor 2 are 0 for three steps: Novograd's second moment then stays at 0.
fn gradients(lens: &[usize], step: u64) -> Vec<Vec<f32>> {
    let zero = |i: usize| i == 2 && step < 3;
    let one = |(i, &len): (usize, &usize)| match zero(i) {
        true => vec![0.0; len],
        false => uniform(Precision::Single, 1000 * (step + 1) + i as u64, len),
    };
    lens.iter().enumerate().map(one).collect()
}

fn new(cuda: &Arc<Cuda>, config: Optim, lens: &[usize], scaling: Option<Scaling>) -> DeviceOptimizer {
    let device = DeviceOptimizer::with_scaling(cuda, config, lens, scaling).unwrap();
    for (i, value) in values(lens).iter().enumerate() {
        device.value(i).upload(value).unwrap();
    }
    device
}

/// Adds what a backward pass of the scaled loss would: `gradients` times the scale.
fn backward(device: &DeviceOptimizer, gradients: &[Vec<f32>]) {
    let scale = device.scale().download().unwrap()[0];
    for (i, g) in gradients.iter().enumerate() {
        device.grad(i).upload(&g.iter().map(|g| g * scale).collect::<Vec<_>>()).unwrap();
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Bits of all that a step may change.
fn everything(device: &DeviceOptimizer) -> (Vec<u32>, State) {
    (bits(&device.values().download().unwrap()), device.state().unwrap())
}

/// A host optimizer in step with a device's.
struct Host<T> {
    optimizer: Optimizer<T>,
    values: Vec<Vec<T>>,
}

impl<T: spleen_hpc::tensor::Float> Host<T> {
    fn new(config: Optim, lens: &[usize]) -> Self {
        let exact = |v: Vec<f32>| v.into_iter().map(|v| T::new(v.into())).collect();
        let optimizer = Optimizer::new(config, lens.iter().copied());
        Host { optimizer, values: values(lens).into_iter().map(exact).collect() }
    }

    fn step(&mut self, gradients: &[Vec<f32>]) {
        let exact = |g: &Vec<f32>| -> Vec<T> { g.iter().map(|&g| T::new(g.into())).collect() };
        let gradients: Vec<Vec<T>> = gradients.iter().map(exact).collect();
        let gradients: Vec<&[T]> = gradients.iter().map(Vec::as_slice).collect();
        self.optimizer.step(self.values.iter_mut().map(Vec::as_mut_slice), &gradients);
    }
}

#[test]
fn twenty_steps_follow_the_reference() {
    // The scale grows after steps 7 and 14: a gradient is divided by the scale that it was made with.
    let scaling = Scaling { interval: 7, ..Scaling::default() };
    for (kind, decay) in [(Kind::Adam, 0.0), (Kind::Adam, 0.1), (Kind::Novograd, 0.0), (Kind::Novograd, 0.1)]
    {
        let config = config(kind, decay);
        let mut host = Host::<f64>::new(config, &LENS);
        (0..20).for_each(|step| host.step(&gradients(&LENS, step)));
        let first = RefCell::new(None);
        on_every_device(|cuda| {
            let device = new(cuda, config, &LENS, Some(scaling));
            for step in 0..20 {
                backward(&device, &gradients(&LENS, step));
                device.step().unwrap();
                let grads = device.grads().download().unwrap();
                assert!(grads.iter().all(|g| g.to_bits() == 0), "gradients are 0 after a step");
            }
            let state = device.state().unwrap();
            assert_eq!((state.scaler.steps, state.scaler.growth, state.scaler.scale), (20, 6, 4.0 * 65536.0));
            let starts = values(&LENS);
            for (i, len) in LENS.iter().enumerate() {
                let case = format!("{kind:?}, decay {decay}, tensor {i} of {len}");
                let got = device.value(i).download().unwrap();
                let moved: Vec<f32> = got.iter().zip(&starts[i]).map(|(w, start)| w - start).collect();
                let want: Vec<f64> =
                    host.values[i].iter().zip(&starts[i]).map(|(w, &start)| w - f64::from(start)).collect();
                // Each of 20 steps and the difference here round a weight by at most half its last place.
                let largest = got.iter().fold(0.0, |max: f64, w| max.max(f64::from(w.abs())));
                let rounding = 21.0 * (2f64.powi(-24) * largest).powi(2) / 3.0;
                let mean_square = want.iter().map(|w| w * w).sum::<f64>() / *len as f64;
                let why = "roundings of the weight, against its move";
                assert_close(&case, &moved, &want, 2.0 * rounding / mean_square + 1e-12, why);
                let why = "a few roundings of 2^-24 a step, most of them forgotten as the moment decays";
                let moments = &host.optimizer.moments[i];
                assert_close(&case, &state.exp_avg[i], &moments.exp_avg, 1e-13, why);
                assert_close(&case, &state.exp_avg_sq[i], &moments.exp_avg_sq, 1e-12, why);
            }
            let got = everything(&device);
            let same = first.borrow_mut().get_or_insert_with(|| got.clone()) == &got;
            assert!(same, "{kind:?}: the bits depend on the schedule or the storage of activations");
        });
    }
}

/// One value anywhere, of any kind that is no number, in weights or moments, is found; the largest number is one.
#[test]
fn what_is_no_number_is_found_wherever_it_is() {
    let lens = [3, 5000, 17];
    for kind in [Kind::Adam, Kind::Novograd] {
        on_devices(Precision::Half, &|cuda| {
            let device = new(cuda, config(kind, 0.0), &lens, Some(Scaling::default()));
            backward(&device, &gradients(&lens, 9));
            device.step().unwrap();
            let state = device.state().unwrap();
            let starts: Vec<Vec<f32>> =
                (0..lens.len()).map(|i| device.value(i).download().unwrap()).collect();
            for (value, want) in [(f32::MAX, true), (f32::NAN, false), (f32::NEG_INFINITY, false)] {
                for (tensor, at) in [(0, 0), (1, 2048), (1, 4999), (2, 16)] {
                    let case = format!("{kind:?}: {value} at {at} of tensor {tensor}");
                    let mut values = starts[tensor].clone();
                    values[at] = value;
                    device.value(tensor).upload(&values).unwrap();
                    assert_eq!(device.is_finite().unwrap(), want, "{case}, weights");
                    device.value(tensor).upload(&starts[tensor]).unwrap();
                    for second in [false, true] {
                        let mut other = state.clone();
                        let moments = if second { &mut other.exp_avg_sq } else { &mut other.exp_avg };
                        let moments = &mut moments[tensor];
                        let at = at.min(moments.len() - 1);
                        moments[at] = value;
                        device.restore(&other).unwrap();
                        assert_eq!(device.is_finite().unwrap(), want, "{case}, moments");
                    }
                    device.restore(&state).unwrap();
                    assert!(device.is_finite().unwrap(), "{kind:?}: nothing is left of {value}");
                }
            }
        });
    }
}

#[test]
fn the_gaps_between_tensors_stay_zero() {
    for kind in [Kind::Adam, Kind::Novograd] {
        on_devices(Precision::Half, &|cuda| {
            let device = new(cuda, config(kind, 0.1), &LENS, Some(Scaling::default()));
            for step in 0..3 {
                backward(&device, &gradients(&LENS, step));
                device.step().unwrap();
            }
            let mut flat = device.values().download().unwrap();
            (0..LENS.len()).for_each(|i| flat[device.tensors().slice(i)].fill(0.0));
            assert!(flat.iter().all(|w| w.to_bits() == 0));
        });
    }
}

/// The CPU's own f32 code, in the same order of operations: no rounding may differ.
#[test]
fn adams_bits_are_the_cpus() {
    let lens = [3, 5000, 17];
    let config = config(Kind::Adam, 0.01);
    let mut host = Host::<f32>::new(config, &lens);
    (0..20).for_each(|step| host.step(&gradients(&lens, step)));
    on_devices(Precision::Half, &|cuda| {
        let device = new(cuda, config, &lens, Some(Scaling::default()));
        for step in 0..20 {
            backward(&device, &gradients(&lens, step));
            device.step().unwrap();
        }
        let state = device.state().unwrap();
        for (i, moments) in host.optimizer.moments.iter().enumerate() {
            assert_eq!(bits(&device.value(i).download().unwrap()), bits(&host.values[i]), "values {i}");
            assert_eq!(bits(&state.exp_avg[i]), bits(&moments.exp_avg), "first moments {i}");
            assert_eq!(bits(&state.exp_avg_sq[i]), bits(&moments.exp_avg_sq), "second moments {i}");
        }
    });
}

/// A step that is skipped leaves everything as it was but the scale: what follows is as if it had never been.
#[test]
fn an_infinity_skips_the_step_and_halves_the_scale() {
    let lens = [1, 9000, 3, 70];
    // (tensor, element): first and last of a tensor, of a chunk, before a gap.
    let places = [(0, 0), (1, 0), (1, 4095), (1, 4096), (1, 8999), (2, 2), (3, 69)];
    for kind in [Kind::Adam, Kind::Novograd] {
        let config = config(kind, 0.01);
        on_devices(Precision::Half, &|cuda| {
            let device = new(cuda, config, &lens, Some(Scaling::default()));
            let good = new(cuda, config, &lens, Some(Scaling::default()));
            let mut scale = 65536.0;
            for step in 0..4u64 {
                for (k, &(tensor, element)) in places.iter().enumerate() {
                    let bad = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN][(k + step as usize) % 3];
                    let before = everything(&device);
                    let mut gradients = gradients(&lens, 50 + k as u64);
                    gradients[tensor][element] = bad;
                    backward(&device, &gradients);
                    device.step().unwrap();
                    scale *= 0.5;
                    let after = everything(&device);
                    assert_eq!(after.0, before.0, "{kind:?}: values after {bad} in {tensor}, {element}");
                    assert_eq!(after.1.exp_avg, before.1.exp_avg, "{kind:?}");
                    assert_eq!(after.1.exp_avg_sq, before.1.exp_avg_sq, "{kind:?}");
                    let (old, new) = (before.1.scaler, after.1.scaler);
                    assert_eq!((new.scale, new.growth, new.infinite), (scale, 0, true));
                    assert_eq!((new.steps, new.skipped), (old.steps, old.skipped + 1));
                    let grads = device.grads().download().unwrap();
                    assert!(grads.iter().all(|g| g.to_bits() == 0), "gradients of a skipped step are 0");
                }
                for optimizer in [&device, &good] {
                    backward(optimizer, &gradients(&lens, step));
                    optimizer.step().unwrap();
                }
                let (got, want) = (everything(&device), everything(&good));
                assert_eq!(got.0, want.0, "{kind:?}: values after step {step}");
                assert_eq!((got.1.exp_avg, got.1.exp_avg_sq), (want.1.exp_avg, want.1.exp_avg_sq));
                assert!(!got.1.scaler.infinite && got.1.scaler.steps == want.1.scaler.steps);
                assert_eq!(got.1.scaler.growth, 1);
            }
        });
    }
}

#[test]
fn the_scale_grows_after_its_interval_but_never_past_f32() {
    let scaling = Scaling { interval: 3, initial: f32::MAX / 3.0, ..Scaling::default() };
    on_devices(Precision::Half, &|cuda| {
        let device = new(cuda, config(Kind::Adam, 0.0), &[5], Some(scaling));
        let mut seen = Vec::new();
        for _ in 0..10 {
            device.step().unwrap();
            let scaler = device.scaler().unwrap();
            seen.push((scaler.scale / scaling.initial, scaler.growth));
        }
        let grown = [(1.0, 1), (1.0, 2), (2.0, 0), (2.0, 1), (2.0, 2)];
        assert_eq!(seen[..5], grown);
        assert_eq!(
            seen[5..],
            [(2.0, 0), (2.0, 1), (2.0, 2), (2.0, 0), (2.0, 1)],
            "2 x 2 x MAX / 3 is no f32"
        );
    });
}

/// Without mixed precision the scale is 1, and a bad step is void all the same: good weights outlive it.
#[test]
fn without_amp_a_bad_step_is_void() {
    for kind in [Kind::Adam, Kind::Novograd] {
        on_devices(Precision::Single, &|cuda| {
            let lens = [6, 3];
            let device = new(cuda, config(kind, 0.0), &lens, None);
            let mut gradients = gradients(&lens, 7);
            backward(&device, &gradients);
            device.step().unwrap();
            let scaler = device.scaler().unwrap();
            assert_eq!((scaler.scale, scaler.steps, scaler.infinite), (1.0, 1, false));
            let before = device.values().download().unwrap();
            gradients[1][2] = f32::NAN;
            backward(&device, &gradients);
            device.step().unwrap();
            let scaler = device.scaler().unwrap();
            assert_eq!((scaler.scale, scaler.steps, scaler.skipped, scaler.infinite), (1.0, 1, 1, true));
            assert_eq!(device.values().download().unwrap(), before);
        });
    }
}

#[test]
fn a_restored_optimizer_goes_on_with_the_same_bits() {
    let lens = [3, 5000, 1];
    let scaling = Some(Scaling { interval: 3, ..Scaling::default() });
    for kind in [Kind::Adam, Kind::Novograd] {
        let config = config(kind, 0.01);
        on_devices(Precision::Half, &|cuda| {
            let device = new(cuda, config, &lens, scaling);
            let run = |device: &DeviceOptimizer, steps: std::ops::Range<u64>| {
                for step in steps {
                    let mut gradients = gradients(&lens, step);
                    if step % 4 == 1 {
                        gradients[1][17] = f32::INFINITY;
                    }
                    backward(device, &gradients);
                    device.step().unwrap();
                }
            };
            run(&device, 0..7);
            let resumed = new(cuda, config, &lens, scaling);
            resumed.grads().fill(0x3f).unwrap();
            resumed.restore(&device.state().unwrap()).unwrap();
            resumed.values().upload(&device.values().download().unwrap()).unwrap();
            assert_eq!(everything(&resumed), everything(&device));
            assert!(resumed.grads().download().unwrap().iter().all(|&g| g == 0.0));
            run(&device, 7..12);
            run(&resumed, 7..12);
            assert_eq!(everything(&resumed), everything(&device));

            let other = new(cuda, config, &[3, 5000], scaling);
            let refused = other.restore(&device.state().unwrap()).unwrap_err().to_string();
            assert!(refused.contains("moments of 2 parameters"), "{refused}");
        });
    }
}
