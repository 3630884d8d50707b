// Depthwise layers that read every second column, which a shift of vectors can't give: a window of two vectors gives the
// columns of two taps.
#pragma once

#include <algorithm>
#include <utility>

#include "picks.h"
#include "program.h"
#include "rows.h"

namespace {

// Floats [first, stop) of a vector; the others are zero, and are not read.
class Stretch {
 public:
  Stretch() = default;
  Stretch(int64_t first, int64_t stop);
  Vec load(const float* lane0) const;

 private:
#if PICKS_BY_MASK
  LaneMask wanted_;
#else
  int64_t first_, stop_;
#endif
};

#if PICKS_BY_MASK

inline Stretch::Stretch(int64_t first, int64_t stop)
    : wanted_(mask_of(first < stop ? (uint32_t(1) << stop) - (uint32_t(1) << first) : 0)) {}
inline Vec Stretch::load(const float* lane0) const { return load_lanes(wanted_, lane0); }

#else

inline Stretch::Stretch(int64_t first, int64_t stop) : first_(first), stop_(std::max(first, stop)) {}
inline Vec Stretch::load(const float* lane0) const {
  if (first_ == 0 && stop_ == VL) return Vec::loadu(lane0);
  float lanes[VL] = {};
  std::copy(lane0 + first_, lane0 + stop_, lanes + first_);
  return Vec::loadu(lanes);
}

#endif

// Up to VL output pixels of one row of the image, and where a kernel of SIZE x SIZE taps side by side reads for them.
template <int SIZE>
struct Sight {
  int64_t target;  // column of the tile
  int count;
  bool is_simple;  // whether all rows of the kernel are inside of the image, and each in one piece
  int first, stop;  // the rows of the kernel that are inside
  // Where the first tap of each row reads for the first pixel, in floats from the start of a channel.
  int64_t rows[SIZE];
  Stretch low[(SIZE + 1) / 2], high[(SIZE + 1) / 2];  // of the window of every other tap
  // What is read of a row, in floats from its first one. The ring ends before `broken` of them, or behind all.
  int64_t begin, end, broken[SIZE];
};

constexpr int MAX_SIGHTS = 2 * REGISTERS;  // of a tile

// How many taps a side the kernel of a step has where it is computed so; or 0.
inline int64_t strided_size(const Step& s, const char* data, const Place& x, Tile t) {
  if (s.stride_x != 2 || s.joint || x.column_stride != 1 || x.tile_step != 0) return 0;
  const int64_t* away = reinterpret_cast<const int64_t*>(data + s.picks);
  const int64_t size = s.pick_count == 9 ? 3 : s.pick_count == 25 ? 5 : 0;
  for (int64_t k = 0; k < size * size; ++k) {
    if (away[2 * k] != away[0] + k / size || away[2 * k + 1] != away[1] + k % size) return 0;
  }
  int64_t vectors = 0;  // which end with each row of the image: it may be too short for that
  for (int64_t done = 0, here; done < t.columns; done += here) {
    here = std::min(s.out_width - (t.column0 + done) % s.out_width, t.columns - done);
    vectors += (here + VL - 1) / VL;
  }
  return vectors <= 2 * ((t.columns + VL - 1) / VL) ? size : 0;
}

template <int SIZE>
int find_sights(const Step& s, const char* data, const Place& x, Tile t, Sight<SIZE>* sights) {
  const int64_t* away = reinterpret_cast<const int64_t*>(data + s.picks);
  Sight<SIZE>* sight = sights;
  int64_t y = t.column0 / s.out_width, x0 = t.column0 % s.out_width;
  for (int64_t done = 0; done < t.columns; ++sight) {
    const int64_t count = std::min({int64_t(VL), s.out_width - x0, t.columns - done});
    const int64_t column = 2 * x0 + away[1], row = s.stride_y * y + away[0], taps = 2 * (count - 1) + SIZE;
    sight->target = done;
    sight->count = int(count);
    sight->begin = std::clamp<int64_t>(-column, 0, taps);
    sight->end = std::clamp<int64_t>(s.in_width - column, sight->begin, taps);
    for (int64_t k = 0; k < SIZE; k += 2) {
      auto lanes = [&](int64_t from) {
        return Stretch(std::clamp<int64_t>(sight->begin - from, 0, VL), std::clamp<int64_t>(sight->end - from, 0, VL));
      };
      sight->low[k / 2] = lanes(k);
      sight->high[k / 2] = lanes(k + VL);
    }
    sight->first = int(std::clamp<int64_t>(-row, 0, SIZE));
    sight->stop = int(std::clamp<int64_t>(s.in_height - row, sight->first, SIZE));
    if (sight->begin == sight->end) sight->stop = sight->first;
    sight->is_simple = sight->stop - sight->first == SIZE;
    for (int64_t k = sight->first; k < sight->stop; ++k) {
      const int64_t pixel = (row + k) * s.in_width + column + sight->begin;
      sight->rows[k] = x.at(pixel) - sight->begin;
      sight->broken[k] = std::min(sight->end, sight->begin + std::min(x.in_a_row(pixel), taps));
      sight->is_simple = sight->is_simple && sight->broken[k] == sight->end;
    }
    done += count;
    x0 += count;
    if (x0 == s.out_width) x0 = 0, ++y;
  }
  return int(sight - sights);
}

template <int SIZE>
C10_ALWAYS_INLINE Vec add_row(Vec sum, const Vec* weights, const Sight<SIZE>& sight, const float* first) {
#pragma GCC unroll 3
  for (int k = 0; k < SIZE; k += 2) {
    const auto [here, next] = at::vec::deinterleave2(sight.low[k / 2].load(first + k), sight.high[k / 2].load(first + k + VL));
    sum = at::vec::fmadd(weights[k], here, sum);
    if (k + 1 < SIZE) sum = at::vec::fmadd(weights[k + 1], next, sum);
  }
  return sum;
}

// The sum of a vector whose rows are not all inside of the image, or in two pieces.
template <int SIZE>
Vec add_pieces(Vec sum, const Vec* weights, const Sight<SIZE>& sight, const float* channel) {
  for (int row = sight.first; row < sight.stop; ++row) {
    const float* first = channel + sight.rows[row];
    float line[2 * VL + SIZE];
    if (const int64_t broken = sight.broken[row]; broken != sight.end) {
      std::copy(first + sight.begin, first + broken, line + sight.begin);
      std::copy_n(channel, sight.end - broken, line + broken);  // the ring goes on at its start
      first = line;
    }
    sum = add_row<SIZE>(sum, weights + row * SIZE, sight, first);
  }
  return sum;
}

// COUNT vectors of one row of the weight.
template <int SIZE, int COUNT>
C10_ALWAYS_INLINE void compute_sights(const Step& s, Vec bias, const Vec* weights, const Sight<SIZE>* sights,
                                      const float* channel, float* out, const float* add) {
  Vec acc[COUNT];
  for (int j = 0; j < COUNT; ++j) {
    const Sight<SIZE>& sight = sights[j];
    acc[j] = bias;
    if (C10_LIKELY(sight.is_simple)) {
      for (int row = 0; row < SIZE; ++row) {
        acc[j] = add_row<SIZE>(acc[j], weights + row * SIZE, sight, channel + sight.rows[row]);
      }
    } else {
      acc[j] = add_pieces<SIZE>(acc[j], weights, sight, channel);
    }
    if (add != nullptr) acc[j] = acc[j] + Vec::loadu(add + sight.target, sight.count);
  }
  activate(acc, s);
  for (int j = 0; j < COUNT; ++j) acc[j].store(out + sights[j].target, sights[j].count);
}

template <int SIZE>
void compute_strided(const Step& s, const char* data, const Place& x, Tile t, const Place& y, const Place& residual) {
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
    for (; j + 4 <= count; j += 4) compute_sights<SIZE, 4>(s, Vec(bias[m]), weights, sights + j, channel, out, add);
    for (; j < count; ++j) compute_sights<SIZE, 1>(s, Vec(bias[m]), weights, sights + j, channel, out, add);
  }
}

// The rows of a tile of such a layer; false where it is none.
inline bool run_strided(const Step& s, const char* data, const Place& x, Tile t, const Place& y, const Place& residual) {
  const int64_t size = strided_size(s, data, x, t);
  if (size == 3) compute_strided<3>(s, data, x, t, y, residual);
  if (size == 5) compute_strided<5>(s, data, x, t, y, residual);
  return size != 0;
}

}  // namespace
