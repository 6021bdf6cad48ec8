// What the weight-gradient kernels share: activations in shared memory, in planes of sixteen channels.
//
// A plane holds one voxel after the other, 16 channels each (32 bytes of fp16, 64 of float). In every voxel whose
// number has bit 2 set the two halves of 8 channels change places: eight consecutive voxels then spread one half over
// all 32 banks, wherever they start, and an `ldmatrix` that reads them has no bank conflict.
#pragma once
#include "pending.cuh"

constexpr u32 WARP = 32;
constexpr u32 CHUNK = 16;                    // channels of a plane
constexpr u32 VECTOR = 16 / sizeof(elem);    // elements that move in one instruction

// Element of a plane that holds this voxel's channel.
DEVICE u32 address(u32 voxel, u32 channel) { return voxel * CHUNK + (channel ^ (voxel << 1 & 8)); }

// One activation as a kernel reads it.
struct Operand {  // src/ops/conv3d/wgrad_args.rs
  In<elem> data;  // (N, D, H, W, channels)
  Pending map;
  u32 channels, chunks;  // chunks: planes that hold the channels
};

// Where a group of sixteen output channels comes from, all groups of y[0] before those of y[1].
struct Group {
  u32 which, first;  // the y, and the channel in it
  u32 row;           // channel among those of both
};
DEVICE Group group_of(const Operand (&y)[2], u32 number) {
  bool second = number >= y[0].chunks;
  u32 first = (number - (second ? y[0].chunks : 0)) * CHUNK;
  return {second, first, (second ? y[0].channels : 0) + first};
}

struct Extent {
  u32 d, h, w;
};

// What every kernel is given: sums over the voxels of tiles of y, which the blocks of the grid's x axis share.
struct Sums {  // src/ops/conv3d/wgrad_args.rs
  Operand x;
  Operand y[2];          // y[1].chunks = 0: there is only one
  Out<float> partials;   // [splits][y channels][x channels][taps]
  Extent x_volume, y_volume;
  Extent tile, tiles;    // of output voxels; number of them along each axis
  u32 tile_count;        // over all samples
  u32 unused;
};
static_assert(sizeof(Sums) == 3 * sizeof(Operand) + 8 + 14 * 4, "keep in step with src/ops/conv3d/wgrad_args.rs");

// First voxel of a tile.
struct Corner {
  u32 sample, d, h, w;
};
DEVICE Corner corner(const Sums& sums, u32 number) {
  u32 w = number % sums.tiles.w;
  number /= sums.tiles.w;
  u32 h = number % sums.tiles.h;
  number /= sums.tiles.h;
  return {number / sums.tiles.d, number % sums.tiles.d * sums.tile.d, h * sums.tile.h, w * sums.tile.w};
}

// Voxels (d, h, w) .. (d, h, w) + size of one sample; those outside the volume are zero.
struct Box {
  u32 sample;
  i32 d, h, w;
  Extent size;
};

// Sixteen channels of a box on their way to a plane. `place(d, h, w)` is the voxel's number there.
template <class Place>
struct Load {
  const Operand& x;
  u32 first;  // channel
  Extent volume;
  Box box;
  elem* plane;
  Place place;

  // All threads: a warp takes rows along w, its lanes UNIT channels each.
  // visit(address in the plane, channel within the sixteen, whether it exists, its index in x).
  template <u32 UNIT, class Visit>
  DEVICE_METHOD void walk(Visit visit) const {
    constexpr u32 UNITS = CHUNK / UNIT;
    u32 lane = threadIdx.x % WARP;
    for (u32 row = threadIdx.x / WARP; row < box.size.d * box.size.h; row += blockDim.x / WARP) {
      u32 slice = row / box.size.h, line = row % box.size.h;
      u32 d = box.d + slice, h = box.h + line;  // negative ones become too large
      bool row_inside = d < volume.d && h < volume.h;
      u64 start = (((u64)box.sample * volume.d + d) * volume.h + h) * volume.w;
#pragma unroll(UNIT == 1 || sizeof(elem) == 4 ? 1 : 2)
      for (u32 i = lane; i < box.size.w * UNITS; i += WARP) {
        u32 column = i / UNITS, channel = i % UNITS * UNIT, w = box.w + column;
        bool inside = row_inside && w < volume.w && first + channel < x.channels;
        elem* to = plane + address(place(slice, line, column), channel);
        visit(to, channel, inside, (start + w) * x.channels + first + channel);
      }
    }
  }

  DEVICE_METHOD bool in_vectors() const { return x.channels % VECTOR == 0; }

  // Starts copying. Channels that cannot move in vectors are here when it returns, with what was pending.
  DEVICE_METHOD void start() const {
    if (in_vectors()) {
      walk<VECTOR>([&](elem* to, u32, bool inside, u64 i) { cp_async_16(to, x.data, i, inside); });
    } else {
      walk<1>([&](elem* to, u32 channel, bool inside, u64 i) {
        float v = inside ? apply(x.map, to_f32(x.data[i]), box.sample, first + channel, x.channels) : 0.0f;
        *to = to_elem(v);
      });
    }
  }

  // Applies what is pending to the vectors this thread copied, once they are here. Outside the volume zeros stay.
  DEVICE_METHOD void finish() const {
    if (!x.map.scale || !in_vectors()) return;
    u32 mine = first + threadIdx.x % WARP % (CHUNK / VECTOR) * VECTOR;  // the same channels in every step of the walk
    if (mine >= x.channels) return;
    float scale[VECTOR], shift[VECTOR], slope = x.map.slope ? x.map.slope[0] : 1.0f;
    u32 from = (x.map.per_sample ? box.sample * x.channels : 0) + mine;
#pragma unroll
    for (u32 k = 0; k < VECTOR; k++) scale[k] = x.map.scale[from + k], shift[k] = x.map.shift[from + k];
    walk<VECTOR>([&](elem* to, u32, bool inside, u64) {
      struct alignas(16) Vector {
        elem e[VECTOR];
      };
      if (!inside) return;
      Vector v = *(Vector*)to;
#pragma unroll
      for (u32 k = 0; k < VECTOR; k++) v.e[k] = to_elem(prelu(scale[k] * to_f32(v.e[k]) + shift[k], slope));
      *(Vector*)to = v;
    });
  }
};
