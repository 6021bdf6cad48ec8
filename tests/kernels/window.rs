//! Sliding windows: the CPU's bits up to the softmax.

use crate::harness::{on_every_device, uniform};
use spleen_hpc::config::{Blend, Window};
use spleen_hpc::device::cuda::Cuda;
use spleen_hpc::infer::importance::importance_map;
use spleen_hpc::infer::predict::{argmax, softmax};
use spleen_hpc::infer::sliding_window::{Windows, axis_starts, sliding_window};
use spleen_hpc::ops::window::cuda::{Image, Tiling};
use spleen_hpc::tensor::{DevicePending, Shape, View};
use std::sync::Arc;

/// (volume, roi, overlap, windows a batch): rows of vectors and rows with a rest; volumes smaller than a window along
/// one, two, three axes; batches that end amid a row of windows.
const CASES: [([usize; 3], [usize; 3], f64, usize); 7] = [
    ([20, 24, 33], [16, 16, 16], 0.5, 4),
    ([20, 17, 40], [16, 16, 16], 0.25, 3),
    ([9, 30, 16], [16, 8, 24], 0.5, 5),
    ([5, 7, 9], [16, 16, 16], 0.5, 4),
    ([18, 6, 21], [8, 12, 10], 0.6, 2),
    ([13, 11, 12], [5, 7, 3], 0.0, 7),
    ([1, 1, 1], [8, 8, 8], 0.5, 1),
];

fn tiling(cuda: &Arc<Cuda>, shape: [usize; 3], config: &Window) -> Tiling {
    let starts = axis_starts(shape, config).map(|axis| axis.into_iter().map(|s| s as i32).collect());
    let weights = importance_map(config.roi, config.blend);
    let weights = (config.blend == Blend::Gaussian).then_some(&weights[..]);
    Tiling::new(cuda, shape, config.roi, starts, weights).unwrap()
}

/// Distance of two floats of one sign in representable numbers.
fn ulps(a: f32, b: f32) -> u32 {
    a.to_bits().abs_diff(b.to_bits())
}

fn check(cuda: &Arc<Cuda>, shape: [usize; 3], config: &Window) {
    let (p, case) = (cuda.precision(), format!("{shape:?} {config:?}"));
    // The volume is a box of a larger one whose other voxels nobody may see.
    let (start, whole) = ([2, 1, 3], [shape[0] + 3, shape[1] + 1, shape[2] + 8]);
    let all = uniform(p, 1, whole.iter().product());
    let mut volume = Vec::new();
    for d in start[0]..start[0] + shape[0] {
        for h in start[1]..start[1] + shape[1] {
            let row = (d * whole[1] + h) * whole[2] + start[2];
            volume.extend_from_slice(&all[row..row + shape[2]]);
        }
    }
    let data = cuda.act(all.len()).unwrap();
    data.upload(&all).unwrap();
    let image = Image { data, whole, start, shape };

    // Logits that differ from window to window, so that order and number of the windows matter.
    let each: usize = config.roi.iter().product();
    let logits = |first: usize, n: usize| uniform(p, 100 + first as u64, n * each * 2);
    let tiling = tiling(cuda, shape, config);
    let sums = tiling.zero_sums().unwrap();
    let mut predict = |windows: &[f32], n: usize, first: usize| {
        let got = tiling.gather(&image, first..first + n).unwrap();
        assert_eq!(got.data.download().unwrap(), windows, "{case}: windows from {first} on");
        let act = cuda.act(n * each * 2).unwrap();
        act.upload(&logits(first, n)).unwrap();
        tiling.blend(&View::plain(act, Shape::new(n, config.roi, 2)), first, &sums).unwrap();
        Ok(logits(first, n))
    };
    let mut want = sliding_window(&volume, shape, config, 2, &mut predict).unwrap();

    let weights = importance_map(config.roi, config.blend);
    let mut count = vec![0f32; volume.len()];
    for corner in Windows::new(shape, config).corners() {
        for (v, count) in count.iter_mut().enumerate() {
            let voxel = [v / (shape[1] * shape[2]), v / shape[2] % shape[1], v % shape[2]];
            let at: [isize; 3] = std::array::from_fn(|a| voxel[a] as isize - corner[a]);
            if (0..3).all(|a| (0..config.roi[a] as isize).contains(&at[a])) {
                let [d, h, w] = at.map(|v| v as usize);
                *count += weights[(d * config.roi[1] + h) * config.roi[2] + w];
            }
        }
    }
    for (i, sum) in sums.download().unwrap().into_iter().enumerate() {
        let got = sum / count[i / 2];
        assert_eq!(got.to_bits(), want[i].to_bits(), "{case} at {i}: {got} instead of {}", want[i]);
    }

    softmax(&mut want);
    let mask = tiling.argmax(&sums).unwrap().download().unwrap();
    tiling.softmax(&sums).unwrap();
    let got = sums.download().unwrap();
    for (i, (got, want)) in got.iter().zip(want.iter()).enumerate() {
        // The same operations but for expf, which libm rounds as good as correctly and CUDA to 1 ulp: a step of the
        // exponential, one of the sum and one of the quotient, each up to twice as large as one of the result's. On
        // the emulator, which shares libm, they are equal.
        assert!(ulps(*got, *want) <= 4, "{case} at {i}: {got} instead of {want}");
    }
    assert_eq!(mask, argmax(&got), "{case}");
}

