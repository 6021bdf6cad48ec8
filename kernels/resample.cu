// From a scan's voxels to the network's grid, and from class probabilities back to a mask of the scan's voxels.
//
// Both are one resampling: torch's affine_grid and grid_sample (align_corners False, border padding) in float64, in the
// order of operations of src/data/resample.rs and without fused multiply-add, so that they are the CPU's bit for bit:
//
//   g_a = theta_a . (base_k, base_j, base_i, 1)              normalised source coordinate, axes a = i, j, k
//   x_a = clamp(((g_a + 1) n_a - 1) / 2, 0, n_a - 1)         source voxel on an axis of n_a voxels
//   y   = float(sum over the 8 neighbours, i slowest, of value (w_k w_j w_i))
//
// Where theta is diagonal the host has made x_a, unclamped, for each output index of an axis. Orientation is in the
// steps from voxel to voxel: axes here are RAS axes, whatever their order and sense in memory.
//
// resample_scan        value = float(raw slope + inter), not finite -> floor; y -> clamp((y - floor) / width, 0, 1)
// resample_foreground  box of y > 0 of each slab i, for the host to join: {first j, end j, first k, end k}
// resample_mask        value = (p0, p1), (1, 0) outside what a crop kept; mask = y1 > y0, so that a draw is 0
//
// A block makes 32 x 32 voxels of one slab: lanes run along the axis on which the source is contiguous while it
// reads, and along the one on which the result is while it writes; a tile in shared memory turns it between.
//
// A CT of 512 x 512 x 90 on 270 x 270 x 224, H100, estimates: scan 47 MB in, 33 MB out, 29 us at 2.8 TB/s; mask 130 MB
// in, 24 MB out, 55 us. A voxel of the scan takes 40 float64 operations at 64 a clock and SM (45 us) and 15 conversions
// between 32 and 64 bits at 16 (68 us, the bound); a voxel of the mask needs those of its coordinates only, 12 and 6,
// where no neighbour is organ. On sm_86, 89 and 120 both run at 2 a clock and SM: 2 to 4 ms for the scan.
// Rejected: float32 coordinates (not the CPU's bits; labels at half-way points fall elsewhere), interpolating p1 alone
// (differs where the channels round differently), a resident native-size float volume (94 MB more each way).
#include "ptx.cuh"

constexpr u32 TILE = 32, PITCH = TILE + 1, THREADS = 256, ROWS = THREADS / TILE;

struct Mapping {  // src/ops/resample/cuda.rs
  In<double> along;           // positions along i, then j, then k of the output
  double theta[3][4];         // rows and columns k, j, i
  u32 oblique;                // positions are normalised and go through theta; else they are source coordinates
  u32 out[3];                 // voxels of the output
  u32 grid[3];                // voxels of the source
  i32 start[3];               // the part of the source that is in memory: its first voxel ..
  u32 stored[3];              // .. and its size
  u32 from_first;             // elements; steps may be negative, sums wrap
  i32 from_step[3];
  u32 to_first;
  i32 to_step[3];
  u32 lane_axis, row_axis;    // axes of a tile; slabs are along the third
  u32 turn;                   // whether the result is contiguous along the tile's rows
};
static_assert(sizeof(Mapping) == 8 + 96 + 24 * 4, "keep in step with src/ops/resample/cuda.rs");

// The two source voxels around a coordinate on one axis.
struct Taps {
  u32 at[2];
  bool inside[2];
  double weight[2];
};

DEVICE Taps taps(const Mapping& map, u32 axis, double x) {
  x = fmin(fmax(x, 0.0), (double)(map.grid[axis] - 1));
  u32 low = (u32)x;
  Taps t;
  t.weight[0] = add_rn(add_rn((double)low, 1.0), -x);
  t.weight[1] = add_rn(x, -(double)low);
  for (u32 i = 0; i < 2; i++) {
    // A neighbour beyond the edge is not in memory, and has weight 0.
    u32 local = low + i - map.start[axis];
    t.inside[i] = local < map.stored[axis];
    t.at[i] = local * map.from_step[axis];
  }
  return t;
}

