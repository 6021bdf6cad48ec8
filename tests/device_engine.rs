//! The training engine on a CUDA device, whole: mixed precision, gradient scaler, recorded steps, resume. Runs on the
//! emulator, or natively with `SPLEEN_TEST_DEVICE=cuda`. `SPLEEN_STEPS=N` makes the runs that are compared longer.

mod support;

use spleen_hpc::config::{Config, Net, Norm, Optimizer, Recipe};
use spleen_hpc::device::cuda::{Cuda, Precision};
use spleen_hpc::nn::UNet;
use spleen_hpc::nn::checkpoint::ScalerState;
use spleen_hpc::rng::Philox;
use spleen_hpc::train::trainer::{Input, Trainer};
use std::sync::Arc;
use support::device;

/// Steps of the runs that are compared: 4 of the full network are what CI has time for on the emulator.
fn steps() -> usize {
    let asked = std::env::var("SPLEEN_STEPS").ok();
    asked.map_or(4, |steps| steps.parse().expect("SPLEEN_STEPS is a number"))
}

/// The bundle's network, or one of a few channels and two levels.
fn net(full: bool, norm: Norm) -> Net {
    Net { norm, channels: if full { vec![16, 32, 64, 128, 256] } else { vec![4, 8, 16] } }
}

/// Two patches with a bright ball each, its labels, and the shape.
fn batch(side: usize, seed: u64) -> (Vec<f32>, Vec<u8>, [usize; 4]) {
    let mut rng = Philox::new(seed, 77);
    let (mut images, mut labels) = (Vec::new(), Vec::new());
    for n in 0..2usize {
        let centre = side as f64 * (0.4 + 0.1 * n as f64);
        for i in 0..side.pow(3) {
            let [d, h, w] = [i / (side * side), i / side % side, i % side].map(|v| v as f64 - centre);
            let inside = (d * d + h * h + w * w).sqrt() < 0.3 * side as f64;
            images.push((0.3 + 0.3 * f64::from(u8::from(inside)) + 0.1 * rng.normal()) as f32);
            labels.push(u8::from(inside));
        }
    }
    (images, labels, [2, side, side, side])
}

fn trainer(net: &Net, optimizer: Optimizer, cuda: Option<&Arc<Cuda>>) -> Trainer {
    let mut config = Config::for_recipe(Recipe::Seed);
    config.optim.optimizer = optimizer;
    config.optim.lr = 1e-3;
    let trainer = Trainer::with_network(UNet::new(net, 5).unwrap(), config.loss, config.optim);
    match cuda {
        None => trainer,
        Some(cuda) => trainer.on_device(cuda).expect("fits"),
    }
}

/// Every number a checkpoint of it would hold, as bits.
fn bits(trainer: &mut Trainer) -> Vec<u64> {
    trainer.refresh().unwrap();
    let (moments, scaler) = trainer.optimizer_state().unwrap();
    let scaler = scaler.expect("a device has a scaler");
    let mut bits =
        vec![scaler.scale.to_bits().into(), scaler.growth_tracker.into(), scaler.steps, scaler.skipped];
    let weights = trainer.net.state_dict();
    for (_, array) in weights.iter() {
        bits.extend(array.to_le_bytes().chunks(4).map(|b| b.iter().fold(0, |v, &b| v << 8 | u64::from(b))));
    }
    let moments = moments.iter().flat_map(|m| m.exp_avg.iter().chain(&m.exp_avg_sq));
    bits.extend(moments.map(|v| u64::from(v.to_bits())));
    bits
}

