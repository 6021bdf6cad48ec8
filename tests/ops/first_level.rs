//! Windows that share the network's first level: the logits of windows by themselves.

use crate::{UNIT, uniform};
use spleen_hpc::Error;
use spleen_hpc::config::{Blend, Net, Norm, Window};
use spleen_hpc::device::bf16::Operands;
use spleen_hpc::device::cpu::{Simd, use_simd};
use spleen_hpc::infer::first_level::Shared;
use spleen_hpc::infer::predict::{CLASSES, Network};
use spleen_hpc::infer::sliding_window::sliding_window;
use spleen_hpc::nn::UNet;
use spleen_hpc::rng::Philox;
use std::sync::Mutex;

/// Volume, window, overlap, windows a batch.
type Case = ([usize; 3], [usize; 3], f64, usize);

/// Transforms pair the same features as in windows by themselves, or windows share nothing.
const PAIRED: &[Case] = &[
    ([20, 48, 72], [16, 16, 24], 0.5, 4),
    // The last windows begin at 37 of 53 and 25 of 49.
    ([16, 53, 49], [8, 16, 24], 0.5, 3),
    // Steps of 4; along D rows take over planes, but for the last one, which begins at 17.
    ([33, 33, 40], [16, 16, 16], 0.75, 5),
    // One window along H, of which 3 voxels are outside.
    ([17, 13, 64], [8, 16, 16], 0.5, 7),
    // Windows that hang over on all sides.
    ([5, 13, 18], [8, 16, 24], 0.5, 2),
    // Along D steps of 4, and windows that end with half a pair.
    ([26, 16, 32], [18, 16, 16], 0.75, 3),
];

/// They do not: windows begin at 0, 12 and 18, along D at 0 and 2.
const UNPAIRED: Case = ([18, 42, 42], [16, 24, 24], 0.5, 4);

fn net(channels: &[usize], operands: Operands) -> UNet {
    let net = Net { norm: Norm::Batch, channels: channels.to_vec() };
    let mut net = UNet::new(&net, 3).expect("a valid network");
    net.set_operands(operands);
    net
}

fn config(roi: [usize; 3], overlap: f64, batch: usize) -> Window {
    Window { roi, overlap, batch, blend: Blend::Gaussian }
}

/// Blended logits of a random volume: of windows by themselves, and of windows that share the first level.
fn both(channels: &[usize], operands: Operands, (shape, roi, overlap, batch): Case) -> [Vec<f32>; 2] {
    let (net, config) = (net(channels, operands), config(roi, overlap, batch));
    let volume = uniform(&mut Philox::new(1, 7), shape.iter().product());
    let [d, h, w] = roi;
    let mut alone = |x: &[f32], n: usize, _: usize| net.infer(x, [n, d, h, w]);
    let alone = sliding_window(&volume, shape, &config, CLASSES, &mut alone).expect("fits");
    let shared = Shared::new(&net, shape, &config).expect("fits");
    let shared = shared.sliding_window(&volume, CLASSES, &|_| Ok(())).expect("fits");
    [alone.to_vec(), shared.to_vec()]
}

/// Root mean square of differences.
fn deviation(a: &[f32], b: &[f32]) -> f64 {
    let squares = a.iter().zip(b).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2));
    (squares.sum::<f64>() / a.len() as f64).sqrt()
}

/// Logits in bfloat16 are as near to f32's: rounding is another, not a larger one. A tenth more would be seen if a value in
/// ten were wrong by as much as all are.
fn assert_as_near(channels: &[usize], case: Case, [alone, shared]: &[Vec<f32>; 2]) {
    let [single, _] = both(channels, Operands::Single, case);
    let (alone, shared) = (deviation(alone, &single), deviation(shared, &single));
    assert!(shared <= 1.1 * alone, "{case:?}: {shared} from f32, windows by themselves {alone}");
}

fn assert_same_bits(unit: Simd, channels: &[usize], cases: &[Case]) {
    for (operands, &case) in
        [Operands::Single, Operands::Bf16].into_iter().flat_map(|o| cases.iter().map(move |c| (o, c)))
    {
        use_simd(unit);
        let [alone, shared] = both(channels, operands, case);
        use_simd(Simd::Avx512);
        let same = alone.iter().zip(&shared).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same, "{unit:?}, {channels:?}, {operands:?}: {case:?}");
    }
}

