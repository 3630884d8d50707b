// Runs a program: sparse (and grouped) convolutions and linear layers in a row, each with its bias, residual and
// activation, over one image or one chunk of tokens after the other. Everything about the program is data (see
// program.py, which writes what the structs below read); only the tile width is compiled in.
//
// A step computes Y[m][p] = act(bias[m] + sum_e value[e] * X[offset[e] + p] + residual[m][p]) for tiles of p that are
// NV vectors wide, and for blocks of input channels that fit a cache. A tap of a kernel larger than 1x1 is an offset into
// the block like any other. Either the block holds zero-padded planes (one per phase of the stride), and p runs over
// their grid, whose columns beyond the output's are computed and dropped (GRID); or it holds a row per channel and tap,
// all of them aligned, which costs more to pack and pays when many rows of the weight read it (GATHERED).

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <omp.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

// Whether programs may hold machine code of machine_code.py.
#if defined(__linux__) && defined(__x86_64__) && defined(__AVX512F__)
#define RUNS_CODE 1
#else
#define RUNS_CODE 0
#endif

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int VL = Vec::size();
constexpr int MAX_NV = 8;
// How much further the arguments of machine code point (see machine_code.py).
constexpr int64_t X_BIAS = 128 * 64, WEIGHT_BIAS = 128 * 4;

struct Entry {
  int32_t offset;  // bytes from the start of the tile in the packed block, or in the source where it is read directly
  float value;
};

struct Block {  // rows [row0, row1) over input channels [channel0, channel1)
  int64_t row0, row1, channel0, channel1, first, last;
  int64_t starts;  // byte position in data: row1 - row0 + 1 positions in entries, int32
  int64_t entries;
  int64_t groups, group_count;  // instead of the entries, where the pattern is machine code
};

struct Group {  // rows [row0, row1) as machine code
  int64_t row0, row1;
  int64_t code, weights;  // byte positions in data
};

struct Buffer {
  int64_t kind;  // 0: in the arena, 1: an input, 2: an output
  int64_t index;  // byte position in the arena, or number of the input or output
  int64_t row_stride;  // floats from one channel to the next
  int64_t column_stride;  // floats from one column to the next: 1, or the channels where they are contiguous (tokens)
  // Floats from one image to the next, or from one token to the next; 0 in the arena where every image has the same
  // place.
  int64_t unit_stride;
  // Floats to go on with every tile besides its width; not 0 for a buffer that holds tile after tile of its steps. And
  // the same where one thread works on the whole image: a tile that only its own chain reads may be overwritten then.
  int64_t tile_step, alone_tile_step;
};

struct Phase {  // of a stride: row r of its plane is row stride_y * r + y of the input, column q is stride_x * q + start
  int64_t y, start;
  int64_t first, stop;  // columns that are not padding
};

enum Mode : int64_t {
  PLAIN,  // 1x1, stride 1: columns are taken as they are
  DIRECT,  // the same, read where it lies: the source is in tiles
  GRID,
  GATHERED,
  PLANES,  // of groups: like GRID, but the whole planes of a group's channels, for all of its columns
  STRIDED,  // 1x1, without padding: columns are picked one by one, from whatever layout the source has
};

enum Activation : int64_t { NONE, RELU, CLAMP, GELU, GELU_TANH, SILU, HARDSWISH, SIGMOID };

struct Step {
  int64_t source, target, residual;  // numbers of buffers; residual -1 for none
  int64_t activation;
  double low, high;  // of CLAMP
  int64_t rows;
  int64_t in_height, in_width, out_height, out_width;
  int64_t stride_y, stride_x;
  int64_t pitch;  // of the grid; out_width where columns and grid are the same
  int64_t columns;  // of the grid, for one image
  int64_t vectors;  // width of a tile
  int64_t mode;
  int64_t channel_stride;  // floats of one channel in the packed block
  int64_t plane_pitch;  // floats of a row of a zero-padded plane
  int64_t phase_rows;  // grid rows that are packed per tile, and per image of it
  int64_t phase_stride;  // floats of one phase
  int64_t phases;  // byte position in data
  int64_t phase_count;
  int64_t taps;  // byte position in data: where each tap starts in the planes, int64
  int64_t tap_count;
  int64_t bias;  // byte position in data, rows floats
  int64_t blocks;  // byte position in data
  int64_t block_count;
  int64_t row_cost;  // byte position in data: rows + 1 running sums of entries, int64
  int64_t block_channels;  // the most channels of any block
  int64_t joint;  // all images of a unit side by side; so are they in all steps behind the first such one
  int64_t chain;  // this step and so many behind it, less one, are worked on tile by tile: each reads the one before
};

