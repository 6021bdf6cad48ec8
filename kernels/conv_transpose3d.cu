// Transposed 3D convolution, kernel 3, stride 2, padding 1, output padding 1 (fprop); the same kernel is the data gradient
// of a convolution of stride 2, whose sides may be odd.
//
//   fprop  y[2 i + t - 1, n] += sum over c of x[i, c] w[t][c][n]
//   dgrad  of y = conv(x) with S = 2: dx[2 o + t - 1, n] += sum over c of dy[o, c] w[t][n][c], dx as large as x was
//
//   x   up to two sources, concatenated along channels, each with its pending norm and PReLU     (N, D, H, W, C)
//   y   (N, 2 D, 2 H, 2 W, C'), or one less on an axis for the data gradient of an odd side
//
// Nothing is scattered and no zero is multiplied. Along an axis, output 2 i + p takes
//   p = 0: tap 1 of input i;   p = 1: tap 2 of input i and tap 0 of input i + 1,
// so input offset o in {0, 1} feeds parities p >= o, and offset (a, b, c) of a voxel feeds 8, 4, 4, 4, 2, 2, 2, 1 of its
// eight output parities: 27 products for eight outputs and 8 views of the tile instead of 27. A block owns
// MT x tile_h x tile_w anchor voxels i; a warp keeps all eight parities of its anchors in registers. They leave in whole
// 32-byte sectors; the two parities of w, which share a line, in stores that follow each other (narrow: in one store).
//
//   general    a slice of warps_n x 16 output channels; 8 parities x 16 channels = 64 sums a thread and anchor fragment.
//              Two warps can share the 27 taps of the same anchors, which fills the machine where the volume is small.
//              In fp16 a fragment of A serves offsets a = 0, 1 of anchors d', d' - 1. With MT = 2, a chunk takes 12 A and 27 B
//              (4 wavefronts each) for 108 mma: 1.4 wavefronts an mma against 1.55 cycles of the tensor core.
//   narrow     at most two output channels: the 8 parities x 2 channels are 16 columns of one fragment, whose weights are
//              zero where an offset feeds nothing; halves that are zero throughout are left out: 12 mma a chunk.
//
// Bounds, 8 patches on an H100: 32 -> 2 to 96^3 51 us of HBM; 64 -> 16 to 48^3 20 of HBM, 10 of mma. Shared memory 31 and 11.
// Rejected: one launch a parity (x read eight times); scatter with atomics (not deterministic, four times the stores).
#include "convolution.cuh"

// The tap that carries an input at offset `o` along an axis to output parity `p`.
DEVICE constexpr u32 tap_of(u32 o, u32 p) { return o ? 0 : p ? 2 : 1; }

// Two channels, the parities of w and the parity (pd, ph) = lane % 4 of a fragment: 4 values beside each other in y.
struct alignas(4 * sizeof(elem)) Pairs {
  elem v[2][2];  // [pw][channel]
};

// What happens to the sums of the narrow kernel: as epilogue() of epilogue.cuh, for its own order of columns.
template <int MT>
DEVICE void narrow_epilogue(Block (&acc)[MT], const Convolution& args, const Station& at, u8* scratch) {
  const Head& head = args.head[0];
  u32 channels = head.channels, t = lane_id() & 3;
  Out<elem> y = head.y.at((u64)blockIdx.z * (args.out.d * args.out.h * args.out.w) * channels);
  auto voxel = [&](u32 m, u32 half, u32 pw) {
    u32 h, w;
    bool inside = at.plane.locate(half, &h, &w);
    return inside ? voxel_index(args.out, 2 * (at.d0 + m) + (t >> 1), 2 * h + (t & 1), 2 * w + pw) : NO_VOXEL;
  };
  float bias[2];
  for (u32 e = 0; e < 2; e++) bias[e] = head.bias && e < channels ? head.bias[e] : 0.0f;
  u32 valid = 0;  // bit 4 m + 2 half + pw
#pragma unroll
  for (u32 m = 0; m < MT; m++)
    for (u32 half = 0; half < 2; half++) {
      u32 first = voxel(m, half, 0), second = voxel(m, half, 1);
      valid |= (first != NO_VOXEL) << (4 * m + 2 * half) | (second != NO_VOXEL) << (4 * m + 2 * half + 1);
      Pairs pairs;
      for (u32 pw = 0; pw < 2; pw++)
        for (u32 e = 0; e < 2; e++) {
          float& sum = acc[m].c[pw][2 * half + e];
          pairs.v[pw][e] = to_elem(sum + bias[e]);
          sum = to_f32(pairs.v[pw][e]);
        }
      if (channels == 2 && args.out.w % 2 == 0) {
        if (first != NO_VOXEL) y.vector(first * 2, pairs);
        continue;
      }
      for (u32 pw = 0; pw < 2; pw++)
        for (u32 e = 0; e < 2; e++) {
          u32 one = pw ? second : first;
          if (e < channels && one != NO_VOXEL) y.set(one * channels + e, pairs.v[pw][e]);
        }
    }
  if (!head.stats) return;
  Moments* all = (Moments*)scratch;
#pragma unroll
  for (u32 e = 0; e < 2; e++) {
    Moments own = moments_of<MT * 4>(valid, [&](u32 i) { return acc[i >> 2].c[i & 1][(i & 2) + e]; }, warp_sum);
    if (lane_id() == 0) all[at.warp_m * GROUP + e] = own;
  }
  store_moments<1>(all, args.head, 1, at.position(args));
}

