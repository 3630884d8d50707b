// What a program consists of, as program.py lays it out, and where its parts lie in a run.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int VL = Vec::size();
constexpr int REGISTERS = 8;  // of a row, in the widest tile whose rows are computed in registers
constexpr int MAX_NV = 16;  // vectors of the widest tile
// How much further the arguments of machine code point (see machine_code.py).
constexpr int64_t X_BIAS = 128 * 64, WEIGHT_BIAS = 128 * 4;

// Floats from the start of the tile in the packed block, or in the source where it is read directly. Two bytes, because
// what a layer of few columns takes is the time to read its weights.
using Offset = uint16_t;

struct Block {  // rows [row0, row1) over input channels [channel0, channel1)
  int64_t row0, row1, channel0, channel1, first, last;
  int64_t starts;  // byte position in data: for row1 - row0 + 1 rows, where their entries begin, int32
  int64_t offsets, values;  // byte positions in data: of each entry, Offset and float
  int64_t groups, group_count;  // instead of entries, where the pattern is machine code
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
  int64_t tile_step;  // floats to go on with every tile besides its width; not 0 for a buffer that holds tile after tile
  // The columns that a thread keeps at a time, in memory of its own, where the chain that alone uses the buffer is worked
  // on tile by tile; 0 for a buffer that others use.
  int64_t ring;
  int64_t ring_index;  // byte position in that memory
};

enum Mode : int64_t {
  PLAIN,  // 1x1, stride 1: columns are taken as they are
  DIRECT,  // the same, read where it lies: the source is in tiles
  PICKED,  // rows of columns, picked one by one from whatever layout the source has (see packing.py)
  DEPTHWISE,  // every row reads a single channel, where it lies
};

enum Activation : int64_t {
  NONE,
  RELU,
  CLAMP,  // between the constants
  LEAKY_RELU,  // the first constant is its slope
  ELU,  // the constants are the factors where the input is negative, and elsewhere
  GELU,
  GELU_TANH,
  SILU,
  HARDSWISH,
  HARDSIGMOID,
  SIGMOID,
  TANH,
  MISH
};

struct Step {
  int64_t source, target, residual;  // numbers of buffers; residual -1 for none
  int64_t activation;
  double constants[2];  // of the activation
  int64_t rows;
  int64_t in_height, in_width, out_height, out_width;
  int64_t stride_y, stride_x;
  int64_t columns;  // for one image
  int64_t vectors;  // width of a tile
  int64_t mode;
  int64_t channel_stride;  // floats of one channel in the packed block
  int64_t picks;  // byte position in data: how far from a pixel each packed row begins, in y and x, int64
  int64_t pick_count;
  int64_t row_floats;  // of a packed row
  int64_t more_columns;  // of a packed row, beyond the tile's
  int64_t bias;  // byte position in data, rows floats
  int64_t taps;  // of DEPTHWISE, byte position in data: [rows][pick_count] floats
  int64_t rows_per_channel;  // of DEPTHWISE
  int64_t blocks;  // byte position in data
  int64_t block_count;
  int64_t row_cost;  // byte position in data: rows + 1 running sums of entries, int64
  int64_t block_channels;  // the most channels of any block
  int64_t joint;  // all images of a unit side by side; so are they in all steps behind the first such one
  int64_t chain;  // this step and so many behind it, less one, are worked on tile by tile: each reads the one before
  // Byte position in data: for each tile, which tiles of the step before it reads, from the first to one behind the last,
  // int64. 0 for a step that reads the same tile, or does not follow in a chain; not 0 for at most one step of a chain.
  int64_t reads;
};

struct Header {
  int64_t steps, step_count, buffers;  // byte positions in data
  int64_t arena_bytes;
  int64_t home;  // the address of a program with machine code, which can be executed nowhere else; 0 without
  int64_t is_tokens;  // units are chunks of tokens instead of images
  int64_t per_unit;  // tokens of a chunk, or the most images that one thread works on at a time
  int64_t ring_bytes;  // that each thread needs for rings
};

// One tile of one step, as the threads of a team see it.
struct Tile {
  int64_t column0, columns;
  int64_t row0, row1;  // of the output, this thread's
};

struct Place {  // where a buffer lies, for one image or for all images that are side by side
  float* data;
  int64_t row_stride, column_stride, tile_step, image_stride;
  int64_t ring = 0;  // columns, after which the next are where the first were; 0 where they all have a place
  int64_t ring_start = 0;  // a column at the start of the ring; `at` knows those of two rings from there on

  // The same, so that the columns of a tile lie where they would without tiles and ring.
  Place in_tile(int64_t tile, int64_t column0) const {
    Place moved = *this;
    moved.data += ring == 0 ? tile * tile_step : -(column0 / ring * ring);
    return moved;
  }
  // Where a column is, in floats.
  int64_t at(int64_t column) const {
    if (ring != 0) return column - ring_start < ring ? column - ring_start : column - ring_start - ring;
    return (tile_step == 0 ? 0 : column / row_stride * tile_step) + column * column_stride;
  }
  // How many columns, from this one on, are `column_stride` apart.
  int64_t in_a_row(int64_t column) const {
    if (ring != 0) return ring - at(column);
    return tile_step == 0 ? INT64_MAX : row_stride - column % row_stride;
  }
};

}  // namespace
