// Where the vectors of a tile come from, for one tap of a kernel: lane by lane.
#pragma once

#include <algorithm>

#include "program.h"

namespace {

constexpr int64_t PADDING = -1;  // the position of a lane that is zero

// Lanes from `first` to before `stop`, so many floats apart from `position` on; the others are zero.
struct Run {
  int64_t position, step, first, stop;
};

struct Positions {  // of the lanes
  int64_t of[VL];
  explicit Positions(const Run& run) {
    std::fill(of, of + VL, PADDING);
    for (int64_t i = run.first; i < run.stop; ++i) of[i] = run.position + (i - run.first) * run.step;
  }
  Positions(int64_t lane0, uint32_t wanted) {
    for (int i = 0; i < VL; ++i) of[i] = wanted >> i & 1 ? lane0 + i : PADDING;
  }
};

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#define PICKS_BY_MASK 1
#else
#define PICKS_BY_MASK 0
#endif

// What picking consists of, in either length of vectors: some lanes, and a number for each lane.
#if defined(CPU_CAPABILITY_AVX512)

using LaneMask = __mmask16;
using LaneNumbers = __m512i;
inline LaneMask mask_of(uint32_t bits) { return LaneMask(bits); }
inline LaneNumbers numbers_of(const int32_t* numbers) { return _mm512_loadu_si512(numbers); }
inline LaneNumbers steps_from(int32_t lane0, int32_t step) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(step)), _mm512_set1_epi32(lane0));
}
inline Vec load_lanes(LaneMask wanted, const float* lane0) { return _mm512_maskz_loadu_ps(wanted, lane0); }
inline Vec keep(LaneMask wanted, Vec v) { return _mm512_maskz_mov_ps(wanted, v); }
inline Vec either(LaneMask second, Vec a, Vec b) { return _mm512_mask_blend_ps(second, a, b); }
// Of the lanes of two vectors, one behind the other.
inline Vec of_two(Vec low, LaneNumbers lanes, Vec high) { return _mm512_permutex2var_ps(low, lanes, high); }
inline Vec gather(LaneMask wanted, LaneNumbers positions, const float* row) {
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), wanted, positions, row, sizeof(float));
}

#elif defined(CPU_CAPABILITY_AVX2)

using LaneMask = __m256i;  // all bits of a lane, or none
using LaneNumbers = __m256i;
inline LaneMask mask_of(uint32_t bits) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), bit), bit);
}
inline LaneNumbers numbers_of(const int32_t* numbers) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers));
}
inline LaneNumbers steps_from(int32_t lane0, int32_t step) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_add_epi32(_mm256_mullo_epi32(lane, _mm256_set1_epi32(step)), _mm256_set1_epi32(lane0));
}
inline Vec load_lanes(LaneMask wanted, const float* lane0) { return _mm256_maskload_ps(lane0, wanted); }
inline Vec keep(LaneMask wanted, Vec v) { return _mm256_and_ps(v, _mm256_castsi256_ps(wanted)); }
inline Vec either(LaneMask second, Vec a, Vec b) { return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(second)); }
inline Vec of_two(Vec low, LaneNumbers lanes, Vec high) {
  const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(lanes, 28));  // the bit that says 8, as the sign
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, lanes), _mm256_permutevar8x32_ps(high, lanes), is_high);
}
inline Vec gather(LaneMask wanted, LaneNumbers positions, const float* row) {
  return _mm256_mask_i32gather_ps(_mm256_setzero_ps(), row, positions, _mm256_castsi256_ps(wanted), sizeof(float));
}

#endif

// One vector of columns: which floats of a row of the source its lanes are, for any number of rows. Nothing else is read.
class Pick {
 public:
  explicit Pick(const int64_t* positions);  // [VL]
  explicit Pick(const Run& run);
  Pick(int64_t lane0, uint32_t wanted);  // the lanes whose bits are set, side by side: lane 0 is at `lane0`
  Vec of(const float* row) const;
  int64_t first() const;  // about where it reads; PADDING where it reads nothing
  bool is_shift() const;  // whether `shifted` is the same as `of`
  Vec shifted(const float* row) const;
  void copy(const float* source, int64_t source_stride, int64_t rows, float* target, int64_t target_stride) const;

