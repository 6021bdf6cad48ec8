// Implicit matrix products over a tile of voxels: no im2col, neither in memory nor in registers.
//
// A block brings a tile of input voxels with its halo to shared memory, a chunk of channels at a time, and applies what
// is pending on them once. Every tap then sees the same tile through a shifted view: rows of A are voxels, and a row
// may start anywhere. B is the tap's weights, packed by kernels/conv3d_pack.cu in the order in which lanes want them and
// read through L1, where all blocks of a multiprocessor find them.
//
//   shared voxel    32 bytes: 16 fp16 or 8 float channels, two 16-byte halves. Half `i` of voxel v lies at
//                   32 v + 16 (i ^ (v >> 2 & 1)): eight voxels that differ mod 8 are then in eight different groups of
//                   banks, so a view is read without conflict when its rows differ mod 8 (plan.rs picks the pitch).
//   fragment        16 voxels x 16 output channels over one chunk: two mma.m16n8k16; for float the same ownership of
//                   results by plain FMA, so that everything around the product is one source.
#pragma once
#include "pending.cuh"

constexpr u32 VOXEL_BYTES = 32;
constexpr u32 CHUNK = VOXEL_BYTES / sizeof(elem);
constexpr u32 VECTOR = 16 / sizeof(elem);  // channels of a 16-byte vector: half a chunk
constexpr u32 GROUP = 16;                  // output channels of a fragment
constexpr u32 BLOCK_WEIGHTS = CHUNK * GROUP;

struct Volume {
  u32 d, h, w;
};

// One of up to two inputs that are concatenated along channels.
struct Source {  // src/ops/conv3d/args.rs
  In<elem> x;    // (N, D, H, W, channels)
  Pending map;
  u32 channels, chunks;
};

// Packed weights of a set of input chunks and output groups: [chunk][tap][group][BLOCK_WEIGHTS].
struct Filter {  // src/ops/conv3d/args.rs
  In<elem> w;
  u32 first_chunk, first_group, groups, unused;

  DEVICE_METHOD u32 tap_step() const { return groups * BLOCK_WEIGHTS; }
  DEVICE_METHOD In<elem> taps(u32 chunk, u32 taps, u32 group) const {
    return w.at((u64)(chunk - first_chunk) * taps * tap_step() + (group - first_group) * BLOCK_WEIGHTS);
  }
};

// The haloed tile: its extent, and where its voxels lie in shared memory.
struct Halo {  // src/ops/conv3d/args.rs
  u32 d, h, w;
  u32 pitch, plane;    // shared voxels from row to row, from plane to plane; `plane` is a multiple of 8
  u32 odd;             // stride 2: where the odd voxels of a row start, so that every second voxel is a neighbour
  u32 per_h, per_w;    // ceil(2^19 / extent), for quotient()
};

// i / extent for i < 4096 and extent < 128.
DEVICE u32 quotient(u32 i, u32 per) { return i * per >> 19; }

DEVICE u32 lane_id() { return threadIdx.x & 31; }

DEVICE u32 shared_at(u32 voxel, u32 half) { return voxel * VOXEL_BYTES + ((half ^ (voxel >> 2 & 1)) << 4); }

struct alignas(16) Float4 {
  float v[4];
};

// 16 bytes of channels as they are stored, and their values.
#if ELEM == 16
typedef Word4 Vector;
DEVICE void unpack(const Vector& v, float (&f)[VECTOR]) {
  for (u32 i = 0; i < 4; i++) {
    f[2 * i] = to_f32(h16{(u16)v.w[i]});
    f[2 * i + 1] = to_f32(h16{(u16)(v.w[i] >> 16)});
  }
}
DEVICE Vector pack(const float (&f)[VECTOR]) {
  Vector v;
  for (u32 i = 0; i < 4; i++) v.w[i] = to_h16x2(f[2 * i], f[2 * i + 1]);
  return v;
}
#else
typedef Float4 Vector;
DEVICE void unpack(const Vector& v, float (&f)[VECTOR]) {
  for (u32 i = 0; i < VECTOR; i++) f[i] = v.v[i];
}
DEVICE Vector pack(const float (&f)[VECTOR]) {
  Vector v;
  for (u32 i = 0; i < VECTOR; i++) v.v[i] = f[i];
  return v;
}
#endif