template <int MT, bool NARROW>
DEVICE void conv_transpose3d(const Convolution& args) {
  SHARED(shared);
  Station at = Station::of<MT, 1>(args);
  Loader<1> loader{args.halo, args.in, blockIdx.z, at.d0, at.h0, at.w0};
  Pipeline<1> pipeline{loader, args.source, args.chunks, args.buffer_bytes, shared};
  Rows rows = Rows::of([&](u32 row) { return at.plane.shared_voxel<1>(row, args.halo); });

  constexpr u32 PARITIES = NARROW ? 1 : 8;  // blocks an anchor fragment
  Block acc[1][MT * PARITIES];
  for (u32 i = 0; i < MT * PARITIES; i++) acc[0][i] = Block{};

  for (u32 chunk = 0; chunk < args.chunks; chunk++) {
    const Filter& filter = pipeline.second(chunk) ? args.filter[1] : args.filter[0];
    In<elem> w = filter.taps(chunk, NARROW ? 8 : 27, at.group<1>(0));
    u32 step = filter.tap_step();
    const u8* tile = pipeline.tile(chunk, [] {});
    // Adds what the views of an offset give to every parity that it feeds.
    auto feed = [&](const FragmentA* views, u32 a, u32 b, u32 c) {
#pragma unroll
      for (u32 parity = 0; parity < 8; parity++) {
        u32 pd = parity >> 2, ph = parity >> 1 & 1, pw = parity & 1;
        if (a > pd || b > ph || c > pw) continue;
        u32 tap = (tap_of(a, pd) * 3 + tap_of(b, ph)) * 3 + tap_of(c, pw);
        FragmentB weights = load_weights(w.at(tap * step));
#pragma unroll
        for (u32 m = 0; m < MT; m++) multiply(acc[0][m * 8 + parity], views[m], weights);
      }
    };
#if ELEM == 16
#pragma unroll
    for (u32 b = 0; b < 2; b++)
#pragma unroll
      for (u32 c = 0; c < 2; c++) {
        // Two warps that share the taps take 12 + 3 and 6 + 6 of them.
        if (args.warps_k == 2 && (b ^ c) != at.warp_k) continue;
        FragmentA views[MT + 1];
#pragma unroll
        for (u32 d = 0; d <= MT; d++)
          views[d] = rows.load(tile + d * args.halo.plane * VOXEL_BYTES, b * args.halo.pitch + c);
#pragma unroll
        for (u32 a = 0; a < 2; a++) {
          if constexpr (NARROW) {
            FragmentB weights = load_weights(w.at((4 * a + 2 * b + c) * step));
#pragma unroll
            for (u32 m = 0; m < MT; m++)
              if (c) multiply_upper(acc[0][m], views[m + a], weights);
              else multiply(acc[0][m], views[m + a], weights);
          } else {
            feed(views + a, a, b, c);
          }
        }
      }
#else
    // Beside the sums a thread has registers for the view of one offset and the weights of one tap: offsets stay a loop,
    // lest the compiler load several at once and spill.
#pragma unroll 1
    for (u32 offset = 0; offset < 8; offset++) {
      u32 b = offset >> 2, c = offset >> 1 & 1, a = offset & 1;
      if (args.warps_k == 2 && (b ^ c) != at.warp_k) continue;
      auto view = [&](u32 m) {
        return rows.load(tile + (m + a) * args.halo.plane * VOXEL_BYTES, b * args.halo.pitch + c);
      };
      if constexpr (NARROW) {
        FragmentB weights = load_weights(w.at((4 * a + 2 * b + c) * step));
#pragma unroll
        for (u32 m = 0; m < MT; m++)
          if (c) multiply_upper(acc[0][m], view(m), weights);
          else multiply(acc[0][m], view(m), weights);
      } else {
        FragmentA views[MT];
#pragma unroll
        for (u32 m = 0; m < MT; m++) views[m] = view(m);
        feed(views, a, b, c);
      }
    }
#endif
  }
  sum_shared_taps(acc, args, at, shared);

  if constexpr (NARROW) {
    narrow_epilogue(acc[0], args, at, shared);
  } else {
    auto voxel = [&](u32 i, u32 half) {
      u32 h, w, m = i >> 3, pd = i >> 2 & 1, ph = i >> 1 & 1, pw = i & 1;
      bool inside = at.plane.locate(half, &h, &w);
      return inside ? voxel_index(args.out, 2 * (at.d0 + m) + pd, 2 * h + ph, 2 * w + pw) : NO_VOXEL;
    };
    epilogue(acc, args.head, at.groups, args.out.d * args.out.h * args.out.w, at.position(args), voxel, shared);
  }
}

KERNEL_RESIDENT(conv_transpose3d_general, Convolution, 256, 1) { conv_transpose3d<2, false>(args); }
// Float fragments take registers of a second block.
KERNEL_RESIDENT(conv_transpose3d_narrow, Convolution, 256, ELEM == 16 ? 2 : 1) { conv_transpose3d<4, true>(args); }