 private:
#if PICKS_BY_MASK
  // A window is two vectors side by side in the row, of which lanes are picked.
  enum { SIDE_BY_SIDE, ONE_WINDOW, TWO_WINDOWS, SCATTERED } kind_;
  int64_t from_[2];
  LaneMask wanted_, from_second_;
  LaneMask low_[2], high_[2];  // what is read of either vector of a window
  LaneNumbers lanes_[2], positions_;
  Vec window(int number, const float* row) const {
    const Vec low = load_lanes(low_[number], row + from_[number]), high = load_lanes(high_[number], row + from_[number] + VL);
    return of_two(low, lanes_[number], high);
  }
#else
  Vec scattered(const float* row) const;
  bool is_shift_;
  int64_t positions_[VL];
#endif
};

#if PICKS_BY_MASK

inline Pick::Pick(const int64_t* positions) : from_{PADDING, PADDING} {
  int32_t lanes[2][VL] = {}, all[VL] = {};
  uint32_t wanted = 0, from_second = 0, low[2] = {}, high[2] = {};
  int last = -1;
  int64_t shift = 0;
  bool is_shift = true;
  for (int i = 0; i < VL; ++i) {
    const int64_t position = positions[i];
    if (position == PADDING) continue;
    if (wanted == 0) shift = position - i;
    is_shift = is_shift && position == shift + i;
    wanted |= 1u << i;
    all[i] = int32_t(position);
    if (last < 0 || (last < 2 && (position < from_[last] || position >= from_[last] + 2 * VL))) {
      if (++last < 2) from_[last] = position;
    }
    if (last > 1) continue;
    const int lane = int(position - from_[last]);
    lanes[last][i] = lane;
    (lane < VL ? low : high)[last] |= 1u << lane % VL;
    if (last == 1) from_second |= 1u << i;
  }
  kind_ = is_shift ? SIDE_BY_SIDE : last == 0 ? ONE_WINDOW : last == 1 ? TWO_WINDOWS : SCATTERED;
  if (is_shift && wanted != 0) from_[0] = shift;
  wanted_ = mask_of(wanted);
  from_second_ = mask_of(from_second);
  for (int w = 0; w < 2; ++w) {
    lanes_[w] = numbers_of(lanes[w]);
    low_[w] = mask_of(low[w]);
    high_[w] = mask_of(high[w]);
  }
  positions_ = numbers_of(all);
}

inline Pick::Pick(const Run& run)
    : kind_(SIDE_BY_SIDE), from_{run.position - run.first, PADDING}, wanted_(mask_of((1u << run.stop) - (1u << run.first))) {
  if (run.first == run.stop) {
    from_[0] = PADDING;
    return;
  }
  if (run.step == 1) return;
  const int64_t reach = (run.stop - run.first - 1) * run.step;
  if (reach >= 2 * VL && run.step <= 4) {
    *this = Pick(Positions(run).of);  // two windows
    return;
  }
  from_[0] = run.position;
  const int32_t step = int32_t(run.step), lane0 = -int32_t(run.first) * step;
  if (reach >= 2 * VL) {
    kind_ = SCATTERED;
    positions_ = steps_from(int32_t(run.position) + lane0, step);
    return;
  }
  kind_ = ONE_WINDOW;
  lanes_[0] = steps_from(lane0, step);
  // The floats of the window that are `step` apart, from the first to the one `reach` away.
  uint64_t every = 1;
  for (int64_t apart = run.step; apart < 2 * VL; apart *= 2) every |= every << apart;
  every &= (uint64_t(2) << reach) - 1;
  low_[0] = mask_of(uint32_t(every) & ((1u << VL) - 1));
  high_[0] = mask_of(uint32_t(every >> VL));
}

