// Where the vectors of a tile come from, for one tap of a kernel: lane by lane.
#pragma once

#include <algorithm>

#include "program.h"

namespace {

constexpr int64_t PADDING = -1;  // the position of a lane that is zero

// One vector of columns: which floats of a row of the source its lanes are, for any number of rows. Nothing else is read.
class Pick {
 public:
  explicit Pick(const int64_t* positions);  // [VL]
  void copy(const float* source, int64_t source_stride, int64_t rows, float* target, int64_t target_stride) const;

 private:
#if defined(CPU_CAPABILITY_AVX512)
  struct Window {  // of two vectors side by side
    int64_t from;
    __m512i lanes;
    __mmask16 low, high;  // what is read of either
    __m512 of(const float* row) const {
      const float* start = row + from;
      return _mm512_permutex2var_ps(_mm512_maskz_loadu_ps(low, start), lanes, _mm512_maskz_loadu_ps(high, start + VL));
    }
  };
  enum { SIDE_BY_SIDE, ONE_WINDOW, TWO_WINDOWS, SCATTERED } kind_;
  __mmask16 wanted_, from_second_;
  Window windows_[2];
  __m512i positions_;
#else
  bool is_vector_;
  int64_t positions_[VL];
#endif
};

#if defined(CPU_CAPABILITY_AVX512)

inline Pick::Pick(const int64_t* positions) : wanted_(0), from_second_(0) {
  alignas(64) int32_t lanes[2][VL] = {}, all[VL] = {};
  int last = -1;
  int64_t side_by_side = 0;
  bool is_shift = true;
  windows_[0].from = windows_[1].from = 0;
  windows_[0].low = windows_[0].high = windows_[1].low = windows_[1].high = 0;
  for (int i = 0; i < VL; ++i) {
    const int64_t position = positions[i];
    if (position == PADDING) continue;
    const __mmask16 bit = __mmask16(1u << i);
    if (wanted_ == 0) side_by_side = position - i;
    is_shift = is_shift && position == side_by_side + i;
    wanted_ |= bit;
    all[i] = int32_t(position);
    if (last < 0 || (last < 2 && (position < windows_[last].from || position >= windows_[last].from + 2 * VL))) {
      if (++last < 2) windows_[last].from = position;
    }
    if (last > 1) continue;
    const int lane = int(position - windows_[last].from);
    lanes[last][i] = lane;
    (lane < VL ? windows_[last].low : windows_[last].high) |= __mmask16(1u << lane % VL);
    if (last == 1) from_second_ |= bit;
  }
  kind_ = is_shift ? SIDE_BY_SIDE : last == 0 ? ONE_WINDOW : last == 1 ? TWO_WINDOWS : SCATTERED;
  if (is_shift) windows_[0].from = side_by_side;
  for (int w = 0; w < 2; ++w) windows_[w].lanes = _mm512_load_si512(lanes[w]);
  positions_ = _mm512_load_si512(all);
}

inline void Pick::copy(const float* source, int64_t source_stride, int64_t rows, float* target,
                       int64_t target_stride) const {
  auto each = [&](auto pick) C10_ALWAYS_INLINE_ATTRIBUTE {
    for (int64_t k = 0; k < rows; ++k) _mm512_storeu_ps(target + k * target_stride, pick(source + k * source_stride));
  };
  const Window first = windows_[0], second = windows_[1];
  const __mmask16 wanted = wanted_, from_second = from_second_;
  const __m512i positions = positions_;
  switch (kind_) {
    case SIDE_BY_SIDE: return each([=](const float* row) { return _mm512_maskz_loadu_ps(wanted, row + first.from); });
    case ONE_WINDOW: return each([=](const float* row) { return _mm512_maskz_mov_ps(wanted, first.of(row)); });
    case TWO_WINDOWS:
      return each([=](const float* row) {
        return _mm512_maskz_mov_ps(wanted, _mm512_mask_blend_ps(from_second, first.of(row), second.of(row)));
      });
    case SCATTERED:
      return each([=](const float* row) {
        return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), wanted, positions, row, sizeof(float));
      });
  }
}

#else

inline Pick::Pick(const int64_t* positions) : is_vector_(true) {
  for (int i = 0; i < VL; ++i) {
    positions_[i] = positions[i];
    is_vector_ = is_vector_ && positions[i] != PADDING && positions[i] == positions[0] + i;
  }
}

inline void Pick::copy(const float* source, int64_t source_stride, int64_t rows, float* target,
                       int64_t target_stride) const {
  for (int64_t k = 0; k < rows; ++k, source += source_stride, target += target_stride) {
    if (is_vector_) {
      Vec::loadu(source + positions_[0]).store(target);
    } else {
      for (int i = 0; i < VL; ++i) target[i] = positions_[i] == PADDING ? 0.f : source[positions_[i]];
    }
  }
}

#endif

// Vectors of a packed row.
inline int64_t picked_vectors(const Step& s, Tile t) { return (t.columns + s.more_columns + VL - 1) / VL; }

// The picks of a tile: [vectors][packed rows].
void find_picks(const Step& s, const char* data, const Place& x, Tile t, Pick* picks) {
  const int64_t* away = reinterpret_cast<const int64_t*>(data + s.picks);
  const int64_t stop = t.column0 + t.columns + s.more_columns;
  for (int64_t start = t.column0; start < stop; start += VL) {
    int64_t image[VL], y[VL], x0[VL], positions[VL];
    const int64_t columns = std::min<int64_t>(VL, stop - start);
    for (int64_t i = 0; i < columns; ++i) {
      const int64_t number = s.joint ? (start + i) / s.columns : 0, p = start + i - number * s.columns;
      image[i] = number * x.image_stride;
      y[i] = s.stride_y * (p / s.out_width);
      x0[i] = s.stride_x * (p % s.out_width);
    }
    std::fill(positions, positions + VL, PADDING);
    for (int64_t k = 0; k < s.pick_count; ++k) {
      for (int64_t i = 0; i < columns; ++i) {
        const int64_t row = y[i] + away[2 * k], column = x0[i] + away[2 * k + 1], pixel = row * s.in_width + column;
        const bool is_inside = row >= 0 && row < s.in_height && column >= 0 && column < s.in_width;
        const int64_t tile = x.tile_step == 0 ? 0 : pixel / x.row_stride;
        positions[i] = is_inside ? image[i] + tile * x.tile_step + pixel * x.column_stride : PADDING;
      }
      new (picks++) Pick(positions);
    }
  }
}

}  // namespace
