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

// Where the planes of a tile begin: a row of the grid, or of the output; all of an image that stands beside others.
inline int64_t first_row(const Step& s, Tile t) { return s.joint ? 0 : t.column0 / s.pitch; }

// The row of a column in the planes of a tile; those of several images lie one behind the other.
inline int64_t plane_row(const Step& s, Tile t, int64_t column) {
  if (!s.joint) return column / s.pitch - first_row(s, t);
  return (column / s.columns - t.column0 / s.columns) * s.phase_rows + column % s.columns / s.out_width;
}

// The zero-padded planes of one channel, given as it lies in the first image: phase by phase and image by image, because
// what reaches beyond a plane is overwritten by the next one.
void fill_planes(const Step& s, const char* data, const Place& x, const float* channel, Tile t, float* planes) {
  const Phase* phases = reinterpret_cast<const Phase*>(data + s.phases);
  const int64_t row0 = first_row(s, t);
  const int64_t first = s.joint ? t.column0 / s.columns : 0, last = s.joint ? (t.column0 + t.columns - 1) / s.columns : 0;
  for (int64_t f = 0; f < s.phase_count; ++f) {
    float* dst = planes + f * s.phase_stride;
    for (int64_t image = first; image <= last; ++image) {
      for (int64_t r = 0; r < s.phase_rows; ++r, dst += s.plane_pitch) {
        int64_t iy = s.stride_y * (row0 + r) + phases[f].y;
        if (iy >= 0 && iy < s.in_height) {
          const float* row = channel + image * x.image_stride + iy * s.in_width;
          fill_row(dst, row, s.plane_pitch, s.stride_x, phases[f], s.in_width);
        } else {
          for (int64_t i = 0; i < s.plane_pitch; i += VL) Vec(0.f).store(dst + i);
        }
      }
    }
  }
}

// Where the columns of a tile lie, in floats: in the planes of a channel, for the first tap; or in the source of a strided
// 1x1 layer.
void find_columns(const Step& s, const Place& x, Tile t, int64_t* positions) {
  for (int64_t done = 0; done < t.columns;) {  // a row of the output at a time
    const int64_t column = t.column0 + done, first = column % s.out_width;
    const int64_t here = std::min(s.out_width - first, t.columns - done);
    if (s.mode == GATHERED) {
      const int64_t start = plane_row(s, t, column) * s.plane_pitch + first;
      for (int64_t i = 0; i < here; ++i) positions[done + i] = start + i;
    } else {
      const int64_t image = column / s.columns, row = column % s.columns / s.out_width;
      for (int64_t i = 0; i < here; ++i) {
        const int64_t from = s.stride_y * row * s.in_width + s.stride_x * (first + i);
        const int64_t tile = x.tile_step == 0 ? 0 : from / x.row_stride;
        positions[done + i] = image * x.image_stride + tile * x.tile_step + from * x.column_stride;
      }
    }
    done += here;
  }
}

Picks find_picks(const Step& s, const Place& x, Tile t) {
  const bool are_picked = s.mode == GATHERED || s.mode == STRIDED;
  int64_t positions[MAX_NV * VL];
  if (are_picked) find_columns(s, x, t, positions);
  return Picks(positions, are_picked ? t.columns : 0, s.mode == GATHERED);
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
const char* pack(const Step& s, const Block& b, const char* data, const Place& x, float* packed, float* planes, Tile t,
                 const Picks& picks) {
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
  if (s.mode == STRIDED) {
    auto row = [&](int64_t k) { return x.data + (b.channel0 + k) * x.row_stride; };
    picks.copy(row, b.channel1 - b.channel0, packed, s.channel_stride);
    return reinterpret_cast<const char*>(packed);
  }
  if (s.mode == GRID || s.mode == PLANES) {
    for (int64_t c = b.channel0; c < b.channel1; ++c) {
      fill_planes(s, data, x, x.data + c * x.row_stride, t, packed + (c - b.channel0) * s.channel_stride);
    }
    return reinterpret_cast<const char*>(packed + t.column0 - first_row(s, t) * s.pitch);
  }
  // All planes first: a vector that is read back before what it consists of has left the store buffer has to wait.
  const int64_t plane_floats = s.phase_count * s.phase_stride;
  const int64_t* taps = reinterpret_cast<const int64_t*>(data + s.taps);
  for (int64_t c = b.channel0; c < b.channel1; ++c) {
    fill_planes(s, data, x, x.data + c * x.row_stride, t, planes + (c - b.channel0) * plane_floats);
  }
  for (int64_t c = b.channel0; c < b.channel1; ++c) {
    const float* channel = planes + (c - b.channel0) * plane_floats;
    auto row = [&](int64_t k) { return channel + taps[k]; };
    picks.copy(row, s.tap_count, packed + (c - b.channel0) * s.channel_stride, s.vectors * VL);
  }
  return reinterpret_cast<const char*>(packed);
}

}  // namespace