#[test]
fn windows_are_gathered_blended_and_finished_like_on_the_cpu() {
    on_every_device(|cuda| {
        for (shape, roi, overlap, batch) in CASES {
            for blend in [Blend::Constant, Blend::Gaussian] {
                check(cuda, shape, &Window { roi, overlap, batch, blend });
            }
        }
    });
}

/// What is pending on the logits is applied, per channel and per (window, channel).
#[test]
fn pending_maps_are_applied_before_the_blend() {
    on_every_device(|cuda| {
        let roi = [4, 4, 8];
        let config = Window { roi, overlap: 0.5, batch: 3, blend: Blend::Constant };
        let tiling = tiling(cuda, [4, 4, 16], &config);
        let shape = Shape::new(3, roi, 2);
        let x = uniform(cuda.precision(), 5, shape.len());
        let data = cuda.act(x.len()).unwrap();
        data.upload(&x).unwrap();
        for per_sample in [false, true] {
            // Powers of two: the map is exact, contracted or not.
            let scale = [2.0f32, -0.5, 1.0, 4.0, 0.25, -1.0];
            let shift = [0.5f32, 3.0, -0.25, 0.0, 1.0, 2.0];
            let groups = if per_sample { 6 } else { 2 };
            let pending = DevicePending {
                scale: cuda.upload(&scale[..groups]).unwrap(),
                shift: cuda.upload(&shift[..groups]).unwrap(),
                slope: Some(cuda.upload(&[-0.5f32]).unwrap()),
                per_sample,
            };
            let logits = View { pending: Some(Arc::new(pending)), ..View::plain(data.clone(), shape) };
            let sums = tiling.zero_sums().unwrap();
            tiling.blend(&logits, 0, &sums).unwrap();
            let mut want = vec![0f32; 4 * 4 * 16 * 2];
            for (k, start) in [0, 4, 8].into_iter().enumerate() {
                for v in 0..4 * 4 * 8 * 2 {
                    let (row, w, c) = (v / 16, v / 2 % 8, v % 2);
                    let group = if per_sample { 2 * k + c } else { c };
                    let z = scale[group] * x[k * 256 + v] + shift[group];
                    want[(row * 16 + start + w) * 2 + c] += if z > 0.0 { z } else { -0.5 * z };
                }
            }
            assert_eq!(sums.download().unwrap(), want, "per sample: {per_sample}");
        }
    });
}

#[test]
fn what_does_not_fit_is_refused() {
    on_every_device(|cuda| {
        let config = Window { roi: [8; 3], overlap: 0.5, batch: 4, blend: Blend::Constant };
        let tiling = tiling(cuda, [8, 8, 12], &config);
        let sums = tiling.zero_sums().unwrap();
        let logits = |shape: Shape| View::plain(cuda.act(shape.len()).unwrap(), shape);
        for (shape, first) in
            [(Shape::new(1, [8; 3], 3), 0), (Shape::new(1, [8, 8, 7], 2), 0), (Shape::new(2, [8; 3], 2), 1)]
        {
            let err = tiling.blend(&logits(shape), first, &sums).unwrap_err().to_string();
            assert!(err.contains("[8, 8, 8] voxels and 2 channels"), "{err}");
        }
        let image = Image { data: cuda.act(512).unwrap(), whole: [8; 3], start: [0; 3], shape: [8; 3] };
        assert!(tiling.gather(&image, 0..1).is_err());
        let starts = [vec![0], vec![0], vec![0]];
        assert!(Tiling::new(cuda, [8; 3], [8; 3], starts, Some(&[1.0])).is_err());
    });
}