// Source coordinate on an axis of a normalised output position (i, j, k).
DEVICE double through_theta(const Mapping& map, u32 axis, const double (&base)[3]) {
  const double(&t)[4] = map.theta[2 - axis];
  double g = add_rn(add_rn(add_rn(mul_rn(t[0], base[2]), mul_rn(t[1], base[1])), mul_rn(t[2], base[0])), t[3]);
  return mul_rn(add_rn(mul_rn(add_rn(g, 1.0), map.grid[axis]), -1.0), 0.5);
}

// The source voxels around an output voxel.
struct Cell {
  Taps i, j, k;
};

DEVICE Cell cell(const Mapping& map, const u32 (&voxel)[3]) {
  double x[3] = {map.along[voxel[0]], map.along[map.out[0] + voxel[1]], map.along[map.out[0] + map.out[1] + voxel[2]]};
  if (map.oblique) {
    double base[3] = {x[0], x[1], x[2]};
    for (u32 axis = 0; axis < 3; axis++) x[axis] = through_theta(map, axis, base);
  }
  return {taps(map, 0, x[0]), taps(map, 1, x[1]), taps(map, 2, x[2])};
}

// Values of the eight neighbours, i slowest. `read(element)` reads a source voxel that is in memory.
template <class V, class Read>
DEVICE void neighbours(const Mapping& map, const Cell& at, V outside, Read read, V (&value)[8]) {
#pragma unroll
  for (u32 e = 0; e < 8; e++) {
    u32 a = e / 4, b = e / 2 % 2, c = e % 2;
    bool inside = at.i.inside[a] && at.j.inside[b] && at.k.inside[c];
    value[e] = inside ? read(map.from_first + at.i.at[a] + at.j.at[b] + at.k.at[c]) : outside;
  }
}

// Their weighted sum; `channel(value)` is the number that counts.
template <class V, class Channel>
DEVICE float weigh(const Cell& at, const V (&value)[8], Channel channel) {
  double sum = 0.0;
#pragma unroll
  for (u32 e = 0; e < 8; e++) {
    double weight = mul_rn(mul_rn(at.k.weight[e % 2], at.j.weight[e / 2 % 2]), at.i.weight[e / 4]);
    sum = add_rn(sum, mul_rn((double)channel(value[e]), weight));
  }
  return (float)sum;
}

// Output voxel (i, j, k) at a lane and row of this block's tile; false past the end.
DEVICE bool locate(const Mapping& map, u32 lane, u32 row, u32 (&voxel)[3]) {
  u32 lanes = map.out[map.lane_axis], rows = map.out[map.row_axis];
  u32 across = (lanes + TILE - 1) / TILE, down = (rows + TILE - 1) / TILE;
  lane += blockIdx.x % across * TILE;
  row += blockIdx.x / across % down * TILE;
  u32 slab = blockIdx.x / across / down;
#pragma unroll
  for (u32 axis = 0; axis < 3; axis++)
    voxel[axis] = axis == map.lane_axis ? lane : axis == map.row_axis ? row : slab;
  return lane < lanes && row < rows;
}

// Makes a tile of the output. `body.value(voxel)` computes a T of 4 bytes, `body.put(element, T)` writes it.
template <class T, class Body>
DEVICE void make_tile(const Body& body, T* tile) {
  const Mapping& map = body.map;
  u32 lane = threadIdx.x % TILE, first = threadIdx.x / TILE, voxel[3];
#pragma unroll 1
  for (u32 row = first; row < TILE; row += ROWS)
    if (locate(map, lane, row, voxel)) tile[row * PITCH + lane] = body.value(voxel);
  __syncthreads();
#pragma unroll 1
  for (u32 other = first; other < TILE; other += ROWS) {
    u32 l = map.turn ? other : lane, r = map.turn ? lane : other;
    if (!locate(map, l, r, voxel)) continue;
    u32 at = map.to_first;
    for (u32 axis = 0; axis < 3; axis++) at += voxel[axis] * map.to_step[axis];
    body.put(at, tile[r * PITCH + l]);
  }
}

struct Scan {  // src/ops/resample/cuda.rs
  Mapping map;
  In<i16> integers;  // as stored in the file; null: values are floats
  In<float> floats;
  double slope, inter;
  Out<elem> image;
  Out<float> exact;  // null: not wanted
  float floor, width;  // of the HU window

