// 3D convolution (fprop), and its data gradient where the stride is 1 (dgrad): an implicit matrix product.
//
//   fprop  y[o, n] = sum over taps t and channels c of x[o S + t - P, c] w[t][c][n],  P = (K - 1) / 2
//   dgrad  dx[i, n] = sum over t, c of dy[i + t - P, c] w'[t][c][n],  w' = w with the taps mirrored and the roles of its
//          channels swapped (kernels/conv3d_pack.cu): the same sum, so the same kernel. With two filters dy is their
//          concatenation. The data gradient for S = 2 is kernels/conv_transpose3d.cu; that of a transposed convolution
//          is the S = 2 convolution here, one head an input.
//
//   x   up to two sources, concatenated along channels, each with its pending norm and PReLU     (N, D, H, W, C)
//   y   up to two heads, concatenated along channels (a unit's convolution and its residual sibling read x once)
//   K S = 3 1, 3 2, 1 1; any number of channels: chunks are padded with zeros in shared memory and in the packed weights
//
// A block of the grid computes MT x tile_h x tile_w output voxels of one sample in a slice of warps_n x G groups of 16
// channels. Warps: warps_m along the (h, w) plane, 16 voxels each and MT deep; warps_n along channels; warps_k share the
// K^2 (h, w) taps and are summed at the end, which fills the machine where the volume is small. tile.cuh says how the
// tile is stored and read.
//
// A warp walks along d: the fragment of plane d' serves the taps kd = 0, 1, 2 of outputs d', d' - 1, d' - 2, so MT + 2
// instead of 3 MT fragments of A are read an (h, w) tap. 16 -> 16 (MT 8, G 1): 10 A (4 wavefronts of shared memory each)
// and 3 B (4 wavefronts of L1) for 48 mma, 1.1 wavefronts an mma against 1.55 cycles of the tensor core at 62 % of its
// peak; reading A for every tap would be 2.5 and bound by shared memory, 30 us instead of 21 for 8 x 16 x 48^3. (All that in
// fp16. In f32 the FMA units bound it, registers hold the weights of one kd, and a warp walks along d once for each.)
// Loads of the next chunk (cp.async) run behind the products of this one; a single chunk (C <= 16) is instead transformed
// on its way through registers, and other blocks of the multiprocessor compute meanwhile.
//
// Bounds, 8 patches on an H100: 16 -> 16 at 48^3 20 us of HBM, 21 of mma; 16 -> 32 + 32, S = 2: 25 and 10; 32 -> 32 at
// 24^3 5 and 10; 256 -> 256 at 6^3 10 of mma, 6 of L2.
// Rejected: im2col (27 times the traffic); the three kw taps packed into N = 48 with a shift-add afterwards (9 A
// fragments instead of 27, but a halo column more work, and the walk along d saves as much); weights in shared memory
// (13.8 KB a block to copy where L1 keeps them for all blocks).
//
// Together the instances would take twice as long to compile as any other file: they stand in several, which are compiled
// side by side.
#pragma once
#include "convolution.cuh"

template <int K, int S, int MT, int G>
DEVICE void conv3d(const Convolution& args) {
  SHARED(shared);
  constexpr u32 PLANES = (MT - 1) * S + K, P = (K - 1) / 2;
  Station at = Station::of<MT, G>(args);
  Loader<S> loader{args.halo, args.in, blockIdx.z, at.d0 * S - P, at.h0 * S - P, at.w0 * S - P};
  Pipeline<S> pipeline{loader, args.source, args.chunks, args.buffer_bytes, shared};
  Rows rows = Rows::of([&](u32 row) { return at.plane.shared_voxel<S>(row, args.halo); });

  Block acc[G][MT];
  for (u32 g = 0; g < G; g++)
    for (u32 m = 0; m < MT; m++) acc[g][m] = Block{};

  for (u32 chunk = 0; chunk < args.chunks; chunk++) {
    In<elem> w[G];
    u32 tap_step[G];
#pragma unroll
    for (u32 g = 0; g < G; g++) {
      u32 group = at.group<G>(g);
      const Filter& f = pipeline.second(chunk) || group >= args.head[0].groups ? args.filter[1] : args.filter[0];
      tap_step[g] = f.tap_step();
      w[g] = f.taps(chunk, K * K * K, group);
    }
    // The view of the tile that a tap of a plane sees.
    auto shift_of = [&](u32 tap) {
      u32 kh = tap / K, kw = tap % K;
      u32 column = S == 1 ? kw : (kw >> 1) + (kw & 1) * args.halo.odd;
      return kh * args.halo.pitch + column;
    };
#if ELEM == 16
    FragmentB next[K][G];
    auto load_taps = [&](u32 tap) {
#pragma unroll
      for (u32 kd = 0; kd < K; kd++)
#pragma unroll
        for (u32 g = 0; g < G; g++) next[kd][g] = load_weights(w[g].at((kd * K * K + tap) * tap_step[g]));
    };
    const u8* tile = pipeline.tile(chunk, [&] { load_taps(at.warp_k); });

#pragma unroll 1
    for (u32 tap = at.warp_k; tap < K * K; tap += args.warps_k) {
      FragmentB b[K][G];
#pragma unroll
      for (u32 kd = 0; kd < K; kd++)
#pragma unroll
        for (u32 g = 0; g < G; g++) b[kd][g] = next[kd][g];
      if (tap + args.warps_k < K * K) load_taps(tap + args.warps_k);
      u32 shift = shift_of(tap);
#pragma unroll
      for (u32 d = 0; d < PLANES; d++) {
        FragmentA a = rows.load(tile + d * args.halo.plane * VOXEL_BYTES, shift);
#pragma unroll
        for (u32 kd = 0; kd < K; kd++) {
          if (d < kd || (d - kd) % S != 0 || (d - kd) / S >= MT) continue;
#pragma unroll
          for (u32 g = 0; g < G; g++) multiply(acc[g][(d - kd) / S], a, b[kd][g]);
        }
      }
    }
#else
    // A warp has registers for the weights of one kd: it walks along d once for each.
    const u8* tile = pipeline.tile(chunk, [] {});
#pragma unroll 1
    for (u32 tap = at.warp_k; tap < K * K; tap += args.warps_k) {
      u32 shift = shift_of(tap);
#pragma unroll 1
      for (u32 kd = 0; kd < K; kd++) {
        FragmentB b[G];
#pragma unroll
        for (u32 g = 0; g < G; g++) b[g] = load_weights(w[g].at((kd * K * K + tap) * tap_step[g]));
#pragma unroll
        for (u32 m = 0; m < MT; m++) {
          FragmentA a = rows.load(tile + (m * S + kd) * args.halo.plane * VOXEL_BYTES, shift);
#pragma unroll
          for (u32 g = 0; g < G; g++) multiply(acc[g][m], a, b[g]);
        }
      }
    }
#endif
  }
  sum_shared_taps(acc, args, at, shared);

  auto voxel = [&](u32 m, u32 half) {
    u32 h, w;
    return at.plane.locate(half, &h, &w) ? voxel_index(args.out, at.d0 + m, h, w) : NO_VOXEL;
  };
  epilogue(acc, args.head, at.groups, args.out.d * args.out.h * args.out.w, at.position(args), voxel, shared);
}

// src/ops/conv3d/plan.rs lists all instances with their files, and has the limit of float: a thread takes more registers
// than larger blocks leave it.
#define CONV3D(name, threads, K, S, MT, G) \
  KERNEL_RESIDENT(name, Convolution, ELEM == 16 ? threads : 256, 1) { conv3d<K, S, MT, G>(args); }