#[test]
fn a_shared_first_level_gives_the_bits_of_windows_by_themselves() {
    let _turn = UNIT.lock().unwrap_or_else(|p| p.into_inner());
    // Products of transforms in planes in f32, in cubes in f32 and in planes in bfloat16, in cubes in both, and nowhere.
    for channels in [&[9, 12][..], &[16, 8], &[32, 8], &[3, 5]] {
        assert_same_bits(Simd::Avx512, channels, PAIRED);
    }
    for unit in [Simd::Avx2, Simd::Portable] {
        assert_same_bits(unit, &[16, 8], &PAIRED[..1]);
    }
}

#[test]
fn transforms_of_other_pairs_round_otherwise_and_not_more() {
    let _turn = UNIT.lock().unwrap_or_else(|p| p.into_inner());
    use_simd(Simd::Avx512);
    let channels = &[16, 8];
    let [alone, shared] = both(channels, Operands::Single, UNPAIRED);
    // Logits of at most 1; some hundred roundings of 6e-8 on the way.
    assert!(deviation(&alone, &shared) < 1e-6, "{}", deviation(&alone, &shared));
    assert!(alone != shared, "the case is of other pairs");
    assert_as_near(channels, UNPAIRED, &both(channels, Operands::Bf16, UNPAIRED));
}

/// The order of AMX's sums depends on a layer's width.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[test]
fn a_shared_first_level_is_as_near_to_f32_on_amx() {
    let _turn = UNIT.lock().unwrap_or_else(|p| p.into_inner());
    let channels = &[16, 8];
    for case in [([8, 32, 32], [8, 16, 16], 0.5, 5), UNPAIRED] {
        crate::amx_emulator::turn_on();
        let found = both(channels, Operands::Bf16, case);
        use_simd(Simd::Avx512);
        assert_as_near(channels, case, &found);
    }
}

/// Asked for a volume's logits, a network with known norms shares its first level: batches end with the rows of windows.
#[test]
fn whoever_hears_of_windows_hears_of_all_and_may_end_them() {
    let _turn = UNIT.lock().unwrap_or_else(|p| p.into_inner());
    let (shape, config) = ([12, 80, 80], config([8, 32, 32], 0.75, 4));
    let volume = vec![0.5; shape.iter().product()];
    let heard = |norm| {
        let net = UNet::new(&Net { norm, channels: vec![2, 2] }, 3).expect("a valid network");
        let heard = Mutex::new(Vec::new());
        let listen = |n| {
            heard.lock().expect("nobody panicked").push(n);
            Ok(())
        };
        Network::UNet(&net, &listen).logits(&volume, shape, &config).expect("fits");
        let ended = Network::UNet(&net, &|_| Err(Error::Interrupted)).logits(&volume, shape, &config);
        assert!(matches!(ended, Err(Error::Interrupted)));
        heard.into_inner().expect("nobody panicked")
    };
    // 3 rows of 7 x 7 windows.
    let row = [[4; 12].as_slice(), &[1]].concat();
    assert_eq!(heard(Norm::Batch), row.repeat(3));
    assert_eq!(heard(Norm::Instance), [[4; 36].as_slice(), &[3]].concat());
}

#[test]
fn it_is_shared_where_that_saves_something_and_the_norms_are_known() {
    let batch = net(&[4, 4], Operands::Single);
    let window = |roi, overlap| config(roi, overlap, 4);
    let planned = |shape, window: &Window| Shared::new(&batch, shape, window).map(|s| s.is_worth_it());
    let (volume, bundle) = ([256, 256, 128], window([96; 3], 0.5));
    assert_eq!(planned(volume, &bundle), Some(true));
    assert_eq!(planned([293, 293, 134], &bundle), Some(true));
    assert_eq!(planned([192; 3], &window([96; 3], 0.0)), Some(false), "no overlap");
    assert_eq!(planned([96; 3], &bundle), Some(false), "one window");
    assert_eq!(planned([64; 3], &window([16, 16, 18], 0.5)), None, "an odd number of features");
    assert_eq!(planned([64; 3], &window([16, 16, 8], 0.5)), None, "nothing but edge");
    let instance =
        UNet::new(&Net { norm: Norm::Instance, channels: vec![4, 4] }, 3).expect("a valid network");
    assert!(Shared::new(&instance, volume, &bundle).is_none(), "every window has statistics of its own");
}
