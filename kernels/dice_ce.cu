// Dice + cross entropy of two classes, fused with the softmax. Over the voxels of a group (the whole batch, or a sample),
// p = softmax(logits), g the one-hot label, K the number of (group, class) terms averaged:
//
//   I = sum p g,  D = sum p^q + sum g,  q = 2 if `squared` else 1
//   dice = mean of 1 - (2 I + s) / (D + s);   ce = mean over all voxels of -ln p[label];   loss = ld dice + lc ce
//   d loss / dp_c = a_c g_c + b_c p_c^(q-1) + (cross entropy),  a = -2 ld / (K (D + s)),  b = q ld (2 I + s) / (K (D + s)^2)
//   dl1 = -p0 p1 (dp0 - dp1) + lc (p1 - g1) / voxels,   dl0 = -dl1
//
// logits, dlogits [groups, voxels, 2] elem; labels [groups, voxels] u8, 0 or 1. A thread has 4 neighbouring voxels at a
// time (16 bytes of fp16 logits, 4 labels), or 1 where a group is no multiple of 4.
//   dice_ce_sums:     6 sums a block: f32 over a thread's voxels (36 of 8 x 96^3 on an H100) and over the block; the last
//                     block to arrive adds blocks in order in double and leaves the loss and (a, b) of each group.
//   dice_ce_backward: one voxel vector a thread; times the loss scale, then rounded.
// Softmax from e = exp(-|l1 - l0|), which cannot overflow: p = 1 / (1 + e) and e / (1 + e), -ln p = ln(1 + e) + max(-m, 0)
// for the label's margin m; p1 - g1 is never formed as a difference.
//
// Bound: 8 patches of 96^3 are 35 MB forward (13 us at 2.8 TB/s) and 64 MB backward (23 us). The forward pass has 48
// instructions a voxel, 11 us of an H100's issue slots: near its memory (estimates). Rejected: log1pf and IEEE
// division (84 instructions, and branches); the fast unit's log(1 + e), whose error of 1e-7 a voxel is not small beside a
// late cross entropy.
#include "vector.cuh"

constexpr int SUMS = 6;  // p0 where label 0; p1 where label 1; p0^q; p1^q; label; -ln p[label]

struct DiceCe {  // src/ops/dice_ce/cuda.rs
  In<elem> logits;
  In<u8> labels;
  InOut<float> partials;  // (groups, SUMS, blocks)
  InOut<u32> ticket;
  Out<float> values;  // loss, dice, ce
  Out<float> slopes;  // (groups, 4): a0, a1, b0, b1
  double lambda_dice, lambda_ce, smooth;
  u32 voxels, voxels_per_block;  // a group
  u32 squared, first_class;      // first_class: 1 leaves the background out of the Dice term
};
static_assert(sizeof(DiceCe) == 88, "keep in step with src/ops/dice_ce/cuda.rs");

struct DiceCeBackward {  // src/ops/dice_ce/cuda.rs
  In<elem> logits;
  In<u8> labels;
  In<float> slopes;
  In<float> scale;  // the loss scale, one value
  Out<elem> dlogits;
  float ce_weight;  // lc / voxels of the batch
  u32 voxels;       // a group
  u32 squared, unused;
};
static_assert(sizeof(DiceCeBackward) == 56, "keep in step with src/ops/dice_ce/cuda.rs");

struct Softmax {
  float p0, p1, e, x;  // x = l1 - l0, e = exp(-|x|)
};

DEVICE Softmax softmax(float l0, float l1) {
  float x = l1 - l0, e = expf(-fabsf(x)), large = reciprocal(1.0f + e), small = e * large;
  return x >= 0.0f ? Softmax{small, large, e, x} : Softmax{large, small, e, x};
}

// ln(1 + e) for e in [0, 1], to 2.5e-7 of itself: 2 artanh(e / (2 + e)), the series in s^2 <= 1/9 by its Chebyshev fit.
DEVICE float ln_one_plus(float e) {
  float s = e * reciprocal(2.0f + e), t = s * s;
  return 2.0f * s * ((((0.14087328f * t + 0.13980709f) * t + 0.20012426f) * t + 0.33333158f) * t + 1.0f);
}

// N voxels from voxel i on.
template <int N>
DEVICE void load_voxels(In<elem> from, In<u8> labels, u64 i, float (&logits)[2 * N], bool (&foreground)[N]) {
  if constexpr (N == 1) {
    for (int c = 0; c < 2; c++) logits[c] = to_f32(from[2 * i + c]);
    foreground[0] = labels[i] == 1;
  } else {
    static_assert(N == 4, "labels move as one word");
    load(from, 2 * i, logits);
    u32 four = labels.vector<Word1>(i).w[0];
    for (int v = 0; v < N; v++) foreground[v] = (four >> 8 * v & 0xff) == 1;
  }
}

