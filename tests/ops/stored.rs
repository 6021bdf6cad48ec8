//! What a training step of bfloat16 stores as bfloat16: the bits of f32 values that were rounded.

use crate::cases::CASES;
use crate::layer::{Case, Layer, bits, rounded};
use crate::{UNIT, lazy, param, uniform};
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use crate::{amx_emulator, cases::AMX_CASES};
use spleen_hpc::config::{Net, Norm};
use spleen_hpc::device::bf16::Operands;
use spleen_hpc::device::cpu::{Simd, use_simd};
use spleen_hpc::nn::unet::Probe;
use spleen_hpc::nn::{Mode, UNet};
use spleen_hpc::ops::norm_prelu::{Affine, Statistics, norm_prelu};
use spleen_hpc::ops::residual::{add, materialize};
use spleen_hpc::rng::Philox;
use spleen_hpc::tensor::{Activation, Grads, ParamId, Shape, Tape, Tensor};

const UNITS: [Simd; 3] = [Simd::Avx512, Simd::Avx2, Simd::Portable];
const BOTH: [Operands; 2] = [Operands::Single, Operands::Bf16];

/// Channels that fill vectors and that do not, an odd number of values.
const SHAPES: [(usize, [usize; 3], usize); 6] = [
    (2, [9, 8, 10], 16),
    (1, [3, 5, 7], 3),
    (2, [3, 5, 11], 2),
    (3, [1, 1, 1], 1),
    (2, [3, 3, 5], 24),
    (2, [20, 30, 31], 2),
];

/// Outputs and gradients of a layer whose inputs and gradients of outputs have values of bfloat16, stored either way.
fn check_layer(what: &str, case: &Case, operands: Operands) {
    // As f32, as bfloat16, and in turn.
    let stored: [fn(usize) -> Operands; 3] = [|_| Operands::Single, |_| Operands::Bf16, |i| BOTH[i % 2]];
    let all = stored.map(|stored| {
        let r = Layer::new(case, 9).of_rounded_values(stored).run(case, operands);
        let tensors: Vec<_> = r.y.iter().chain(&r.dx).map(bits).collect();
        (tensors, r.dw, r.db)
    });
    assert!(all[0] == all[1] && all[0] == all[2], "{what}, {operands:?}");
}

