// What the two tiled convolution kernels, kernels/conv3d.cuh and kernels/conv_transpose3d.cu, share besides the tile and
// the epilogue: their arguments, where a block and a warp stand, and the sum over warps that shared the taps.
#pragma once
#include "epilogue.cuh"

struct Convolution {  // src/ops/conv3d/tiled.rs
  Source source[2];
  Head head[2];
  Filter filter[2];
  Halo halo;
  Volume in, out;
  u32 tile_h, tile_w;    // voxels of a block that its warps hold; along d it is the kernel's own
  u32 tiles_h, tiles_w;  // blocks along h and w
  u32 warps_m;           // along the (h, w) plane, 16 voxels each
  u32 warps_n;           // along output channels
  u32 warps_k;           // share the taps of the same results
  u32 chunks;            // of both sources
  u32 buffer_bytes;      // of a haloed tile in shared memory; two of them where there are several chunks
  u32 unused;
};
static_assert(sizeof(Convolution) == 304, "keep in step with src/ops/conv3d/tiled.rs");

// Grid: tiles of a sample, slices of warps_n x GROUPS groups of output channels, samples.
struct Station {
  u32 d0, h0, w0;  // first voxel of the block
  u32 warp_m, warp_n, warp_k;
  u32 groups, first_group;  // of all heads; of the block
  Plane plane;

  template <int DEPTH, int GROUPS>
  DEVICE_MEMBER Station of(const Convolution& args) {
    Station s;
    u32 tile_w = blockIdx.x % args.tiles_w, tile_h = blockIdx.x / args.tiles_w % args.tiles_h;
    s.d0 = blockIdx.x / (args.tiles_w * args.tiles_h) * DEPTH;
    s.h0 = tile_h * args.tile_h;
    s.w0 = tile_w * args.tile_w;
    u32 warp = threadIdx.x / 32;
    s.warp_m = warp % args.warps_m;
    s.warp_n = warp / args.warps_m % args.warps_n;
    s.warp_k = warp / (args.warps_m * args.warps_n);
    s.groups = args.head[0].groups + args.head[1].groups;
    s.first_group = blockIdx.y * args.warps_n * GROUPS;
    s.plane = Plane{args.tile_h, args.tile_w, s.h0, s.w0, s.warp_m * 16};
    return s;
  }

  // The group whose weights this warp reads as its g-th: past the last one the last, and the results are dropped.
  template <int GROUPS>
  DEVICE_METHOD u32 group(u32 g) const {
    return min(first_group + warp_n * GROUPS + g, groups - 1);
  }

  DEVICE_METHOD Position position(const Convolution& args) const {
    return Position{blockIdx.z, blockIdx.x, gridDim.x, warp_m, args.warps_m, warp_n, args.warps_n, first_group,
                    warp_k == 0};
  }
};

// Adds up, in order, what the warps of one place have of the same results; the first of them has the sum. Ends with a
// barrier, as it begins: `shared` is free before and after. Called by all threads.
template <int G, int M>
DEVICE void sum_shared_taps(Block (&acc)[G][M], const Convolution& args, const Station& s, u8* shared) {
  __syncthreads();
  for (u32 k = 1; k < args.warps_k; k++) {
    Block* sums = (Block*)shared + (s.warp_n * args.warps_m + s.warp_m) * (G * M * 32) + lane_id();
    if (s.warp_k == k)
      for (u32 i = 0; i < G * M; i++) sums[i * 32] = acc[i / M][i % M];
    __syncthreads();
    if (s.warp_k == 0)
      for (u32 i = 0; i < G * M; i++)
        for (u32 e = 0; e < 8; e++) acc[i / M][i % M].c[e / 4][e % 4] += sums[i * 32].c[e / 4][e % 4];
    __syncthreads();
  }
}