// The pending map of one vector of channels.
struct VectorMap {
  float scale[VECTOR], shift[VECTOR], slope;

  // Channels past the last one stay zero.
  DEVICE_METHOD void load(const Source& s, u32 n, u32 c) {
    u32 first = s.map.per_sample ? n * s.channels + c : c;
    bool whole = s.channels % VECTOR == 0 && c < s.channels;
#pragma unroll
    for (u32 i = 0; i < VECTOR; i += 4) {
      if (whole) {
        Float4 a = s.map.scale.vector<Float4>(first + i), b = s.map.shift.vector<Float4>(first + i);
        for (u32 j = 0; j < 4; j++) {
          scale[i + j] = a.v[j];
          shift[i + j] = b.v[j];
        }
      } else {
        for (u32 j = i; j < i + 4; j++) {
          scale[j] = c + j < s.channels ? s.map.scale[first + j] : 0.0f;
          shift[j] = c + j < s.channels ? s.map.shift[first + j] : 0.0f;
        }
      }
    }
    slope = s.map.slope ? s.map.slope[0] : 1.0f;
  }

  DEVICE_METHOD Vector operator()(const Vector& v) const {
    float f[VECTOR];
    unpack(v, f);
    for (u32 i = 0; i < VECTOR; i++) f[i] = prelu(scale[i] * f[i] + shift[i], slope);
    return pack(f);
  }
};

// Brings chunks of a haloed tile to shared memory. Even threads carry the first half of every voxel's chunk, odd ones
// the second, so a thread needs the map of one vector of channels only.
template <int STRIDE>
struct Loader {
  const Halo& halo;
  Volume volume;
  u32 n, d0, h0, w0;  // sample and first voxel of the haloed tile; "-1" wraps, and is then outside like any other

  struct Place {
    u32 at;     // in shared memory, bytes
    u32 voxel;  // of the sample
    bool inside;
  };

  DEVICE_METHOD u32 voxels() const { return halo.d * halo.h * halo.w; }

  DEVICE_METHOD Place place(u32 i) const {
    u32 row = quotient(i, halo.per_w), w = i - row * halo.w;
    u32 d = quotient(row, halo.per_h), h = row - d * halo.h;
    u32 column = STRIDE == 1 ? w : (w >> 1) + (w & 1) * halo.odd;
    u32 z = d0 + d, y = h0 + h, x = w0 + w;
    Place p;
    p.at = shared_at(d * halo.plane + h * halo.pitch + column, threadIdx.x & 1);
    p.voxel = (z * volume.h + y) * volume.w + x;
    p.inside = z < volume.d && y < volume.h && x < volume.w;
    return p;
  }

  DEVICE_METHOD In<elem> sample(const Source& s) const {
    return s.x.at((u64)n * (volume.d * volume.h * volume.w) * s.channels);
  }

  // Starts copying a chunk as it is stored; channels must fill whole vectors. Outside the volume there are zeros.
  DEVICE_METHOD void prefetch(u8* tile, const Source& s, u32 chunk) const {
    In<elem> x = sample(s);
    u32 c = chunk * CHUNK + (threadIdx.x & 1) * VECTOR;
    for (u32 i = threadIdx.x >> 1; i < voxels(); i += blockDim.x >> 1) {
      Place p = place(i);
      cp_async_16(tile + p.at, x, p.voxel * s.channels + c, p.inside && c < s.channels);
    }
  }

  DEVICE_METHOD Vector load(const Source& s, In<elem> x, u32 voxel, u32 c) const {
    u32 i = voxel * s.channels + c;
    if (s.channels % VECTOR == 0) return c < s.channels ? x.vector<Vector>(i) : Vector{};
    float f[VECTOR];
    for (u32 j = 0; j < VECTOR; j++) f[j] = c + j < s.channels ? to_f32(x[i + j]) : 0.0f;
    return pack(f);
  }

