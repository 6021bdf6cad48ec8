//! Results whose bits depend neither on the number of threads nor on the vector unit.

use crate::cases::CASES;
use crate::layer::{Case, Layer, bits, conv, transposed};
use crate::{UNIT, uniform};
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use crate::{amx_emulator, cases::AMX_CASES};
use spleen_hpc::config::{Config, Net, Norm, Recipe};
use spleen_hpc::device::bf16::Operands;
use spleen_hpc::device::cpu::{Simd, use_simd};
use spleen_hpc::nn::{Mode, UNet};
use spleen_hpc::rng::Philox;
use spleen_hpc::tensor::{ParamId, Shape, Tape, Tensor};
use spleen_hpc::train::trainer::Trainer;

/// A small network in inference, and one training step of it: every logit and gradient.
fn network_bits(norm: Norm, operands: Operands) -> Vec<u32> {
    let mut net = UNet::new(&Net { norm, channels: vec![4, 18, 33] }, 5).expect("a valid network");
    net.set_operands(operands);
    let shape = Shape::new(2, [8, 12, 20], 1);
    let x = Tensor::from_slice(shape, &uniform(&mut Philox::new(1, 1), shape.len()));
    let (inferred, _) = net.forward(&mut Tape::off(), x.clone(), Mode::Eval, None).expect("fits");
    let mut tape = Tape::recording();
    let (logits, _) = net.forward(&mut tape, x, Mode::Train, None).expect("fits");
    let mut grads = net.grads();
    grads.set(logits.id(), logits.clone());
    tape.backward(&mut grads).expect("fits");
    let params = (0..net.params().len()).flat_map(|i| grads.param(ParamId(i)));
    inferred.data().iter().chain(logits.data()).chain(params).map(|v| v.to_bits()).collect()
}

/// Two training steps of the same network, so that the second reads what the first wrote: losses, parameters and
/// the optimizer's moments.
fn training_bits(norm: Norm, operands: Operands) -> Vec<u64> {
    let recipe = Config::for_recipe(Recipe::Seed);
    let net = Net { norm, channels: vec![4, 18, 33] };
    let mut trainer = Trainer::new(&net, recipe.loss, recipe.optim, 5).expect("a valid network");
    trainer.net.set_operands(operands);
    let shape = [2, 8, 12, 20];
    let images = uniform(&mut Philox::new(1, 2), shape.iter().product());
    let labels: Vec<u8> = images.iter().map(|&v| u8::from(v > 0.3)).collect();
    let losses = [0; 2].map(|_| trainer.step(&images, &labels, shape).expect("finite").to_bits());
    let (moments, _) = trainer.optimizer_state().expect("on the CPU");
    let moments = moments.iter().flat_map(|m| m.exp_avg.iter().chain(&m.exp_avg_sq));
    let params = trainer.net.params().iter().flat_map(|p| p.value.iter());
    let values = params.chain(moments).map(|v| u64::from(v.to_bits()));
    losses.into_iter().chain(values).collect()
}

/// Every bit of a layer's outputs, finished or not, and gradients.
fn layer_bits(case: &Case, operands: Operands) -> Vec<u32> {
    let layer = Layer::new(case, 3);
    let r = layer.run(case, operands);
    let finished = layer.finished(case, operands, true, &layer.summands(Operands::Bf16), Operands::Bf16);
    let tensors = r.y.iter().chain(&r.inferred).chain(&r.dx).chain(&finished).flat_map(bits);
    let params = r.dw.iter().chain(&r.db).flatten().map(|v| v.to_bits());
    tensors.chain(params).collect()
}

#[test]
fn bits_of_layers_do_not_depend_on_the_vector_unit() {
    let _turn = UNIT.lock().unwrap_or_else(|p| p.into_inner());
    use_simd(Simd::Avx512);
    for (i, case) in CASES.iter().enumerate() {
        for operands in [Operands::Single, Operands::Bf16] {
            let want = layer_bits(case, operands);
            for unit in [Simd::Avx2, Simd::Portable] {
                use_simd(unit);
                let got = layer_bits(case, operands);
                use_simd(Simd::Avx512);
                assert!(got == want, "case {i}, {operands:?}: {unit:?} changes the result");
            }
        }
    }
}

/// Layers that the network below has not: backward passes of stride 2 that are filtered, and inference in cubes, of several slabs.
const LARGE: [Case; 3] = [
    conv([10, 12, 16], &[18], &[16, 20], 3, 2),
    transposed([5, 8, 8], &[17, 16], &[18]),
    conv([27, 6, 7], &[32], &[48], 3, 1),
];

#[test]
fn bits_of_filtered_layers_do_not_depend_on_threads() {
    let _turn = UNIT.lock().unwrap_or_else(|p| p.into_inner());
    use_simd(Simd::Avx512);
    for (i, case) in LARGE.iter().enumerate() {
        let [_, dx, dw] = case.filtering_in_a_step();
        assert!(dx.is_some() && dw.is_some() && case.filtering().is_some(), "case {i} is filtered");
        for operands in [Operands::Single, Operands::Bf16] {
            let bits = [1, 2, 4].map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
                pool.install(|| layer_bits(case, operands))
            });
            assert!(bits[1..].iter().all(|b| *b == bits[0]), "case {i}, {operands:?}");
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads_or_vector_unit() {
    let _turn = UNIT.lock().unwrap_or_else(|p| p.into_inner());
    use_simd(Simd::Avx512);
    for (norm, operands) in [Norm::Batch, Norm::Instance]
        .into_iter()
        .flat_map(|norm| [Operands::Single, Operands::Bf16].map(|operands| (norm, operands)))
    {
        let want = network_bits(norm, operands);
        for threads in [1, 2, 4] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            assert!(
                pool.install(|| network_bits(norm, operands)) == want,
                "{norm:?}, {operands:?}: {threads} threads change the result"
            );
        }
        for unit in [Simd::Avx2, Simd::Portable] {
            use_simd(unit);
            let got = network_bits(norm, operands);
            use_simd(Simd::Avx512);
            assert!(got == want, "{norm:?}, {operands:?}: {unit:?} changes the result");
        }
    }
}

#[test]
fn bits_of_training_do_not_depend_on_the_vector_unit() {
    let _turn = UNIT.lock().unwrap_or_else(|p| p.into_inner());
    use_simd(Simd::Avx512);
    for norm in [Norm::Batch, Norm::Instance] {
        for operands in [Operands::Single, Operands::Bf16] {
            let want = training_bits(norm, operands);
            for unit in [Simd::Avx2, Simd::Portable] {
                use_simd(unit);
                let got = training_bits(norm, operands);
                use_simd(Simd::Avx512);
                assert!(got == want, "{norm:?}, {operands:?}: {unit:?} changes the result");
            }
        }
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[test]
fn bits_on_amx_do_not_depend_on_threads() {
    let _turn = UNIT.lock().unwrap_or_else(|p| p.into_inner());
    amx_emulator::turn_on();
    // 8 threads take shorter runs of tiles than one.
    let bits = [1, 2, 8].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        let layers =
            || AMX_CASES.iter().flat_map(|case| layer_bits(case, Operands::Bf16)).collect::<Vec<_>>();
        pool.install(|| (network_bits(Norm::Batch, Operands::Bf16), layers()))
    });
    use_simd(Simd::Avx512);
    assert!(bits[1..].iter().all(|b| *b == bits[0]));
}
