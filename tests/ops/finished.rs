//! Convolutions of inference that finish their outputs, and those that read what was finished: the bits that separate
//! steps would give.

use crate::cases::CASES;
use crate::layer::{Case, Layer, bits, widened};
use crate::{UNIT, param, uniform};
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use crate::{amx_emulator, cases::AMX_CASES};
use spleen_hpc::Error;
use spleen_hpc::config::{Config, Net, Norm, Recipe};
use spleen_hpc::device::bf16::Operands;
use spleen_hpc::device::cpu::{Simd, use_simd};
use spleen_hpc::device::list::List;
use spleen_hpc::nn::Mode;
use spleen_hpc::nn::unet::Probe;
use spleen_hpc::ops::conv::Epilogue;
use spleen_hpc::ops::conv_transpose3d::conv_transpose3d_finished;
use spleen_hpc::ops::conv3d::{Filter, conv3d_finished};
use spleen_hpc::rng::Philox;
use spleen_hpc::tensor::{Activation, Pending, Shape, Tape, Tensor};
use spleen_hpc::train::trainer::Trainer;

const BOTH: [Operands; 2] = [Operands::Single, Operands::Bf16];

/// What a layer should give, from its raw outputs: map, sum and rounding one after the other.
fn separately(
    layer: &Layer,
    raw: &[Tensor],
    mapped: bool,
    plus: &[Activation],
    stored: Operands,
) -> Vec<Vec<u32>> {
    let output = |(i, raw): (usize, &Tensor)| {
        let channels = raw.shape().c;
        let plus = plus.get(i).map(|plus| bits(plus.raw()));
        let value = |(at, &y): (usize, &f32)| {
            let y = if mapped { layer.mapped(i, at % channels, y) } else { y };
            let y = y + plus.as_ref().map_or(-0.0, |plus| widened(&(plus[at] as u16)));
            match stored {
                Operands::Single => y.to_bits(),
                Operands::Bf16 => half::bf16::from_f32(y).to_bits().into(),
            }
        };
        raw.data().iter().enumerate().map(value).collect()
    };
    raw.iter().enumerate().map(output).collect()
}

fn check(what: &str, case: &Case, operands: Operands) {
    let layer = Layer::new(case, 7);
    let raw = layer.inferred(case, operands);
    let [single, half] = BOTH.map(|stored| layer.summands(stored));
    for (mapped, sum) in [(true, true), (true, false), (false, true), (false, false)] {
        for stored in BOTH {
            let plus = if sum { &half[..] } else { &[] };
            let got: Vec<_> = layer.finished(case, operands, mapped, plus, stored).iter().map(bits).collect();
            let want = separately(&layer, &raw, mapped, plus, stored);
            assert!(got == want, "{what}, {operands:?}: map {mapped}, sum {sum}, to {stored:?}");
        }
    }
    let of_half = layer.finished(case, operands, true, &half, Operands::Single);
    let of_single = layer.finished(case, operands, true, &single, Operands::Single);
    assert!(of_half.iter().map(bits).eq(of_single.iter().map(bits)), "{what}: summands of bfloat16");
    let read = BOTH.map(|stored| {
        let layer = Layer::new(case, 7).of_rounded_inputs(stored);
        layer.inferred(case, operands).iter().map(bits).collect::<Vec<_>>()
    });
    assert!(read[0] == read[1], "{what}, {operands:?}: inputs of bfloat16");
}

#[test]
fn finished_outputs_are_those_of_separate_steps() {
    let _turn = UNIT.lock().unwrap_or_else(|p| p.into_inner());
    for unit in [Simd::Avx512, Simd::Avx2, Simd::Portable] {
        use_simd(unit);
        for (i, case) in CASES.iter().enumerate() {
            BOTH.iter().for_each(|&operands| check(&format!("{unit:?}, case {i}"), case, operands));
        }
    }
    use_simd(Simd::Avx512);
}

#[test]
fn an_epilogue_that_does_not_fit_is_refused() {
    let mut rng = Philox::new(4, 0);
    let tensor = |space, c| -> Activation {
        let shape = Shape::new(1, space, c);
        Tensor::from_slice(shape, &vec![1.0; shape.len()]).into()
    };
    let x = tensor([2, 2, 4], 2);
    let (weight, transposed) = (param(0, &[3, 2, 3, 3, 3], &mut rng), param(1, &[2, 3, 3, 3, 3], &mut rng));
    let pending = |c| Pending { scale: List::of(1.0, c), shift: List::of(0.0, c), slope: 0.5 };
    let (short, whole) = (pending(2), pending(3));
    let uneven = Pending { shift: List::of(0.0, 2), ..pending(3) };
    let lazy = Activation::lazy(tensor([2, 2, 4], 3).raw().clone(), pending(3));
    for (map, plus) in [
        (&short, None),
        (&uneven, None),
        // As many values, in another order.
        (&whole, Some(tensor([4, 2, 2], 3))),
        (&whole, Some(lazy)),
    ] {
        let epilogue = Epilogue { map: Some(map), plus: plus.as_ref(), stored: Operands::Bf16 };
        let filter = Filter { weight: &weight, bias: None };
        let of_conv = conv3d_finished(&x, &[(filter, epilogue)], 1, Operands::Bf16);
        assert!(matches!(of_conv, Err(Error::Shape { op: "conv3d", .. })));
        let of_transposed = conv_transpose3d_finished(&[&x], &transposed, None, epilogue, Operands::Bf16);
        assert!(matches!(of_transposed, Err(Error::Shape { op: "conv_transpose3d", .. })));
    }
}

/// A probe wants every module's output, so nothing is finished then.
#[test]
fn a_network_that_finishes_has_the_bits_of_one_that_does_not() {
    let recipe = Config::for_recipe(Recipe::Seed);
    for channels in [vec![4, 18, 33], vec![16, 16]] {
        let net = Net { norm: Norm::Batch, channels };
        let mut trainer = Trainer::new(&net, recipe.loss, recipe.optim, 5).expect("a valid network");
        let shape = Shape::new(2, [8, 12, 20], 1);
        let x = uniform(&mut Philox::new(1, 3), shape.len());
        let labels: Vec<u8> = x.iter().map(|&v| u8::from(v > 0.3)).collect();
        // Running statistics, scales, shifts and slopes that are not those of the beginning.
        for _ in 0..2 {
            trainer.step(&x, &labels, [2, 8, 12, 20]).expect("finite");
        }
        let net = trainer.net;
        let x = Tensor::from_slice(shape, &x);
        let infer = |probe: Option<&mut Probe>| {
            net.forward(&mut Tape::off(), x.clone(), Mode::Eval, probe).expect("fits").0
        };
        assert_eq!(bits(&infer(None)), bits(&infer(Some(&mut |_, _| ()))), "{:?}", net.net().channels);
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[test]
fn finished_outputs_on_amx_are_those_of_separate_steps() {
    let _turn = UNIT.lock().unwrap_or_else(|p| p.into_inner());
    amx_emulator::turn_on();
    for (i, case) in AMX_CASES.iter().enumerate() {
        check(&format!("AMX, case {i}"), case, Operands::Bf16);
    }
    use_simd(Simd::Avx512);
}
