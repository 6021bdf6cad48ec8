//! Where the elements of matrices lie in the registers of a warp, against the tables of the PTX ISA ("Matrix fragments
//! for mma.m16n8k16 with floating point type", "ldmatrix"), and bank conflicts.

use crate::{Data, Planted, device, kernel, launch};
use half::f16;
use spleen_hpc::device::cuda::emulated::Emulated;
use spleen_hpc::device::cuda::{Cuda, Precision};
use spleen_hpc::rng::Philox;
use std::sync::Arc;

fn pair(low: f16, high: f16) -> f32 {
    f32::from_bits(u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16)
}

#[test]
fn mma_multiplies_matrices_in_the_layout_of_the_isa() {
    let mut rng = Philox::new(1, 0);
    let mut draw =
        |len: usize| -> Vec<f16> { (0..len).map(|_| f16::from_f64(rng.range(-2.0, 2.0))).collect() };
    let (a, b, d) = (draw(16 * 16), draw(16 * 8), draw(16 * 8));
    // Row of a_i: groupID for 0 <= i < 2 or 4 <= i < 6, groupID + 8 otherwise; column: (threadID_in_group * 2) + (i & 1),
    // + 8 for i >= 4. Row of b_i: (threadID_in_group * 2) + (i & 1), + 8 for i >= 2; column: groupID. Row of c_i: groupID
    // for i < 2, + 8 otherwise; column: (threadID_in_group * 2) + (i & 1).
    let (mut fragments, mut sums) = (Vec::new(), Vec::new());
    for lane in 0..32 {
        let (group, thread) = (lane >> 2, lane % 4);
        let at_a = |i: usize| {
            let row = if i < 2 || (4..6).contains(&i) { group } else { group + 8 };
            a[row * 16 + thread * 2 + (i & 1) + if i >= 4 { 8 } else { 0 }]
        };
        let at_b = |i: usize| b[(thread * 2 + (i & 1) + if i >= 2 { 8 } else { 0 }) * 8 + group];
        fragments.extend([0, 2, 4, 6].map(|i| pair(at_a(i), at_a(i + 1))));
        fragments.extend([0, 2].map(|i| pair(at_b(i), at_b(i + 1))));
        sums.extend((0..4).map(|i| {
            let row = if i < 2 { group } else { group + 8 };
            (row, thread * 2 + (i & 1))
        }));
    }
    for seed in 0..3 {
        let cuda = device(seed);
        let data = Data::new(&cuda, 0).unwrap();
        let x = cuda.upload(&fragments).unwrap();
        let start: Vec<f32> = sums.iter().map(|(m, n)| d[m * 8 + n].to_f32()).collect();
        let y = cuda.upload(&start).unwrap();
        let args = Planted { x: x.read(), y: y.both(), ..data.args(0, 0) };
        cuda.launch(&kernel("planted_mma"), launch(1, 32, 0), &args).unwrap();
        for ((m, n), got) in sums.iter().zip(y.download().unwrap()) {
            let product = |k: usize| a[m * 16 + k].to_f64() * b[k * 8 + n].to_f64();
            let want = d[m * 8 + n].to_f64() + (0..16).map(product).sum::<f64>();
            assert!((f64::from(got) - want).abs() < 1e-5, "d[{m}][{n}] = {got}, not {want}");
        }
    }
}

#[test]
fn every_cpu_gives_the_same_bits() {
    assert!(spleen_hpc::device::cuda::emulated::mma_paths_agree());
}

/// x: rows of 8 numbers of 16 bits, each its own row and column.
fn rows() -> Vec<f32> {
    let element = |row: u32, column: u32| row << 8 | column;
    (0..32u32)
        .flat_map(|row| {
            (0..4).map(move |w| f32::from_bits(element(row, 2 * w) | element(row, 2 * w + 1) << 16))
        })
        .collect()
}

fn ldmatrix(cuda: &Arc<Cuda>, variant: u32, pitch: u32) -> Vec<u32> {
    let data = Data::new(cuda, 0).unwrap();
    let x = cuda.upload(&rows()).unwrap();
    let y = cuda.upload(&[0.0f32; 128]).unwrap();
    let args = Planted { x: x.read(), y: y.both(), ..data.args(pitch, variant) };
    cuda.launch(&kernel("planted_ldmatrix"), launch(1, 32, 32 * pitch), &args).unwrap();
    y.download().unwrap().into_iter().map(f32::to_bits).collect()
}

#[test]
fn ldmatrix_distributes_rows_as_the_isa_says() {
    // Thread T0 holds row 0, columns 0 and 1; T1 columns 2 and 3; .. T4 row 1, columns 0 and 1. Threads 8 m .. 8 m + 7 hold
    // the addresses of matrix m, which goes to register m. With .trans, rows and columns change places.
    for (variant, matrices, trans) in [(0, 4, false), (1, 4, true), (2, 2, false), (3, 2, true)] {
        for seed in 0..3 {
            let got = ldmatrix(&device(seed), variant, 16);
            for lane in 0..32 {
                for m in 0..matrices {
                    let element = |e: usize| {
                        let (row, column) = (lane / 4, lane % 4 * 2 + e);
                        let (row, column) = if trans { (column, row) } else { (row, column) };
                        ((8 * m + row) << 8 | column) as u32
                    };
                    let want = element(0) | element(1) << 16;
                    assert_eq!(got[4 * lane + m], want, "variant {variant} lane {lane} matrix {m}");
                }
            }
        }
    }
}

#[test]
fn bank_conflicts_of_ldmatrix_are_counted() {
    // Eight rows of 16 bytes fall into eight different groups of banks at a pitch of 16 or 48 bytes, into one at 128.
    for (pitch, wavefronts) in [(16, 4), (48, 4), (64, 16), (128, 32)] {
        let driver = Arc::new(Emulated::new(0));
        let cuda = Cuda::new(driver.clone(), Precision::Half);
        ldmatrix(&cuda, 0, pitch);
        assert_eq!(driver.bank_conflicts(), (4, wavefronts), "pitch {pitch}");
        assert_eq!(driver.bank_conflicts(), (0, 0), "read once");
    }
}