// In the last block: partial sums to the loss and its slopes. totals (groups, SUMS) is shared memory.
DEVICE void finish(const DiceCe& args, double* totals) {
  u32 blocks = gridDim.x, groups = gridDim.y, lane = threadIdx.x % 32;
  for (u32 column = threadIdx.x / 32; column < groups * SUMS; column += blockDim.x / 32) {
    double sum = 0.0;
#pragma unroll 8
    for (u32 b = lane; b < blocks; b += 32) sum += args.partials[column * blocks + b];
    for (int offset = 16; offset > 0; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane == 0) totals[column] = sum;
  }
  __syncthreads();
  u32 classes = 2 - args.first_class;
  for (u32 i = threadIdx.x; i < groups * 2; i += blockDim.x) {
    u32 g = i / 2, c = i % 2;
    double* t = totals + g * SUMS;
    double overlap = 2.0 * t[c] + args.smooth, size = t[2 + c] + (c ? t[4] : args.voxels - t[4]) + args.smooth;
    double ratio = overlap / size, a = args.lambda_dice / (groups * classes * size);
    bool counts = c >= args.first_class;
    t[c] = counts ? 1.0 - ratio : 0.0;
    args.slopes.set(g * 4 + c, counts ? (float)(-2.0 * a) : 0.0f);
    args.slopes.set(g * 4 + 2 + c, counts ? (float)(args.squared ? 2.0 * a * ratio : a * ratio) : 0.0f);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  double dice = 0.0, ce = 0.0;
  for (u32 g = 0; g < groups; g++) {
    dice += totals[g * SUMS] + totals[g * SUMS + 1];
    ce += totals[g * SUMS + 5];
  }
  dice /= groups * classes;
  ce /= (double)args.voxels * groups;
  args.values.set(0, (float)(args.lambda_dice * dice + args.lambda_ce * ce));
  args.values.set(1, (float)dice);
  args.values.set(2, (float)ce);
}

template <int N>
DEVICE void dice_ce_sums(const DiceCe& args) {
  SHARED(shared);
  u32* flag = (u32*)shared;
  double* totals = (double*)(shared + 16);                          // (groups, SUMS)
  float* warps = (float*)(totals + gridDim.y * SUMS);               // (SUMS, warps)
  u32 g = blockIdx.y, end = min((blockIdx.x + 1) * args.voxels_per_block, args.voxels);
  float sum[SUMS] = {};
#pragma unroll 1
  for (u32 i = blockIdx.x * args.voxels_per_block + threadIdx.x * N; i < end; i += blockDim.x * N) {
    u64 at = (u64)g * args.voxels + i;
    float logits[2 * N];
    bool foreground[N];
    load_voxels(args.logits, args.labels, at, logits, foreground);
    for (int v = 0; v < N; v++) {
      Softmax s = softmax(logits[2 * v], logits[2 * v + 1]);
      float against = foreground[v] ? -s.x : s.x;  // minus the label's margin
      sum[0] += foreground[v] ? 0.0f : s.p0;
      sum[1] += foreground[v] ? s.p1 : 0.0f;
      sum[2] += args.squared ? s.p0 * s.p0 : s.p0;
      sum[3] += args.squared ? s.p1 * s.p1 : s.p1;
      sum[4] += foreground[v] ? 1.0f : 0.0f;
      sum[5] += ln_one_plus(s.e) + fmaxf(against, 0.0f);
    }
  }
  u32 warp = threadIdx.x / 32, count = blockDim.x / 32;
  for (int k = 0; k < SUMS; k++) {
    sum[k] = warp_sum(sum[k]);
    if (threadIdx.x % 32 == 0) warps[k * count + warp] = sum[k];
  }
  __syncthreads();
  if (threadIdx.x < SUMS) {
    float total = 0.0f;
    for (u32 w = 0; w < count; w++) total += warps[threadIdx.x * count + w];
    args.partials.set((g * SUMS + threadIdx.x) * gridDim.x + blockIdx.x, total);
  }
  if (last_block(args.ticket, gridDim.x * gridDim.y, flag)) finish(args, totals);
}

template <int N>
DEVICE void dice_ce_backward(const DiceCeBackward& args) {
  u32 g = blockIdx.y, i = (blockIdx.x * blockDim.x + threadIdx.x) * N;
  if (i >= args.voxels) return;
  u64 at = (u64)g * args.voxels + i;
  float logits[2 * N];
  bool foreground[N];
  load_voxels(args.logits, args.labels, at, logits, foreground);
  float scale = args.scale[0];
  float a0 = args.slopes[g * 4], a1 = args.slopes[g * 4 + 1];
  float b0 = args.slopes[g * 4 + 2], b1 = args.slopes[g * 4 + 3];
  for (int v = 0; v < N; v++) {
    Softmax s = softmax(logits[2 * v], logits[2 * v + 1]);
    float dp0 = b0 * (args.squared ? s.p0 : 1.0f) + (foreground[v] ? 0.0f : a0);
    float dp1 = b1 * (args.squared ? s.p1 : 1.0f) + (foreground[v] ? a1 : 0.0f);
    float dl1 = s.p0 * s.p1 * (dp1 - dp0) + args.ce_weight * (foreground[v] ? -s.p0 : s.p1);
    logits[2 * v] = -dl1 * scale;
    logits[2 * v + 1] = dl1 * scale;
  }
  if constexpr (N == 1)
    for (int c = 0; c < 2; c++) args.dlogits.set(2 * at + c, to_elem(logits[c]));
  else
    store(args.dlogits, 2 * at, logits);
}

KERNEL(dice_ce_sums, DiceCe, 512) { dice_ce_sums<4>(args); }
KERNEL(dice_ce_sums_scalar, DiceCe, 512) { dice_ce_sums<1>(args); }
KERNEL(dice_ce_backward, DiceCeBackward, 256) { dice_ce_backward<4>(args); }
KERNEL(dice_ce_backward_scalar, DiceCeBackward, 256) { dice_ce_backward<1>(args); }