#[test]
fn layers_read_either_alike() {
    let _turn = UNIT.lock().unwrap_or_else(|p| p.into_inner());
    for unit in UNITS {
        use_simd(unit);
        for (i, case) in CASES.iter().enumerate() {
            BOTH.iter().for_each(|&operands| check_layer(&format!("{unit:?}, case {i}"), case, operands));
        }
    }
    use_simd(Simd::Avx512);
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[test]
fn layers_on_amx_read_either_alike() {
    let _turn = UNIT.lock().unwrap_or_else(|p| p.into_inner());
    amx_emulator::turn_on();
    for (i, case) in AMX_CASES.iter().chain(CASES).enumerate() {
        check_layer(&format!("AMX, case {i}"), case, Operands::Bf16);
    }
    use_simd(Simd::Avx512);
}

/// A residual sum of activations, lazy, plain or of bfloat16.
#[test]
fn sums_are_rounded_once() {
    let _turn = UNIT.lock().unwrap_or_else(|p| p.into_inner());
    let mut rng = Philox::new(21, 0);
    for (n, space, c) in SHAPES {
        let shape = Shape::new(n, space, c);
        let mut plain = || Tensor::from_slice(shape, &uniform(&mut rng, shape.len()));
        let (a, b) = (plain(), plain());
        let operands: [Activation; 3] = [lazy(shape, &mut rng), a.into(), rounded(&b, Operands::Bf16).into()];
        for (i, j) in (0..3).flat_map(|i| (0..3).map(move |j| (i, j))) {
            let sum = |stored| add(&mut Tape::off(), &operands[i], &operands[j], stored).expect("fits");
            let want = bits(&rounded(&sum(Operands::Single), Operands::Bf16));
            for unit in UNITS {
                use_simd(unit);
                assert!(bits(&sum(Operands::Bf16)) == want, "{shape}, {i} + {j}, {unit:?}");
            }
            use_simd(Simd::Avx512);
        }
        let widened = materialize(&operands[2]).expect("on the host");
        assert!(bits(&widened) == bits(&rounded(&b, Operands::Single)), "{shape}");
    }
}

/// A norm of a sum of a norm: its gradient, of bfloat16, is another norm's.
#[test]
fn norms_read_gradients_of_bfloat16() {
    let _turn = UNIT.lock().unwrap_or_else(|p| p.into_inner());
    let shape = Shape::new(2, [3, 4, 5], 3);
    let mut rng = Philox::new(23, 0);
    let x = Tensor::from_slice(shape, &uniform(&mut rng, shape.len()));
    let dz = Tensor::from_slice(shape, &uniform(&mut rng, shape.len()));
    let [single, half] = BOTH.map(|operands| {
        let mut tape = Tape::recording();
        tape.operands = operands;
        let norm = |tape: &mut Tape, x: &Tensor| {
            norm_prelu(tape, x, Statistics::Batch, Affine::default()).expect("fits").0
        };
        let y = norm(&mut tape, &x);
        let sum = add(&mut tape, &y, &x.clone().into(), Operands::Single).expect("fits");
        let z = norm(&mut tape, &sum);
        let mut grads = Grads::new([]);
        grads.set(z.id(), dz.clone());
        tape.backward(&mut grads).expect("fits");
        materialize(&grads.take(x.id()).expect("has a gradient").into()).expect("on the host")
    });
    // Two gradients are rounded, by at most 2^-9 of the largest each; a norm multiplies by 1 / std of values within +-1, here
    // below 2, and takes two means off.
    let largest = single.data().iter().fold(0.0, |m: f32, v| m.max(v.abs()));
    let furthest = single.data().iter().zip(half.data()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(furthest > 0.0 && furthest < (1.0 + 2.0 * 3.0) * largest / 512.0, "{furthest} of {largest}");
}

/// The gradient of what a norm reads; where another consumer gives one too, their sum in f32.
#[test]
fn gradients_of_norms_are_rounded_once() {
    let _turn = UNIT.lock().unwrap_or_else(|p| p.into_inner());
    for (statistics, (n, space, c)) in
        [Statistics::Batch, Statistics::Instance].into_iter().flat_map(|s| SHAPES.map(|shape| (s, shape)))
    {
        let shape = Shape::new(n, space, c);
        let mut rng = Philox::new(22, 0);
        let x = Tensor::from_slice(shape, &uniform(&mut rng, shape.len()));
        let params = [param(0, &[c], &mut rng), param(1, &[c], &mut rng), param(2, &[1], &mut rng)];
        let affine = Affine { gamma: Some(&params[0]), beta: Some(&params[1]), slope: Some(&params[2]) };
        let dys = [0; 2].map(|_| Tensor::from_slice(shape, &uniform(&mut rng, shape.len())));
        let gradients = |operands, dys: &[Tensor]| {
            let mut tape = Tape::recording();
            tape.operands = operands;
            let mut grads = Grads::new(params.iter().map(|p| p.value.len()));
            for dy in dys {
                let (y, _) = norm_prelu(&mut tape, &x, statistics, affine).expect("fits");
                grads.set(y.id(), dy.clone());
            }
            tape.backward(&mut grads).expect("fits");
            let of_params = params.iter().map(|p| grads.param(p.id).to_vec()).collect::<Vec<_>>();
            (grads.take(x.id()).expect("has a gradient"), of_params)
        };
        let single = |dys: &[Tensor]| gradients(Operands::Single, dys);
        let (dx, of_params) = single(&dys[..1]);
        let want = bits(&rounded(&dx, Operands::Bf16));
        for unit in UNITS {
            use_simd(unit);
            let (got, got_of_params) = gradients(Operands::Bf16, &dys[..1]);
            assert!(bits(&got) == want && got_of_params == of_params, "{shape}, {statistics:?}, {unit:?}");
        }
        use_simd(Simd::Avx512);
        let [first, second] = [0, 1].map(|i| rounded(&single(&dys[i..=i]).0, Operands::Single));
        let sum = first.data().iter().zip(second.data()).map(|(a, b)| a + b).collect::<Vec<_>>();
        let (both, _) = gradients(Operands::Bf16, &dys);
        assert!(both.data() == sum, "{shape}, {statistics:?}: two consumers");
    }
}

/// A probe wants every module's output in f32. (Gradients are stored alike in both.)
#[test]
fn residual_sums_of_bfloat16_change_no_bit_of_a_step() {
    let _turn = UNIT.lock().unwrap_or_else(|p| p.into_inner());
    let mut net =
        UNet::new(&Net { norm: Norm::Batch, channels: vec![4, 18, 33] }, 5).expect("a valid network");
    net.set_operands(Operands::Bf16);
    let shape = Shape::new(2, [8, 12, 20], 1);
    let x = Tensor::from_slice(shape, &uniform(&mut Philox::new(1, 1), shape.len()));
    let step = |probe: Option<&mut Probe>| {
        let mut tape = Tape::recording();
        let (logits, _) = net.forward(&mut tape, x.clone(), Mode::Train, probe).expect("fits");
        let mut grads = net.grads();
        grads.set(logits.id(), logits.clone());
        tape.backward(&mut grads).expect("fits");
        let params = (0..net.params().len()).map(|i| grads.param(ParamId(i)).to_vec()).collect::<Vec<_>>();
        (bits(&logits), params)
    };
    assert!(step(None) == step(Some(&mut |_, _| ())));
}
