"""What every script shares: one-sentence errors, progress on a terminal and in a log file."""

from __future__ import annotations

import io
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names may hold any bytes
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (ValueError, OSError) as error:
        if _shows_traceback():
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
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
    finally:
        _give_up_dead_terminal()


def _give_up_dead_terminal() -> None:
    """A terminal that was closed must not turn success into a failure of the last flush."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), stream.fileno())


def _shows_traceback() -> bool:
    return os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0")


def command_line(argv: Sequence[str], launcher: Sequence[str] = ("python",)) -> str:
    """``argv`` as it is typed, behind the program that runs it."""
    return shlex.join([*launcher, *argv])


class Stopped(BaseException):
    """The user asked by a signal to stop; the message names it."""


@contextmanager
def on_stop_signal(action: Callable[[str], None]) -> Iterator[None]:
    """Call ``action`` with the name of the first SIGTERM, SIGINT or SIGHUP; the second ends all.

    A SIGHUP that is ignored, as under ``nohup``, stays so. Outside of the main thread Python takes
    no signals.
    """
    # torchrun passes on a signal that may have come here as well, and kills who stays.
    second = signal.SIG_IGN if "TORCHELASTIC_RUN_ID" in os.environ else signal.SIG_DFL

    def handle(number: int, frame: FrameType | None) -> None:
        for other in previous:
            signal.signal(other, second)
        action(signal.Signals(number).name)

    previous = {}
    with suppress(ValueError):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            previous[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def stop_at_signals() -> Iterator[None]:
    """Raise :class:`Stopped` at the first signal that :func:`on_stop_signal` takes."""

    def stop(name: str) -> None:
        raise Stopped(name)

    with on_stop_signal(stop):
        yield


class Progress:
    """How far some work has come.

    On a terminal this is a tqdm bar with rate and remaining time. Elsewhere (``nohup``, a pipe)
    it is a plain line at the start of the work and then at most one every 30 seconds, so that a
    log file stays readable.

    :param total: how many items there will be.
    :param desc: what is being done, e.g. ``"preparing"``.
    :param unit: what one item is, e.g. ``"patient"``.
    """

    def __init__(self, total: int, desc: str, unit: str = "it") -> None:
        self.total, self.desc, self.unit = total, desc, unit
        self.done = 0
        self._bar = tqdm(total=total, desc=desc, unit=unit) if sys.stderr.isatty() else None
        self._start = self._last = time.monotonic()
        if self._bar is None:
            print(f"{desc}: 0/{total} {unit}", file=sys.stderr, flush=True)

    def advance(self, count: int = 1) -> None:
        """So many more items are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if self.done == self.total or now - self._last >= 30:
            seconds = now - self._start
            left = seconds / self.done * (self.total - self.done)
            line = f"{self.desc}: {self.done}/{self.total} {self.unit}, {seconds:.0f} s"
            print(f"{line}, {left:.0f} s left", file=sys.stderr, flush=True)
            self._last = now

    def close(self) -> None:
        """Leave the terminal's line as it is."""
        if self._bar is not None:
            self._bar.close()


def progress(items: Iterable[T], *, total: int, desc: str, unit: str = "it") -> Iterator[T]:
    """Yield ``items`` while showing how far they have come, see :class:`Progress`."""
    shown = Progress(total, desc, unit)
    try:
        for item in items:
            yield item
            shown.advance()
    finally:
        shown.close()