inline Pick::Pick(int64_t lane0, uint32_t wanted)
    : kind_(SIDE_BY_SIDE), from_{wanted == 0 ? PADDING : lane0, PADDING}, wanted_(mask_of(wanted)) {}

inline Vec Pick::of(const float* row) const {
  switch (kind_) {
    case SIDE_BY_SIDE: return shifted(row);
    case ONE_WINDOW: return keep(wanted_, window(0, row));
    case TWO_WINDOWS: return keep(wanted_, either(from_second_, window(0, row), window(1, row)));
    default: return gather(wanted_, positions_, row);
  }
}

inline int64_t Pick::first() const { return from_[0]; }
inline bool Pick::is_shift() const { return kind_ == SIDE_BY_SIDE; }
inline Vec Pick::shifted(const float* row) const { return load_lanes(wanted_, row + from_[0]); }

inline void Pick::copy(const float* source, int64_t source_stride, int64_t rows, float* target,
                       int64_t target_stride) const {
  const Pick pick = *this;  // which the stores can't change: it stays in registers
  auto each = [&](auto of) C10_ALWAYS_INLINE_ATTRIBUTE {
    for (int64_t k = 0; k < rows; ++k) of(source + k * source_stride).store(target + k * target_stride);
  };
  switch (kind_) {
    case SIDE_BY_SIDE: return each([&](const float* row) C10_ALWAYS_INLINE_ATTRIBUTE { return pick.shifted(row); });
    case ONE_WINDOW:
      return each([&](const float* row) C10_ALWAYS_INLINE_ATTRIBUTE { return keep(pick.wanted_, pick.window(0, row)); });
    default: return each([&](const float* row) C10_ALWAYS_INLINE_ATTRIBUTE { return pick.of(row); });
  }
}

#else

inline Pick::Pick(const int64_t* positions) : is_shift_(true) {
  for (int i = 0; i < VL; ++i) {
    positions_[i] = positions[i];
    is_shift_ = is_shift_ && positions[i] != PADDING && positions[i] == positions[0] + i;
  }
}

inline Pick::Pick(const Run& run) : Pick(Positions(run).of) {}
inline Pick::Pick(int64_t lane0, uint32_t wanted) : Pick(Positions(lane0, wanted).of) {}
inline int64_t Pick::first() const { return positions_[0]; }
inline bool Pick::is_shift() const { return is_shift_; }
inline Vec Pick::shifted(const float* row) const { return Vec::loadu(row + positions_[0]); }
inline Vec Pick::scattered(const float* row) const {
  float lanes[VL];
  for (int i = 0; i < VL; ++i) lanes[i] = positions_[i] == PADDING ? 0.f : row[positions_[i]];
  return Vec::loadu(lanes);
}
inline Vec Pick::of(const float* row) const { return is_shift_ ? shifted(row) : scattered(row); }

inline void Pick::copy(const float* source, int64_t source_stride, int64_t rows, float* target,
                       int64_t target_stride) const {
  for (int64_t k = 0; k < rows; ++k, source += source_stride, target += target_stride) {
    of(source).store(target);
  }
}

#endif

// Vectors of a packed row.
inline int64_t picked_vectors(const Step& s, Tile t) { return (t.columns + s.more_columns + VL - 1) / VL; }

// Columns of a tile that make up a vector: of which images, and the pixels that the first tap but for the padding reads.
struct Lanes {
  int64_t image[VL];
  int32_t y[VL], x[VL];
  Lanes(const Step& s, int64_t start, int64_t count) {
    int64_t number = s.joint ? start / s.columns : 0, p = start - number * s.columns;
    int32_t row = int32_t(p / s.out_width), column0 = int32_t(p % s.out_width);
    for (int64_t i = 0; i < count; ++i, ++p, ++column0) {
      if (column0 == s.out_width) column0 = 0, ++row;
      if (s.joint && p == s.columns) p = 0, row = 0, ++number;
      image[i] = number;
      y[i] = row * int32_t(s.stride_y);
      x[i] = column0 * int32_t(s.stride_x);
    }
  }
};

