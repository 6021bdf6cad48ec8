// Weight gradients of the 3D convolution and of the transposed one.
//
//   conv3d            dw[o, i, t] += sum over samples and output voxels v of x[s v + t - p, i] dy[v, o]
//   conv_transpose3d  dw[i, o, t] += sum over samples and input voxels v of dy[2 v + t - 1, o] x[v, i]
//
// The second is the first with s = 2 where dy and x change places, down to the layout of dw, so one kernel serves both;
// its names are the convolution's. Kernel 3 with p = 1 and s = 1 or 2, kernel 1 with p = 0 and s = 1. There is one x, and
// one dy or two (a unit's filters; the inputs of a concatenation), each of them with a norm and PReLU pending or not.
//
// A GEMM with M = 16 input channels of one tap, N = 16 output channels, K = voxels. A block owns 16 input channels and
// COB x 16 output channels, and adds up its share of the tiles of voxels in registers: a warp has one kd, one 16 of
// output channels and every KS-th group of 16 voxels, with 9 (kh, kw) x 16 x 16 sums in 72 registers a lane.
//
// Both tiles lie in shared memory as planes of 16 channels (wgrad.cuh), rows along w behind each other. dy has the row
// pitch of x, with zeros in the gap: then "16 consecutive numbers of x, 16 consecutive ones of dy" is a step of K for
// every tap, whatever the tile's size, also across rows. The gap is one voxel if the tile is as wide as the volume, as
// the zero right of one row is the zero left of the next, else two.
//   s = 1: x of (kd, kh) is read once, and multiplied with dy moved by kw = 0, 1, 2: 6 ldmatrix for 18 mma.
//   s = 2: even and odd h and w lie apart, so that steps are consecutive again. x[2 v - 1] and x[2 v] of (kd, kh) are
//          read, dy and dy moved by one: kw = 0: odd dy, kw = 1: even dy, kw = 2: odd, moved. 8 ldmatrix for 18 mma.
// While one tile is multiplied the next one is copied (cp.async). A warp maps what it copied itself when it has done 1/2,
// 3/4 or all of its multiplications: the three warps of a scheduler do so in turn, and two keep the tensor cores busy.
//
// A block writes its sums once, in dw's layout, as one of `splits` partial results; wgrad_reduce adds these to dw in a
// fixed order. What a launch writes there is at most 4 bytes x splits x dw, about 4 MB (s = 1) or 7 MB (s = 2) at 132
// blocks.
//
// Bound on an H100, 16 -> 16 at 48^3, 8 patches (estimates from roofline.md's rates): mma 20 us, ldmatrix 18 us (one for
// 3 mma), HBM 20 us, L2 14 us with halos of 1.8, the map 4 us of issue slots.
// Rejected: 32 x 32 channels a block (110 KB of sums a block: 190 MB of partial results over the net); M = 16 taps x
// channels (a tap would need its own view of x, 2 mma for an ldmatrix); a ring of planes along d (saves 20 % of L2's
// bytes where blocks are short along d); stores in the order of fragments (the reduction would scatter).
// ELEM 32 multiplies the same tiles with FFMA, each lane for the outputs it would have of an mma.
#include "wgrad.cuh"

constexpr u32 WARPS = 12, THREADS = WARPS * WARP;

struct Wgrad {  // src/ops/conv3d/cuda_wgrad.rs
  Sums sums;
  u32 pitch;             // of a row of the tile, voxels
  u32 steps;             // groups of 16 voxels of a slice of the tile
  u32 x_plane, y_plane;  // voxels of a plane
};
static_assert(sizeof(Wgrad) == sizeof(Sums) + 4 * 4, "keep in step with src/ops/conv3d/cuda_wgrad.rs");

// How a tile of x lies in a plane, for kernel K and stride S, and which view of it meets which view of dy.
template <int K, int S>
struct Tile {
  // There are S views of x for one (kd, kh), and so many of dy:
  static constexpr u32 SHIFTS = K == 1 ? 1 : S == 1 ? 3 : 2;
  DEVICE_MEMBER u32 view(u32 kw) { return S == 2 && kw == 1; }
  DEVICE_MEMBER u32 shift(u32 kw) { return S == 2 ? kw / 2 : kw; }

  u32 rows, pitch;  // of output voxels

  DEVICE_METHOD Extent x_size(u32 depth) const { return {S * (depth - 1) + K, S * (rows - 1) + K, S * pitch}; }

  // Number in the plane of the box's voxel (d, h, w). With S = 2 a slice is: rows 0, 2, .. (the odd ones of x, as the
  // box begins at -1), their columns 0, 2, .. and then 1, 3, ..; then rows 1, 3, .. in the same way.
  DEVICE_METHOD u32 operator()(u32 d, u32 h, u32 w) const {
    if constexpr (S == 1) {
      return (d * (rows + K - 1) + h) * pitch + w;
    } else {
      u32 lines = h % 2 ? rows : rows + 1;
      return (d * (2 * rows + 1) + h % 2 * (rows + 1)) * 2 * pitch + (w % 2 * lines + h / 2) * pitch + w / 2;
    }
  }
};

