// Training patches cut out of volumes that stay in device memory.
//
// Patch n is the box of `patch` voxels from spec.start on, of volume spec.case: image = volume + shift, label = label;
// voxels outside the volume are 0, so their image is `shift` (src/data/sampler.rs `cut`). Specs are read from device
// memory: a captured launch cuts other patches each time. No gradient.
//
// Volumes (D, H, W), C order, fp16 or f32 as they were cached, labels u8. Out: (N, D, H, W, 1) as activations, labels
// (N, D, H, W). One thread cuts 4 voxels in a row of w (1 where 4 does not divide the patch): patches begin anywhere,
// so loads are single voxels, coalesced over the warp; stores are 8 (f32: 16) and 4 bytes.
//
// Bound: memory. 6 bytes a voxel: 8 patches of 96^3 are 42 MB, 0.015 ms at 2.8 TB/s of an H100.
// Rejected: rows through shared memory with aligned 16-byte loads (the loads of a warp already touch whole sectors, and
// L1 serves their second to fourth use); cutting on the host (42 MB over the bus a step).
#include "ptx.cuh"

constexpr u32 THREADS = 256;  // src/ops/patch/cuda.rs

struct alignas(16) Case {  // src/ops/patch/cuda.rs
  In<u8> image;
  In<u8> label;
  u32 d, h, w;
  u32 image_bytes;  // of a voxel: 2 or 4
};
static_assert(sizeof(Case) == 32, "keep in step with src/ops/patch/cuda.rs");

struct Spec {  // src/ops/patch/mod.rs
  u32 volume;  // index of the case
  i32 start[3];  // negative where the volume is padded in front
  float shift;
};
static_assert(sizeof(Spec) == 20, "keep in step with src/ops/patch/mod.rs");

struct Cut {  // src/ops/patch/cuda.rs
  In<Case> cases;
  In<Spec> specs;
  Out<elem> image;
  Out<u8> label;
  u32 d, h, w;  // of a patch
  u32 unused;
};
static_assert(sizeof(Cut) == 48, "keep in step with src/ops/patch/cuda.rs");

template <u32 N>
struct alignas(N * sizeof(elem)) Elems {
  elem v[N];
};
template <u32 N>
struct alignas(N) Bytes {
  u8 v[N];
};

DEVICE float intensity(const Case& volume, u32 i) {
  const u8* image = volume.image.p;
  return volume.image_bytes == 2 ? to_f32(In<h16>{(const h16*)image}[i]) : In<float>{(const float*)image}[i];
}

template <u32 N>
DEVICE void cut(const Cut& args) {
  u32 columns = args.w / N, rows = args.d * args.h;
  u32 item = blockIdx.x * THREADS + threadIdx.x;
  if (item >= rows * columns) return;
  Spec spec = args.specs[blockIdx.y];
  Case volume = args.cases[spec.volume];
  u32 row = item / columns, column = item % columns * N;
  i32 d = spec.start[0] + (i32)(row / args.h), h = spec.start[1] + (i32)(row % args.h);
  i32 w = spec.start[2] + (i32)column;
  // As unsigned numbers negative ones are large.
  bool row_inside = (u32)d < volume.d && (u32)h < volume.h;
  u32 from = ((u32)d * volume.h + (u32)h) * volume.w + (u32)w;
  Elems<N> image;
  Bytes<N> label;
  for (u32 e = 0; e < N; e++) {
    bool inside = row_inside && (u32)w + e < volume.w;
    image.v[e] = to_elem(inside ? add_rn(intensity(volume, from + e), spec.shift) : spec.shift);
    label.v[e] = inside ? volume.label[from + e] : 0;
  }
  u64 to = ((u64)blockIdx.y * rows + row) * args.w + column;
  args.image.vector(to, image);
  args.label.vector(to, label);
}

KERNEL(patch_cut_4, Cut, THREADS) { cut<4>(args); }
KERNEL(patch_cut_1, Cut, THREADS) { cut<1>(args); }