/// Mixed precision follows the CPU's f32 run: the loss of step k is off by the rounding of k - 1 updates. fp16
/// activations are off by 2^-11 of themselves, which moves a loss of order 1 by a few 1e-3 at most over 20 steps.
/// Later two trajectories go their own ways, so the means of the last 25 losses are compared, and the yardstick is a
/// CPU run that starts from weights rounded to fp16.
fn follows_the_cpu(full: bool, side: usize, steps: usize, precision: Precision, allowed: f64) {
    let Some(cuda) = device(precision, 1) else { return };
    for (norm, optimizer) in [(Norm::Batch, Optimizer::Adam), (Norm::Instance, Optimizer::Novograd)] {
        let net = net(full, norm);
        let mut rounded = trainer(&net, optimizer, None);
        for param in rounded.net.params_mut() {
            param.make_mut().iter_mut().for_each(|v| *v = half::f16::from_f32(*v).to_f32());
        }
        let mut runs = [trainer(&net, optimizer, None), trainer(&net, optimizer, Some(&cuda)), rounded];
        let losses = runs.each_mut().map(|run| -> Vec<f64> {
            let step = |step| {
                let (images, labels, shape) = batch(side, step as u64 % 3);
                run.step(&images, &labels, shape).unwrap()
            };
            (0..steps).map(step).collect()
        });
        let [want, got, control] = losses;
        println!("{norm:?} {optimizer:?} {precision:?} on {cuda:?}: CPU {want:.5?}, device {got:.5?}");
        for (step, (want, got)) in want.iter().zip(&got).enumerate().take(20) {
            assert!((want - got).abs() <= allowed, "step {step}: {got} on the device, {want} on the CPU");
        }
        if let Some(last) = steps.checked_sub(25).filter(|&last| last >= 20) {
            let mean = |losses: &[f64]| losses[last..].iter().sum::<f64>() / 25.0;
            let (off, yardstick) = ((mean(&got) - mean(&want)).abs(), (mean(&control) - mean(&want)).abs());
            println!("mean of the last 25 losses: off by {off:.1e}, the rounded start by {yardstick:.1e}");
            assert!(off <= allowed.max(3.0 * yardstick), "{off} against {yardstick}");
        }
        assert!(got[steps - 1] < got[0], "the loss does not fall: {got:?}");
    }
}

#[test]
fn mixed_precision_follows_the_cpu() {
    follows_the_cpu(false, 16, steps().max(8), Precision::Half, 5e-3);
    follows_the_cpu(true, 32, steps(), Precision::Half, 5e-3);
}

#[test]
fn single_precision_follows_the_cpu_closely() {
    // Sums of up to 27 * 16 terms in another order; a trajectory multiplies that by the steps.
    follows_the_cpu(false, 16, 8, Precision::Single, 1e-4);
}

/// A recorded step is the step: a trainer that replays and one that is made anew for every step, and so never replays,
/// have the same bits. That is also a resume after every step.
#[test]
fn replays_and_resumes_are_bit_identical() {
    let Some(cuda) = device(Precision::Half, 2) else { return };
    for (norm, optimizer) in [(Norm::Batch, Optimizer::Adam), (Norm::Instance, Optimizer::Novograd)] {
        let net = net(false, norm);
        let mut replaying = trainer(&net, optimizer, Some(&cuda));
        let mut eager = trainer(&net, optimizer, Some(&cuda));
        for step in 0..5 {
            let (images, labels, shape) = batch(16, step);
            let one = replaying.step(&images, &labels, shape).unwrap();
            let other = eager.step(&images, &labels, shape).unwrap();
            assert_eq!(one.to_bits(), other.to_bits(), "loss of step {step}");
            assert!(bits(&mut replaying) == bits(&mut eager), "{norm:?} {optimizer:?}: after step {step}");
            let (moments, scaler) = eager.optimizer_state().unwrap();
            let mut resumed = trainer(&net, optimizer, Some(&cuda));
            resumed.net.load(&eager.net.state_dict()).unwrap();
            resumed.restore(eager.steps(), moments, scaler).unwrap();
            eager = resumed;
        }
    }
}

/// The schedule of threads, warps, blocks and copies changes no bit.
#[test]
fn schedules_change_nothing() {
    let run = |seed| {
        let cuda = device(Precision::Half, seed)?;
        let mut gpu = trainer(&net(false, Norm::Batch), Optimizer::Adam, Some(&cuda));
        for step in 0..3 {
            let (images, labels, shape) = batch(16, step);
            gpu.step(&images, &labels, shape).unwrap();
        }
        Some(bits(&mut gpu))
    };
    let Some(first) = run(0) else { return };
    for seed in 1..3 {
        assert!(run(seed).expect("the same device") == first, "seed {seed}");
    }
}

