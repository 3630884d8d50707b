// Runs a program: sparse (and grouped) convolutions and linear layers in a row, each with its bias, residual and
// activation, over one image or one chunk of tokens after the other. Everything about the program is data (see
// program.py, which writes what the structs below read); only the tile width is compiled in.
//
// A step computes Y[m][p] = act(bias[m] + sum_e value[e] * X[offset[e] + p] + residual[m][p]) for tiles of p that are
// NV vectors wide, and for blocks of input channels that fit a cache, where a tap of a kernel larger than 1x1 is an offset
// like any other (see packing.py).

#include <omp.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "columns.h"
#include "narrow.h"
#include "program.h"
#include "rows.h"
#include "shares.h"
#include "strided.h"
#include "threads.h"

// Whether programs may hold machine code of machine_code.py.
#if defined(__linux__) && defined(__x86_64__) && defined(__AVX512F__)
#define RUNS_CODE 1
#else
#define RUNS_CODE 0
#endif

namespace {

struct TileMemory {  // what a thread needs for a tile of a step, in floats, one behind the other
  int64_t picks, partial, all;
  explicit TileMemory(const Step& s) {
    auto aligned = [](int64_t floats) { return (floats + 63) / 64 * 64; };
    const int64_t beyond = MAX_NV * VL;  // what vectors reach beyond their tile
    picks = aligned(s.block_channels * s.channel_stride + beyond);
    partial = picks + aligned(s.pick_count * (s.row_floats / VL) * sizeof(Pick) / sizeof(float));
    all = partial + s.rows * s.vectors * VL;
  }
};

void run_tile(const Step& s, const char* data, const Place& x, const Place& y, const Place& residual, Tile t) {
  if (s.mode == DEPTHWISE && run_strided(s, data, x, t, y, residual)) return;
  const TileMemory parts(s);
  float* packed = reinterpret_cast<float*>(tile_memory.get(parts.all * sizeof(float)));
  float* partial = packed + parts.partial;
  if (is_narrow(s, data, t)) return run_few(s, data, x, packed, partial, t, y, residual);
  Pick* picks = reinterpret_cast<Pick*>(packed + parts.picks);
  const Block* blocks = reinterpret_cast<const Block*>(data + s.blocks);
  if (s.mode == PICKED || s.mode == DEPTHWISE) find_picks(s, data, x, t, picks);
  const int64_t vectors = (t.columns + VL - 1) / VL;
  if (s.mode == DEPTHWISE) COMPUTE_DEPTHWISE[vectors - 1](s, data, x, picks, partial, t, y, residual);
  for (int64_t i = 0; i < s.block_count; ++i) {
    const Block& b = blocks[i];
    if (b.row1 <= t.row0 || b.row0 >= t.row1) continue;
    const char* start = s.mode == DIRECT ? reinterpret_cast<const char*>(x.data + b.channel0 * x.row_stride + t.column0)
                                         : pack(s, b, x, picks, packed, t);
    COMPUTE[vectors - 1](s, b, data, start, partial, t, y, residual);
  }
  if (y.column_stride != 1) {
    turn(partial, s.vectors * VL, y.data + t.column0 * y.column_stride + t.row0, y.column_stride, t.row1 - t.row0,
         t.columns);
  }
}

struct Places {
  Place source, target, residual;
};

// Rows of one tile of a step.
void run_rows(const Step& s, const char* data, const Places& at, int64_t columns, int64_t tile,
              std::pair<int64_t, int64_t> rows) {
  const int64_t width = s.vectors * VL, column0 = tile * width;
  if (rows.first == rows.second) return;
  const Tile t{column0, std::min(width, columns - column0), rows.first, rows.second};
  const bool picks = s.mode == PICKED || s.mode == DEPTHWISE;
  const Place source = picks ? at.source : at.source.in_tile(tile, column0);
  run_tile(s, data, source, at.target.in_tile(tile, column0), at.residual.in_tile(tile, column0), t);
}

}  // namespace