// sums[kh][kw] += x^T dy over 16 voxels: `x` begins at voxel at[kh][view] of its plane, `y` at voxel `y_at` + shift.
template <int K, int S>
DEVICE void step(float (&sums)[K][K][2][4], const elem* x, const u32 (&at)[K][S], const elem* y, u32 y_at) {
  typedef Tile<K, S> T;
  u32 lane = threadIdx.x % WARP;
  if constexpr (sizeof(elem) == 2) {
    // Fragments of both come transposed: a plane has K (voxels) along its rows. Matrices of x: channels 0-7 and 8-15
    // of voxels 0-7, then of 8-15. Of dy: voxels 0-7 and 8-15 of channels 0-7, then of 8-15.
    u32 x_voxel = lane / 16 * 8 + lane % 8, x_channel = lane / 8 % 2 * 8;
    u32 y_voxel = y_at + lane % 16, y_channel = lane / 16 * 8;
    u32 b[T::SHIFTS][4];
#pragma unroll
    for (u32 s = 0; s < T::SHIFTS; s++)
      ldmatrix_x4_trans(b[s], y + address(y_voxel + T::SHIFTS - 1 - s, y_channel));
#pragma unroll
    for (u32 kh = 0; kh < K; kh++) {
      u32 a[S][4];
#pragma unroll
      for (u32 v = 0; v < S; v++) ldmatrix_x4_trans(a[v], x + address(at[kh][v] + x_voxel, x_channel));
#pragma unroll
      for (u32 kw = 0; kw < K; kw++)
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
          const u32(&dy)[4] = b[T::shift(kw)];
          mma_m16n8k16(sums[kh][kw][half], a[T::view(kw)], dy[2 * half], dy[2 * half + 1]);
        }
    }
  } else {
#pragma unroll 1
    for (u32 k = 0; k < 16; k++)
#pragma unroll
      for (u32 kh = 0; kh < K; kh++)
#pragma unroll
        for (u32 kw = 0; kw < K; kw++)
#pragma unroll
          for (u32 e = 0; e < 8; e++) {
            u32 i = lane / 4 + e / 2 % 2 * 8, o = e / 4 * 8 + lane % 4 * 2 + e % 2;
            float xv = to_f32(x[address(at[kh][T::view(kw)] + k, i)]);
            float yv = to_f32(y[address(y_at + k + T::SHIFTS - 1 - T::shift(kw), o)]);
            sums[kh][kw][e / 4][e % 4] += xv * yv;
          }
  }
}