/// Steps that are queued ahead, their patches on the way while other steps run, are those that are waited for one by one.
#[test]
fn steps_queued_ahead_are_those_waited_for() {
    let run = |seed, ahead: bool| {
        let cuda = device(Precision::Half, seed)?;
        let mut gpu = trainer(&net(false, Norm::Batch), Optimizer::Adam, Some(&cuda));
        let mut losses = Vec::new();
        for step in 0..9 {
            let (images, labels, shape) = batch(if step % 4 == 3 { 8 } else { 16 }, step);
            gpu.queue(Input::Patches { images: &images, labels: &labels, shape }).unwrap();
            losses.extend(gpu.take_losses(!ahead).unwrap());
        }
        losses.extend(gpu.take_losses(true).unwrap());
        assert_eq!(losses.len(), 9);
        Some((losses, bits(&mut gpu)))
    };
    let Some(want) = run(0, false) else { return };
    for seed in 0..4 {
        assert!(run(seed, true).expect("the same device") == want, "seed {seed}");
    }
}

/// A scale at which fp16 gradients overflow: the step is void and the scale halves, until it fits.
#[test]
fn an_overflow_voids_the_step_and_halves_the_scale() {
    let Some(cuda) = device(Precision::Half, 0) else { return };
    let mut gpu = trainer(&net(false, Norm::Batch), Optimizer::Adam, Some(&cuda));
    let (images, labels, shape) = batch(16, 0);
    let (moments, scaler) = gpu.optimizer_state().unwrap();
    let mut scaler = scaler.expect("a device has a scaler");
    // dlogits are at most about 1 / voxels: 2^13 voxels times 65504 is where they overflow for certain.
    scaler.scale = 2f32.powi(40);
    gpu.restore(0, moments, Some(scaler)).unwrap();
    let weights = |gpu: &mut Trainer| {
        gpu.refresh().unwrap();
        gpu.net.params().iter().flat_map(|p| p.value.to_vec()).map(f32::to_bits).collect::<Vec<_>>()
    };
    let before = weights(&mut gpu);
    let mut loss = f64::NAN;
    for void in 1..=40 {
        let now = gpu.step(&images, &labels, shape).unwrap();
        let state = gpu.optimizer_state().unwrap().1.expect("a device has a scaler");
        if state.steps == 1 {
            assert!(void > 1, "nothing overflowed");
            assert!(weights(&mut gpu) != before, "a step that counts changes the weights");
            assert_eq!(state.scale, 2f32.powi(41 - void));
            assert_eq!(gpu.steps(), void as u64);
            return;
        }
        assert_eq!((state.skipped, state.growth_tracker), (void as u64, 0));
        assert_eq!(state.scale, 2f32.powi(40 - void));
        assert!(weights(&mut gpu) == before, "a void step changes no weight");
        // Batch norm in training mode does not look at the running statistics, so the loss stays.
        assert!(loss.is_nan() || loss == now);
        loss = now;
    }
    panic!("the scale never fitted");
}

