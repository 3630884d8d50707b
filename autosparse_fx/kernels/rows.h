// The rows of a weight: multiplied with a tile, finished and written.
#pragma once

#include <c10/macros/Macros.h>

#include <algorithm>
#include <array>
#include <utility>

#include "picks.h"
#include "program.h"

namespace {

// Inlined in any case: in many copies of a loop over rows the compiler decides otherwise, and sums go through memory.
template <int NV>
C10_ALWAYS_INLINE void activate(Vec (&x)[NV], const Step& s) {
  auto each = [&](auto f) C10_ALWAYS_INLINE_ATTRIBUTE {
    for (int j = 0; j < NV; ++j) x[j] = f(x[j]);
  };
  const Vec a(float(s.constants[0])), b(float(s.constants[1])), zero(0.f);
  switch (s.activation) {
    case RELU: return each([=](Vec v) { return at::vec::maximum(v, zero); });
    case CLAMP: return each([=](Vec v) { return at::vec::clamp(v, a, b); });
    case LEAKY_RELU: return each([=](Vec v) { return at::vec::maximum(v, zero) + a * at::vec::minimum(v, zero); });
    case ELU: return each([=](Vec v) { return b * at::vec::maximum(v, zero) + a * at::vec::minimum(v, zero).expm1(); });
    case GELU:
      return each([](Vec v) { return Vec(0.5f) * v * (Vec(1.f) + (v * Vec(0.70710678118654752440f)).erf()); });
    case GELU_TANH:
      return each([](Vec v) {
        Vec inner = Vec(0.79788456080286535588f) * (v + Vec(0.044715f) * v * v * v);
        return Vec(0.5f) * v * (Vec(1.f) + inner.tanh());
      });
    case SILU: return each([](Vec v) { return v / (Vec(1.f) + v.neg().exp()); });
    case HARDSWISH:
      return each([](Vec v) { return v * at::vec::clamp(v + Vec(3.f), Vec(0.f), Vec(6.f)) / Vec(6.f); });
    case HARDSIGMOID: return each([](Vec v) { return at::vec::clamp(v + Vec(3.f), Vec(0.f), Vec(6.f)) / Vec(6.f); });
    case SIGMOID: return each([](Vec v) { return Vec(1.f) / (Vec(1.f) + v.neg().exp()); });
    case TANH: return each([](Vec v) { return v.tanh(); });
    case MISH:
      return each([](Vec v) {  // v * tanh(log(1 + e)) with e = exp(v), which must not overflow
        const Vec e = at::vec::minimum(v, Vec(20.f)).exp(), n = e * (e + Vec(2.f));
        return v * n / (n + Vec(2.f));
      });
    default: return;
  }
}

// Whether the columns of a tile, which belong to several images, are not side by side in memory.
inline bool is_in_pieces(const Step& s, const Place& y, const Place& residual) {
  if (!s.joint) return false;
  return y.image_stride != s.columns || (residual.data != nullptr && residual.image_stride != s.columns);
}

// Writes one row of such a tile, an image at a time.
void write_pieces(const Step& s, const float* line, Tile t, int64_t m, const Place& y, const Place& residual) {
  float* out = y.data + m * y.row_stride;
  const float* add = residual.data + m * residual.row_stride;
  for (int64_t done = 0, here; done < t.columns; done += here) {
    const int64_t image = (t.column0 + done) / s.columns, x = (t.column0 + done) % s.columns;
    here = std::min(s.columns - x, t.columns - done);
    for (int64_t i = 0; i < here; i += VL) {
      int n = int(std::min<int64_t>(VL, here - i));
      Vec value[1] = {Vec::loadu(line + done + i, n)};
      if (residual.data != nullptr) value[0] = value[0] + Vec::loadu(add + image * residual.image_stride + x + i, n);
      activate(value, s);
      value[0].store(out + image * y.image_stride + x + i, n);
    }
  }
}

// The end of a row of a tile, whose sums are complete.
template <int NV>
C10_ALWAYS_INLINE void finish(const Step& s, Vec (&acc)[NV], int64_t m, float* sums, Tile t, const Place& y, const Place& residual) {
  const int tail = int(t.columns - (NV - 1) * VL);
  if (y.column_stride != 1) {  // tokens: the caller turns the finished tile around
    activate(acc, s);
    for (int j = 0; j < NV; ++j) acc[j].store(sums + j * VL);
  } else if (is_in_pieces(s, y, residual)) {
    alignas(64) float line[NV * VL];
    for (int j = 0; j < NV; ++j) acc[j].store(line + j * VL);
    write_pieces(s, line, t, m, y, residual);
  } else {
    float* out = y.data + m * y.row_stride + t.column0;
    if (residual.data != nullptr) {
      const float* add = residual.data + m * residual.row_stride + t.column0;
      for (int j = 0; j < NV - 1; ++j) acc[j] = acc[j] + Vec::loadu(add + j * VL);
      acc[NV - 1] = acc[NV - 1] + Vec::loadu(add + (NV - 1) * VL, tail);
    }
    activate(acc, s);
    for (int j = 0; j < NV - 1; ++j) acc[j].store(out + j * VL);
    acc[NV - 1].store(out + (NV - 1) * VL, tail);
  }
}

// Rows of one block whose pattern is machine code (see machine_code.py): a group of rows at a time.
template <int NV>
void compute_coded(const Step& s, const Block& b, const char* data, const char* x, float* partial, Tile t,
                   const Place& y, const Place& residual) {
  using Code = void (*)(const char* x, const char* weights, float* sums, const float* bias);
  const Group* groups = reinterpret_cast<const Group*>(data + b.groups);
  const float* bias = reinterpret_cast<const float*>(data + s.bias);
  const int64_t partial_stride = s.vectors * VL;
  const bool are_kept = !(b.first && b.last) || y.column_stride != 1;  // sums, beyond this group
  for (int64_t g = 0; g < b.group_count; ++g) {
    const Group& group = groups[g];
    if (group.row0 < t.row0 || group.row1 > t.row1) continue;
    float* sums = are_kept ? partial + (group.row0 - t.row0) * partial_stride : partial;
    const Code code = reinterpret_cast<Code>(data + group.code);
    // The next group's instructions and weights lie behind this one's, and the processor would wait for each line.
    const int64_t ahead = g + 1 < b.group_count ? groups[g + 1].code - group.code : 0;
    const char* next = data + group.code + ahead;
    for (int j = 0; j < NV; ++j) {
      for (int64_t i = ahead * j / NV; i < ahead * (j + 1) / NV; i += 64) __builtin_prefetch(next + i, 0, 2);
      code(x + j * sizeof(Vec) + X_BIAS, data + group.weights + WEIGHT_BIAS, sums + j * VL, bias + group.row0);
    }
    if (!b.last) continue;
    for (int64_t m = group.row0; m < group.row1; ++m, sums += partial_stride) {
      Vec acc[NV];
      for (int j = 0; j < NV; ++j) acc[j] = Vec::loadu(sums + j * VL);
      finish(s, acc, m, sums, t, y, residual);
    }
  }
}

// What is read some hundreds of entries later.
inline void prefetch_entries(const Offset* offset, const float* value) {
  __builtin_prefetch(reinterpret_cast<const char*>(offset) + 512, 0, 3);
  __builtin_prefetch(reinterpret_cast<const char*>(value) + 1024, 0, 3);
}

// Rows of one block whose pattern is entries.
template <int NV>
void compute_entries(const Step& s, const Block& b, const char* data, const char* x, float* partial, Tile t,
                     const Place& y, const Place& residual) {
  const int32_t* starts = reinterpret_cast<const int32_t*>(data + b.starts);
  const Offset* offsets = reinterpret_cast<const Offset*>(data + b.offsets);
  const float* values = reinterpret_cast<const float*>(data + b.values);
  const float* source = reinterpret_cast<const float*>(x);
  const float* bias = reinterpret_cast<const float*>(data + s.bias);
  for (int64_t m = std::max(b.row0, t.row0), end = std::min(b.row1, t.row1); m < end; ++m) {
    Vec acc[NV];
    float* sums = partial + (m - t.row0) * s.vectors * VL;
    if (b.first) {
      for (int j = 0; j < NV; ++j) acc[j] = Vec(bias[m]);
    } else {
      for (int j = 0; j < NV; ++j) acc[j] = Vec::loadu(sums + j * VL);
    }
    for (int64_t e = starts[m - b.row0], stop = starts[m - b.row0 + 1]; e != stop; ++e) {
      if constexpr (NV <= 2) prefetch_entries(offsets + e, values + e);  // few columns: entries take the time
      const float* p = source + offsets[e];
      const Vec v(values[e]);
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) acc[j] = at::vec::fmadd(v, Vec::loadu(p + j * VL), acc[j]);
    }
    if (b.last) {
      finish(s, acc, m, sums, t, y, residual);
    } else {
      for (int j = 0; j < NV; ++j) acc[j].store(sums + j * VL);
    }
  }
}

