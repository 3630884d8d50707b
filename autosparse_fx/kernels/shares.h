// What of a step, and of a chain of steps, each thread of a team works on.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "program.h"

namespace {

// How the tiles of a step are shared by a team: side by side, and in rows where there are too few.
class Share {
 public:
  int64_t row_parts = 1;
  Share(const Step& s, int64_t columns, int64_t member, int64_t team) {
    const int64_t width = s.vectors * VL, tiles = (columns + width - 1) / width;
    while (row_parts < team && (tiles * row_parts) % team != 0 && tiles < 4 * team) ++row_parts;
    first_ = tiles * row_parts * member / team;
    stop_ = tiles * row_parts * (member + 1) / team;
  }
  int64_t first_tile() const { return first_ / row_parts; }
  int64_t stop_tile() const { return (stop_ + row_parts - 1) / row_parts; }
  // The member's rows of a tile.
  std::pair<int64_t, int64_t> rows(const Step& s, const char* data, int64_t tile) const {
    const int64_t* cost = reinterpret_cast<const int64_t*>(data + s.row_cost);
    const int64_t before = tile * row_parts;
    auto cut = [&](int64_t k) {
      if (k == 0 || k == row_parts) return k == 0 ? int64_t(0) : s.rows;
      return int64_t(std::lower_bound(cost, cost + s.rows, cost[s.rows] * k / row_parts) - cost);
    };
    return {cut(std::max(first_ - before, int64_t(0))), cut(std::min(stop_ - before, row_parts))};
  }

 private:
  int64_t first_, stop_;  // parts of tiles
};

// Of each tile, which tiles of the step before it the step reads: from, and to before.
inline const int64_t* tiles_read(const Step& s, const char* data) {
  return reinterpret_cast<const int64_t*>(data + s.reads);
}

// What a member works on of a chain before it waits for the others: its share of `last`, all of what that reads in the
// steps before it, and the same share of those behind it, up to `stop`.
struct Part {
  const Step *last, *stop;
  Share share;
};

// `columns_of`: how many columns a step has, of all images that are side by side.
template <typename Columns>
Part part_of(const Step* begin, const char* data, Columns columns_of, int64_t member, int64_t team) {
  const Step *stop = begin + begin->chain, *last = stop - 1;
  while (last != begin && last->reads == 0) --last;  // the one that reads several tiles, or the first
  auto share_of = [&](const Step* s, int64_t who) { return Share(*s, columns_of(*s), who, team); };
  const Share share = share_of(last, member);
  bool is_split = share.row_parts > 1;  // the next step needs rows of other members
  if (last != begin && team > 1) {  // or members would compute too much of the steps before that others compute as well
    const int64_t *reads = tiles_read(*last, data), width = begin->vectors * VL;
    int64_t made = 0;
    for (int64_t who = 0; who < team; ++who) {
      const Share other = share_of(last, who);
      const int64_t first = other.first_tile(), end = other.stop_tile();
      if (first < end) made += reads[2 * (end - 1) + 1] - reads[2 * first];
    }
    is_split = is_split || 4 * made > 5 * ((columns_of(*begin) + width - 1) / width);
  }
  if (is_split) return {begin, begin + 1, share_of(begin, member)};
  return {last, stop, share};
}

}  // namespace