struct Header {
  int64_t steps, step_count, buffers;  // byte positions in data
  int64_t arena_bytes;
  int64_t home;  // the address of a program with machine code, which can be executed nowhere else; 0 without
  int64_t is_tokens;  // units are chunks of tokens instead of images
  int64_t per_unit;  // tokens of a chunk, or the most images that one thread works on at a time
};

struct Scratch {  // memory of one thread that stays for the next call
  char* memory = nullptr;
  size_t size = 0;
  char* get(size_t bytes) {
    if (bytes > size) {
      std::free(memory);
      size_t huge = size_t(2) << 20;
      size = (bytes + huge - 1) / huge * huge;
      memory = static_cast<char*>(std::aligned_alloc(huge, size));
      if (memory == nullptr) std::abort();
#if defined(__linux__)
      madvise(memory, size, MADV_HUGEPAGE);  // rows of a plane are pages apart
#endif
      std::memset(memory, 0, size);
    }
    return memory;
  }
  ~Scratch() { std::free(memory); }
};
thread_local Scratch arena_memory, tile_memory;

struct Barrier {  // of the threads that share an image
  std::atomic<int64_t> arrived{0}, phase{0};
  void wait(int64_t count) {
    if (count == 1) return;
    int64_t before = phase.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
      arrived.store(0, std::memory_order_relaxed);
      phase.store(before + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase.load(std::memory_order_acquire) == before; ++spins) {
      if (spins > 20000) std::this_thread::yield();
    }
  }
};

template <int NV>
inline void activate(Vec (&x)[NV], const Step& s) {
  auto each = [&](auto f) {
    for (int j = 0; j < NV; ++j) x[j] = f(x[j]);
  };
  switch (s.activation) {
    case RELU: return each([](Vec v) { return at::vec::maximum(v, Vec(0.f)); });
    case CLAMP: return each([&](Vec v) { return at::vec::clamp(v, Vec(float(s.low)), Vec(float(s.high))); });
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
    case SIGMOID: return each([](Vec v) { return Vec(1.f) / (Vec(1.f) + v.neg().exp()); });
    default: return;
  }
}

// One tile of one step, as the threads of a team see it.
struct Tile {
  int64_t column0, columns;  // in the grid
  int64_t row0, row1;  // of the output, this thread's
};

struct Place {  // where a buffer lies, for one image or for all images that are side by side
  float* data;
  int64_t row_stride, column_stride, tile_step, image_stride;

  Place in_tile(int64_t tile) const {
    return {data + tile * tile_step, row_stride, column_stride, tile_step, image_stride};
  }
};

// Whether the columns of a tile are not side by side in memory.
inline bool is_in_pieces(const Step& s, const Place& y, const Place& residual) {
  if (s.mode == GRID || s.mode == PLANES) return s.pitch != s.out_width;
  if (!s.joint) return false;
  return y.image_stride != s.columns || (residual.data != nullptr && residual.image_stride != s.columns);
}

// Writes one row of a tile whose columns lie on a wider grid than the output, a row of the output at a time; or belong
// to several images, an image at a time.
void write_pieces(const Step& s, const float* line, Tile t, int64_t m, const Place& y, const Place& residual) {
  const bool is_grid = s.mode == GRID || s.mode == PLANES;
  const int64_t period = is_grid ? s.pitch : s.columns, wanted = is_grid ? s.out_width : s.columns;
  const int64_t pieces = is_grid ? s.out_height : INT64_MAX;
  const int64_t y_step = is_grid ? s.out_width : y.image_stride, add_step = is_grid ? s.out_width : residual.image_stride;
  float* out = y.data + m * y.row_stride;
  const float* add = residual.data + m * residual.row_stride;
  for (int64_t column = t.column0, done = 0; done < t.columns;) {
    int64_t piece = column / period, x = column % period;
    int64_t here = std::min(period - x, t.columns - done), keep = std::min(here, wanted - x);
    for (int64_t i = 0; piece < pieces && i < keep; i += VL) {
      int n = int(std::min<int64_t>(VL, keep - i));
      Vec value[1] = {Vec::loadu(line + done + i, n)};
      if (residual.data != nullptr) value[0] = value[0] + Vec::loadu(add + piece * add_step + x + i, n);
      activate(value, s);
      value[0].store(out + piece * y_step + x + i, n);
    }
    column += here;
    done += here;
  }
}

