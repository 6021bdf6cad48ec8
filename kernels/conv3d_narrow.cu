// 3D convolution, kernel 3, of one or two input channels: too few for a chunk of 16 to be worth its zeros.
//
//   y[o, n] = sum over taps t and channels c of x[o S + t - 1, c] w[t][c][n]       shapes as in kernels/conv3d.cuh
//
//   flat  S = 2, one source of 1 or 2 channels, up to two heads: the network's first unit (1 -> 16 + 16) and the data
//         gradient of its last transposed convolution (2 -> 16 + 16). k = tap C + c runs through 27 C numbers, padded to 32
//         or 64. A block computes 4 x 8 x 16 voxels x 32 channels; a warp has one h, 16 w, 4 d. Lanes gather their
//         elements of A from the tile in shared memory: 16 loads of 2 or 4 bytes a fragment row block, 4 us in all.
//   band  S = 1, 2 -> 2: the network's last convolution and its data gradient. Rows of A are 16 h; k = 8 neighbours
//         along w x 2 channels, n = 4 neighbours x 2 channels, and B is w[kw] where input - output = kw, a band: 9 mma
//         (kd, kh) for 64 outputs. A fragment serves kd = 0, 1, 2 of three outputs along d, as in kernels/conv3d.cuh; the
//         weights stay in 18 registers. A block computes 8 x 16 x 32 voxels, a warp 8 of the 32 along w.
//
// Bounds, 8 patches on an H100: 1 -> 16 + 16 to 48^3 25 us of HBM, 3 of mma; 2 -> 2 at 96^3 18 us of HBM, 7 of mma, 7 of
// shared memory, and about 13 of issue slots for loading (one voxel, not a vector, a thread: rows of a haloed tile start
// anywhere).
// Rejected: 2 -> 2 by FFMA (54 per output: 96 M a patch, 26 us at full rate for 8); as a flat product (4 mma of 8 columns
// for 16 voxels, six of eight columns empty, and 16 gathers for each: 31 us of shared memory).
#include "epilogue.cuh"

struct Conv3dNarrow {  // src/ops/conv3d/narrow.rs
  In<elem> x;
  Pending map;
  Head head[2];
  Filter filter[2];  // "flat" or "band"
  Volume in, out;
  u32 tiles_h, tiles_w;  // blocks along h and w
};
static_assert(sizeof(Conv3dNarrow) == 184, "keep in step with src/ops/conv3d/narrow.rs");

// The channels of one voxel.
template <int C>
struct alignas(C * sizeof(elem)) Cell {
  elem v[C];
};

// The haloed tile of a block, D x H x W cells, rows PITCH cells apart of which the last PITCH - W stay zero.
template <int C, int D, int H, int W, int PITCH>
struct CellTile {
  static constexpr u32 PLANE = H * PITCH;

  // Loads it with its map applied, zeros outside the volume; (d0, h0, w0) is its first voxel.
  DEVICE_MEMBER void load(Cell<C>* tile, const Conv3dNarrow& args, u32 n, u32 d0, u32 h0, u32 w0) {
    float scale[C], shift[C];
    bool mapped = (bool)args.map.scale;
    for (u32 c = 0; c < C; c++) {
      u32 i = args.map.per_sample ? n * C + c : c;
      scale[c] = mapped ? args.map.scale[i] : 1.0f;
      shift[c] = mapped ? args.map.shift[i] : 0.0f;
    }
    float slope = args.map.slope ? args.map.slope[0] : 1.0f;
    In<elem> x = args.x.at((u64)n * (args.in.d * args.in.h * args.in.w) * C);
#pragma unroll 4
    for (u32 i = threadIdx.x; i < D * PLANE; i += blockDim.x) {
      u32 column = i % PITCH, h = i / PITCH % H, d = i / PLANE;
      u32 voxel = column < W ? voxel_index(args.in, d0 + d, h0 + h, w0 + column) : NO_VOXEL;
      Cell<C> cell{};
      if (voxel != NO_VOXEL) {
        cell = x.template vector<Cell<C>>(voxel * C);
        if (mapped)
          for (u32 c = 0; c < C; c++) cell.v[c] = to_elem(prelu(scale[c] * to_f32(cell.v[c]) + shift[c], slope));
      }
      tile[i] = cell;
    }
  }
};