/// A run may move to the CPU, or to f32, and back: the scale, and how many steps counted, go with it.
#[test]
fn the_scaler_outlives_steps_without_it() {
    let (Some(half), Some(single)) = (device(Precision::Half, 0), device(Precision::Single, 0)) else {
        return;
    };
    let net = net(false, Norm::Batch);
    let (images, labels, shape) = batch(16, 0);
    let mut first = trainer(&net, Optimizer::Adam, Some(&half));
    let (moments, scaler) = first.optimizer_state().unwrap();
    let scaler = scaler.map(|_| ScalerState { scale: 512.0, growth_tracker: 7, steps: 40, skipped: 2 });
    first.restore(42, moments, scaler).unwrap();
    first.step(&images, &labels, shape).unwrap();
    let mut run = first;
    for cuda in [None, Some(&single), None, Some(&half)] {
        let (moments, scaler) = run.optimizer_state().unwrap();
        run.refresh().unwrap();
        let mut next = trainer(&net, Optimizer::Adam, cuda);
        next.net.load(&run.net.state_dict()).unwrap();
        next.restore(run.steps(), moments, scaler).unwrap();
        next.step(&images, &labels, shape).unwrap();
        run = next;
    }
    let scaler = run.optimizer_state().unwrap().1.expect("kept all the way");
    assert_eq!((scaler.scale, scaler.skipped), (512.0, 2));
    assert_eq!((scaler.steps, run.steps()), (45, 47));
    // Only the steps of mixed precision are steps towards a larger scale.
    assert_eq!(scaler.growth_tracker, 9);
}

#[test]
fn a_loss_that_is_not_a_number_ends_training() {
    let Some(cuda) = device(Precision::Half, 0) else { return };
    let mut gpu = trainer(&net(false, Norm::Batch), Optimizer::Adam, Some(&cuda));
    let (mut images, labels, shape) = batch(16, 0);
    gpu.step(&images, &labels, shape).unwrap();
    images[5] = f32::NAN;
    let error = gpu.step(&images, &labels, shape).unwrap_err().to_string();
    assert!(error.starts_with("step 2: the loss is NaN"), "{error}");
    assert!(gpu.is_finite().unwrap(), "the scaler voids a step without numbers");
}

#[test]
fn moments_that_are_no_numbers_are_seen() {
    let Some(cuda) = device(Precision::Half, 0) else { return };
    let (images, labels, shape) = batch(16, 0);
    for place in [None, Some(&cuda)] {
        let mut run = trainer(&net(false, Norm::Batch), Optimizer::Adam, place);
        run.step(&images, &labels, shape).unwrap();
        run.refresh().unwrap();
        let (moments, scaler) = run.optimizer_state().unwrap();
        let mut broken = moments.clone();
        broken.last_mut().unwrap().exp_avg_sq[0] = f32::INFINITY;
        run.restore(1, broken, scaler).unwrap();
        assert!(!run.is_finite().unwrap(), "a moment");
        run.restore(1, moments, scaler).unwrap();
        assert!(run.is_finite().unwrap(), "the moments of before");
    }
}

/// On the CPU: on a device such an image makes the loss NaN, which ends training before.
#[test]
fn a_running_variance_that_is_no_number_is_seen() {
    let (images, labels, shape) = batch(16, 0);
    let mut run = trainer(&net(false, Norm::Batch), Optimizer::Adam, None);
    // The variance overflows; what is divided by it is 0, and so are gradients.
    let huge: Vec<f32> = images.iter().map(|v| v * 1e25).collect();
    run.step(&huge, &labels, shape).unwrap();
    assert!(run.net.params().iter().all(|p| p.value.iter().all(|v| v.is_finite())), "weights are numbers");
    assert!(!run.is_finite().unwrap());
}

/// Evaluation mode of the real network, window by window, beside the CPU's.
#[test]
fn inference_follows_the_cpu() {
    for (precision, allowed) in [(Precision::Half, 2e-2), (Precision::Single, 2e-5)] {
        let Some(cuda) = device(precision, 0) else { return };
        let host = UNet::new(&net(true, Norm::Batch), 9).unwrap();
        let mut gpu = host.clone();
        gpu.place_for_inference(&cuda).unwrap();
        let (images, _, _) = batch(32, 4);
        let shape = [1, 32, 32, 32];
        let want = host.infer(&images[..32 * 32 * 32], shape).unwrap();
        let got = gpu.infer(&images[..32 * 32 * 32], shape).unwrap();
        let worst = want.data().iter().zip(got.data()).map(|(w, g)| (w - g).abs()).fold(0.0, f32::max);
        println!("{precision:?}: logits off by at most {worst:.1e}");
        assert!(worst <= allowed, "{precision:?}: {worst}");
    }
}
