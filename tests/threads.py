"""Threads that take turns as often as the interpreter lets them, and what locks keep them from."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def in_turns(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What ``work`` returns in each of so many threads, which it is given the numbers of."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(work, range(count)))
    finally:
        sys.setswitchinterval(interval)


def is_free(lock: Any) -> bool:
    """Whether another thread could take it."""

    def attempt() -> bool:
        found: bool = lock.acquire(blocking=False)
        if found:
            lock.release()
        return found

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(attempt).result()