  // Leaves the chunk with its map applied, to be seen after a barrier: rewrites what this thread's own prefetch
  // brought, or loads it now.
  DEVICE_METHOD void complete(u8* tile, const Source& s, u32 chunk, bool prefetched) const {
    bool mapped = (bool)s.map.scale;
    if (prefetched && !mapped) return;
    In<elem> x = sample(s);
    u32 c = chunk * CHUNK + (threadIdx.x & 1) * VECTOR;
    VectorMap map;
    if (mapped) map.load(s, n, c);
    constexpr u32 BATCH = 2;  // loads under way together
    u32 step = blockDim.x >> 1;
    for (u32 first = threadIdx.x >> 1; first < voxels(); first += BATCH * step) {
      Place p[BATCH];
      Vector v[BATCH];
#pragma unroll
      for (u32 b = 0; b < BATCH; b++) {
        p[b] = place(first + b * step);
        v[b] = Vector{};
        if (first + b * step < voxels() && p[b].inside)
          v[b] = prefetched ? *(const Vector*)(tile + p[b].at) : load(s, x, p[b].voxel, c);
      }
#pragma unroll
      for (u32 b = 0; b < BATCH; b++) {
        if (mapped && p[b].inside) v[b] = map(v[b]);
        if (first + b * step < voxels()) *(Vector*)(tile + p[b].at) = v[b];
      }
    }
  }
};

constexpr u32 NO_VOXEL = 0xffffffffu;

DEVICE u32 voxel_index(const Volume& v, u32 d, u32 h, u32 w) {
  return d < v.d && h < v.h && w < v.w ? (d * v.h + h) * v.w + w : NO_VOXEL;
}

// The 16 voxels of a block's (h, w) plane that are a warp's rows of A, in the plane's order from `first` on. Rows past
// the plane's end are not voxels; they read the first one.
struct Plane {
  u32 tile_h, tile_w, h0, w0, first;

  template <int STRIDE>
  DEVICE_METHOD u32 shared_voxel(u32 row, const Halo& halo) const {
    u32 i = first + row < tile_h * tile_w ? first + row : 0;
    return i / tile_w * STRIDE * halo.pitch + i % tile_w;
  }
  // Where this lane's row g (half 0) or g + 8 (half 1) is in the volume; false if it is no voxel of the tile.
  DEVICE_METHOD bool locate(u32 half, u32* h, u32* w) const {
    u32 i = first + lane_id() / 4 + 8 * half;
    *h = h0 + i / tile_w;
    *w = w0 + i % tile_w;
    return i < tile_h * tile_w;
  }
};

// Walks over the chunks of both sources. Where there are several, the next one is on its way while one is multiplied, in
// two buffers; a single one goes through registers at once. Called by all threads of a block.
template <int STRIDE>
struct Pipeline {
  Loader<STRIDE> loader;
  const Source (&sources)[2];
  u32 chunks, buffer_bytes;
  u8* shared;

  DEVICE_METHOD bool second(u32 chunk) const { return chunk >= sources[0].chunks; }
  DEVICE_METHOD const Source& source(u32 chunk) const { return second(chunk) ? sources[1] : sources[0]; }
  DEVICE_METHOD u32 local(u32 chunk) const { return second(chunk) ? chunk - sources[0].chunks : chunk; }
  DEVICE_METHOD u8* buffer(u32 chunk) const { return shared + (chunk & 1) * buffer_bytes; }
  DEVICE_METHOD bool prefetched(u32 chunk) const { return chunks > 1 && source(chunk).channels % VECTOR == 0; }

  DEVICE_METHOD void prefetch(u32 chunk) const {
    if (chunk >= chunks) return;
    if (prefetched(chunk)) loader.prefetch(buffer(chunk), source(chunk), local(chunk));
    cp_async_commit();
  }
  // The tile of a chunk, once all threads have brought their part. `waiting` runs before they wait for each other.
  template <class F>
  DEVICE_METHOD const u8* tile(u32 chunk, F waiting) const {
    if (chunk == 0) prefetch(0);
    cp_async_wait<0>();
    loader.complete(buffer(chunk), source(chunk), local(chunk), prefetched(chunk));
    waiting();
    __syncthreads();  // now nobody reads the other buffer any more
    prefetch(chunk + 1);
    return buffer(chunk);
  }
};