  DEVICE_METHOD float read(u32 at) const {
    if (!integers) {
      constexpr float LARGEST = 3.402823466e38f;
      float v = floats[at];
      return fabsf(v) <= LARGEST ? v : floor;
    }
    i16 v = integers[at];
    return slope == 1.0 && inter == 0.0 ? (float)v : (float)add_rn(mul_rn((double)v, slope), inter);
  }
  DEVICE_METHOD float value(const u32 (&voxel)[3]) const {
    Cell at = cell(map, voxel);
    float values[8];
    neighbours(map, at, 0.0f, [this](u32 element) { return read(element); }, values);
    float y = (weigh(at, values, [](float v) { return v; }) - floor) / width;
    return y < 0.0f ? 0.0f : y > 1.0f ? 1.0f : y;
  }
  DEVICE_METHOD void put(u32 at, float y) const {
    image.set(at, to_elem(y));
    if (exact) exact.set(at, y);
  }
};
static_assert(sizeof(Scan) == sizeof(Mapping) + 7 * 8, "keep in step with src/ops/resample/cuda.rs");

KERNEL(resample_scan, Scan, THREADS) {
  SHARED(memory);
  make_tile(args, (float*)memory);
}

struct alignas(8) Pair {
  float v[2];
};

struct Mask {  // src/ops/resample/cuda.rs
  Mapping map;
  In<float> probabilities;  // two a voxel
  Out<u8> mask;

  DEVICE_METHOD u32 value(const u32 (&voxel)[3]) const {
    Cell at = cell(map, voxel);
    Pair values[8];
    const Pair background = {{1.0f, 0.0f}};
    neighbours(
        map, at, background, [this](u32 element) { return probabilities.vector<Pair>((u64)element * 2); }, values);
    // Rounding keeps order and weights are not negative: without a neighbour of more p1 than p0, y1 > y0 cannot be.
    bool any = false;
    for (u32 e = 0; e < 8; e++) any |= values[e].v[1] > values[e].v[0];
    if (!any) return 0;
    float y0 = weigh(at, values, [](Pair p) { return p.v[0]; });
    float y1 = weigh(at, values, [](Pair p) { return p.v[1]; });
    return y1 > y0;
  }
  DEVICE_METHOD void put(u32 at, u32 y) const { mask.set(at, (u8)y); }
};
static_assert(sizeof(Mask) == sizeof(Mapping) + 2 * 8, "keep in step with src/ops/resample/cuda.rs");

KERNEL(resample_mask, Mask, THREADS) {
  SHARED(memory);
  make_tile(args, (u32*)memory);
}

struct Foreground {  // src/ops/resample/cuda.rs
  In<float> image;
  Out<u32> boxes;  // four a slab; end 0 where there is no foreground
  u32 rows, row_len;
};
static_assert(sizeof(Foreground) == 24, "keep in step with src/ops/resample/cuda.rs");

DEVICE void join(u32 (&box)[4], const u32 (&other)[4]) {
  for (u32 i = 0; i < 4; i += 2) {
    box[i] = min(box[i], other[i]);
    box[i + 1] = max(box[i + 1], other[i + 1]);
  }
}

KERNEL(resample_foreground, Foreground, THREADS) {
  SHARED(memory);
  u32(&of_warp)[ROWS][4] = *(u32(*)[ROWS][4])memory;
  u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u32 box[4] = {~0u, 0, ~0u, 0};
  for (u32 j = warp; j < args.rows; j += ROWS) {
    In<float> row = args.image.at(((u64)blockIdx.x * args.rows + j) * args.row_len);
    for (u32 k = lane; k < args.row_len; k += 32)
      if (row[k] > 0.0f) join(box, {j, j + 1, k, k + 1});
  }
  for (int offset = 16; offset > 0; offset >>= 1) {
    u32 other[4];
    for (u32 i = 0; i < 4; i++) other[i] = __shfl_xor_sync(0xffffffffu, box[i], offset);
    join(box, other);
  }
  if (lane == 0)
    for (u32 i = 0; i < 4; i++) of_warp[warp][i] = box[i];
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (u32 w = 1; w < ROWS; w++) join(box, of_warp[w]);
  args.boxes.vector((u64)blockIdx.x * 4, Word4{{box[0], box[1], box[2], box[3]}});
}
