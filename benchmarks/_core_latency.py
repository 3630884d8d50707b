"""How long a cache line takes from one core to another: on virtual machines it changes, and moves timings with it."""

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

SOURCE = r"""
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace {
constexpr int kBatches = 31, kRoundTrips = 200;

bool pin(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  return pthread_setaffinity_np(pthread_self(), sizeof(set), &set) == 0;
}
}  // namespace

// The median of the mean one-way times of the batches, in nanoseconds; negative if the threads cannot be pinned.
extern "C" double one_way_nanoseconds(int first, int second) {
  alignas(128) std::atomic<int> ball{0};
  std::atomic<bool> pinned{true};
  constexpr int kTotal = kBatches * kRoundTrips;
  std::vector<double> batches;
  std::thread echo([&] {
    if (!pin(second)) pinned = false;
    for (int i = 0; i < kTotal; ++i) {
      while (ball.load(std::memory_order_acquire) != 2 * i + 1) {}
      ball.store(2 * i + 2, std::memory_order_release);
    }
  });
  std::thread serve([&] {
    if (!pin(first)) pinned = false;
    for (int batch = 0; batch < kBatches; ++batch) {
      const auto start = std::chrono::steady_clock::now();
      for (int i = batch * kRoundTrips; i < (batch + 1) * kRoundTrips; ++i) {
        ball.store(2 * i + 1, std::memory_order_release);
        while (ball.load(std::memory_order_acquire) != 2 * i + 2) {}
      }
      const std::chrono::duration<double, std::nano> passed = std::chrono::steady_clock::now() - start;
      batches.push_back(passed.count() / (2 * kRoundTrips));
    }
  });
  serve.join();
  echo.join();
  std::nth_element(batches.begin(), batches.begin() + kBatches / 2, batches.end());
  return pinned ? batches[kBatches / 2] : -1.0;
}
"""


class CoreLatency:
    """Measures between the first and the last core that this process may use; ``reason`` says why it cannot."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        if not self.cores:
            self.reason = "threads cannot be pinned on this system"
        elif len(self.cores) == 1:
            self.reason = "there is one core only"
        else:
            self._build()

    def _build(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder) / "latency.cpp", Path(folder) / "latency.so"
            source.write_text(SOURCE)
            command = [os.environ.get("CXX", "g++"), "-O2", "-std=c++17", "-shared", "-fPIC", "-pthread"]
            try:
                subprocess.run([*command, str(source), "-o", str(library)], check=True, capture_output=True, text=True)
                self._measure = ctypes.CDLL(str(library)).one_way_nanoseconds
            except subprocess.CalledProcessError as error:
                self.reason = f"the compiler failed: {error.stderr.strip()[-200:]}"
            except OSError as error:
                self.reason = f"no C++ compiler: {error}"
            else:
                self._measure.restype = ctypes.c_double

    def nanoseconds(self) -> float | None:
        if self.reason is not None:
            return None
        found: float = self._measure(self.cores[0], self.cores[-1])
        return found if found >= 0 else None
