// Weight gradients where x has one or two channels (the maths: conv3d_wgrad.cu): the network's first convolutions
// (1 -> 16 + 16, s = 2), the last transposed one (32 -> 2, so x is its dy) and the last convolution (2 -> 2, 96^3).
//
// wgrad_gather: a GEMM with M = 27 taps x channels of x (27 of 32, 54 of 64), N = 32 channels of dy, K = voxels. x lies in
// shared memory as it is stored; the fragments of its unfolded matrix are gathered from there number by number, 2
// numbers a register, so nothing is unfolded in memory. A warp takes every 8th group of 16 voxels along w.
// Bound on an H100, 8 patches of 96^3 (estimates): HBM, 71 MB = 25 us (1 -> 16 + 16), 85 MB = 30 us (32 -> 2); the gathers
// and mma of a group are about 80 instructions a warp, 5 us in all.
//
// wgrad_pair (2 -> 2, s = 1): plain FFMA. A thread owns a column of voxels along d and all 108 sums; the 27 x 2 floats
// around its voxel slide along in registers, so that a voxel costs 9 loads from shared memory. Planes of x come one by
// one, with what was pending, two in shared memory.
// Bound: 764 MFMA = 26 us, HBM 57 MB = 20 us. Rejected: wgrad_gather with N = 8 (32 gathers for 4 mma, 115 us); planes by
// channel, M = 9 (kd, kh) x 2, N = 3 kw x 2: 2 mma for 16 voxels and 19 us of shared memory, but every tile transposed.
#include "wgrad.cuh"

constexpr u32 TAPS = 27, WARPS = 8, THREADS = WARPS * WARP;

// All channels of a voxel.
template <u32 C>
struct alignas(C * sizeof(elem)) Voxel {
  elem c[C];
};