// A thread's part of 16 voxels x 16 channels. Lane 4 g + t: [j][0], [j][1] are voxel g, [j][2], [j][3] voxel g + 8,
// channels 8 j + 2 t and 8 j + 2 t + 1.
struct Block {
  float c[2][4];
};

#if ELEM == 16
struct FragmentA {
  u32 r[4];
};
struct FragmentB {
  Word4 w;
};

// Which 16 voxels of the tile are the rows of A.
struct Rows {
  u32 voxel, half;  // of the row whose address this lane gives to ldmatrix

  // `voxel_of(row)` is the shared voxel of a row for the view that is not shifted.
  template <class F>
  DEVICE_MEMBER Rows of(F voxel_of) {
    return Rows{voxel_of(lane_id() & 15), lane_id() >> 4};
  }
  // The view shifted by `shift` voxels; `plane` is a multiple of 8 voxels away from the tile's start.
  DEVICE_METHOD FragmentA load(const u8* plane, u32 shift) const {
    FragmentA a;
    ldmatrix_x4(a.r, plane + shared_at(voxel + shift, half));
    return a;
  }
};

DEVICE FragmentB load_weights(In<elem> block) { return FragmentB{block.vector<Word4>(lane_id() * 8)}; }

DEVICE void multiply(Block& block, const FragmentA& a, const FragmentB& b) {
  mma_m16n8k16(block.c[0], a.r, b.w.w[0], b.w.w[1]);
  mma_m16n8k16(block.c[1], a.r, b.w.w[2], b.w.w[3]);
}
// Where the weights of channels 0..7 are zero.
DEVICE void multiply_upper(Block& block, const FragmentA& a, const FragmentB& b) {
  mma_m16n8k16(block.c[1], a.r, b.w.w[2], b.w.w[3]);
}
#else
// Both fragments come to registers in vectors before the first of their 64 products a lane. Loaded channel by channel, a
// warp would wait for memory eight times a fragment, and nothing else would run where the volume is small.
struct FragmentA {
  Float4 row[2][CHUNK / VECTOR];  // voxels g and g + 8
};
struct FragmentB {
  Float4 k[CHUNK];  // of an input channel: its weights for output channels 2 t, 2 t + 1, 2 t + 8, 2 t + 9
};

struct Rows {
  u32 voxel[2];

  template <class F>
  DEVICE_MEMBER Rows of(F voxel_of) {
    return Rows{{voxel_of(lane_id() >> 2), voxel_of((lane_id() >> 2) + 8)}};
  }
  DEVICE_METHOD FragmentA load(const u8* plane, u32 shift) const {
    FragmentA a;
    for (u32 r = 0; r < 2; r++)
      for (u32 half = 0; half < CHUNK / VECTOR; half++)
        a.row[r][half] = *(const Float4*)(plane + shared_at(voxel[r] + shift, half));
    return a;
  }
};

DEVICE FragmentB load_weights(In<elem> block) {
  FragmentB b;
  for (u32 k = 0; k < CHUNK; k++) b.k[k] = block.vector<Float4>(k * GROUP + (lane_id() & 3) * 4);
  return b;
}

// For output channels from 8 FIRST on. Summed apart and then added: thousands of products in one chain would leave twice
// torch's rounding error.
template <u32 FIRST>
DEVICE void multiply_from(Block& block, const FragmentA& a, const FragmentB& b) {
  for (u32 r = 0; r < 2; r++) {
    float sum[2][2] = {};
    for (u32 k = 0; k < CHUNK; k++)
      for (u32 j = FIRST; j < 2; j++)
        for (u32 e = 0; e < 2; e++) sum[j][e] += a.row[r][k / VECTOR].v[k % VECTOR] * b.k[k].v[2 * j + e];
    for (u32 j = FIRST; j < 2; j++)
      for (u32 e = 0; e < 2; e++) block.c[j][2 * r + e] += sum[j][e];
  }
}
DEVICE void multiply(Block& block, const FragmentA& a, const FragmentB& b) { multiply_from<0>(block, a, b); }
DEVICE void multiply_upper(Block& block, const FragmentA& a, const FragmentB& b) { multiply_from<1>(block, a, b); }
#endif