// The end of a row of a tile, whose sums are complete.
template <int NV>
inline void finish(const Step& s, Vec (&acc)[NV], int64_t m, float* sums, Tile t, const Place& y, const Place& residual) {
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

// Rows of one block. `partial` holds the sums between blocks: [rows][s.vectors * VL].
template <int NV>
void compute(const Step& s, const Block& b, const char* data, const char* x, float* partial, Tile t, const Place& y,
             const Place& residual) {
  if (b.group_count > 0) return compute_coded<NV>(s, b, data, x, partial, t, y, residual);
  const int32_t* starts = reinterpret_cast<const int32_t*>(data + b.starts);
  const Entry* entries = reinterpret_cast<const Entry*>(data + b.entries);
  const float* bias = reinterpret_cast<const float*>(data + s.bias);
  for (int64_t m = std::max(b.row0, t.row0), end = std::min(b.row1, t.row1); m < end; ++m) {
    Vec acc[NV];
    float* sums = partial + (m - t.row0) * s.vectors * VL;
    if (b.first) {
      for (int j = 0; j < NV; ++j) acc[j] = Vec(bias[m]);
    } else {
      for (int j = 0; j < NV; ++j) acc[j] = Vec::loadu(sums + j * VL);
    }
    const Entry* e = entries + starts[m - b.row0];
    const Entry* stop = entries + starts[m - b.row0 + 1];
    for (; e != stop; ++e) {
      const float* p = reinterpret_cast<const float*>(x + e->offset);
      const Vec v(e->value);
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

using Compute = void (*)(const Step&, const Block&, const char*, const char*, float*, Tile, const Place&, const Place&);
template <int... NV>
constexpr std::array<Compute, sizeof...(NV)> computes(std::integer_sequence<int, NV...>) {
  return {compute<NV + 1>...};
}
constexpr auto COMPUTE = computes(std::make_integer_sequence<int, MAX_NV>());  // for 1, 2, ... vectors

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

// The vectors that make a row of columns of a tile, the same for every tap: a row of the output at a time. A vector that
// reaches beyond its row is overwritten by the next one, or lies behind the tile.
struct Copies {
  int32_t from[2 * MAX_NV * VL], to[2 * MAX_NV * VL];
  int count = 0;
  Copies(const Step& s, Tile t) {
    if (s.mode != GATHERED) return;
    for (int64_t done = 0; done < t.columns;) {
      int64_t column = t.column0 + done, x = column % s.out_width;
      int64_t here = std::min(s.out_width - x, t.columns - done);
      int64_t row = plane_row(s, t, column) * s.plane_pitch;
      for (int64_t i = 0; i < here; i += VL, ++count) {
        from[count] = int32_t(row + x + i);
        to[count] = int32_t(done + i);
      }
      done += here;
    }
  }
};

// One row of columns per tap, taken from the planes.
void gather(const Step& s, const char* data, const float* planes, const Copies& copies, float* dst) {
  const int64_t* taps = reinterpret_cast<const int64_t*>(data + s.taps);
  for (int64_t k = 0; k < s.tap_count; ++k, dst += s.vectors * VL) {
    const float* src = planes + taps[k];
    for (int i = 0; i < copies.count; ++i) Vec::loadu(src + copies.from[i]).store(dst + copies.to[i]);
  }
}

// Where the columns that a tile of a strided 1x1 layer reads lie in the source, in floats.
void pick_columns(const Step& s, const Place& x, Tile t, int64_t* positions) {
  for (int64_t i = 0; i < t.columns; ++i) {
    int64_t image = (t.column0 + i) / s.columns, p = (t.column0 + i) % s.columns;
    int64_t column = s.stride_y * (p / s.out_width) * s.in_width + s.stride_x * (p % s.out_width);
    int64_t tile = x.tile_step == 0 ? 0 : column / x.row_stride;
    positions[i] = image * x.image_stride + tile * x.tile_step + column * x.column_stride;
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
const char* pack(const Step& s, const Block& b, const char* data, const Place& x, float* packed, float* planes, Tile t,
                 const Copies& copies) {
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
    int64_t positions[MAX_NV * VL];
    pick_columns(s, x, t, positions);
    for (int64_t c = b.channel0; c < b.channel1; ++c) {
      const float* src = x.data + c * x.row_stride;
      float* dst = packed + (c - b.channel0) * s.channel_stride;
      for (int64_t i = 0; i < t.columns; ++i) dst[i] = src[positions[i]];
    }
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
  for (int64_t c = b.channel0; c < b.channel1; ++c) {
    fill_planes(s, data, x, x.data + c * x.row_stride, t, planes + (c - b.channel0) * plane_floats);
  }
  for (int64_t c = b.channel0; c < b.channel1; ++c) {
    gather(s, data, planes + (c - b.channel0) * plane_floats, copies, packed + (c - b.channel0) * s.channel_stride);
  }
  return reinterpret_cast<const char*>(packed);
}

struct TileMemory {  // what a thread needs for a tile of a step, in floats, one behind the other
  int64_t planes, partial, all;
  explicit TileMemory(const Step& s) {
    auto aligned = [](int64_t floats) { return (floats + 63) / 64 * 64; };
    const int64_t beyond = MAX_NV * VL + s.plane_pitch;  // what vectors reach beyond their tile
    planes = aligned(s.block_channels * s.channel_stride + beyond);
    partial = planes + aligned(s.block_channels * s.phase_count * s.phase_stride + beyond);
    all = partial + s.rows * s.vectors * VL;
  }
};

void run_tile(const Step& s, const char* data, const Place& x, const Place& y, const Place& residual, Tile t) {
  const TileMemory parts(s);
  float* packed = reinterpret_cast<float*>(tile_memory.get(parts.all * sizeof(float)));
  float *planes = packed + parts.planes, *partial = packed + parts.partial;
  const Block* blocks = reinterpret_cast<const Block*>(data + s.blocks);
  const Copies copies(s, t);
  auto run = [&](const Block& b, const char* start, Tile part) {
    COMPUTE[(part.columns + VL - 1) / VL - 1](s, b, data, start, partial, part, y, residual);
  };
  for (int64_t i = 0; i < s.block_count; ++i) {
    const Block& b = blocks[i];
    if (b.row1 <= t.row0 || b.row0 >= t.row1) continue;
    if (s.mode == DIRECT) {
      run(b, reinterpret_cast<const char*>(x.data + b.channel0 * x.row_stride + t.column0), t);
      continue;
    }
    const char* start = pack(s, b, data, x, packed, planes, t, copies);
    const int64_t width = s.mode == PLANES ? s.vectors * VL : t.columns;
    for (int64_t column = 0; column < t.columns; column += width) {
      Tile part{t.column0 + column, std::min(width, t.columns - column), t.row0, t.row1};
      run(b, start + column * sizeof(float), part);
    }
  }
  if (y.column_stride != 1) {
    turn(partial, s.vectors * VL, y.data + t.column0 * y.column_stride + t.row0, y.column_stride, t.row1 - t.row0,
         t.columns);
  }
}

// How the tiles of a step are shared by a team: side by side, and in rows where there are too few.
struct Share {
  int64_t width, tiles, row_parts, first, stop;
  Share(const Step& s, int64_t columns, int64_t member, int64_t team) {
    width = s.mode == PLANES ? columns : s.vectors * VL;
    tiles = (columns + width - 1) / width;
    row_parts = 1;
    while (row_parts < team && (tiles * row_parts) % team != 0 && tiles < 4 * team) ++row_parts;
    first = tiles * row_parts * member / team;
    stop = tiles * row_parts * (member + 1) / team;
  }
};

struct Places {
  Place source, target, residual;
};

// One part of a step: a tile, or some of its rows.
void run_part(const Step& s, const char* data, const Places& at, int64_t columns, const Share& share, int64_t part) {
  const int64_t* cost = reinterpret_cast<const int64_t*>(data + s.row_cost);
  const int64_t tile = part / share.row_parts, piece = part % share.row_parts, width = share.width;
  auto cut = [&](int64_t k) {
    if (k == 0 || k == share.row_parts) return k == 0 ? int64_t(0) : s.rows;
    return int64_t(std::lower_bound(cost, cost + s.rows, cost[s.rows] * k / share.row_parts) - cost);
  };
  Tile t{tile * width, std::min(width, columns - tile * width), cut(piece), cut(piece + 1)};
  if (t.row0 == t.row1) return;
  const Place source = s.mode == STRIDED ? at.source : at.source.in_tile(tile);
  run_tile(s, data, source, at.target.in_tile(tile), at.residual.in_tile(tile), t);
}

}  // namespace

// Floats in a vector, and vectors in the widest tile: what a program is laid out for.
extern "C" int64_t vector_length() { return VL; }
extern "C" int64_t most_vectors() { return MAX_NV; }

extern "C" int64_t runs_code() { return RUNS_CODE && VL * sizeof(float) == 64; }

// Lets the processor execute a program, and nobody write to it any more. 0, or an error number of the system's.
extern "C" int64_t make_executable(void* program, int64_t bytes) {
#if RUNS_CODE
  return mprotect(program, size_t(bytes), PROT_READ | PROT_EXEC) == 0 ? 0 : errno;
#else
  return ENOSYS;
#endif
}

// inputs, outputs: float32, [batch, channels, ...] images, or [batch, channels] tokens. batch: images or tokens.
// is_channels_last: of each input, whether its channels are contiguous; only for those that are read in the modes
// PLAIN and STRIDED. False for a copy of a program with machine code, in memory that cannot be executed.
extern "C" bool run_sparse_program(const char* data, const float* const* inputs, const bool* is_channels_last,
                                   float* const* outputs, int64_t batch, int64_t threads) {
  const Header& h = *reinterpret_cast<const Header*>(data);
  if (h.home != 0 && h.home != reinterpret_cast<int64_t>(data)) return false;
  if (batch == 0) return true;
  const Step* steps = reinterpret_cast<const Step*>(data + h.steps);
  const Buffer* buffers = reinterpret_cast<const Buffer*>(data + h.buffers);
  int64_t per_unit = h.per_unit;
  if (h.is_tokens && batch < per_unit * threads) {
    per_unit = ((batch + threads - 1) / threads + VL - 1) / VL * VL;  // so that every thread has some
  }
  // What belongs to one thread: chunks of tokens, or images; the threads share the images that are too few for that.
  const int64_t grain = h.is_tokens ? per_unit : 1, grains = (batch + grain - 1) / grain;
  const int64_t apart = h.is_tokens ? grains : grains / threads * threads;
  auto edge = [&](int64_t member) { return std::min(batch, apart * member / threads * grain); };
  char* shared = edge(threads) < batch ? arena_memory.get(h.arena_bytes) : nullptr;
  Barrier barrier;

  // `first`: the image or token that a unit begins with. `image`: of the unit; none where all of them are side by side.
  auto place = [&](int64_t number, int64_t first, int64_t image, char* arena, bool is_alone) -> Place {
    if (number < 0) return {nullptr, 0, 0, 0, 0};
    const Buffer& b = buffers[number];
    float* base = b.kind == 0 ? reinterpret_cast<float*>(arena + b.index)
        : b.kind == 1         ? const_cast<float*>(inputs[b.index])
                              : outputs[b.index];
    base += ((b.kind == 0 ? 0 : first) + image) * b.unit_stride;
    if (b.kind == 1 && !h.is_tokens && is_channels_last[b.index]) {
      return {base, 1, b.unit_stride / b.row_stride, 0, b.unit_stride};
    }
    return {base, b.row_stride, b.column_stride, is_alone ? b.alone_tile_step : b.tile_step, b.unit_stride};
  };
  // Runs the step and the rest of its chain, and returns the step behind.
  auto run_chain = [&](const Step* s, int64_t columns, auto at, int64_t member, int64_t team) {
    const Step* chain = s + s->chain;
    const Share share(*s, columns, member, team);
    if (share.row_parts > 1) chain = s + 1;  // the next step needs rows of other members
    for (int64_t part = share.first; part < share.stop; ++part) {
      for (const Step* link = s; link < chain; ++link) {
        const Places places{at(link->source), at(link->target), at(link->residual)};
        run_part(*link, data, places, columns, share, part);
      }
    }
    barrier.wait(team);
    return chain;
  };
  auto run_unit = [&](int64_t first, int64_t count, char* arena, int64_t member, int64_t team) {
    const Step *begin = steps, *stop = steps + h.step_count;
    for (int64_t image = 0; !h.is_tokens && image < count; ++image) {
      auto at = [&](int64_t number) { return place(number, first, image, arena, team == 1); };
      for (begin = steps; begin < stop && !begin->joint;) begin = run_chain(begin, begin->columns, at, member, team);
    }
    auto at = [&](int64_t number) { return place(number, first, 0, arena, team == 1); };
    while (begin < stop) {
      begin = run_chain(begin, h.is_tokens ? count : count * begin->columns, at, member, team);
    }
  };
#pragma omp parallel num_threads(int(threads))
  {
    int64_t member = omp_get_thread_num(), team = omp_get_num_threads();
    auto run_own = [&](int64_t from, int64_t to) {
      if (from == to) return;
      char* own = arena_memory.get(h.arena_bytes);
      for (int64_t i = from; i < to; i += per_unit) run_unit(i, std::min(per_unit, to - i), own, 0, 1);
    };
    if (team == threads) {
      run_own(edge(member), edge(member + 1));
      if (edge(threads) < batch) barrier.wait(team);  // the shared memory is also one thread's own
      for (int64_t i = edge(threads); i < batch; ++i) run_unit(i, 1, shared, member, team);
    } else if (member == 0) {  // fewer threads than were asked for
      run_own(0, batch);
    }
  }
  return true;
}
