// Tiles of a few columns, as one token is: sums of one lane, or of four or eight, over columns that fit the first cache.
#pragma once

#include <algorithm>
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

inline bool is_narrow(const Step& s, const char* data, Tile t) {
  return s.vectors == 1 && 2 * t.columns <= VL && !s.joint && (s.mode == PLAIN || s.mode == DIRECT) &&
         reinterpret_cast<const Block*>(data + s.blocks)->group_count == 0;
}

// The channels of a block, N columns of each side by side: copied to `packed`, or where they lie.
template <int N>
const float* pack_narrow(const Block& b, const Place& x, float* packed, Tile t) {
  const float* source = x.data + t.column0 * x.column_stride + b.channel0 * x.row_stride;
  if (N == 1 && x.row_stride == 1) return source;
  for (int64_t c = 0; c < b.channel1 - b.channel0; ++c) {
    const float* channel = source + c * x.row_stride;
    for (int64_t i = 0; i < N; ++i) packed[c * N + i] = i < t.columns ? channel[i * x.column_stride] : 0.0f;
  }
  return packed;
}

// Adds what one block gives to sums of N columns for each row of the tile.
template <int N>
void add_narrow(const Block& b, const char* data, const float* packed, float* sums, Tile t) {
  using Lane = typename Few<N>::Type;
  constexpr int SHIFT = log2_of(VL / N);  // from where a channel would be in a tile of a vector
  const int32_t* starts = reinterpret_cast<const int32_t*>(data + b.starts);
  const Offset* offsets = reinterpret_cast<const Offset*>(data + b.offsets);
  const float* values = reinterpret_cast<const float*>(data + b.values);
  auto product = [&](int64_t e) C10_ALWAYS_INLINE_ATTRIBUTE {
    Lane columns;
    std::memcpy(&columns, packed + (offsets[e] >> SHIFT), sizeof(Lane));
    return columns * values[e];
  };
  for (int64_t m = std::max(b.row0, t.row0), end = std::min(b.row1, t.row1); m < end; ++m) {
    Lane acc[4] = {};  // so that no sum waits for the one before
    std::memcpy(&acc[0], sums + (m - t.row0) * N, sizeof(Lane));
    int64_t e = starts[m - b.row0];
    const int64_t stop = starts[m - b.row0 + 1];
    for (; e + 8 <= stop; e += 8) {
      prefetch_entries(offsets + e, values + e);
      for (int i = 0; i < 8; ++i) acc[i % 4] += product(e + i);
    }
    if (e + 4 <= stop) {
      for (int i = 0; i < 4; ++i) acc[i] += product(e + i);
      e += 4;
    }
    for (; e != stop; ++e) acc[0] += product(e);
    const Lane sum = (acc[0] + acc[1]) + (acc[2] + acc[3]);
    std::memcpy(sums + (m - t.row0) * N, &sum, sizeof(Lane));
  }
}

// A tile of at most N columns. `packed`: memory for N floats for each channel of a block; `sums`: a vector for each row.
template <int N>
void run_narrow(const Step& s, const char* data, const Place& x, float* packed, float* sums, Tile t, const Place& y,
                const Place& residual) {
  const int64_t rows = t.row1 - t.row0;
  const float* bias = reinterpret_cast<const float*>(data + s.bias) + t.row0;
  for (int64_t m = 0; m < rows; ++m) std::fill_n(sums + m * N, N, bias[m]);
  const Block* blocks = reinterpret_cast<const Block*>(data + s.blocks);
  for (const Block* b = blocks; b != blocks + s.block_count; ++b) {
    if (b->row1 <= t.row0 || b->row0 >= t.row1) continue;
    add_narrow<N>(*b, data, pack_narrow<N>(*b, x, packed, t), sums, t);
  }
  auto each = [&](const Place& place, auto f) C10_ALWAYS_INLINE_ATTRIBUTE {
    float* first = place.data + t.row0 * place.row_stride + t.column0 * place.column_stride;
    for (int64_t i = 0; i < t.columns; ++i) {
      for (int64_t m = 0; m < rows; ++m) f(sums[m * N + i], first[m * place.row_stride + i * place.column_stride]);
    }
  };
  if (residual.data != nullptr) each(residual, [](float& sum, float add) { sum += add; });
  for (int64_t i = 0; s.activation != NONE && i < rows * N; i += VL) {
    Vec some[1] = {Vec::loadu(sums + i)};
    activate(some, s);
    some[0].store(sums + i);
  }
  each(y, [](float sum, float& out) { out = sum; });
}

void run_few(const Step& s, const char* data, const Place& x, float* packed, float* sums, Tile t, const Place& y,
             const Place& residual) {
  if (t.columns == 1) return run_narrow<1>(s, data, x, packed, sums, t, y, residual);
  if (t.columns <= 4) return run_narrow<4>(s, data, x, packed, sums, t, y, residual);
  if constexpr (VL >= 8) run_narrow<8>(s, data, x, packed, sums, t, y, residual);
}

}  // namespace
