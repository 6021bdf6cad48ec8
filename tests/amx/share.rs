//! How much of what AMX multiplies the network asked for: every layer and pass, counted by the emulator.

use crate::TURN;
use crate::amx_emulator::{emulated_products, turn_on};
use spleen_hpc::bench::config;
use spleen_hpc::bench::layers::{Layer, PASSES, Pass, layers};
use spleen_hpc::device::amx::PRODUCT_FLOPS;
use spleen_hpc::device::bf16::Operands;
use spleen_hpc::ops::conv::Phase;
use spleen_hpc::ops::conv_transpose3d;
use spleen_hpc::ops::conv3d::{self, Filter};
use spleen_hpc::tensor::{Activation, Param, ParamId, Shape, Tensor};

/// One pass on one patch of zeros with bfloat16 operands.
fn run(layer: &Layer, pass: Pass, patch: [usize; 3]) {
    let zeros = |space, channels| {
        let shape = Shape::new(1, space, channels);
        Tensor::from_slice(shape, &vec![0.0; shape.len()])
    };
    let xs: Vec<Activation> =
        layer.inputs.iter().map(|&c| zeros(layer.input_space(patch), c).into()).collect();
    let outputs = |w: &[usize; 5]| if layer.transposed { w[1] } else { w[0] };
    let dys: Vec<Tensor> =
        layer.weights.iter().map(|w| zeros(layer.output_space(patch), outputs(w))).collect();
    let weights: Vec<Param> = layer
        .weights
        .iter()
        .map(|w| Param::new(ParamId(0), w.to_vec(), vec![0.0; w.iter().product()]))
        .collect();
    let (kernel, stride, bf16) = (layer.weights[0][2], layer.stride, Operands::Bf16);
    let filters: Vec<Filter> = weights.iter().map(|weight| Filter { weight, bias: None }).collect();
    match (pass, layer.transposed) {
        (Pass::Fprop, false) => drop(conv3d::cpu::fprop(&xs[0], &filters, stride, bf16, Phase::Forward)),
        (Pass::Dgrad, false) => {
            drop(conv3d::cpu::dgrad(xs[0].shape(), &dys, &weights, (kernel, stride), bf16));
        }
        (Pass::Wgrad, false) => drop(conv3d::cpu::wgrad(&xs[0], &dys, kernel, stride, bf16)),
        (Pass::Fprop, true) => {
            let inputs: Vec<&Activation> = xs.iter().collect();
            drop(conv_transpose3d::cpu::fprop(&inputs, &weights[0], None, bf16, Phase::Forward));
        }
        (Pass::Dgrad, true) => drop(conv_transpose3d::cpu::dgrad(&xs, &dys[0], &weights[0], bf16)),
        (Pass::Wgrad, true) => drop(conv_transpose3d::cpu::wgrad(&xs, &dys[0], bf16)),
    }
}

/// Products of tiles that a pass takes, with those that only keep the multiplier awake, and which part of their operations it needs.
fn share(layer: &Layer, pass: Pass, patch: [usize; 3]) -> (usize, f64) {
    let before = emulated_products().expect("emulated");
    run(layer, pass, patch);
    let products = emulated_products().expect("emulated") - before;
    (products, layer.cost(1, patch).flop / (products * PRODUCT_FLOPS) as f64)
}

/// Whether a pass of a layer is one that AMX takes: all but the gradient of the weights between two channels and two.
fn on_amx(layer: &Layer, pass: Pass) -> bool {
    layer.weights[0][..2] != [2, 2] || pass != Pass::Wgrad
}

#[test]
fn products_are_mostly_useful() {
    let _turn = TURN.lock().unwrap_or_else(|p| p.into_inner());
    turn_on();
    if emulated_products().is_none() {
        return; // The CPU does not count.
    }
    for layer in layers(&config().net) {
        for pass in PASSES.into_iter().filter(|&p| layer.has(p)) {
            let (products, share) = share(&layer, pass, [32; 3]);
            assert_eq!(products > 0, on_amx(&layer, pass), "{} {pass}", layer.name);
            // 2^3 voxels of the bottom fill half of 16 rows; nothing may take many times what it needs.
            assert!(products == 0 || share > 0.05, "{} {pass}: {share:.3}", layer.name);
        }
    }
}

/// The table for patches of 96^3; a minute.
#[test]
#[ignore = "prints a table"]
fn table_of_shares() {
    let _turn = TURN.lock().unwrap_or_else(|p| p.into_inner());
    turn_on();
    println!("{:<28} {:>6} {:>10} {:>8} {:>6}", "layer", "pass", "products", "GFLOP", "share");
    for pass in PASSES {
        let (mut all, mut needed, mut beside) = (0, 0.0, 0.0);
        for layer in layers(&config().net).iter().filter(|l| l.has(pass)) {
            let (products, share) = share(layer, pass, [96; 3]);
            let flop = layer.cost(1, [96; 3]).flop;
            if products == 0 {
                beside += flop;
                println!("{:<28} {pass:>6} {:>10} {:>8.3} {:>6}", layer.name, "-", flop / 1e9, "-");
                continue;
            }
            (all, needed) = (all + products, needed + flop);
            println!("{:<28} {pass:>6} {products:>10} {:>8.3} {share:>6.2}", layer.name, flop / 1e9);
        }
        let share = needed / (all * PRODUCT_FLOPS) as f64;
        println!(
            "{pass}: {all} products, {share:.2} of them useful; {:.3} GFLOP on the vector unit\n",
            beside / 1e9
        );
    }
}
