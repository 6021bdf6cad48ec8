// Weights for the convolution kernels, packed once a step from the f32 masters: rounded to storage, padded with zeros to
// whole chunks of input and groups of output channels, in the order in which the lanes of a warp take them.
//
//   out [chunk][tap][group][BLOCK_WEIGHTS]; a lane's weights of a block (float: of a k) are one 16-byte vector:
//   fp16   lane 4 g + t: for j = 0, 1: k = 2t, 2t + 1, 2t + 8, 2t + 9 of channel n = 8 j + g   (B of mma.m16n8k16)
//   float  a lane's of a k: [k][t] for n = 2t, 2t + 1, 2t + 8, 2t + 9
//
// Four layouts, by what a "tap" and the axes k and n of a block are:
//   taps      one block a tap (kernels/conv3d.cuh, kernels/conv_transpose3d.cu): k input, n output channels. dgrad: their
//             roles are swapped and, for stride 1, the taps mirrored.
//   flat      one or two input channels: k = tap C + c runs through all 27 taps (kernels/conv3d_narrow.cu)
//   band      2 -> 2 channels: one block a (kd, kh); k = 8 voxels of a row x 2 channels, n = 4 voxels x 2 channels, with
//             w[kw] where input voxel - output voxel = kw: a band (kernels/conv3d_narrow.cu). float: [tap][c][n].
//   parity    at most two output channels, transposed: one block an input offset (a, b, c) in {0, 1}^3; n is output
//             parity x channel: 8 pw + 4 pd + 2 ph + channel (kernels/conv_transpose3d.cu)
//
// One thread a packed weight; 5 M of them for the whole network, 20 MB read and 10 MB written a layout: 11 us of HBM.
#include "tile.cuh"

struct Pack {       // src/ops/conv3d/pack.rs
  In<float> w;      // the master: weight (k, n, tap) is element k k_step + n n_step + tap
  Out<elem> out;
  u32 k_step, n_step;
  u32 k[2], n[2];   // channels of the sources and of the heads; k[1] and n[1] may be 0
  u32 taps;         // of the master
  u32 mirrored;     // whether they are taken from last to first
  u32 blocks;       // "taps" of the packed layout
  u32 len;          // weights packed
};
static_assert(sizeof(Pack) == 56, "keep in step with src/ops/conv3d/pack.rs");

// A weight of the master, or none.
struct Weight {
  bool any;
  u32 k, n, tap;
};

// Channel `i` of padded pieces of `channels` channels each, in units of `unit`.
DEVICE bool piece_channel(const u32 (&channels)[2], u32 unit, u32 i, u32* channel) {
  u32 first = (channels[0] + unit - 1) / unit * unit;
  *channel = i < first ? i : channels[0] + (i - first);
  return i < first ? i < channels[0] : i - first < channels[1];
}

// `weight_of(chunk, tap, group, k, n)` says which weight of the master belongs to a place of a block.
template <class F>
DEVICE void pack_weights(const Pack& args, F weight_of) {
  u32 i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= args.len) return;
  u32 e = i % BLOCK_WEIGHTS, block = i / BLOCK_WEIGHTS;
#if ELEM == 16
  u32 lane = e / 8, j = e / 4 % 2, upper = e / 2 % 2;
  u32 k = 2 * (lane % 4) + 8 * upper + e % 2, n = 8 * j + lane / 4;
#else
  u32 k = e / GROUP, t = e / 4 % 4, n = 8 * (e / 2 % 2) + 2 * t + e % 2;
#endif
  u32 groups = (args.n[0] + GROUP - 1) / GROUP + (args.n[1] + GROUP - 1) / GROUP;
  Weight w = weight_of(block / groups / args.blocks, block / groups % args.blocks, block % groups, k, n);
  u32 tap = args.mirrored ? args.taps - 1 - w.tap : w.tap;
  args.out.set(i, to_elem(w.any ? args.w[(u64)w.k * args.k_step + w.n * args.n_step + tap] : 0.0f));
}

KERNEL(conv3d_pack_taps, Pack, 256) {
  pack_weights(args, [&](u32 chunk, u32 tap, u32 group, u32 k, u32 n) {
    Weight w{true, 0, 0, tap};
    w.any = piece_channel(args.k, CHUNK, chunk * CHUNK + k, &w.k) && piece_channel(args.n, GROUP, group * GROUP + n, &w.n);
    return w;
  });
}

KERNEL(conv3d_pack_flat, Pack, 256) {
  pack_weights(args, [&](u32 chunk, u32, u32 group, u32 k, u32 n) {
    u32 i = chunk * CHUNK + k;
    Weight w{true, i % args.k[0], 0, i / args.k[0]};
    w.any = w.tap < args.taps && piece_channel(args.n, GROUP, group * GROUP + n, &w.n);
    return w;
  });
}

KERNEL(conv3d_pack_parity, Pack, 256) {
  pack_weights(args, [&](u32 chunk, u32 offset, u32, u32 k, u32 n) {
    u32 parity = (n & 4) | (n & 2) | n >> 3;  // pd, ph, pw; an offset's bits are in the same order
    Weight w{true, 0, n & 1, 0};
    w.any = piece_channel(args.k, CHUNK, chunk * CHUNK + k, &w.k) && w.n < args.n[0] && (offset & ~parity) == 0;
    // Along one axis: output 2 i + p takes tap 1 of input i if p = 0, tap 2 of i and tap 0 of i + 1 if p = 1.
    for (u32 bit = 4; bit; bit >>= 1) w.tap = w.tap * 3 + (offset & bit ? 0 : parity & bit ? 2 : 1);
    return w;
  });
}

KERNEL(conv3d_pack_band, Pack, 256) {
#if ELEM == 16
  pack_weights(args, [&](u32, u32 row, u32, u32 k, u32 n) {
    u32 kw = k / 2 - n / 2;  // wraps where the input lies before the first tap
    return Weight{n < 8 && kw < 3, k % 2, n % 2, row * 3 + kw};
  });
#else
  u32 i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= args.len) return;
  u32 tap = args.mirrored ? args.taps - 1 - i / 4 : i / 4;
  args.out.set(i, args.w[i / 2 % 2 * args.k_step + i % 2 * args.n_step + tap]);
#endif
}