// The picks of a tile: [packed rows][vectors].
void find_picks(const Step& s, const char* data, const Place& x, Tile t, Pick* picks) {
  const int64_t* away = reinterpret_cast<const int64_t*>(data + s.picks);
  const int64_t stop = t.column0 + t.columns + s.more_columns, vectors = picked_vectors(s, t);
  const int64_t pixels = s.in_height * s.in_width;
  const bool is_beside = x.image_stride == pixels;  // one image of the source beside the other, in the same tiles
  // Whether a tap's columns are those of the tile, so many columns further on, but for the padding.
  const bool shifts = s.stride_x == 1 && s.stride_y == 1 && s.in_width == s.out_width &&
      (!s.joint || (is_beside && pixels == s.columns));
  for (int64_t start = t.column0; start < stop; start += VL, ++picks) {
    const int64_t columns = std::min<int64_t>(VL, stop - start);
    const Lanes lanes(s, start, columns);
    const bool is_one_row = lanes.x[0] / s.stride_x + columns <= s.out_width;
    for (int64_t k = 0; k < s.pick_count; ++k) {
      Pick* pick = picks + k * vectors;
      const int32_t away_y = int32_t(away[2 * k]), away_x = int32_t(away[2 * k + 1]);
      if (is_one_row) {
        const int64_t row = lanes.y[0] + away_y, column = lanes.x[0] + away_x;
        const bool is_outside = row < 0 || row >= s.in_height;
        auto lanes_before = [&](int64_t end) { return end <= column ? 0 : (end - column - 1) / s.stride_x + 1; };
        const int64_t last = is_outside ? 0 : std::min(columns, lanes_before(s.in_width));
        const int64_t first = std::min(last, lanes_before(0));
        const int64_t pixel = (is_beside ? lanes.image[0] * pixels : 0) + row * s.in_width + column + first * s.stride_x;
        if (first == last || x.in_a_row(pixel) > (last - first - 1) * s.stride_x) {
          const int64_t image = is_beside ? 0 : lanes.image[0] * x.image_stride;
          const int64_t position = first == last ? PADDING : image + x.at(pixel);
          new (pick) Pick(Run{position, s.stride_x * x.column_stride, first, last});
          continue;
        }
      } else if (shifts && x.column_stride == 1) {
        uint32_t wanted = 0;
        for (int i = 0; i < columns; ++i) {
          const bool is_inside = uint32_t(lanes.y[i] + away_y) < uint32_t(s.in_height) &&
              uint32_t(lanes.x[i] + away_x) < uint32_t(s.in_width);
          wanted |= uint32_t(is_inside) << i;
        }
        const int first = wanted == 0 ? 0 : __builtin_ctz(wanted), last = wanted == 0 ? 0 : 31 - __builtin_clz(wanted);
        const int64_t pixel = start + away_y * s.in_width + away_x + first;
        if (wanted == 0 || x.in_a_row(pixel) > last - first) {
          new (pick) Pick(wanted == 0 ? PADDING : x.at(pixel) - first, wanted);
          continue;
        }
      }
      int64_t positions[VL];
      std::fill(positions, positions + VL, PADDING);
      for (int64_t i = 0; i < columns; ++i) {
        const int64_t row = lanes.y[i] + away_y, column = lanes.x[i] + away_x;
        const bool is_inside = row >= 0 && row < s.in_height && column >= 0 && column < s.in_width;
        const int64_t pixel = (is_beside ? lanes.image[i] * pixels : 0) + row * s.in_width + column;
        if (is_inside) positions[i] = (is_beside ? 0 : lanes.image[i] * x.image_stride) + x.at(pixel);
      }
      new (pick) Pick(positions);
    }
  }
}

}  // namespace
