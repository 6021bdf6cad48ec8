// 16 bytes of neighbouring activations, as floats.
#pragma once
#include "ptx.cuh"

constexpr int VECTOR = 16 / sizeof(elem);  // elements

DEVICE void unpack(const Word4& w, float (&v)[VECTOR]) {
  for (int i = 0; i < 4; i++) {
    if constexpr (VECTOR == 8) {
      v[2 * i] = to_f32(h16{(u16)w.w[i]});
      v[2 * i + 1] = to_f32(h16{(u16)(w.w[i] >> 16)});
    } else {
      v[i] = __builtin_bit_cast(float, w.w[i]);
    }
  }
}

DEVICE Word4 pack(const float (&v)[VECTOR]) {
  Word4 w;
  for (int i = 0; i < 4; i++) {
    if constexpr (VECTOR == 8)
      w.w[i] = (u32)to_h16(v[2 * i]).bits | (u32)to_h16(v[2 * i + 1]).bits << 16;
    else
      w.w[i] = __builtin_bit_cast(u32, v[i]);
  }
  return w;
}

// N elements from i on: whole vectors where i is a multiple of VECTOR, or a single one.
template <int N, class Memory>
DEVICE void load(const Memory& from, u64 i, float (&v)[N]) {
  if constexpr (N == 1) {
    v[0] = to_f32(from[i]);
  } else {
    static_assert(N % VECTOR == 0);
    for (int part = 0; part < N / VECTOR; part++)
      unpack(from.template vector<Word4>(i + part * VECTOR), *(float (*)[VECTOR])&v[part * VECTOR]);
  }
}

template <int N, class Memory>
DEVICE void store(const Memory& to, u64 i, const float (&v)[N]) {
  if constexpr (N == 1) {
    to.set(i, to_elem(v[0]));
  } else {
    static_assert(N % VECTOR == 0);
    for (int part = 0; part < N / VECTOR; part++)
      to.vector(i + part * VECTOR, pack(*(const float (*)[VECTOR])&v[part * VECTOR]));
  }
}
