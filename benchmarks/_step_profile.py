"""Where the time of a training step goes: PyTorch's profiler, its events summed by what they do."""

import ctypes
from collections import defaultdict
from collections.abc import Callable

from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile

STEPS = 5
PRODUCTS = ("mm", "conv", "dot_product", "mkl", "onednn", "linear")
LIBRARY = ("batch_norm", "layer_norm", "softmax", "pool", "nll")


def profiled(step: Callable[[], None]) -> dict[str, float]:
    """Return the milliseconds of one step by kind of work, and the page faults that the step took."""
    before = page_faults()
    for _ in range(STEPS):
        step()
    faults = page_faults() - before
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            step()
    found = by_kind(profiler.key_averages())
    return found | {"page faults": faults / STEPS}


def by_kind(events: EventList) -> dict[str, float]:
    """Self time: an operator's own kernel, without what it calls."""
    found: defaultdict[str, float] = defaultdict(float)
    for event in events:
        found[kind(event.key)] += event.self_cpu_time_total / 1000 / STEPS
    return dict(found)


def kind(name: str) -> str:
    if "cpp_fused" in name:
        return "generated kernels"
    if any(part in name for part in PRODUCTS):
        return "products"
    if any(part in name for part in LIBRARY):
        return "norms, losses, pooling"
    if name.startswith("aten::") or "SGD" in name:
        return "optimizer, and gradients put together"
    return "everything else"


def page_faults() -> int:
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def keep_heap() -> None:
    """Let glibc neither give freed memory back to the system nor map large tensors one by one.

    Otherwise a step pays for page faults, more or fewer of them by how the heap happens to lie.
    """
    trim_threshold, mmap_threshold = -1, -3
    libc = ctypes.CDLL("libc.so.6")
    if not (libc.mallopt(mmap_threshold, 1 << 30) and libc.mallopt(trim_threshold, (1 << 31) - 1)):
        raise OSError("glibc refused to keep freed memory")


def print_profiles(profiles: dict[str, dict[str, float]]) -> None:
    """A table of kinds by variant."""
    kinds = list(dict.fromkeys(kind for found in profiles.values() for kind in found))
    print("\n| ms of a step, profiled | " + " | ".join(profiles) + " |")
    print("| --- |" + " --- |" * len(profiles))
    for name in kinds:
        figures = [found.get(name, 0.0) for found in profiles.values()]
        form = "{:,.0f}" if name == "page faults" else "{:.1f}"
        print(f"| {name} | " + " | ".join(form.format(figure) for figure in figures) + " |")
