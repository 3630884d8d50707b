// The columns of a tile: taken from wherever they lie, and packed as the rows of the weight read them.
#pragma once

#include <algorithm>

#include "picks.h"
#include "program.h"

namespace {

// dst[c][r] = src[r][c]; both sides are rows of floats, src_stride and dst_stride apart.
void turn(const float* src, int64_t src_stride, float* dst, int64_t dst_stride, int64_t src_rows, int64_t src_columns) {
  int64_t r = 0;
  for (; src_columns >= VL && r + VL <= src_rows; r += VL) {
    for (int64_t next = 0; next < src_columns; next += VL) {
      const int64_t c = std::min(next, src_columns - VL);  // the last ones share columns
      at::vec::transpose_mxn<float, VL, VL>(src + r * src_stride + c, src_stride, dst + c * dst_stride + r, dst_stride);
    }
  }
  for (; r < src_rows; ++r) {
    for (int64_t c = 0; c < src_columns; ++c) dst[c * dst_stride + r] = src[r * src_stride + c];
  }
}

// Calls f with the columns of a tile that are side by side in the source: the first of them in the tile, where it lies
// in the source, and how many there are.
template <typename F>
inline void each_piece(const Step& s, const Place& x, Tile t, F f) {
  if (!s.joint || x.image_stride == s.columns * x.column_stride) return f(0, t.column0 * x.column_stride, t.columns);
  for (int64_t done = 0, here; done < t.columns; done += here) {
    int64_t image = (t.column0 + done) / s.columns, p = (t.column0 + done) % s.columns;
    here = std::min(s.columns - p, t.columns - done);
    f(done, image * x.image_stride + p * x.column_stride, here);
  }
}

// Packs the channels of a block for a tile, and returns where the tile starts in it.
const char* pack(const Step& s, const Block& b, const Place& x, const Pick* picks, float* packed, Tile t) {
  if (s.mode == PLAIN && x.column_stride != 1) {
    const int64_t channels = b.channel1 - b.channel0, beyond = (VL - t.columns % VL) % VL;
    each_piece(s, x, t, [&](int64_t first, int64_t at, int64_t count) {
      turn(x.data + at + b.channel0, x.column_stride, packed + first, s.channel_stride, count, channels);
    });
    for (int64_t c = 0; beyond > 0 && c < channels; ++c) {  // numbers as small as can be there slow some processors down
      std::fill_n(packed + c * s.channel_stride + t.columns, beyond, 0.0f);
    }
    return reinterpret_cast<const char*>(packed);
  }
  if (s.mode == PLAIN) {
    for (int64_t c = b.channel0; c < b.channel1; ++c) {
      float* dst = packed + (c - b.channel0) * s.channel_stride;
      each_piece(s, x, t, [&](int64_t first, int64_t at, int64_t count) {
        const float* src = x.data + c * x.row_stride + at;
        int64_t i = 0;
        for (; i + VL <= count; i += VL) Vec::loadu(src + i).store(dst + first + i);
        if (i < count) Vec::loadu(src + i, int(count - i)).store(dst + first + i);
      });
    }
    return reinterpret_cast<const char*>(packed);
  }
  const float* source = x.data + b.channel0 * x.row_stride;
  const int64_t vectors = picked_vectors(s, t);
  for (int64_t j = 0; j < vectors; ++j) {
    for (int64_t k = 0; k < s.pick_count; ++k) {
      float* target = packed + k * s.row_floats + j * VL;
      picks[k * vectors + j].copy(source, x.row_stride, b.channel1 - b.channel0, target, s.channel_stride);
    }
  }
  return reinterpret_cast<const char*>(packed);
}

}  // namespace