// Rows of one block. `partial` holds the sums between blocks: [rows][s.vectors * VL].
template <int NV>
void compute(const Step& s, const Block& b, const char* data, const char* x, float* partial, Tile t, const Place& y,
             const Place& residual) {
  if (b.group_count > 0) return compute_coded<NV>(s, b, data, x, partial, t, y, residual);
  if constexpr (NV <= REGISTERS) compute_entries<NV>(s, b, data, x, partial, t, y, residual);
}

// Rows that read a single channel each.
template <int NV>
void compute_depthwise(const Step& s, const char* data, const Place& x, const Pick* picks, float* partial, Tile t,
                       const Place& y, const Place& residual) {
  const float* bias = reinterpret_cast<const float*>(data + s.bias);
  const float* weight = reinterpret_cast<const float*>(data + s.taps) + t.row0 * s.pick_count;
  // What other threads have just written of the channels would be waited for, one channel after the other; not so what
  // this one has, in a ring.
  const int64_t line = 64 / sizeof(float), ahead = 8 * x.row_stride;
  int64_t first = INT64_MAX, last = 0;
  for (const Pick* pick = picks; pick != picks + s.pick_count * NV; ++pick) {
    if (pick->first() == PADDING) continue;
    first = std::min(first, pick->first());
    last = std::max(last, pick->first() + VL);
  }
  auto each_row = [&](auto of) C10_ALWAYS_INLINE_ATTRIBUTE {
    for (int64_t m = t.row0; m < t.row1; ++m) {
      const float* channel = x.data + m / s.rows_per_channel * x.row_stride;
      for (int64_t i = first; i < last && x.ring == 0; i += line) __builtin_prefetch(channel + ahead + i);
      Vec acc[NV];
      for (int j = 0; j < NV; ++j) acc[j] = Vec(bias[m]);
      const Pick* pick = picks;
      for (int64_t k = 0; k < s.pick_count; ++k, ++weight, pick += NV) {
        const Vec v(*weight);
#pragma GCC unroll 16
        for (int j = 0; j < NV; ++j) acc[j] = at::vec::fmadd(v, of(pick[j], channel), acc[j]);
      }
      finish(s, acc, m, partial, t, y, residual);
    }
  };
  if (std::all_of(picks, picks + s.pick_count * NV, [](const Pick& pick) { return pick.is_shift(); })) {
    each_row([](const Pick& pick, const float* channel) { return pick.shifted(channel); });
  } else {
    each_row([](const Pick& pick, const float* channel) { return pick.of(channel); });
  }
}

using ComputeDepthwise = void (*)(const Step&, const char*, const Place&, const Pick*, float*, Tile, const Place&,
                                  const Place&);
template <int... NV>
constexpr std::array<ComputeDepthwise, sizeof...(NV)> depthwise_computes(std::integer_sequence<int, NV...>) {
  return {compute_depthwise<NV + 1>...};
}
constexpr auto COMPUTE_DEPTHWISE = depthwise_computes(std::make_integer_sequence<int, REGISTERS>());

using Compute = void (*)(const Step&, const Block&, const char*, const char*, float*, Tile, const Place&, const Place&);
template <int... NV>
constexpr std::array<Compute, sizeof...(NV)> computes(std::integer_sequence<int, NV...>) {
  return {compute<NV + 1>...};
}
constexpr auto COMPUTE = computes(std::make_integer_sequence<int, MAX_NV>());  // for 1, 2, ... vectors

}  // namespace
