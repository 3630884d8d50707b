// What threads keep for themselves, and where those that share an image wait for each other.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

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
thread_local Scratch arena_memory, ring_memory, tile_memory;

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

}  // namespace
