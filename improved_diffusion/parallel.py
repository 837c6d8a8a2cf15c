"""Work on the machine's cores: one function over many items in separate processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

# Shows how far a loop has come: (items, total=, desc=, unit=) -> the same items.
Progress = Callable[..., Iterator[T]]


def no_progress(items: Iterable[T], *, total: int, desc: str, unit: str = "it") -> Iterator[T]:
    """Yield ``items`` and show nothing: what library calls use unless they are given more."""
    yield from items


def default_workers() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def process_map(workers: int) -> Iterator[Callable[[Callable[[T], R], Iterable[T]], Iterator[R]]]:
    """Give a ``map`` that runs in ``workers`` processes (1: in this process, no other).

    Results come in the order of the items, so the first error is the same in every run. The
    function must be importable (defined at the top of a module). When the block ends early, items
    that have begun are finished and the others dropped.

    :raises ValueError: ``workers`` is below 1.
    :raises OSError: a worker was killed from outside, as the system does when memory runs out.
    """
    if workers < 1:
        raise ValueError(f"--workers {workers}: at least one worker process is needed.")
    if workers == 1:
        yield map
        return
    # "spawn": a fork of a process that runs threads (numpy's, torch's) can deadlock.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield executor.map
    except BrokenProcessPool as error:
        raise OSError(
            "a worker process was killed, perhaps because memory ran out; start again with fewer"
            " --workers: what is complete is kept"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the main process, and end when the main process ends, however it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