template <int C>
DEVICE void conv3d_flat(const Conv3dNarrow& args) {
  SHARED(shared);
  constexpr u32 MT = 4, ROWS = 8, COLUMNS = 16, G = 2;
  constexpr u32 H = 2 * ROWS + 1, W = 2 * COLUMNS + 1;
  typedef CellTile<C, 2 * MT + 1, H, W, W + 1> Tile;
  u32 tile_w = blockIdx.x % args.tiles_w, tile_h = blockIdx.x / args.tiles_w % args.tiles_h;
  u32 d0 = blockIdx.x / (args.tiles_w * args.tiles_h) * MT, h0 = tile_h * ROWS, w0 = tile_w * COLUMNS;
  u32 warp = threadIdx.x / 32, g = lane_id() / 4, t = lane_id() & 3;
  u32 groups = args.head[0].groups + args.head[1].groups, first_group = blockIdx.y * G;
  Cell<C>* tile = (Cell<C>*)shared;
  Tile::load(tile, args, blockIdx.z, 2 * d0 - 1, 2 * h0 - 1, 2 * w0 - 1);

  In<elem> w[G];  // first step of each group's weights
  u32 step_len[G];
#pragma unroll
  for (u32 i = 0; i < G; i++) {
    u32 group = min(first_group + i, groups - 1);
    const Filter& f = group >= args.head[0].groups ? args.filter[1] : args.filter[0];
    step_len[i] = f.tap_step();
    w[i] = f.taps(0, 1, group);
  }
  // Cells from a voxel's first tap to another. Padded taps have zero weights: they may read any cell.
  auto offset = [&](u32 tap) { return tap < 27 ? tap / 9 * Tile::PLANE + tap / 3 % 3 * (W + 1) + tap % 3 : 0; };
  Block acc[G][MT];
  for (u32 i = 0; i < G; i++)
    for (u32 m = 0; m < MT; m++) acc[i][m] = Block{};
  const Cell<C>* first = tile + 2 * warp * (W + 1) + 2 * g;
  constexpr u32 LOWER = 2 * 8, DEEPER = 2 * Tile::PLANE;  // cells to row g + 8, to the next voxel along d
#if ELEM == 16
  constexpr u32 STEPS = (27 * C + CHUNK - 1) / CHUNK;
  constexpr u32 PAIR = 2 / C;  // taps of two neighbouring k
  u32 taps[STEPS][2][PAIR];
  FragmentB weights[STEPS][G];
  for (u32 step = 0; step < STEPS; step++)
    for (u32 i = 0; i < G; i++) weights[step][i] = load_weights(w[i].at(step * step_len[i]));
  for (u32 step = 0; step < STEPS; step++)
    for (u32 upper = 0; upper < 2; upper++)
      for (u32 i = 0; i < PAIR; i++) taps[step][upper][i] = offset((step * 16 + upper * 8 + 2 * t) / C + i);
  __syncthreads();
#pragma unroll
  for (u32 m = 0; m < MT; m++)
#pragma unroll
    for (u32 step = 0; step < STEPS; step++) {
      FragmentA a;
      for (u32 r = 0; r < 4; r++) {
        const Cell<C>* row = first + m * DEEPER + (r & 1) * LOWER;
        const u32(&tap)[PAIR] = taps[step][r >> 1];
        h16 low = row[tap[0]].v[0], high = C == 2 ? row[tap[0]].v[C - 1] : row[tap[PAIR - 1]].v[0];
        a.r[r] = low.bits | (u32)high.bits << 16;
      }
      for (u32 i = 0; i < G; i++) multiply(acc[i][m], a, weights[step][i]);
    }
#else
  __syncthreads();
#pragma unroll 1
  for (u32 k = 0; k < 27 * C; k++) {
    const Cell<C>* cell = first + offset(k / C);
    Float4 weight[G];
    for (u32 i = 0; i < G; i++)
      weight[i] = w[i].template vector<Float4>(k / CHUNK * step_len[i] + k % CHUNK * GROUP + 4 * t);
    for (u32 m = 0; m < MT; m++)
      for (u32 e = 0; e < 8; e++) {
        float v = cell[m * DEEPER + (e >> 1 & 1) * LOWER].v[k % C];
        for (u32 i = 0; i < G; i++) acc[i][m].c[e >> 2][e & 3] += v * weight[i].v[(e >> 2) * 2 + (e & 1)];
      }
  }
#endif
  __syncthreads();
  auto voxel = [&](u32 m, u32 half) { return voxel_index(args.out, d0 + m, h0 + warp, w0 + g + 8 * half); };
  Position at{blockIdx.z, blockIdx.x, gridDim.x, warp, ROWS, 0, 1, first_group, true};
  epilogue(acc, args.head, groups, args.out.d * args.out.h * args.out.w, at, voxel, shared);
}

