"""What every script shares: one-sentence errors, progress on a terminal and in a log file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

TRACEBACK_VARIABLE = "IMPROVED_DIFFUSION_TRACEBACK"


def run(main: Callable[[], None]) -> None:
    """Call ``main()`` and end the process as a command-line program should.

    ``ValueError`` and ``OSError`` are the user's to mend: their message is printed as one
    ``error:`` line on standard error and the exit status is 2, as for a GPU without enough
    memory. Any other exception is a bug and keeps its traceback. With the environment variable
    ``IMPROVED_DIFFUSION_TRACEBACK=1`` the traceback of a user's error is shown too.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        if _shows_traceback():
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except RuntimeError as error:
        # torch.OutOfMemoryError, known by its name because not every script loads torch.
        if type(error).__name__ != "OutOfMemoryError" or _shows_traceback():
            raise
        advice = "lower --microbatch in training, --batch_size in sampling"
        print(f"error: the GPU's memory is too small; {advice}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def _shows_traceback() -> bool:
    return os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0")


def progress(items: Iterable[T], *, total: int, desc: str, unit: str = "it") -> Iterator[T]:
    """Yield ``items`` while showing how far they have come.

    On a terminal this is a tqdm bar with rate and remaining time. Elsewhere (``nohup``, a pipe)
    it is a plain line at the start of the work and then at most one every 30 seconds, so that a
    log file stays readable.

    :param total: how many items there will be.
    :param desc: what is being done, e.g. ``"preparing"``.
    :param unit: what one item is, e.g. ``"patient"``.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=desc, unit=unit)
        return
    start = last = time.monotonic()
    print(f"{desc}: 0/{total} {unit}", file=sys.stderr, flush=True)
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if done == total or now - last >= 30:
            seconds = now - start
            left = seconds / done * (total - done)
            line = f"{desc}: {done}/{total} {unit}, {seconds:.0f} s, {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)
            last = now