template <int K, int S, int COB>
DEVICE void wgrad(const Wgrad& args, u8* memory) {
  constexpr u32 KS = WARPS / (K * COB), TAPS = K * K * K;
  static_assert(KS * K * COB == WARPS, "every warp has its part");
  typedef Tile<K, S> T;
  const Sums& all = args.sums;
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  u32 kd = warp % K, block_chunk = warp / K % COB, part = warp / (K * COB);
  const T tile{all.tile.h, args.pitch};
  u32 y_slice = args.steps * 16 + T::SHIFTS - 1;  // its first SHIFTS - 1 voxels are zero, as are all gaps
  u32 stage = (args.x_plane + COB * args.y_plane) * CHUNK;
  u32 x_first = blockIdx.y * CHUNK;

  for (u32 i = threadIdx.x; i < 2 * stage / VECTOR; i += THREADS) ((Word4*)memory)[i] = Word4{};
  __syncthreads();

  // The block's share of a tile, in one of two stages.
  auto each_load = [&](u32 number, u32 which, auto&& visit) {
    Corner at = corner(all, number);
    i32 d0 = at.d, h0 = at.h, w0 = at.w;
    elem* x_plane = (elem*)memory + which * stage;
    Box x_box{at.sample, S * d0 - K / 2, S * h0 - K / 2, S * w0 - K / 2, tile.x_size(all.tile.d)};
    visit(Load<T>{all.x, x_first, all.x_volume, x_box, x_plane, tile});
    auto place = [&](u32 d, u32 h, u32 w) { return d * y_slice + T::SHIFTS - 1 + h * args.pitch + w; };
#pragma unroll 1
    for (u32 k = 0; k < COB; k++) {
      Group group = group_of(all.y, blockIdx.z * COB + k);
      const Operand& y = all.y[group.which];
      if (group.first >= y.channels) continue;
      elem* y_plane = x_plane + (args.x_plane + k * args.y_plane) * CHUNK;
      Box y_box{at.sample, d0, h0, w0, all.tile};
      visit(Load<decltype(place)>{y, group.first, all.y_volume, y_box, y_plane, place});
    }
  };

  float sums[K][K][2][4] = {};
  u32 all_steps = (all.tile.d * args.steps - part + KS - 1) / KS;  // of this warp in a tile
  for (u32 which = 0, next = blockIdx.x; next < all.tile_count + gridDim.x; which ^= 1, next += gridDim.x) {
    // Stage `which` holds the tile before `next`, nothing at first; the other stage is free.
    bool more = next < all.tile_count;
    if (more) {
      each_load(next, which ^ 1, [](const auto& load) { load.start(); });
      cp_async_commit();
    }
    const elem* x = (elem*)memory + which * stage;
    const elem* y = x + (args.x_plane + block_chunk * args.y_plane) * CHUNK;
    u32 count = next == blockIdx.x ? 0 : all_steps, turn = count * (2 + warp / 4) / 4;
    for (u32 i = 0, d = 0, group = part;; i++, group += KS) {
      if (i == turn && more) {
        cp_async_wait<0>();
        each_load(next, which ^ 1, [](const auto& load) { load.finish(); });
      }
      if (i == count) break;
      for (; group >= args.steps; group -= args.steps) d++;
      u32 at[K][S];
#pragma unroll
      for (u32 kh = 0; kh < K; kh++)
#pragma unroll
        for (u32 v = 0; v < S; v++) at[kh][v] = tile(S * d + kd, kh, v) + group * 16;
      step<K, S>(sums, x, at, y, d * y_slice + group * 16);
    }
    __syncthreads();  // the next tile is here, and nobody reads this one any more
  }

  // The warps' sums go through shared memory: those of one output are added in the order of their parts, and leave in
  // dw's layout. The pitch of an output channel is 4 mod 16 words: the lanes of a warp write to 32 different banks.
  constexpr u32 PITCH = CHUNK * TAPS + 4;
  float* dw = (float*)memory;
  u32 x_count = min(CHUNK, all.x.channels - x_first) * TAPS, row = all.x.channels * TAPS;
  u64 out = (u64)blockIdx.x * (all.y[0].channels + all.y[1].channels) * row + x_first * TAPS;
#pragma unroll 1
  for (u32 k = 0; k < COB; k++) {
    for (u32 p = 0; p < KS; p++) {
      __syncthreads();
      if (block_chunk != k || part != p) continue;
#pragma unroll
      for (u32 kh = 0; kh < K; kh++)
#pragma unroll
        for (u32 kw = 0; kw < K; kw++)
#pragma unroll
          for (u32 e = 0; e < 8; e++) {
            u32 i = lane / 4 + e / 2 % 2 * 8, o = e / 4 * 8 + lane % 4 * 2 + e % 2;
            float* sum = dw + o * PITCH + i * TAPS + (kd * K + kh) * K + kw;
            *sum = sums[kh][kw][e / 4][e % 4] + (p ? *sum : 0.0f);
          }
    }
    __syncthreads();
    Group group = group_of(all.y, blockIdx.z * COB + k);
    for (u32 o = warp; o < CHUNK && group.first + o < all.y[group.which].channels; o += WARPS) {
      u64 to = out + (u64)(group.row + o) * row;
      for (u32 i = lane; i < x_count; i += WARP) all.partials.set(to + i, dw[o * PITCH + i]);
    }
  }
}

#define WGRAD(name, K, S, COB)    \
  KERNEL(name, Wgrad, THREADS) {  \
    SHARED(memory);               \
    wgrad<K, S, COB>(args, memory); \
  }
WGRAD(wgrad_k3s1, 3, 1, 1)
WGRAD(wgrad_k3s2, 3, 2, 2)
WGRAD(wgrad_k1s1, 1, 1, 2)

// dw += the sum of its partial results. A block has 256 / groups columns; group g adds up splits g, g + groups, ..,
// then the groups' sums are added in order.
struct Reduce {  // src/ops/conv3d/cuda_wgrad.rs
  In<float> partials;   // [splits][len]
  InOut<float> dw[2];   // the first `first_len` values, and the others
  u32 len, first_len;
  u32 splits, groups;   // groups: a power of two, at most 8
};
static_assert(sizeof(Reduce) == 24 + 16, "keep in step with src/ops/conv3d/cuda_wgrad.rs");

KERNEL(wgrad_reduce, Reduce, 256) {
  SHARED(memory);
  float* sums = (float*)memory;  // [groups][columns]
  u32 columns = 256 / args.groups, column = threadIdx.x % columns, group = threadIdx.x / columns;
  u32 i = blockIdx.x * columns + column;
  float sum = 0.0f;
  if (i < args.len) {
#pragma unroll 8
    for (u32 s = group; s < args.splits; s += args.groups) sum += args.partials[(u64)s * args.len + i];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (group > 0 || i >= args.len) return;
  for (u32 g = 1; g < args.groups; g++) sum += sums[g * columns + column];
  bool second = i >= args.first_len;
  InOut<float> dw = args.dw[second];
  u32 to = second ? i - args.first_len : i;
  dw.set(to, dw[to] + sum);
}
