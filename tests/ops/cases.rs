//! The layers that are compared.

use crate::layer::{Case, conv, transposed};

/// Odd sizes, sizes of one, thin and wide channels, block tails (33 = 32 + 1, 20 = 16 + 4), siblings and concats.
pub const CASES: &[Case] = &[
    conv([5, 6, 7], &[3], &[5], 3, 1),
    conv([5, 6, 7], &[3], &[4, 6], 3, 2),
    conv([1, 2, 1], &[2], &[2], 3, 1),
    conv([2, 1, 3], &[2], &[2], 3, 2),
    conv([4, 3, 37], &[2], &[2], 3, 1),
    conv([3, 2, 50], &[1], &[3], 3, 1),
    conv([2, 3, 100], &[2], &[2], 3, 1),
    conv([2, 2, 45], &[16], &[16], 3, 1),
    conv([2, 3, 27], &[32], &[48], 3, 1),
    conv([4, 4, 16], &[33], &[20], 3, 1),
    conv([3, 4, 13], &[16], &[16, 16], 3, 2),
    conv([9, 10, 12], &[1], &[16, 16], 3, 2),
    conv([3, 3, 3], &[40], &[64], 3, 1),
    conv([3, 5, 6], &[18], &[70], 1, 1),
    // Nine blocks of channels, and part of a tenth.
    conv([2, 3, 5], &[150], &[70], 1, 1),
    transposed([3, 4, 5], &[4], &[3]),
    transposed([2, 3, 4], &[5, 3], &[16]),
    transposed([2, 2, 20], &[16, 16], &[2]),
    transposed([1, 2, 35], &[16, 16], &[2]),
    transposed([2, 1, 17], &[3], &[3]),
    transposed([1, 1, 1], &[34], &[33]),
    // Fewer products (8 channels and more, H and W of two and more): block tails, siblings, a second slab of planes; and
    // volumes too flat for that.
    conv([13, 10, 9], &[25], &[24], 3, 1),
    conv([2, 9, 8], &[12], &[16, 9], 3, 1),
    conv([14, 42, 30], &[8], &[8], 3, 1),
    conv([3, 4, 6], &[9], &[70, 20], 3, 1),
    conv([3, 1, 20], &[33], &[20], 3, 1),
    // The same of bfloat16 (16 channels and more): several filters, of odd numbers of channels, more than 64 lanes, one tile, and
    // a second slab of planes.
    conv([3, 5, 6], &[17], &[16, 9], 3, 1),
    conv([3, 4, 6], &[33], &[70, 20], 3, 1),
    conv([1, 3, 9], &[23], &[16, 3, 13], 3, 1),
    conv([1, 2, 2], &[16], &[16], 3, 1),
    conv([14, 9, 10], &[16], &[16], 3, 1).alone(),
    // In cubes (32 channels and more): an odd number of planes, siblings, channels that fill no block, an even and an
    // odd number of lane blocks, one cube, a second slab of planes, long rows; and a single plane, which is not cut into cubes.
    conv([5, 6, 7], &[51], &[18, 33], 3, 1),
    conv([2, 2, 2], &[32], &[32], 3, 1).alone(),
    conv([27, 5, 6], &[32], &[48], 3, 1).alone(),
    conv([4, 9, 22], &[64], &[32], 3, 1).alone(),
    conv([2, 2, 101], &[32], &[33], 3, 1).alone(),
    conv([1, 6, 6], &[32], &[32], 3, 1),
    // Sums of gradients of weights so large that a task adds several slabs up; tiles too few for whole pairs of them.
    conv([1, 4, 6], &[160], &[144], 3, 1),
    conv([3, 4, 2], &[20], &[18], 3, 1),
    conv([2, 5, 5], &[16], &[17], 3, 1),
    // Of stride 2, one way or the other, in inference: odd and even sizes, siblings, concats, channels that fill no block, more than
    // 64 lanes, one tile, tiles that end beyond the volume, a second slab of planes and of rows; 8 channels in f32 alone.
    conv([3, 8, 8], &[16], &[16, 20], 3, 2),
    conv([4, 11, 8], &[18], &[33], 3, 2),
    conv([3, 4, 4], &[35], &[70], 3, 2).alone(),
    conv([3, 4, 26], &[18], &[33], 3, 2),
    conv([2, 26, 27], &[16], &[9, 8], 3, 2).alone(),
    conv([27, 16, 15], &[16], &[16], 3, 2).alone(),
    conv([24, 12, 96], &[16], &[16], 3, 2).alone(),
    conv([5, 12, 11], &[9], &[8], 3, 2),
    transposed([3, 4, 6], &[16, 20], &[16]),
    transposed([2, 4, 6], &[17], &[23]),
    transposed([2, 2, 13], &[16], &[16]),
    transposed([1, 13, 14], &[19], &[16]).alone(),
    transposed([1, 2, 2], &[16], &[70]),
    transposed([14, 6, 8], &[16], &[16]).alone(),
    transposed([1, 6, 171], &[75], &[16]).alone(),
    transposed([2, 4, 4], &[8], &[12]),
    // The same with anchors enough for a training step: siblings and concats, channels that fill no block, odd sizes, whose data
    // gradient is direct, a single plane of an odd number of tiles, more than 64 lanes, sums of several slabs.
    conv([10, 12, 16], &[18], &[16, 20], 3, 2),
    conv([9, 15, 15], &[17], &[33], 3, 2),
    conv([2, 20, 52], &[16], &[16], 3, 2).alone(),
    conv([6, 12, 16], &[16], &[70], 3, 2),
    conv([4, 16, 16], &[120], &[128], 3, 2),
    transposed([5, 8, 8], &[17, 16], &[18]),
    transposed([4, 9, 8], &[8], &[9]),
    // More tiles than tasks, the last ones clipped: neighbours share planes.
    conv([68, 37, 3], &[20], &[18], 3, 1),
    conv([68, 37, 17], &[3], &[2], 3, 1),
    conv([68, 37, 3], &[2], &[2], 3, 1),
    conv([70, 66, 3], &[17], &[5], 3, 2),
    transposed([38, 35, 2], &[3, 4], &[5]),
    transposed([38, 35, 17], &[3], &[2]),
    // An odd number of values; thin outputs of several groups of channels, 1, 3, 4 and 8 values an anchor; rows of one.
    conv([5, 7, 9], &[9], &[9], 3, 1).alone(),
    conv([2, 3, 37], &[5], &[4], 3, 1).alone(),
    conv([1, 3, 101], &[70], &[3], 3, 1).alone(),
    conv([3, 1, 37], &[33], &[1], 3, 1).alone(),
    transposed([1, 3, 37], &[40], &[1]).alone(),
    transposed([1, 3, 37], &[40], &[4]).alone(),
    conv([2, 3, 1], &[3], &[5], 3, 2),
    // One channel of stride 2: pairs of taps; rows of one, of an odd and of an even number of voxels.
    conv([3, 4, 1], &[1], &[3], 3, 2),
    conv([2, 5, 51], &[1], &[40], 3, 2),
    conv([5, 3, 32], &[1], &[4, 16], 3, 2),
];

