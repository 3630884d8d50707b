// The columns of a tile: taken from wherever they lie, and packed as the rows of the weight read them.
#pragma once

#include <algorithm>

#include "picks.h"
#include "program.h"

namespace {

// dst[c][r] = src[r][c]; both sides are rows of floats, src_stride and dst_stride apart.
void turn(const float* src, int64_t src_stride, float* dst, int64_t dst_stride, int64_t src_rows, int64_t src_columns) {
  int64_t r = 0;
  for (; r + VL <= src_rows; r += VL) {
    int64_t c = 0;
    for (; c + VL <= src_columns; c += VL) {
      at::vec::transpose_mxn<float, VL, VL>(src + r * src_stride + c, src_stride, dst + c * dst_stride + r, dst_stride);
    }
    for (; c < src_columns; ++c) {
      for (int64_t i = r; i < r + VL; ++i) dst[c * dst_stride + i] = src[i * src_stride + c];
    }
  }
  for (; r < src_rows; ++r) {
    for (int64_t c = 0; c < src_columns; ++c) dst[c * dst_stride + r] = src[r * src_stride + c];
  }
}

// Fills a row of a plane from a row of the input, with zeros around. Whole vectors are stored: what reaches beyond the
// row is overwritten by the next one, or lies behind the planes.
void fill_row(float* dst, const float* src, int64_t width, int64_t step, const Phase& f, int64_t limit) {
  for (int64_t i = 0; i < f.first; i += VL) Vec(0.f).store(dst + i);
  const float* from = src + f.start;
  if (step == 1) {
    for (int64_t i = f.first; i < f.stop; i += VL) {
      Vec::loadu(from + i, int(std::min<int64_t>(f.stop - i, VL))).store(dst + i);
    }
  } else if (step == 2) {
    for (int64_t i = f.first; i < f.stop; i += VL) {
      int64_t there = limit - f.start - 2 * i;  // floats to the end of the input's row
      Vec low = Vec::loadu(from + 2 * i, int(std::min<int64_t>(there, VL)));
      Vec high = there > VL ? Vec::loadu(from + 2 * i + VL, int(std::min<int64_t>(there - VL, VL))) : Vec(0.f);
      at::vec::deinterleave2(low, high).first.store(dst + i);
    }
  } else {
    for (int64_t i = f.first; i < f.stop; ++i) dst[i] = from[step * i];
  }
  for (int64_t i = f.stop; i < width; i += VL) Vec(0.f).store(dst + i);
}

// The zero-padded planes of one channel, phase by phase, because what reaches beyond a plane is overwritten by the next.
void fill_planes(const Step& s, const char* data, const float* channel, float* planes) {
  const Phase* phases = reinterpret_cast<const Phase*>(data + s.phases);
  for (int64_t f = 0; f < s.phase_count; ++f) {
    float* dst = planes + f * s.phase_stride;
    for (int64_t r = 0; r < s.phase_rows; ++r, dst += s.plane_pitch) {
      int64_t iy = s.stride_y * r + phases[f].y;
      if (iy >= 0 && iy < s.in_height) {
        fill_row(dst, channel + iy * s.in_width, s.plane_pitch, s.stride_x, phases[f], s.in_width);
      } else {
        for (int64_t i = 0; i < s.plane_pitch; i += VL) Vec(0.f).store(dst + i);
      }
    }
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
const char* pack(const Step& s, const Block& b, const char* data, const Place& x, const Pick* picks, float* packed,
                 Tile t) {
  if (s.mode == PLAIN && x.column_stride != 1) {
    each_piece(s, x, t, [&](int64_t first, int64_t at, int64_t count) {
      turn(x.data + at + b.channel0, x.column_stride, packed + first, s.channel_stride, count, b.channel1 - b.channel0);
    });
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
  if (s.mode == PLANES) {
    for (int64_t c = b.channel0; c < b.channel1; ++c) {
      fill_planes(s, data, x.data + c * x.row_stride, packed + (c - b.channel0) * s.channel_stride);
    }
    return reinterpret_cast<const char*>(packed);
  }
  const float* source = x.data + b.channel0 * x.row_stride;
  for (int64_t j = 0; j < picked_vectors(s, t); ++j) {
    for (int64_t k = 0; k < s.pick_count; ++k) {
      float* target = packed + k * s.row_floats + j * VL;
      picks++->copy(source, x.row_stride, b.channel1 - b.channel0, target, s.channel_stride);
    }
  }
  return reinterpret_cast<const char*>(packed);
}

}  // namespace
