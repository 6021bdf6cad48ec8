// The norm and PReLU that a consumer applies while it loads: y = PReLU(scale x + shift).
#pragma once
#include "ptx.cuh"

struct Pending {  // src/tensor: CudaPending
  In<float> scale;  // null: nothing is pending
  In<float> shift;
  In<float> slope;  // one value; null: no PReLU
  u32 per_sample;   // scale and shift have one value per (sample, channel), not per channel
  u32 unused;
};

DEVICE float prelu(float z, float slope) { return z > 0.0f ? z : slope * z; }

DEVICE float apply(const Pending& map, float x, u32 n, u32 c, u32 channels) {
  if (!map.scale) return x;
  u32 i = map.per_sample ? n * channels + c : c;
  float z = map.scale[i] * x + map.shift[i];
  return map.slope ? prelu(z, map.slope[0]) : z;
}
