// Tiles of a few columns, as one token is: sums of one lane, or of four or eight, over columns that fit the first cache.
#pragma once

#include <cstring>

#include "program.h"
#include "rows.h"

namespace {

template <int N>
struct Few {
  typedef float Type __attribute__((vector_size(N * sizeof(float))));
};
template <>
struct Few<1> {
  using Type = float;
};

constexpr int log2_of(int64_t n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }

inline bool is_narrow(const Step& s, const Block& b, Tile t) {
  return s.vectors == 1 && 2 * t.columns <= VL && !s.joint && b.group_count == 0 &&
         (s.mode == PLAIN || s.mode == DIRECT);
}

// Rows of one block whose pattern is entries, for at most N columns. `packed`: memory for N floats for each channel.
template <int N>
void compute_narrow(const Step& s, const Block& b, const char* data, const Place& x, float* packed, float* partial,
                    Tile t, const Place& y, const Place& residual) {
  using Lane = typename Few<N>::Type;
  constexpr int SHIFT = log2_of(VL / N);  // from where a channel would be in a tile of a vector
  const float* source = x.data + t.column0 * x.column_stride;
  for (int64_t c = b.channel0; c < b.channel1; ++c) {
    float* target = packed + (c - b.channel0) * N;
    const float* channel = source + c * x.row_stride;
    for (int64_t i = 0; i < N; ++i) target[i] = i < t.columns ? channel[i * x.column_stride] : 0.0f;
  }
  const int32_t* starts = reinterpret_cast<const int32_t*>(data + b.starts);
  const Offset* offsets = reinterpret_cast<const Offset*>(data + b.offsets);
  const float* values = reinterpret_cast<const float*>(data + b.values);
  const float* bias = reinterpret_cast<const float*>(data + s.bias);
  auto product = [&](int64_t e) C10_ALWAYS_INLINE_ATTRIBUTE {
    Lane columns;
    std::memcpy(&columns, packed + (offsets[e] >> SHIFT), sizeof(Lane));
    return columns * values[e];
  };
  for (int64_t m = std::max(b.row0, t.row0), end = std::min(b.row1, t.row1); m < end; ++m) {
    float* sums = partial + (m - t.row0) * VL;
    alignas(64) float line[VL] = {};
    if (b.first) {
      std::fill_n(line, N, bias[m]);
    } else {
      std::memcpy(line, sums, N * sizeof(float));
    }
    Lane acc[4] = {};  // so that no sum waits for the one before
    std::memcpy(&acc[0], line, sizeof(Lane));
    int64_t e = starts[m - b.row0];
    const int64_t stop = starts[m - b.row0 + 1];
    for (; e + 4 <= stop; e += 4) {
      prefetch_entries(offsets + e, values + e);
      for (int i = 0; i < 4; ++i) acc[i] += product(e + i);
    }
    for (; e != stop; ++e) acc[0] += product(e);
    const Lane sum = (acc[0] + acc[1]) + (acc[2] + acc[3]);
    std::memcpy(line, &sum, sizeof(Lane));
    Vec made[1] = {Vec::loadu(line)};
    if (b.last) {
      finish(s, made, m, sums, t, y, residual);
    } else {
      made[0].store(sums);
    }
  }
}

void compute_few(const Step& s, const Block& b, const char* data, const Place& x, float* packed, float* partial, Tile t,
                 const Place& y, const Place& residual) {
  if (t.columns == 1) return compute_narrow<1>(s, b, data, x, packed, partial, t, y, residual);
  if (t.columns <= 4) return compute_narrow<4>(s, b, data, x, packed, partial, t, y, residual);
  if constexpr (VL >= 8) compute_narrow<8>(s, b, data, x, packed, partial, t, y, residual);
}

}  // namespace