DEVICE void conv3d_band(const Conv3dNarrow& args) {
  SHARED(shared);
  constexpr u32 MT = 8, H = 18, W = 34, PITCH = 36;  // 16 rows of A: 9 times 16 bytes apart, in different banks
  constexpr u32 WINDOWS = 2;                         // of 4 outputs along w, a warp
  typedef CellTile<2, MT + 2, H, W, PITCH> Tile;
  u32 tile_w = blockIdx.x % args.tiles_w, tile_h = blockIdx.x / args.tiles_w % args.tiles_h;
  u32 d0 = blockIdx.x / (args.tiles_w * args.tiles_h) * MT, h0 = tile_h * 16, w0 = tile_w * 32;
  u32 warp = threadIdx.x / 32, g = lane_id() / 4, t = lane_id() & 3;
  Cell<2>* tile = (Cell<2>*)shared;
  Tile::load(tile, args, blockIdx.z, d0 - 1, h0 - 1, w0 - 1);

  // Lane 4 g + t: [2 half + channel] is voxel (d0 + m, h0 + g + 8 half, w0 + 8 warp + 4 window + t).
  float acc[MT][WINDOWS][4];
  for (u32 i = 0; i < MT * WINDOWS * 4; i++) acc[i / 4 / WINDOWS][i / 4 % WINDOWS][i % 4] = 0.0f;
#if ELEM == 16
  Word2 weights[3][3];  // [kh][kd]
  for (u32 kh = 0; kh < 3; kh++)
    for (u32 kd = 0; kd < 3; kd++)
      weights[kh][kd] = args.filter[0].w.vector<Word2>((kd * 3 + kh) * BLOCK_WEIGHTS + lane_id() * 8);
  __syncthreads();
  const Cell<2>* row = tile + (lane_id() & 15) * PITCH + 8 * warp + 4 * (lane_id() >> 4);
#pragma unroll
  for (u32 kh = 0; kh < 3; kh++)
#pragma unroll
    for (u32 d = 0; d < MT + 2; d++)
#pragma unroll
      for (u32 window = 0; window < WINDOWS; window++) {
        u32 a[4];
        ldmatrix_x4(a, row + d * Tile::PLANE + kh * PITCH + 4 * window);
#pragma unroll
        for (u32 kd = 0; kd < 3; kd++)
          if (d >= kd && d - kd < MT)
            mma_m16n8k16(acc[d - kd][window], a, weights[kh][kd].w[0], weights[kh][kd].w[1]);
      }
#else
  __syncthreads();
  const Cell<2>* first = tile + g * PITCH + 8 * warp + t;
#pragma unroll 1
  for (u32 tap = 0; tap < 27; tap++) {
    const Cell<2>* cell = first + tap / 9 * Tile::PLANE + tap / 3 % 3 * PITCH + tap % 3;
    float weight[2][2];
    for (u32 i = 0; i < 4; i++) weight[i >> 1][i & 1] = args.filter[0].w[tap * 4 + i];
#pragma unroll
    for (u32 m = 0; m < MT; m++)
      for (u32 window = 0; window < WINDOWS; window++)
        for (u32 half = 0; half < 2; half++) {
          Cell<2> x = cell[m * Tile::PLANE + half * 8 * PITCH + 4 * window];
          for (u32 e = 0; e < 2; e++)
            acc[m][window][2 * half + e] += x.v[0] * weight[0][e] + x.v[1] * weight[1][e];
        }
  }
#endif

  const Head& head = args.head[0];
  Out<elem> y = head.y.at((u64)blockIdx.z * (args.out.d * args.out.h * args.out.w) * 2);
  auto voxel = [&](u32 m, u32 window, u32 half, u32 w) {
    return voxel_index(args.out, d0 + m, h0 + g + 8 * half, w0 + 8 * warp + 4 * window + w);
  };
  float bias[2];
  for (u32 e = 0; e < 2; e++) bias[e] = head.bias ? head.bias[e] : 0.0f;
  u32 valid = 0;  // bit 4 m + 2 window + half
#pragma unroll
  for (u32 m = 0; m < MT; m++) {
    for (u32 i = 0; i < 4; i++) valid |= (voxel(m, i >> 1, i & 1, t) != NO_VOXEL) << (4 * m + i);
    for (u32 i = 0; i < 8; i++) {
      float& sum = acc[m][i >> 2][i & 3];
      sum = stored(sum + bias[i & 1]);
    }
#if ELEM == 16
    if (args.out.w % 4 == 0) {
      u32 r[4];
      for (u32 i = 0; i < 4; i++) r[i] = to_h16x2(acc[m][i >> 1][2 * (i & 1)], acc[m][i >> 1][2 * (i & 1) + 1]);
      transpose_quad(r);
      u32 line = voxel(m, t >> 1, t & 1, 0);
      if (line != NO_VOXEL) y.vector(line * 2, Word4{{r[0], r[1], r[2], r[3]}});
      continue;
    }
#endif
    for (u32 i = 0; i < 4; i++) {
      const float* pair = &acc[m][i >> 1][2 * (i & 1)];
      u32 one = voxel(m, i >> 1, i & 1, t);
      if (one != NO_VOXEL) y.vector(one * 2, Cell<2>{{to_elem(pair[0]), to_elem(pair[1])}});
    }
  }
  if (!head.stats) return;
  __syncthreads();
  Moments* all = (Moments*)shared;
#pragma unroll
  for (u32 e = 0; e < 2; e++) {
    Moments own = moments_of<MT * 4>(
        valid, [&](u32 i) { return acc[i >> 2][i >> 1 & 1][2 * (i & 1) + e]; }, warp_sum);
    if (lane_id() == 0) all[warp * GROUP + e] = own;
  }
  store_moments<1>(all, args.head, 1, Position{blockIdx.z, blockIdx.x, gridDim.x, warp, 4, 0, 1, 0, true});
}

KERNEL_RESIDENT(conv3d_flat1, Conv3dNarrow, 256, 2) { conv3d_flat<1>(args); }
KERNEL_RESIDENT(conv3d_flat2, Conv3dNarrow, 256, 2) { conv3d_flat<2>(args); }
KERNEL_RESIDENT(conv3d_band2, Conv3dNarrow, 128, ELEM == 16 ? 4 : 1) { conv3d_band(args); }
