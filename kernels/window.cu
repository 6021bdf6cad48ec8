// Sliding windows over a volume: gather, blend, and what the blend means.
//
//   blended(v) = sum_k w(v - s_k) logits_k(v - s_k) / sum_k w(v - s_k)    over the windows k that cover v, in order of k
//   p = softmax(blended)
//
// Windows are every combination of the first voxels s along the three axes, in C order; s is negative where a volume is
// smaller than the window and is read as if padded with 0. Sums are float32, product and sum rounded apart, and each
// voxel adds its windows in their order: src/infer/sliding_window.rs bit for bit, given the same logits.
//
// window_gather   volume -> (n, roi, 1); a thread writes 16 bytes along W, or one element at a time where W is no
//                 multiple of that
// window_blend    sums += w logits of a batch; a thread owns a voxel of the box around the batch's windows
// window_softmax  in place: sums -> probabilities; with `mask` the argmax instead, a draw is 0. The weights' sum is
//                 made again from the starts
//
// Bytes of a volume of 270 x 270 x 224 in 100 windows of 96^3, H100, estimates at 2.8 TB/s: gather 177 + 177 MB, 126 us;
// blend 354 MB of logits and 826 MB of sums read and written (a batch is a row of four windows), 0.42 ms, where the
// network takes 15; softmax 260 MB, 93 us.
// Rejected: a thread a voxel of the whole volume (25 batches times 16 M threads that look for a window), float atomics
// (order), a plane of weight sums kept in memory (65 MB read and written each batch).
#include "pending.cuh"

constexpr u32 THREADS = 256, CLASSES = 2;

struct Windows {  // src/ops/window/cuda.rs
  In<i32> starts;  // first voxels along D, then H, then W
  u32 count[3];    // windows along each axis
  u32 roi[3];
  u32 shape[3];    // the volume
  u32 first;       // number of the batch's first window
};
static_assert(sizeof(Windows) == 48, "keep in step with src/ops/window/cuda.rs");

struct Place {
  u32 d, h, w;
};

// First voxel of the k-th window of the batch. Unsigned: what lies before it wraps to beyond its end.
DEVICE Place corner(const Windows& a, u32 k) {
  u32 number = a.first + k;
  return {(u32)a.starts[number / a.count[2] / a.count[1]], (u32)a.starts[a.count[0] + number / a.count[2] % a.count[1]],
          (u32)a.starts[a.count[0] + a.count[1] + number % a.count[2]]};
}

// Voxel i, in C order, of a box that is `h` by `w` in its last axes.
DEVICE Place unravel(u32 i, u32 h, u32 w) { return {i / w / h, i / w % h, i % w}; }

struct Gather {  // src/ops/window/cuda.rs
  Windows windows;
  In<elem> image;
  Out<elem> batch;
  u32 slab, row;  // elements of the image from one d, one h to the next
  u64 first;      // element of voxel 0
};
static_assert(sizeof(Gather) == 48 + 16 + 16, "keep in step with src/ops/window/cuda.rs");

KERNEL(window_gather, Gather, THREADS) {
  constexpr u32 LEN = 16 / sizeof(elem);
  struct alignas(16) Vector {
    elem v[LEN];
  };
  const Windows& a = args.windows;
  u32 len = a.roi[2] % LEN ? 1 : LEN, per_row = a.roi[2] / len;
  u32 i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= a.roi[0] * a.roi[1] * per_row) return;
  Place in = unravel(i, a.roi[1], per_row), s = corner(a, blockIdx.y);
  u32 d = s.d + in.d, h = s.h + in.h, w = s.w + in.w * len;
  bool covered = d < a.shape[0] && h < a.shape[1];
  In<elem> row = args.image.at(args.first + (covered ? (u64)d * args.slab + (u64)h * args.row : 0));
  Vector values;
#pragma unroll
  for (u32 e = 0; e < LEN; e++) {
    bool inside = e < len && covered && w + e < a.shape[2];
    values.v[e] = inside ? row[w + e] : to_elem(0.0f);
  }
  u64 to = ((u64)blockIdx.y * a.roi[0] * a.roi[1] * per_row + i) * len;
  if (len == LEN) {
    args.batch.vector(to, values);
  } else {
    args.batch.set(to, values.v[0]);
  }
}