// sums[m][n] += unfolded x^T dy over 16 voxels. Row m of the unfolded x is at `x` + at[m] for voxel 0, `along` further
// for each next one; `y` begins at voxel `y_at` of two planes.
template <u32 MT>
DEVICE void gather_step(float (&sums)[MT][4][4], const elem* x, const u32 (&at)[MT][2], u32 along,
                        const elem* const (&y)[2], u32 y_at) {
  u32 lane = threadIdx.x % WARP;
  if constexpr (sizeof(elem) == 2) {
    u32 b[2][4];
#pragma unroll
    for (u32 k = 0; k < 2; k++) ldmatrix_x4_trans(b[k], y[k] + address(y_at + lane % 16, lane / 16 * 8));
    u32 first = lane % 4 * 2 * along;
#pragma unroll
    for (u32 m = 0; m < MT; m++) {
      u32 a[4];
#pragma unroll
      for (u32 r = 0; r < 4; r++) {
        const u16* pair = (const u16*)x + at[m][r % 2] + first + r / 2 * 8 * along;
        a[r] = pair[0] | (u32)pair[along] << 16;
      }
#pragma unroll
      for (u32 n = 0; n < 4; n++) mma_m16n8k16(sums[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
  } else {
#pragma unroll 1
    for (u32 k = 0; k < 16; k++)
#pragma unroll
      for (u32 m = 0; m < MT; m++)
#pragma unroll
        for (u32 n = 0; n < 4; n++)
#pragma unroll
          for (u32 e = 0; e < 4; e++) {
            u32 o = n % 2 * 8 + lane % 4 * 2 + e % 2;
            sums[m][n][e] += to_f32(x[at[m][e / 2] + k * along]) * to_f32(y[n / 2][address(y_at + k, o)]);
          }
  }
}

template <u32 C, u32 S>
DEVICE void gather(const Sums& args, u8* memory) {
  constexpr u32 ROWS = TAPS * C, MT = (ROWS + 15) / 16, COLUMNS = 32;
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  Extent x_size{S * (args.tile.d - 1) + 3, S * (args.tile.h - 1) + 3, S * (args.tile.w - 1) + 3};
  // Rounded up to what keeps planes aligned.
  u32 x_len = (x_size.d * x_size.h * x_size.w * C + VECTOR - 1) / VECTOR * VECTOR;
  u32 y_plane = args.tile.d * args.tile.h * args.tile.w * CHUNK;
  u32 stage = x_len + 2 * y_plane;

  auto each_y = [&](u32 number, u32 which, auto&& visit) {
    Corner at = corner(args, number);
    auto place = [&](u32 d, u32 h, u32 w) { return (d * args.tile.h + h) * args.tile.w + w; };
#pragma unroll 1
    for (u32 k = 0; k < 2; k++) {
      Group group = group_of(args.y, blockIdx.z * 2 + k);
      const Operand& y = args.y[group.which];
      if (group.first >= y.channels) continue;
      elem* plane = (elem*)memory + which * stage + x_len + k * y_plane;
      Box box{at.sample, (i32)at.d, (i32)at.h, (i32)at.w, args.tile};
      visit(Load<decltype(place)>{y, group.first, args.y_volume, box, plane, place});
    }
  };
  auto load_x = [&](u32 number, u32 which) {
    Corner at = corner(args, number);
    Voxel<C>* to = (Voxel<C>*)((elem*)memory + which * stage);
    for (u32 row = warp; row < x_size.d * x_size.h; row += WARPS) {
      u32 d = at.d * S - 1 + row / x_size.h, h = at.h * S - 1 + row % x_size.h;  // -1 becomes too large
      bool row_inside = d < args.x_volume.d && h < args.x_volume.h;
      u64 start = (((u64)at.sample * args.x_volume.d + d) * args.x_volume.h + h) * args.x_volume.w;
#pragma unroll(sizeof(elem) == 2 ? 4 : 1)
      for (u32 i = lane; i < x_size.w; i += WARP) {
        u32 w = at.w * S - 1 + i;
        Voxel<C> v{};
        if (row_inside && w < args.x_volume.w) {
          v = args.x.data.template vector<Voxel<C>>((start + w) * C);
#pragma unroll
          for (u32 c = 0; c < C; c++) v.c[c] = to_elem(apply(args.x.map, to_f32(v.c[c]), at.sample, c, C));
        }
        to[row * x_size.w + i] = v;
      }
    }
  };

  // Planes of channels that do not exist stay zero.
  for (u32 i = threadIdx.x; i < 2 * stage / VECTOR; i += THREADS) ((Word4*)memory)[i] = Word4{};
  __syncthreads();

  u32 at[MT][2];
#pragma unroll
  for (u32 m = 0; m < MT; m++)
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
      u32 row = min(m * 16 + r * 8 + lane / 4, ROWS - 1), tap = row / C;
      at[m][r] = ((tap / 9 * x_size.h + tap / 3 % 3) * x_size.w + tap % 3) * C + row % C;
    }

  float sums[MT][4][4] = {};
  u32 which = 0, groups = args.tile.w / 16;
  each_y(blockIdx.x, which, [](const auto& load) { load.start(); });
  cp_async_commit();
  load_x(blockIdx.x, which);
  for (u32 number = blockIdx.x; number < args.tile_count; number += gridDim.x, which ^= 1) {
    cp_async_wait<0>();
    each_y(number, which, [](const auto& load) { load.finish(); });
    __syncthreads();  // this tile is here, and nobody reads the one before it any more
    if (number + gridDim.x < args.tile_count) {
      each_y(number + gridDim.x, which ^ 1, [](const auto& load) { load.start(); });
      cp_async_commit();
      load_x(number + gridDim.x, which ^ 1);
    }
    const elem* x = (elem*)memory + which * stage;
    const elem* y[2] = {x + x_len, x + x_len + y_plane};
    for (u32 i = warp; i < args.tile.d * args.tile.h * groups; i += WARPS) {
      u32 row = i / groups, w = i % groups * 16, d = row / args.tile.h, h = row % args.tile.h;
      const elem* from = x + ((d * S * x_size.h + h * S) * x_size.w + w * S) * C;
      gather_step<MT>(sums, from, at, S * C, y, row * args.tile.w + w);
    }
  }

  // As in conv3d_wgrad.cu: the warps' sums are added one after the other and leave in dw's layout.
  float* dw = (float*)memory;  // [COLUMNS][ROWS]
  for (u32 p = 0; p < WARPS; p++) {
    __syncthreads();
    if (warp != p) continue;
#pragma unroll
    for (u32 m = 0; m < MT; m++)
#pragma unroll
      for (u32 n = 0; n < 4; n++)
#pragma unroll
        for (u32 e = 0; e < 4; e++) {
          u32 row = m * 16 + e / 2 * 8 + lane / 4, o = n * 8 + lane % 4 * 2 + e % 2;
          if (row >= ROWS) continue;
          float* sum = dw + o * ROWS + row % C * TAPS + row / C;
          *sum = sums[m][n][e] + (p ? *sum : 0.0f);
        }
  }
  __syncthreads();
  u64 out = (u64)blockIdx.x * (args.y[0].channels + args.y[1].channels) * ROWS;
  for (u32 o = warp; o < COLUMNS; o += WARPS) {
    Group group = group_of(args.y, blockIdx.z * 2 + o / CHUNK);
    if (group.first + o % CHUNK >= args.y[group.which].channels) continue;
    u64 to = out + (u64)(group.row + o % CHUNK) * ROWS;
    for (u32 i = lane; i < ROWS; i += WARP) args.partials.set(to + i, dw[o * ROWS + i]);
  }
}

#define GATHER(name, C, S)      \
  KERNEL(name, Sums, THREADS) { \
    SHARED(memory);             \
    gather<C, S>(args, memory); \
  }
GATHER(wgrad_gather_c1s1, 1, 1)
GATHER(wgrad_gather_c2s1, 2, 1)
GATHER(wgrad_gather_c1s2, 1, 2)
GATHER(wgrad_gather_c2s2, 2, 2)

struct Pair {
  float c[2];
};

// Reads voxels of two channels with what is pending on one sample.
struct PairReader {
  In<elem> data;
  Extent volume;
  u64 sample;  // its first voxel
  float scale[2], shift[2], slope;

  DEVICE_METHOD PairReader(const Operand& x, Extent volume, u32 n) : data(x.data), volume(volume) {
    sample = (u64)n * volume.d * volume.h * volume.w;
    slope = x.map.slope ? x.map.slope[0] : 1.0f;
#pragma unroll
    for (u32 c = 0; c < 2; c++) {
      u32 i = x.map.per_sample ? n * 2 + c : c;
      scale[c] = x.map.scale ? x.map.scale[i] : 1.0f;
      shift[c] = x.map.scale ? x.map.shift[i] : 0.0f;
    }
  }

  // Zero outside the volume; coordinates below 0 are too large as u32.
  DEVICE_METHOD Pair at(u32 d, u32 h, u32 w) const {
    if (d >= volume.d || h >= volume.h || w >= volume.w) return Pair{};
    auto v = data.vector<Voxel<2>>((sample + (d * volume.h + h) * volume.w + w) * 2);
    return {prelu(scale[0] * to_f32(v.c[0]) + shift[0], slope), prelu(scale[1] * to_f32(v.c[1]) + shift[1], slope)};
  }
};

// A block has tiles of 8 x 32 columns; tile.d is a multiple of 3, as the window's three planes change roles.
KERNEL(wgrad_pair, Sums, THREADS) {
  constexpr u32 H = WARPS, W = WARP, XH = H + 2, XW = W + 2, PLANE = XH * XW, SHARE = (PLANE + THREADS - 1) / THREADS;
  SHARED(memory);
  Pair* planes = (Pair*)memory;  // [2][XH][XW]
  u32 h = threadIdx.x / W, w = threadIdx.x % W;
  float sums[TAPS][2][2] = {};  // [tap][channel of x][channel of dy]
  for (u32 number = blockIdx.x; number < args.tile_count; number += gridDim.x) {
    Corner first = corner(args, number);
    PairReader x(args.x, args.x_volume, first.sample), dy(args.y[0], args.y_volume, first.sample);
    Pair window[3][9];  // planes d - 1, d, d + 1 in turn
    Pair next[SHARE];
    auto fetch = [&](u32 d) {
#pragma unroll
      for (u32 k = 0; k < SHARE; k++) {
        u32 i = threadIdx.x + k * THREADS;
        next[k] = x.at(i < PLANE ? d : args.x_volume.d, first.h - 1 + i / XW, first.w - 1 + i % XW);
      }
    };
    auto publish = [&](u32 which) {
#pragma unroll
      for (u32 k = 0; k < SHARE; k++) {
        u32 i = threadIdx.x + k * THREADS;
        if (i < PLANE) planes[which * PLANE + i] = next[k];
      }
    };
    auto read = [&](Pair(&plane)[9], u32 which) {
#pragma unroll
      for (u32 t = 0; t < 9; t++) plane[t] = planes[which * PLANE + (h + t / 3) * XW + w + t % 3];
    };
    __syncthreads();  // the tile before has been read
    fetch(first.d - 1);
    publish(0);
    fetch(first.d);
    publish(1);
    __syncthreads();
    read(window[0], 0);
    read(window[1], 1);
    __syncthreads();
    fetch(first.d + 1);
    Pair g = dy.at(first.d, first.h + h, first.w + w);
    for (u32 d = first.d; d < first.d + args.tile.d; d += 3) {
#pragma unroll
      for (u32 r = 0; r < 3; r++) {
        // Its last readers were two planes ago: one barrier is enough.
        u32 which = (d + r) % 2;
        publish(which);
        __syncthreads();
        fetch(d + r + 2);
        Pair g_next = dy.at(d + r + 1, first.h + h, first.w + w);
        read(window[(r + 2) % 3], which);
#pragma unroll
        for (u32 tap = 0; tap < TAPS; tap++)
#pragma unroll
          for (u32 i = 0; i < 2; i++)
#pragma unroll
            for (u32 o = 0; o < 2; o++) sums[tap][i][o] += window[(r + tap / 9) % 3][tap % 9].c[i] * g.c[o];
        g = g_next;
      }
    }
  }
  float* warps = (float*)memory;  // [WARPS][108]
  __syncthreads();
#pragma unroll
  for (u32 tap = 0; tap < TAPS; tap++)
#pragma unroll
    for (u32 i = 0; i < 2; i++)
#pragma unroll
      for (u32 o = 0; o < 2; o++) {
        float sum = warp_sum(sums[tap][i][o]);
        if (w == 0) warps[h * 4 * TAPS + (o * 2 + i) * TAPS + tap] = sum;
      }
  __syncthreads();
  if (threadIdx.x >= 4 * TAPS) return;
  float sum = 0.0f;
  for (u32 k = 0; k < WARPS; k++) sum += warps[k * 4 * TAPS + threadIdx.x];
  args.partials.set((u64)blockIdx.x * 4 * TAPS + threadIdx.x, sum);
}
