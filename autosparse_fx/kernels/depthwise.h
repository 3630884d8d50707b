// Rows that read a single channel each, where a kernel of few taps slides over the rows of one image.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "picks.h"
#include "program.h"
#include "rows.h"

namespace {

// The lanes of a vector that a tap reads, each one float behind the other or every second one; the others are zero.
class Lanes {
 public:
  Lanes() = default;
  Lanes(int64_t first, int64_t stop);
  template <int STRIDE>
  Vec load(const float* lane0) const;

 private:
#if defined(CPU_CAPABILITY_AVX512)
  __mmask16 side_by_side_, low_, high_;
#elif defined(CPU_CAPABILITY_AVX2)
  __m256i wanted_;
#else
  int64_t first_, stop_;
#endif
};

#if defined(CPU_CAPABILITY_AVX512)

inline Lanes::Lanes(int64_t first, int64_t stop) {
  auto below = [](int64_t lane) { return (uint64_t(1) << lane) - 1; };
  const uint64_t every_second = first < stop ? 0x55555555u & below(2 * stop) & ~below(2 * first) : 0;
  side_by_side_ = first < stop ? __mmask16(below(stop) & ~below(first)) : 0;
  low_ = __mmask16(every_second);
  high_ = __mmask16(every_second >> VL);
}

template <int STRIDE>
C10_ALWAYS_INLINE Vec Lanes::load(const float* lane0) const {
  if constexpr (STRIDE == 1) return _mm512_maskz_loadu_ps(side_by_side_, lane0);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512 low = _mm512_maskz_loadu_ps(low_, lane0), high = _mm512_maskz_loadu_ps(high_, lane0 + VL);
  return _mm512_permutex2var_ps(low, even, high);
}

#elif defined(CPU_CAPABILITY_AVX2)

inline Lanes::Lanes(int64_t first, int64_t stop) {
  alignas(32) int32_t wanted[VL];
  for (int64_t i = 0; i < VL; ++i) wanted[i] = i >= first && i < stop ? -1 : 0;
  wanted_ = _mm256_load_si256(reinterpret_cast<const __m256i*>(wanted));
}

template <int STRIDE>
C10_ALWAYS_INLINE Vec Lanes::load(const float* lane0) const {
  if constexpr (STRIDE == 1) return _mm256_maskload_ps(lane0, wanted_);
  const __m256i even = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
  return _mm256_mask_i32gather_ps(_mm256_setzero_ps(), lane0, even, _mm256_castsi256_ps(wanted_), sizeof(float));
}

#else

inline Lanes::Lanes(int64_t first, int64_t stop) : first_(first), stop_(stop) {}

template <int STRIDE>
C10_ALWAYS_INLINE Vec Lanes::load(const float* lane0) const {
  if (STRIDE == 1 && first_ == 0 && stop_ == VL) return Vec::loadu(lane0);
  float lanes[VL] = {};
  for (int64_t i = first_; i < stop_; ++i) lanes[i] = lane0[i * STRIDE];
  return Vec::loadu(lanes);
}

#endif

// Up to VL output pixels of one row of the image, and where a kernel of SIZE x SIZE taps side by side reads for them.
template <int SIZE>
struct Sight {
  int64_t target;  // column of the tile
  int count;
  // Where the first tap of each row of the kernel reads for the first pixel, in floats from the start of a channel.
  int64_t rows[SIZE];
  Lanes lanes[SIZE];  // of the taps of a row
  // Rows [first, stop) of the kernel are inside of the image. The ring ends behind `before` lanes and taps of each of
  // them, or behind all.
  int first, stop;
  int64_t before[SIZE];
  int64_t begin, end;  // of what is read of a row, in floats from what its first tap reads for the first pixel
  bool is_simple;  // whether all rows are inside of the image and in one piece
};

constexpr int MAX_SIGHTS = 2 * REGISTERS;  // of a tile

// How many taps a side the kernel of a step has where it is computed so; or 0.
inline int64_t sliding_size(const Step& s, const char* data, const Place& x, Tile t) {
  if (s.joint || x.column_stride != 1 || x.tile_step != 0 || s.stride_x > 2) return 0;
  const int64_t* away = reinterpret_cast<const int64_t*>(data + s.picks);
  const int64_t size = s.pick_count == 9 ? 3 : s.pick_count == 25 ? 5 : 0;
  for (int64_t k = 0; k < size * size; ++k) {
    if (away[2 * k] != away[0] + k / size || away[2 * k + 1] != away[1] + k % size) return 0;
  }
  // Vectors end with each row of the image, which may be too short for that.
  int64_t vectors = 0;
  for (int64_t done = 0, here; done < t.columns; done += here) {
    here = std::min(s.out_width - (t.column0 + done) % s.out_width, t.columns - done);
    vectors += (here + VL - 1) / VL;
  }
  return 3 * vectors <= (s.stride_x == 1 ? 4 : 6) * ((t.columns + VL - 1) / VL) ? size : 0;
}

template <int SIZE>
int find_sights(const Step& s, const char* data, const Place& x, Tile t, Sight<SIZE>* sights) {
  const int64_t* away = reinterpret_cast<const int64_t*>(data + s.picks);
  Sight<SIZE>* sight = sights;
  int64_t y = t.column0 / s.out_width, x0 = t.column0 % s.out_width;
  for (int64_t done = 0; done < t.columns; ++sight) {
    const int64_t count = std::min({int64_t(VL), s.out_width - x0, t.columns - done});
    const int64_t column = s.stride_x * x0 + away[1], row = s.stride_y * y + away[0];
    const int64_t taps = s.stride_x * (count - 1) + SIZE;
    sight->target = done;
    sight->count = int(count);
    for (int64_t k = 0; k < SIZE; ++k) {
      auto lanes_before = [&](int64_t end) { return end <= column + k ? 0 : (end - column - k - 1) / s.stride_x + 1; };
      const int64_t stop = std::min(count, lanes_before(s.in_width));
      sight->lanes[k] = Lanes(std::min(stop, lanes_before(0)), stop);
    }
    sight->begin = std::clamp<int64_t>(-column, 0, taps);
    sight->end = std::clamp<int64_t>(s.in_width - column, sight->begin, taps);
    const bool is_beside = sight->begin == sight->end;
    sight->first = int(std::clamp<int64_t>(-row, 0, SIZE));
    sight->stop = is_beside ? sight->first : int(std::clamp<int64_t>(s.in_height - row, sight->first, SIZE));
    sight->is_simple = sight->stop - sight->first == SIZE;
    for (int64_t k = sight->first; k < sight->stop; ++k) {
      const int64_t pixel = (row + k) * s.in_width + column + sight->begin;
      sight->rows[k] = x.at(pixel) - sight->begin;
      sight->before[k] = std::min(sight->end, sight->begin + std::min(x.in_a_row(pixel), taps));
      sight->is_simple = sight->is_simple && sight->before[k] == sight->end;
    }
    done += count;
    x0 += count;
    if (x0 == s.out_width) x0 = 0, ++y;
  }
  return int(sight - sights);
}

template <int SIZE, int STRIDE>
C10_ALWAYS_INLINE Vec add_row(Vec sum, const Vec* weights, const Lanes* lanes, const float* first) {
#pragma GCC unroll 5
  for (int k = 0; k < SIZE; ++k) sum = at::vec::fmadd(weights[k], lanes[k].template load<STRIDE>(first + k), sum);
  return sum;
}

// The sum of a vector whose rows are not all inside of the image, or in two pieces.
template <int SIZE, int STRIDE>
Vec add_pieces(Vec sum, const Vec* weights, const Sight<SIZE>& sight, const Place& x, const float* channel) {
  for (int row = sight.first; row < sight.stop; ++row) {
    const float* first = channel + sight.rows[row];
    float line[STRIDE * VL + SIZE];
    if (const int64_t before = sight.before[row]; before != sight.end) {
      std::copy(first + sight.begin, first + before, line + sight.begin);
      std::copy_n(channel, sight.end - before, line + before);
      first = line;
    }
    sum = add_row<SIZE, STRIDE>(sum, weights + row * SIZE, sight.lanes, first);
  }
  return sum;
}

// COUNT vectors of one row of the weight.
template <int SIZE, int STRIDE, int COUNT>
C10_ALWAYS_INLINE void slide_over(const Step& s, Vec bias, const Vec* weights, const Sight<SIZE>* sights, const Place& x,
                                  const float* channel, float* out, const float* add) {
  Vec acc[COUNT];
  for (int j = 0; j < COUNT; ++j) {
    acc[j] = bias;
    if (C10_LIKELY(sights[j].is_simple)) {
      for (int row = 0; row < SIZE; ++row) {
        acc[j] = add_row<SIZE, STRIDE>(acc[j], weights + row * SIZE, sights[j].lanes, channel + sights[j].rows[row]);
      }
    } else {
      acc[j] = add_pieces<SIZE, STRIDE>(acc[j], weights, sights[j], x, channel);
    }
    if (add != nullptr) acc[j] = acc[j] + Vec::loadu(add + sights[j].target, sights[j].count);
  }
  activate(acc, s);
  for (int j = 0; j < COUNT; ++j) acc[j].store(out + sights[j].target, sights[j].count);
}

template <int SIZE, int STRIDE>
void compute_sliding(const Step& s, const char* data, const Place& x, Tile t, const Place& y, const Place& residual) {
  const float* bias = reinterpret_cast<const float*>(data + s.bias);
  const float* weight = reinterpret_cast<const float*>(data + s.taps) + t.row0 * SIZE * SIZE;
  Sight<SIZE> sights[MAX_SIGHTS];
  const int count = find_sights<SIZE>(s, data, x, t, sights);
  for (int64_t m = t.row0; m < t.row1; ++m, weight += SIZE * SIZE) {
    const float* channel = x.data + m / s.rows_per_channel * x.row_stride;
    float* out = y.data + m * y.row_stride + t.column0;
    const float* add = residual.data == nullptr ? nullptr : residual.data + m * residual.row_stride + t.column0;
    Vec weights[SIZE * SIZE];
    for (int k = 0; k < SIZE * SIZE; ++k) weights[k] = Vec(weight[k]);
    int j = 0;
    for (; j + 4 <= count; j += 4) slide_over<SIZE, STRIDE, 4>(s, Vec(bias[m]), weights, sights + j, x, channel, out, add);
    for (; j < count; ++j) slide_over<SIZE, STRIDE, 1>(s, Vec(bias[m]), weights, sights + j, x, channel, out, add);
  }
}

// Rows of a tile of a depthwise step, where a small kernel slides over rows; false where it does not.
inline bool slide(const Step& s, const char* data, const Place& x, Tile t, const Place& y, const Place& residual) {
  const int64_t size = sliding_size(s, data, x, t);
  if (size == 0) return false;
  using Sliding = void (*)(const Step&, const char*, const Place&, Tile, const Place&, const Place&);
  constexpr Sliding of[2][2] = {{compute_sliding<3, 1>, compute_sliding<3, 2>}, {compute_sliding<5, 1>, compute_sliding<5, 2>}};
  of[size == 5][s.stride_x - 1](s, data, x, t, y, residual);
  return true;
}

}  // namespace