/// Layers that fill tiles of AMX: whole and broken blocks of channels, rows shorter and longer than 16 voxels, both
/// strides, several sources, more channels than one halo tile holds.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub const AMX_CASES: &[Case] = &[
    conv([3, 4, 24], &[16], &[16], 3, 1),
    conv([2, 3, 50], &[16], &[32], 3, 1),
    conv([6, 6, 6], &[32], &[48], 3, 1),
    conv([5, 7, 9], &[20], &[18], 3, 1),
    conv([5, 6, 33], &[16], &[32, 32], 3, 2),
    conv([4, 4, 12], &[40], &[24], 3, 2),
    conv([3, 3, 4], &[160], &[16], 3, 1),
    conv([3, 5, 6], &[40], &[70], 1, 1),
    // Nine blocks of channels, and part of a tenth.
    conv([2, 3, 5], &[150], &[70], 1, 1),
    transposed([3, 3, 6], &[32, 32], &[16]),
    transposed([2, 3, 17], &[16, 24], &[33]),
    transposed([1, 1, 1], &[34], &[33]),
    transposed([2, 3, 5], &[16, 16], &[1]),
    transposed([3, 2, 19], &[16, 16], &[2]),
    transposed([2, 2, 6], &[40], &[4]),
    // Few outputs of more channels than a group.
    transposed([2, 2, 6], &[160], &[2]),
    conv([5, 6, 27], &[1], &[16, 16], 3, 2),
    conv([4, 3, 10], &[1], &[24], 3, 1),
    conv([4, 3, 9], &[2], &[18], 3, 1),
    transposed([2, 3, 14], &[16, 16], &[2]),
    conv([3, 4, 40], &[2], &[2], 3, 1),
    conv([2, 9, 21], &[2], &[1], 3, 1),
    // A single plane; columns of four planes of bands, then a plane by itself; columns of three planes and of two.
    conv([1, 5, 18], &[32], &[16], 3, 1),
    conv([9, 3, 17], &[2], &[2], 3, 1),
    conv([5, 4, 20], &[16], &[16], 3, 1),
    // Tiles along d that keep planes of the one before, of half-full blocks.
    conv([528, 2, 3], &[9], &[8], 3, 2),
    // The last tile of the data gradient has no output of the odd parity along d.
    conv([17, 3, 4], &[24], &[16], 3, 2),
    // Tiles in runs that share planes, channels that fill no block, whole tiles at either end.
    conv([64, 40, 3], &[20], &[18], 3, 1),
];
