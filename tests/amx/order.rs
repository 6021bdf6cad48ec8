//! The order in which a convolution on AMX adds its products, bit for bit.

use crate::TURN;
use crate::amx_emulator::turn_on;
use spleen_hpc::device::bf16::Operands;
use spleen_hpc::ops::conv::Phase;
use spleen_hpc::ops::conv3d::{self, Filter};
use spleen_hpc::rng::Philox;
use spleen_hpc::tensor::{Activation, Param, ParamId, Shape, Tensor};

fn uniform(rng: &mut Philox, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.range(-1.0, 1.0) as f32).collect()
}

/// A product of one row of A and one column of B, added to `sum`: pairs' first halves, their second halves, their sum,
/// all sums.
fn product(sum: f32, terms: &[(f32, f32)]) -> f32 {
    let chain = |odd: usize| terms.iter().skip(odd).step_by(2).fold(0.0f32, |s, &(x, w)| x.mul_add(w, s));
    sum + (chain(0) + chain(1))
}

/// The output of (O, I, 3, 3, 3) `w` at one voxel from products of these terms in this order; products of different
/// groups of input channels are added up by themselves.
fn output(groups: &[Vec<Vec<(f32, f32)>>]) -> f32 {
    let sums = groups.iter().map(|group| group.iter().fold(0.0, |sum, terms| product(sum, terms)));
    sums.reduce(|y, sum| sum + y).expect("a group")
}

/// Compares with groups of products of these terms, of volumes of one plane to nine and of one block of 16 outputs to three:
/// bits depend on none of the ways to share them out.
fn compare(
    (channels, stride): (usize, usize),
    terms: impl Fn(&dyn Fn(usize, [usize; 3]) -> (f32, f32)) -> Vec<Vec<Vec<(f32, f32)>>>,
) {
    for outputs in [16, 32, 48] {
        (1..=9).for_each(|depth| compare_volume([channels, outputs], stride, [depth, 4, 5], &terms));
    }
}

fn compare_volume(
    [channels, outputs]: [usize; 2],
    stride: usize,
    space: [usize; 3],
    terms: impl Fn(&dyn Fn(usize, [usize; 3]) -> (f32, f32)) -> Vec<Vec<Vec<(f32, f32)>>>,
) {
    let mut rng = Philox::new(9, channels as u64);
    let shape = Shape::new(1, space, channels);
    let x = uniform(&mut rng, shape.len());
    let w = uniform(&mut rng, outputs * channels * 27);
    let weight = Param::new(ParamId(0), vec![outputs, channels, 3, 3, 3], w.clone());
    let _turn = TURN.lock().unwrap_or_else(|p| p.into_inner());
    turn_on();
    let input = Activation::from(Tensor::from_slice(shape, &x));
    let filter = [Filter { weight: &weight, bias: None }];
    let got = conv3d::cpu::fprop(&input, &filter, stride, Operands::Bf16, Phase::Forward);
    let round = |v: f32| half::bf16::from_f32(v).to_f32();
    for (i, &got) in got[0].data().iter().enumerate() {
        let (voxel, o) = (i / outputs, i % outputs);
        let [_, out_h, out_w] = space.map(|s| s.div_ceil(stride));
        let at = [voxel / (out_h * out_w), voxel / out_w % out_h, voxel % out_w];
        let term = |c: usize, tap: [usize; 3]| {
            let place: [usize; 3] = std::array::from_fn(|a| (at[a] * stride + tap[a]).wrapping_sub(1));
            let inside = place.iter().zip(space).all(|(&p, s)| p < s);
            let [d, h, w_] = place;
            let x = if inside { x[((d * space[1] + h) * space[2] + w_) * channels + c] } else { 0.0 };
            let tap = (tap[0] * 3 + tap[1]) * 3 + tap[2];
            (round(x), round(w[(o * channels + c) * 27 + tap]))
        };
        let want = output(&terms(&term));
        assert_eq!(
            got.to_bits(),
            want.to_bits(),
            "{channels} to {outputs} channels of {space:?}, output {i}: {got} and {want}"
        );
    }
}

#[test]
fn sixteen_channels_are_added_two_taps_at_a_time() {
    compare((16, 1), |term| {
        let row = |kh| {
            let tap = |kd, kw: usize| (0..16).map(move |c| term(c, [kd, kh, kw]));
            let pairs = (0..3).map(|kd| tap(kd, 0).chain(tap(kd, 1)).collect());
            let last = (0..3).map(|kd| tap(kd, 2).collect());
            pairs.chain(last).collect::<Vec<Vec<_>>>()
        };
        vec![(0..3).flat_map(row).collect()]
    });
}

#[test]
fn at_a_stride_of_two_as_well() {
    compare((16, 2), |term| {
        let row = |i: usize| {
            let tap = |kw: usize| (0..16).map(move |c| term(c, [i / 3, i % 3, kw]));
            [tap(0).chain(tap(1)).collect(), tap(2).collect()]
        };
        vec![(0..9).flat_map(row).collect()]
    });
}

#[test]
fn more_channels_are_added_32_at_a_time_and_128_by_themselves() {
    compare((160, 1), |term| {
        let block = |first: usize| {
            let taps = (0..27).map(|i| [i % 3, i / 9, i / 3 % 3]);
            taps.map(move |tap| (first..first + 32).map(|c| term(c, tap)).collect::<Vec<_>>())
                .collect::<Vec<_>>()
        };
        vec![[0, 32, 64, 96].into_iter().flat_map(block).collect(), block(128)]
    });
}
