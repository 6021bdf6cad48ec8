//! The CPU engine: the layers that cost most, a forward pass, a training step.
//!
//! `cargo bench --bench engine`; name a layer to run only that one. Elements are multiply-adds, so criterion's
//! throughput of 100 Gelem/s is 200 GFLOP/s.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use spleen_hpc::config::{Config, Recipe};
use spleen_hpc::device::bf16::Operands;
use spleen_hpc::device::list::List;
use spleen_hpc::nn::UNet;
use spleen_hpc::ops::conv_transpose3d::conv_transpose3d;
use spleen_hpc::ops::conv3d::{Filter, conv3d};
use spleen_hpc::rng::Philox;
use spleen_hpc::tensor::{Activation, Grads, Param, ParamId, Pending, Shape, Tape, Tensor};
use spleen_hpc::train::trainer::Trainer;
use std::hint::black_box;

fn uniform(len: usize) -> Vec<f32> {
    let mut rng = Philox::new(1, len as u64);
    (0..len).map(|_| rng.uniform() as f32).collect()
}

/// (name, side of the input, input channels, output channels, kernel, stride, transposed), four patches of 96^3.
const LAYERS: &[(&str, usize, usize, usize, usize, usize, bool)] = &[
    ("down0 conv1, 16->16 at 48", 48, 16, 16, 3, 1, false),
    ("down1 conv0, 16->32 s2 to 24", 48, 16, 32, 3, 2, false),
    ("down1 conv1, 32->32 at 24", 24, 32, 32, 3, 1, false),
    ("bottom conv1, 256->256 at 6", 6, 256, 256, 3, 1, false),
    ("up1 transposed, 64->16 to 48", 24, 64, 16, 3, 2, true),
    ("up0 transposed, 32->2 to 96", 48, 32, 2, 3, 2, true),
    ("up0 conv, 2->2 at 96", 96, 2, 2, 3, 1, false),
];

fn layers(c: &mut Criterion) {
    for &(name, side, input, output, k, stride, transposed) in LAYERS {
        let shape = Shape::new(4, [side; 3], input);
        let raw = Tensor::from_slice(shape, &uniform(shape.len()));
        let pending = Pending { scale: List::of(1.1, input), shift: List::of(-0.3, input), slope: 0.25 };
        let x = Activation::lazy(raw, pending);
        let shape = if transposed { vec![input, output, k, k, k] } else { vec![output, input, k, k, k] };
        let value = uniform(shape.iter().product());
        let weight = Param::new(ParamId(0), shape, value);
        let run = |tape: &mut Tape, operands: Operands| -> Tensor {
            tape.operands = operands;
            if transposed {
                conv_transpose3d(tape, &[&x], &weight, None).expect("fits")
            } else {
                conv3d(tape, &x, &[Filter { weight: &weight, bias: None }], stride).expect("fits").remove(0)
            }
        };
        let y = run(&mut Tape::off(), Operands::Single);
        let coarse = if transposed { x.shape() } else { y.shape() };
        let macs = (coarse.n * coarse.voxels() * weight.value.len()) as u64;
        let mut group = c.benchmark_group(name);
        group.sample_size(20).throughput(Throughput::Elements(macs));
        for (operands, kind) in [(Operands::Single, "f32"), (Operands::Bf16, "bf16")] {
            group.throughput(Throughput::Elements(macs));
            group.bench_function(format!("fprop, {kind}"), |b| {
                b.iter(|| black_box(run(&mut Tape::off(), operands)));
            });
            let record = || {
                let mut tape = Tape::recording();
                let y = run(&mut tape, operands);
                let mut grads = Grads::new([weight.value.len()]);
                grads.set(y.id(), y.clone());
                (tape, grads)
            };
            let backward = |(tape, mut grads): (Tape, Grads)| {
                tape.backward(&mut grads).expect("fits");
                grads
            };
            group.throughput(Throughput::Elements(2 * macs));
            group.bench_function(format!("dgrad + wgrad, {kind}"), |b| {
                b.iter_batched(record, backward, BatchSize::PerIteration);
            });
        }
    }
}

fn network(c: &mut Criterion) {
    let config = Config::for_recipe(Recipe::Seed);
    let mut group = c.benchmark_group("network");
    group.sample_size(10);
    for (side, n, operands, name) in
        [(48, 8, Operands::Single, "f32"), (96, 2, Operands::Single, "f32"), (96, 2, Operands::Bf16, "bf16")]
    {
        let voxels: usize = side * side * side;
        let mut net = UNet::new(&config.net, 1).expect("a valid network");
        net.set_operands(operands);
        let images = uniform(4 * voxels);
        group.bench_function(format!("forward, 4 x {side}^3, {name}"), |b| {
            b.iter(|| net.infer(&images, [4, side, side, side]).expect("fits"));
        });
        let mut trainer = Trainer::new(&config.net, config.loss, config.optim, 1).expect("a valid network");
        trainer.net.set_operands(operands);
        let images = uniform(n * voxels);
        let labels: Vec<u8> = images.iter().map(|&v| u8::from(v > 0.9)).collect();
        group.bench_function(format!("training step, {n} x {side}^3, {name}"), |b| {
            b.iter(|| trainer.step(&images, &labels, [n, side, side, side]).expect("a finite loss"));
        });
    }
}

criterion_group!(benches, layers, network);
criterion_main!(benches);
