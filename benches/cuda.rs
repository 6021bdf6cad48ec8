//! The CUDA engine: forward passes and training steps of the bundle's network, on the first GPU.
//!
//! `cargo bench --bench cuda`; name a row to time only that one. Work is queued as inference and training queue it and
//! waited for once, so a time is what one more pass or step costs. Elements are multiply-adds, three times those of the
//! forward pass for a step, so criterion's 100 Telem/s are 200 TFLOP/s. Steps cut their patches from resident phantoms.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use spleen_hpc::bench::layers::forward_costs;
use spleen_hpc::config::{Amp, CacheDtype, Config, DeviceChoice, Norm, Recipe};
use spleen_hpc::data::cache::{CacheParams, build_all};
use spleen_hpc::data::cache_file::CachedCase;
use spleen_hpc::data::dataset::training_cases;
use spleen_hpc::data::phantom::{PhantomConfig, generate};
use spleen_hpc::data::sampler::PatchSpec;
use spleen_hpc::device::Device;
use spleen_hpc::device::choice::resolve;
use spleen_hpc::device::cuda::Cuda;
use spleen_hpc::nn::UNet;
use spleen_hpc::rng::Philox;
use spleen_hpc::tensor::{Shape, View};
use spleen_hpc::train::trainer::{Input, Trainer};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Precisions and how rows call them.
const PRECISIONS: [(Amp, &str); 2] = [(Amp::On, "f16"), (Amp::Off, "f32")];

/// The GPU, or the sentence that says why there is none.
fn gpu(amp: Amp) -> Option<Arc<Cuda>> {
    match resolve(DeviceChoice::Cuda(0), amp) {
        Ok((Device::Cuda(cuda), _)) => Some(cuda),
        Ok((Device::Cpu(_), why)) => {
            println!("skipped: {why}");
            None
        }
        Err(why) => {
            println!("skipped: {why}");
            None
        }
    }
}

fn config(norm: Norm) -> Config {
    let mut config = Config::for_recipe(Recipe::V036);
    config.net.norm = norm;
    config
}

/// Multiply-adds of a forward pass.
fn macs(config: &Config, n: usize, side: usize) -> u64 {
    (forward_costs(&config.net, n, side).iter().map(|cost| cost.flop).sum::<f64>() / 2.0) as u64
}

fn forward(c: &mut Criterion) {
    let config = config(Norm::Batch);
    let mut group = c.benchmark_group("forward");
    group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    for (amp, precision) in PRECISIONS {
        let Some(cuda) = gpu(amp) else { return };
        let mut net = UNet::new(&config.net, 1).expect("a valid network");
        net.place_for_inference(&cuda).expect("fits");
        for (n, side) in [(1, 96), (4, 96), (4, 160)] {
            let shape = Shape::new(n, [side; 3], 1);
            let mut rng = Philox::new(1, 1);
            let images: Vec<f32> = (0..shape.len()).map(|_| rng.uniform() as f32).collect();
            let data = cuda.act(images.len()).expect("fits");
            data.upload(&images).expect("a working GPU");
            let x = View { shape, data, pending: None };
            group.throughput(Throughput::Elements(macs(&config, n, side)));
            group.bench_function(BenchmarkId::new(format!("{n} x {side}^3"), precision), |b| {
                b.iter_custom(|runs| {
                    let start = Instant::now();
                    for _ in 0..runs {
                        net.infer_on_device(&x).expect("fits");
                    }
                    cuda.synchronize().expect("a working GPU");
                    start.elapsed()
                });
            });
        }
    }
}

/// Preprocessed phantoms as training has them, in a folder that is gone at the end.
fn cases(config: &Config) -> (tempfile::TempDir, Vec<CachedCase>) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let data = dir.path().join("data");
    let phantoms = PhantomConfig { cases: 2, test_cases: 0, seed: 3, full: false };
    generate(&data, &phantoms, &|_, _| {}).expect("phantoms");
    let found = training_cases(&data).expect("cases");
    let params =
        CacheParams { preprocess: config.preprocess.clone(), label_value: None, dtype: CacheDtype::F16 };
    let cases = build_all(&found, &params, &dir.path().join("cache"), &|_| {}).expect("a cache");
    (dir, cases)
}

fn step(c: &mut Criterion) {
    let (n, side) = (8, 96);
    if gpu(Amp::On).is_none() {
        return;
    }
    let (_dir, cases) = cases(&config(Norm::Batch));
    let spec = |i: usize| PatchSpec { case: i % 2, start: [i as i64; 3], shift: 0.0 };
    let specs: Vec<PatchSpec> = (0..n).map(spec).collect();
    let mut group = c.benchmark_group("training step");
    group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    for (amp, precision) in PRECISIONS {
        for (norm, name) in [(Norm::Batch, "batch norm"), (Norm::Instance, "instance norm")] {
            let Some(cuda) = gpu(amp) else { return };
            let config = config(norm);
            let trainer = Trainer::new(&config.net, config.loss, config.optim, 1).expect("a valid network");
            let mut trainer = trainer.on_device(&cuda).expect("fits");
            trainer.make_resident(&cases).expect("fits");
            group.throughput(Throughput::Elements(3 * macs(&config, n, side)));
            group.bench_function(BenchmarkId::new(format!("{n} x {side}^3, {name}"), precision), |b| {
                b.iter_custom(|steps| {
                    let start = Instant::now();
                    for _ in 0..steps {
                        trainer
                            .queue(Input::Resident { specs: &specs, patch: [side; 3] })
                            .expect("a finite loss");
                    }
                    trainer.take_losses(true).expect("finite losses");
                    start.elapsed()
                });
            });
        }
    }
}

criterion_group!(benches, forward, step);
criterion_main!(benches);
