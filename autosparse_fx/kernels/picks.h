// Columns of a tile that do not lie side by side where they come from.
#pragma once

#include <algorithm>

#include "program.h"

namespace {

#if defined(CPU_CAPABILITY_AVX512)

// Copies the floats at given positions side by side, for any number of rows: a vector at a time, whose lanes come out of
// one window of 32 floats or two, or are gathered.
class Picks {
  struct Window {
    int64_t from;
    __m512i lanes;
    __mmask16 low, high;  // what is read of either half
    __m512 of(const float* row) const {
      const float* start = row + from;
      return _mm512_permutex2var_ps(_mm512_maskz_loadu_ps(low, start), lanes, _mm512_maskz_loadu_ps(high, start + VL));
    }
  };
  struct Vector {
    Window first, second;
    __mmask16 from_second, wanted;
    bool is_gathered;
    __m512i positions;
  };
  Vector vectors_[MAX_NV];
  int count_ = 0;

 public:
  // Of the positions only those of one row: `copy` is told where rows begin. The memory behind the last of them is read
  // by others than this class.
  Picks(const int64_t* positions, int64_t columns, bool /* is_readable_beyond */) {
    for (int64_t done = 0; done < columns; done += VL) add(positions + done, int(std::min<int64_t>(VL, columns - done)));
  }

  // dst[k * stride + i] = row(k)[positions[i]]
  template <typename F>
  void copy(F row, int64_t rows, float* dst, int64_t stride) const {
    for (const Vector* v = vectors_; v != vectors_ + count_; ++v, dst += VL) {
      if (v->is_gathered) {
        for (int64_t k = 0; k < rows; ++k) {
          const __m512 zero = _mm512_setzero_ps();
          _mm512_storeu_ps(dst + k * stride, _mm512_mask_i32gather_ps(zero, v->wanted, v->positions, row(k), 4));
        }
      } else if (v->from_second == 0) {
        const Window first = v->first;
        for (int64_t k = 0; k < rows; ++k) _mm512_storeu_ps(dst + k * stride, first.of(row(k)));
      } else {
        const Window first = v->first, second = v->second;
        for (int64_t k = 0; k < rows; ++k) {
          const float* from = row(k);
          _mm512_storeu_ps(dst + k * stride, _mm512_mask_blend_ps(v->from_second, first.of(from), second.of(from)));
        }
      }
    }
  }

 private:
  void add(const int64_t* positions, int lanes) {
    alignas(64) int32_t at[2][VL] = {}, all[VL] = {};
    Vector& v = vectors_[count_++];
    Window* windows[2] = {&v.first, &v.second};
    v = Vector{};
    int window = -1;
    for (int i = 0; i < lanes; ++i) {
      all[i] = int32_t(positions[i]);
      v.wanted |= __mmask16(1u << i);
      if (window < 0 || positions[i] < windows[window]->from || positions[i] >= windows[window]->from + 2 * VL) {
        if (window == 1) v.is_gathered = true;
        if (v.is_gathered) continue;
        windows[++window]->from = positions[i];
      }
      const int lane = int(positions[i] - windows[window]->from);
      at[window][i] = lane;
      (lane < VL ? windows[window]->low : windows[window]->high) |= __mmask16(1u << lane % VL);
      if (window == 1) v.from_second |= __mmask16(1u << i);
    }
    v.first.lanes = _mm512_load_si512(at[0]);
    v.second.lanes = _mm512_load_si512(at[1]);
    v.positions = _mm512_load_si512(all);
  }
};

#else

// Copies the floats at given positions side by side, for any number of rows: those that are side by side already as
// vectors. What a vector holds beyond them is overwritten by the next one, or lies behind the tile.
class Picks {
  struct Run {
    int64_t from, to, columns;
  };
  Run runs_[MAX_NV * VL];
  int count_ = 0;
  bool is_readable_beyond_;

 public:
  // is_readable_beyond: whether there is a vector's memory behind the last position.
  Picks(const int64_t* positions, int64_t columns, bool is_readable_beyond) : is_readable_beyond_(is_readable_beyond) {
    for (int64_t i = 0; i < columns; ++i) {
      if (i == 0 || positions[i] != positions[i - 1] + 1) runs_[count_++] = {positions[i], i, 0};
      ++runs_[count_ - 1].columns;
    }
  }

  // dst[k * stride + i] = row(k)[positions[i]]
  template <typename F>
  void copy(F row, int64_t rows, float* dst, int64_t stride) const {
    for (int64_t k = 0; k < rows; ++k, dst += stride) {
      const float* from = row(k);
      for (const Run* run = runs_; run != runs_ + count_; ++run) {
        int64_t i = 0;
        for (; i + VL <= run->columns; i += VL) Vec::loadu(from + run->from + i).store(dst + run->to + i);
        if (is_readable_beyond_ && i < run->columns) {
          Vec::loadu(from + run->from + i).store(dst + run->to + i);
        } else {
          for (; i < run->columns; ++i) dst[run->to + i] = from[run->from + i];
        }
      }
    }
  }
};

#endif

}  // namespace
