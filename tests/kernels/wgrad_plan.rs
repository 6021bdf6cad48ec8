//! Launch plans of the weight gradients: what the network's layers get at 8 patches of 96^3.

use spleen_hpc::device::cuda::{Info, Precision};
use spleen_hpc::ops::conv3d::cuda_thinwgrad::{is_thin, thin_plan};
use spleen_hpc::ops::conv3d::cuda_wgrad::{Problem, plan};

fn device(multiprocessors: u32, shared_kb: u32) -> Info {
    Info {
        name: "a GPU".into(),
        capability: (9, 0),
        multiprocessors,
        memory: 80 << 30,
        shared_per_block: shared_kb << 10,
    }
}

/// Every convolution of the network; for a transposed one x is its dy, and the y are its inputs.
fn network() -> Vec<Problem> {
    let layer = |kernel, stride, edge, x_channels, y_channels| Problem {
        kernel,
        stride,
        n: 8,
        space: if kernel == 1 { [1, 1, edge * edge * edge] } else { [edge; 3] },
        x_channels,
        y_channels,
    };
    vec![
        layer(3, 2, 48, 1, [16, 16]),
        layer(3, 1, 48, 16, [16, 0]),
        layer(3, 2, 24, 16, [32, 32]),
        layer(3, 1, 24, 32, [32, 0]),
        layer(3, 2, 12, 32, [64, 64]),
        layer(3, 1, 12, 64, [64, 0]),
        layer(3, 2, 6, 64, [128, 128]),
        layer(3, 1, 6, 128, [128, 0]),
        layer(3, 1, 6, 128, [256, 0]),
        layer(1, 1, 6, 128, [256, 0]),
        layer(3, 1, 6, 256, [256, 0]),
        layer(3, 2, 6, 64, [128, 256]),
        layer(3, 1, 12, 64, [64, 0]),
        layer(3, 2, 12, 32, [64, 64]),
        layer(3, 1, 24, 32, [32, 0]),
        layer(3, 2, 24, 16, [32, 32]),
        layer(3, 1, 48, 16, [16, 0]),
        layer(3, 2, 48, 2, [16, 16]),
        layer(3, 1, 96, 2, [2, 0]),
    ]
}

/// (tile, blocks, shared bytes, floats of partial results) of a problem.
fn planned(p: &Problem, info: &Info, precision: Precision) -> ([usize; 3], usize, usize, usize) {
    if is_thin(p) {
        let plan = thin_plan(p, info, precision);
        (plan.tile, plan.grid.iter().product(), plan.shared, plan.grid[0] * plan.partial)
    } else {
        let plan = plan(p, info, precision);
        (plan.tile, plan.grid.iter().product(), plan.shared, plan.grid[0] * plan.partial)
    }
}

#[test]
fn the_network_fills_an_h100_with_bounded_workspace() {
    let h100 = device(132, 227);
    let mut workspace = 0;
    for p in network() {
        let (tile, blocks, shared, partials) = planned(&p, &h100, Precision::Half);
        println!(
            "{p:?}: tile {tile:?}, {blocks} blocks, {} KB, {} KB of partials",
            shared >> 10,
            partials >> 8
        );
        assert!(blocks >= 64, "{p:?}: {blocks} blocks");
        workspace += partials * 4;
    }
    assert!(workspace <= 120 << 20, "{} MB", workspace >> 20);
}

#[test]
fn every_layer_fits_a_small_device() {
    for precision in [Precision::Half, Precision::Single] {
        for mut p in network() {
            // Patches as large as an inference window's layers, odd ones too.
            for scale in [1, 2] {
                p.space = p.space.map(|s| s * scale + scale - 1);
                let (tile, _, shared, _) = planned(&p, &device(46, 99), precision);
                assert!(shared <= 99 << 10, "{p:?} {precision:?}: tile {tile:?}, {shared} bytes");
            }
        }
    }
}