// Floats in a vector, and vectors in the widest tile: what a program is laid out for.
extern "C" int64_t vector_length() { return VL; }
extern "C" int64_t most_vectors() { return REGISTERS; }

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
// PLAIN, and PICKED for a single tap. seconds: of each step, what it took one of the threads is added to it, with what
// that thread waited for others afterwards; or null. False for a copy of a program with machine code, in memory that
// cannot be executed.
extern "C" bool run_sparse_program(const char* data, const float* const* inputs, const bool* is_channels_last,
                                   float* const* outputs, int64_t batch, int64_t threads, double* seconds) {
  const Header& h = *reinterpret_cast<const Header*>(data);
  if (h.home != 0 && h.home != reinterpret_cast<int64_t>(data)) return false;
  if (batch == 0) return true;
  const Step* steps = reinterpret_cast<const Step*>(data + h.steps);
  const Buffer* buffers = reinterpret_cast<const Buffer*>(data + h.buffers);
  int64_t per_unit = h.per_unit;
  if (h.is_tokens && batch < per_unit * threads) {
    per_unit = ((batch + threads - 1) / threads + VL - 1) / VL * VL;  // so that every thread has some
  }
  // What belongs to one thread: chunks of tokens, or images; the threads share what is too little for that.
  const int64_t grain = h.is_tokens ? per_unit : 1, grains = (batch + grain - 1) / grain;
  const int64_t rest = grains % threads;
  const bool shares = h.is_tokens ? grains < threads : 4 * rest <= 3 * threads;
  const int64_t apart = !shares ? grains : h.is_tokens ? 0 : grains - rest;
  const int64_t at_a_time = h.is_tokens ? h.per_unit : 1;  // of what is shared
  auto edge = [&](int64_t member) { return std::min(batch, apart * member / threads * grain); };
  char* shared = edge(threads) < batch ? arena_memory.get(h.arena_bytes) : nullptr;
  Barrier barrier;

  // `first`: the image or token that a unit begins with. `image`: of the unit; none where all of them are side by side.
  // `own`: memory of the thread, where a chain of several steps is worked on tile by tile; or null.
  auto place = [&](int64_t number, int64_t first, int64_t image, char* arena, char* own) -> Place {
    if (number < 0) return {nullptr, 0, 0, 0, 0};
    const Buffer& b = buffers[number];
    if (own != nullptr && b.ring != 0) {
      return {reinterpret_cast<float*>(own + b.ring_index), b.ring, 1, 0, b.unit_stride, b.ring};
    }
    float* base = b.kind == 0 ? reinterpret_cast<float*>(arena + b.index)
        : b.kind == 1         ? const_cast<float*>(inputs[b.index])
                              : outputs[b.index];
    base += ((b.kind == 0 ? 0 : first) + image) * b.unit_stride;
    if (b.kind == 1 && !h.is_tokens && is_channels_last[b.index]) {
      return {base, 1, b.unit_stride / b.row_stride, 0, b.unit_stride};
    }
    return {base, b.row_stride, b.column_stride, b.tile_step, b.unit_stride};
  };
  // Runs the step and the rest of its chain, and returns the step behind.
  auto run_chain = [&](const Step* begin, auto columns_of, auto at, int64_t member, int64_t team, double* timed) {
    auto clocked = [&](const Step* step, auto work) {
      if (timed == nullptr) return work();
      const auto start = std::chrono::steady_clock::now();
      work();
      timed[step - steps] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    };
    const auto [last, stop, share] = part_of(begin, data, columns_of, member, team);
    const int64_t* reads = tiles_read(*last, data);
    char* own = stop - begin > 1 ? ring_memory.get(h.ring_bytes) : nullptr;
    auto run = [&](const Step* s, int64_t tile, std::pair<int64_t, int64_t> rows, int64_t ring_start = 0) {
      // What the first step reads is from before the chain.
      Places places{at(s->source, s == begin ? nullptr : own), at(s->target, own), at(s->residual, own)};
      places.source.ring_start = ring_start;
      clocked(s, [&] { run_rows(*s, data, places, columns_of(*s), tile, rows); });
    };
    int64_t made = 0;  // tiles of the steps before the last
    for (int64_t tile = share.first_tile(); tile < share.stop_tile(); ++tile) {
      int64_t ring_start = 0;
      if (last != begin) {
        for (made = std::max(made, reads[2 * tile]); made < reads[2 * tile + 1]; ++made) {
          for (const Step* s = begin; s != last; ++s) run(s, made, {0, s->rows});
        }
        const int64_t ring = buffers[last->source].ring, first = reads[2 * tile] * (last - 1)->vectors * VL;
        ring_start = first / ring * ring;
      }
      for (const Step* s = last; s != stop; ++s) run(s, tile, share.rows(*s, data, tile), s == last ? ring_start : 0);
    }
    clocked(stop - 1, [&] { barrier.wait(team); });
    return stop;
  };
  auto run_unit = [&](int64_t first, int64_t count, char* arena, int64_t member, int64_t team, double* timed) {
    const Step *begin = steps, *stop = steps + h.step_count;
    for (int64_t image = 0; !h.is_tokens && image < count; ++image) {
      auto at = [&](int64_t number, char* own) { return place(number, first, image, arena, own); };
      auto columns_of = [](const Step& s) { return s.columns; };
      for (begin = steps; begin < stop && !begin->joint;) {
        begin = run_chain(begin, columns_of, at, member, team, timed);
      }
    }
    auto at = [&](int64_t number, char* own) { return place(number, first, 0, arena, own); };
    auto columns_of = [&](const Step& s) { return h.is_tokens ? count : count * s.columns; };
    while (begin < stop) begin = run_chain(begin, columns_of, at, member, team, timed);
  };
#pragma omp parallel num_threads(int(threads))
  {
    int64_t member = omp_get_thread_num(), team = omp_get_num_threads();
    double* timed = member == 0 ? seconds : nullptr;
    auto run_own = [&](int64_t from, int64_t to) {
      if (from == to) return;
      char* own = arena_memory.get(h.arena_bytes);
      for (int64_t i = from; i < to; i += per_unit) run_unit(i, std::min(per_unit, to - i), own, 0, 1, timed);
    };
    if (team == threads) {
      run_own(edge(member), edge(member + 1));
      if (edge(threads) < batch) barrier.wait(team);  // the shared memory is also one thread's own
      for (int64_t i = edge(threads); i < batch; i += at_a_time) {
        run_unit(i, std::min(at_a_time, batch - i), shared, member, team, timed);
      }
    } else if (member == 0) {  // fewer threads than were asked for
      run_own(0, batch);
    }
  }
  return true;
}