struct alignas(8) Pair {
  float v[CLASSES];
};
struct alignas(CLASSES * sizeof(elem)) StoredPair {
  elem v[CLASSES];
};

struct Blend {  // src/ops/window/cuda.rs
  Windows windows;
  In<elem> logits;    // (n, roi, 2)
  Pending map;
  In<float> weights;  // of a window's voxels; null: all 1
  InOut<float> sums;  // (D, H, W, 2)
  u32 n;
  u32 box_start[3], box_len[3];  // the windows' own, within the volume
  u32 unused;
};
static_assert(sizeof(Blend) == 48 + sizeof(Pending) + 24 + 32, "keep in step with src/ops/window/cuda.rs");

KERNEL(window_blend, Blend, THREADS) {
  const Windows& a = args.windows;
  u32 i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= args.box_len[0] * args.box_len[1] * args.box_len[2]) return;
  Place v = unravel(i, args.box_len[1], args.box_len[2]);
  v.d += args.box_start[0], v.h += args.box_start[1], v.w += args.box_start[2];
  u64 at = 2 * ((u64)(v.d * a.shape[1] + v.h) * a.shape[2] + v.w);
  u32 voxels = a.roi[0] * a.roi[1] * a.roi[2];
  Pair sum = args.sums.vector<Pair>(at);
  for (u32 k = 0; k < args.n; k++) {
    Place s = corner(a, k);
    u32 d = v.d - s.d, h = v.h - s.h, w = v.w - s.w;
    if (d >= a.roi[0] || h >= a.roi[1] || w >= a.roi[2]) continue;
    u32 in = (d * a.roi[1] + h) * a.roi[2] + w;
    float weight = args.weights ? args.weights[in] : 1.0f;
    StoredPair logits = args.logits.vector<StoredPair>(2 * ((u64)k * voxels + in));
    for (u32 c = 0; c < CLASSES; c++)
      sum.v[c] = add_rn(sum.v[c], mul_rn(apply(args.map, to_f32(logits.v[c]), k, c, CLASSES), weight));
  }
  args.sums.vector(at, sum);
}

struct Softmax {  // src/ops/window/cuda.rs
  Windows windows;
  In<float> weights;  // of a window's voxels; null: all 1
  InOut<float> sums;  // (D, H, W, 2)
  Out<u8> mask;       // null: probabilities are wanted
};
static_assert(sizeof(Softmax) == 48 + 24, "keep in step with src/ops/window/cuda.rs");

KERNEL(window_softmax, Softmax, THREADS) {
  const Windows& a = args.windows;
  u32 i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= a.shape[0] * a.shape[1] * a.shape[2]) return;
  Place v = unravel(i, a.shape[1], a.shape[2]);
  In<i32> along_h = a.starts.at(a.count[0]), along_w = along_h.at(a.count[1]);
  float total = 0.0f;
  for (u32 x = 0; x < a.count[0]; x++) {
    u32 d = v.d - a.starts[x];
    if (d >= a.roi[0]) continue;
    for (u32 y = 0; y < a.count[1]; y++) {
      u32 h = v.h - along_h[y];
      if (h >= a.roi[1]) continue;
      for (u32 z = 0; z < a.count[2]; z++) {
        u32 w = v.w - along_w[z];
        if (w < a.roi[2]) total += args.weights ? args.weights[(d * a.roi[1] + h) * a.roi[2] + w] : 1.0f;
      }
    }
  }
  Pair x = args.sums.vector<Pair>(2 * (u64)i);
  x.v[0] /= total, x.v[1] /= total;
  float top = fmaxf(x.v[0], x.v[1]);
  float exp0 = expf(x.v[0] - top), exp1 = expf(x.v[1] - top), sum = exp0 + exp1;
  Pair p = {{exp0 / sum, exp1 / sum}};
  if (args.mask) {
    args.mask.set(i, p.v[1] > p.v[0]);
  } else {
    args.sums.vector(2 * (u64)i, p);
  }
}
