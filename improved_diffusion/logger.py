"""Log lines and logged values: terminal, log.txt, progress.csv, progress.json, TensorBoard.

``configure()`` opens a folder; ``log("...")`` writes a line; ``logkv("loss", 0.1)`` collects
values and ``dumpkvs()`` writes what was collected as one row. Files that exist are continued,
never overwritten, so a resumed run keeps one log. ``drop_rows_after(step)`` removes the rows of
work that was lost with the last interruption.

Nothing is kept open between two writes: a killed run loses at most the line being written. What
cannot be written, because a disk is full or gone, is kept for the next write and never ends a run.
A remote folder (``gs://...`` and the others that blobfile knows) works the same way, but appending
there means downloading and uploading the file, so log rarely (``--log_interval``) or log locally.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import functools
import importlib.util
import io
import json
import operator
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TextIO

import blobfile as bf

from improved_diffusion.files import atomic_write, is_remote

DEBUG = 10
INFO = 20
WARN = 30
ERROR = 40
DISABLED = 50

FOLDER_VARIABLE = "OPENAI_LOGDIR"
FORMAT_VARIABLE = "OPENAI_LOG_FORMAT"
FORMATS = ("stdout", "log", "csv", "json", "tensorboard")

Value = int | float | str


class KVWriter:
    """Something that writes rows of values."""

    def writekvs(self, kvs: Mapping[str, Value]) -> None:
        """Write one row."""
        raise NotImplementedError

    def drop_rows_after(self, step: int) -> int:
        """Forget the rows whose ``step`` is larger; returns how many there were.

        A writer that keeps no rows to be read back has nothing to do.
        """
        return 0

    def close(self) -> None:
        """Release what the writer holds."""


class SeqWriter:
    """Something that writes lines of text."""

    def writeseq(self, seq: Iterable[str]) -> None:
        """Write the parts as one line, separated by spaces."""
        raise NotImplementedError

    def close(self) -> None:
        """Release what the writer holds."""


class HumanOutputFormat(KVWriter, SeqWriter):
    """Lines of text, and each row as a table with a key and a value per line.

    :param filename_or_file: a path, which is appended to; an open text file; or None for
        standard output, looked up at each write so that redirecting it works.
    """

    MAX_WIDTH = 36

    def __init__(self, filename_or_file: str | TextIO | None = None) -> None:
        self._target = filename_or_file
        self._file = Appended(filename_or_file) if isinstance(filename_or_file, str) else None

    def writekvs(self, kvs: Mapping[str, Value]) -> None:
        """Write the table, sorted by key; floats with five significant digits."""
        cells = [(_shorten(key), _shorten(_readable(kvs[key]))) for key in sorted(kvs)]
        key_width = max((len(key) for key, _ in cells), default=0)
        value_width = max((len(value) for _, value in cells), default=0)
        rule = "-" * (key_width + value_width + 3)
        lines = [f"{key:<{key_width}} | {value}" for key, value in cells]
        self._write("\n".join([rule, *lines, rule]) + "\n")

    def writeseq(self, seq: Iterable[str]) -> None:
        """Write the parts as one line, separated by spaces."""
        self._write(" ".join(seq) + "\n")

    def _write(self, text: str) -> None:
        if self._file is not None:
            self._file.append(text)
        else:
            stream = sys.stdout if self._target is None else self._target
            stream.write(text)
            stream.flush()


class JSONOutputFormat(KVWriter):
    """One JSON object per row and line, appended to the file at the path ``filename``."""

    def __init__(self, filename: str) -> None:
        self._path = filename
        _cut_incomplete_line(filename)
        self._file = Appended(filename)

    def writekvs(self, kvs: Mapping[str, Value]) -> None:
        """Append one line."""
        self._file.append(json.dumps(dict(sorted(kvs.items()))) + "\n")

    def drop_rows_after(self, step: int) -> int:
        """Remove the lines whose ``step`` is larger than ``step``; returns how many."""
        lines = _read(self._path).splitlines(keepends=True)
        kept = [line for line in lines if not json.loads(line).get("step", step) > step]
        if len(kept) < len(lines):
            _replace(self._path, "".join(kept))
        return len(lines) - len(kept)


class CSVOutputFormat(KVWriter):
    """One line per row in the CSV file at the path ``filename``, a column per key.

    The first row's keys, sorted, are the header; an existing file's header is kept and continued,
    without the incomplete last line that a killed process may have left. A key that appears later
    becomes a further column, and the file is rewritten with empty cells in the older rows. Floats
    are written so that they read back equal.

    :raises ValueError: the existing file is not a table of this kind.
    """

    def __init__(self, filename: str) -> None:
        self._path = filename
        _cut_incomplete_line(filename)
        self.keys, _ = _read_table(filename)
        self._file = Appended(filename)

    def writekvs(self, kvs: Mapping[str, Value]) -> None:
        """Append one row; a missing key's cell stays empty."""
        new_keys = sorted(kvs.keys() - set(self.keys))
        if new_keys:
            try:
                self._file.append("")  # what is waiting has the old columns
                self._add_columns(new_keys)
            except OSError:
                if not self.keys:
                    raise
                # The row goes without them, and the next one tries again.
        row = [_exact(kvs[key]) if key in kvs else "" for key in self.keys]
        self._file.append(_csv_text([row], width=len(row)))

    def _add_columns(self, new_keys: list[str]) -> None:
        _, rows = _read_table(self._path)
        keys = [*self.keys, *new_keys]
        _replace(self._path, _csv_text([keys, *rows], width=len(keys)))
        self.keys = keys

    def drop_rows_after(self, step: int) -> int:
        """Remove the rows whose ``step`` is larger than ``step``, atomically; returns how many."""
        if "step" not in self.keys:
            return 0
        column = self.keys.index("step")
        _, rows = _read_table(self._path)
        kept = [row for row in rows if not (_number(row[column]) or 0) > step]
        if len(kept) < len(rows):
            _replace(self._path, _csv_text([self.keys, *kept], width=len(self.keys)))
        return len(rows) - len(kept)


class TensorBoardOutputFormat(KVWriter):
    """Each value as a scalar in the TensorBoard folder ``dir``, over ``step`` where it is logged.

    :raises ValueError: the package ``tensorboard`` is not installed.
    """

    def __init__(self, dir: str) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ValueError(
                "the log format 'tensorboard' needs the package tensorboard, which is not "
                "installed: pip install tensorboard, or leave it out of the formats"
            )
        self._folder = dir
        self._rows = 0
        self._writer = self._open(purge_step=None)

    def _open(self, purge_step: int | None) -> Any:
        # Imported here because the logger must not load torch for those who only want lines.
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self._folder, purge_step=purge_step)

    def writekvs(self, kvs: Mapping[str, Value]) -> None:
        """Write one point per number; text is left out."""
        self._rows += 1
        step = int(kvs.get("step", self._rows))
        for key, value in kvs.items():
            if not isinstance(value, str):
                self._writer.add_scalar(key, value, global_step=step)
        self._writer.flush()

    def drop_rows_after(self, step: int) -> int:
        """Have TensorBoard hide the points past ``step``; their number is not known, so 0."""
        self._writer.close()
        self._writer = self._open(purge_step=step + 1)
        return 0

    def close(self) -> None:
        """Write what is pending and close the event file."""
        self._writer.close()


def make_output_format(
    format: str, ev_dir: str, log_suffix: str = ""
) -> HumanOutputFormat | JSONOutputFormat | CSVOutputFormat | TensorBoardOutputFormat:
    """Open one output in the folder ``ev_dir``, which is made if needed.

    :param format: "stdout", "log" (log.txt), "csv" (progress.csv), "json" (progress.json) or
        "tensorboard" (the folder tb).
    :param log_suffix: put before the file name's extension.
    :raises ValueError: another format; or tensorboard, which is not installed.
    """
    bf.makedirs(ev_dir)
    if format == "stdout":
        return HumanOutputFormat()
    if format == "log":
        return HumanOutputFormat(bf.join(ev_dir, f"log{log_suffix}.txt"))
    if format == "csv":
        return CSVOutputFormat(bf.join(ev_dir, f"progress{log_suffix}.csv"))
    if format == "json":
        return JSONOutputFormat(bf.join(ev_dir, f"progress{log_suffix}.json"))
    if format == "tensorboard":
        return TensorBoardOutputFormat(bf.join(ev_dir, f"tb{log_suffix}"))
    raise ValueError(f"unknown log format {format!r}: choose from {', '.join(FORMATS)}")


class Logger:
    """Collects values and hands rows and lines to its outputs.

    :param dir: the folder of the outputs, or None where there is none.
    :param output_formats: ``KVWriter`` and ``SeqWriter`` objects.
    :param comm: must be None; see :meth:`set_comm`.

    ``Logger.CURRENT`` is what the functions of this module use, None before ``configure()``.
    ``Logger.DEFAULT`` prints lines until then.
    """

    DEFAULT: Logger
    CURRENT: Logger | None = None

    def __init__(
        self, dir: str | None, output_formats: list[KVWriter | SeqWriter], comm: None = None
    ) -> None:
        self.name2val: dict[str, Value] = {}
        self.level = INFO
        self.dir = dir
        self.output_formats = output_formats
        self.set_comm(comm)
        self._sums: dict[str, tuple[float, int]] = {}
        self._failing: set[KVWriter | SeqWriter] = set()

    def logkv(self, key: str, val: Any) -> None:
        """Note a value for the next row; the last of several calls counts.

        :param val: a number, a tensor or array of one element, or text.
        :raises ValueError: anything else.
        """
        self.name2val[key] = _plain(key, val)
        self._sums.pop(key, None)

    def logkv_mean(self, key: str, val: Any) -> None:
        """Note a number for the next row, which gets the mean of all calls since the last row."""
        number = _plain(key, val)
        if isinstance(number, str):
            raise ValueError(f"{key!r} is averaged and must be a number, not the text {number!r}")
        total, count = self._sums.get(key, (0.0, 0))
        self._sums[key] = total + number, count + 1
        self.name2val[key] = (total + number) / (count + 1)

    def dumpkvs(self) -> dict[str, Value]:
        """Write the noted values as one row and forget them; returns them. None: no row."""
        row = dict(self.name2val)
        if row:
            for output in self.output_formats:
                if isinstance(output, KVWriter):
                    self._try(output.writekvs, row)
        self.name2val.clear()
        self._sums.clear()
        return row

    def drop_rows_after(self, step: int) -> int:
        """Remove the rows past ``step`` from progress.csv and .json, and say so in the log.

        For a run that resumes at ``step``: those rows describe work that is done again.

        :returns: how many rows progress.csv (else progress.json) lost.
        """
        dropped = 0
        for output in self.output_formats:
            if isinstance(output, KVWriter):
                dropped = max(dropped, output.drop_rows_after(step))
        if dropped:
            self.log(f"dropped {dropped} logged rows past step {step}, which is done again")
        return dropped

    def log(self, *args: object, level: int = INFO) -> None:
        """Write the arguments as one line, unless ``level`` is below the logger's."""
        if level >= self.level:
            for output in self.output_formats:
                if isinstance(output, SeqWriter):
                    self._try(output.writeseq, [str(arg) for arg in args])

    def _try(self, write: Callable[[Any], None], content: Any) -> None:
        """Write; tell the first of failures that follow each other, which must not end a run."""
        try:
            write(content)
            self._failing.discard(write.__self__)
        except OSError as error:
            if write.__self__ not in self._failing:
                self._failing.add(write.__self__)
                with contextlib.suppress(OSError):
                    print(f"the log cannot be written: {error}", file=sys.stderr, flush=True)

    def set_level(self, level: int) -> None:
        """Leave out lines below ``level``; ``DISABLED`` leaves out all. Rows are not affected."""
        self.level = level

    def set_comm(self, comm: None) -> None:
        """Averaging over the processes of an MPI communicator is not offered: None only.

        :raises ValueError: any communicator. Writing one process's values under the name of
            all would be wrong without a sign of it.
        """
        if comm is not None:
            raise ValueError(
                "the logger does not average over several processes: give comm=None and run "
                "one process"
            )

    def get_dir(self) -> str | None:
        """The folder of the outputs."""
        return self.dir

    def close(self) -> None:
        """Close the outputs."""
        for output in self.output_formats:
            output.close()


Logger.DEFAULT = Logger(dir=None, output_formats=[HumanOutputFormat()])


def configure(
    dir: str | None = None,
    format_strs: Iterable[str] | None = None,
    comm: None = None,
    log_suffix: str = "",
) -> None:
    """Open the log folder; its name is the first line that is logged.

    :param dir: the folder, made if needed and continued if it holds a log. Not given: the
        environment variable ``OPENAI_LOGDIR``, else a new folder ``runs/<date>_<time>`` under the
        working directory.
    :param format_strs: see :func:`make_output_format`. Not given: the comma-separated environment
        variable ``OPENAI_LOG_FORMAT``, else stdout, log and csv, and tensorboard where it is
        installed.
    :param comm: must be None; see :meth:`Logger.set_comm`.
    :param log_suffix: put before the extension of the files' names.
    :raises ValueError: an unknown format, a folder that cannot be made or written, or a
        progress.csv in it that is no such table.
    """
    Logger.CURRENT = _open_logger(dir, format_strs, comm, log_suffix)
    Logger.CURRENT.log(f"Logging to {Logger.CURRENT.dir}")


def _open_logger(
    dir: str | None, format_strs: Iterable[str] | None, comm: None, log_suffix: str
) -> Logger:
    dir = dir or os.environ.get(FOLDER_VARIABLE)
    if format_strs is None:
        format_strs = _default_formats()
    try:
        folder = _new_run_folder() if not dir else os.path.expanduser(dir)
        bf.makedirs(folder)
        if not is_remote(folder) and not os.access(folder, os.W_OK):
            raise PermissionError(None, "permission denied")
    except OSError as error:
        raise ValueError(
            f"the log folder {dir or 'runs/'} cannot be made or written "
            f"({(error.strerror or str(error)).lower()}): choose another folder"
        ) from error
    outputs = [make_output_format(name, folder, log_suffix) for name in format_strs]
    return Logger(folder, outputs, comm)


def _default_formats() -> list[str]:
    if FORMAT_VARIABLE in os.environ:
        names = os.environ[FORMAT_VARIABLE].split(",")
        return [name.strip() for name in names if name.strip()]
    formats = ["stdout", "log", "csv"]
    if importlib.util.find_spec("tensorboard") is not None:
        formats.append("tensorboard")
    return formats


def _new_run_folder() -> str:
    """Make ``runs/<date>_<time>``, with a number after it if another run started that second."""
    name = os.path.join("runs", datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    folder, number = name, 1
    while True:
        try:
            os.makedirs(folder)
            return folder
        except FileExistsError:
            if not os.path.isdir(folder):
                raise
            number += 1
            folder = f"{name}_{number}"


def reset() -> None:
    """Close the current logger; lines go to the terminal until ``configure()`` is called again."""
    if Logger.CURRENT is not None:
        Logger.CURRENT.close()
        Logger.CURRENT = None


@contextlib.contextmanager
def scoped_configure(
    dir: str | None = None, format_strs: Iterable[str] | None = None, comm: None = None
) -> Iterator[None]:
    """Log to another folder inside a ``with`` block; arguments as for :func:`configure`."""
    previous = Logger.CURRENT
    configure(dir=dir, format_strs=format_strs, comm=comm)
    own = Logger.CURRENT
    try:
        yield
    finally:
        own.close()
        Logger.CURRENT = previous


def get_current() -> Logger:
    """The logger in use. The first use for values or for the folder calls :func:`configure`."""
    if Logger.CURRENT is None:
        configure()
    return Logger.CURRENT


def _for_lines() -> Logger:
    # A line of text needs no folder: printing one from a library call must not make one.
    return Logger.CURRENT or Logger.DEFAULT


def log(*args: object, level: int = INFO) -> None:
    """Write the arguments, separated by spaces, as one line to the terminal and log.txt."""
    _for_lines().log(*args, level=level)


def debug(*args: object) -> None:
    """``log`` at level DEBUG, which is left out unless ``set_level(DEBUG)``."""
    log(*args, level=DEBUG)


def info(*args: object) -> None:
    """``log`` at level INFO."""
    log(*args, level=INFO)


def warn(*args: object) -> None:
    """``log`` at level WARN."""
    log(*args, level=WARN)


def error(*args: object) -> None:
    """``log`` at level ERROR."""
    log(*args, level=ERROR)


def set_level(level: int) -> None:
    """See :meth:`Logger.set_level`."""
    _for_lines().set_level(level)


def logkv(key: str, val: Any) -> None:
    """See :meth:`Logger.logkv`."""
    get_current().logkv(key, val)


def logkv_mean(key: str, val: Any) -> None:
    """See :meth:`Logger.logkv_mean`."""
    get_current().logkv_mean(key, val)


def logkvs(d: Mapping[str, Any]) -> None:
    """``logkv`` for every item."""
    for key, val in d.items():
        logkv(key, val)


def dumpkvs() -> dict[str, Value]:
    """See :meth:`Logger.dumpkvs`."""
    return get_current().dumpkvs()


def getkvs() -> dict[str, Value]:
    """The values noted since the last row."""
    return get_current().name2val


def drop_rows_after(step: int) -> int:
    """See :meth:`Logger.drop_rows_after`."""
    return get_current().drop_rows_after(step)


def set_comm(comm: None) -> None:
    """See :meth:`Logger.set_comm`."""
    get_current().set_comm(comm)


def get_dir() -> str | None:
    """The folder of the current logger."""
    return get_current().get_dir()


record_tabular = logkv
dump_tabular = dumpkvs


@contextlib.contextmanager
def profile_kv(scopename: str) -> Iterator[None]:
    """Add the seconds spent in a ``with`` block to the value ``wait_<scopename>``."""
    logger, key = get_current(), f"wait_{scopename}"
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - start
        logger.logkv(key, logger.name2val.get(key, 0.0) + seconds)


def profile(n: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: :func:`profile_kv` with the name ``n`` around every call of the function."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def profiled(*args: object, **kwargs: object) -> Any:
            with profile_kv(n):
                return function(*args, **kwargs)

        return profiled

    return decorate


def read_progress(path: str) -> list[dict[str, float]]:
    """Read a progress.csv, also one that is being written.

    :returns: one dict per row, in the file's order, without the cells that are empty or text and
        without an incomplete last row.
    :raises ValueError: there is no such file, or it is not a table with a header.
    """
    if not bf.exists(path):
        raise ValueError(f"there is no file {path}: give the progress.csv of a training run")
    keys, rows = _read_table(path)
    return [
        {key: number for key, cell in zip(keys, row) if (number := _number(cell)) is not None}
        for row in rows
    ]


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _read_table(path: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a CSV file as text, every row as wide as the header."""
    try:
        table = [row for row in csv.reader(io.StringIO(_complete_lines(_read(path)))) if row]
    except (csv.Error, UnicodeDecodeError) as problem:
        raise ValueError(f"{path} is not a CSV file ({problem}): move it away") from problem
    if not table:
        return [], []
    keys, rows = table[0], table[1:]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(keys):
            raise ValueError(
                f"row {number} of {path} has {len(row)} cells where the header has {len(keys)}: "
                "repair the row or move the file away"
            )
    return keys, rows


def _csv_text(rows: Iterable[list[str]], width: int) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(
        row + [""] * (width - len(row)) for row in rows
    )
    return buffer.getvalue()


def _plain(key: str, value: Any) -> Value:
    """The Python number in a number, tensor or array of one element; text stays text."""
    if isinstance(value, str):
        return " ".join(value.split())  # a row is a line
    try:
        return operator.index(value)
    except TypeError:
        pass
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as problem:
        raise ValueError(
            f"{key!r} is logged as a {type(value).__name__} that is not one number: log a number, "
            "a tensor of one element or text"
        ) from problem


def _exact(value: Value) -> str:
    return value if isinstance(value, str) else repr(value)


def _readable(value: Value) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _shorten(text: str) -> str:
    """Cut the middle out of long text: the ends of keys tell them apart (``..._q0``)."""
    if len(text) <= HumanOutputFormat.MAX_WIDTH:
        return text
    half = (HumanOutputFormat.MAX_WIDTH - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


def _read(path: str) -> str:
    if not bf.exists(path):
        return ""
    with bf.BlobFile(path, "rb") as file:
        return file.read().decode()


class Appended:
    """A text file that is appended to, and keeps what could not be written for the next time.

    :raises OSError: by :meth:`append`, if the text cannot be written now.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._waiting = ""
        self._size = 0  # after the last write
        self._failed = False

    def append(self, text: str) -> None:
        """Add ``text``, and before it what is waiting."""
        self._waiting += text
        if not self._waiting:
            return
        content = self._waiting.encode(errors="backslashreplace")
        if not is_remote(self.path):
            if os.path.exists(self.path) and not self._failed:
                self._size = os.path.getsize(self.path)
            self._failed = True
            if self._size:
                # A part may have been written; and a file that is gone must not begin anew.
                os.truncate(self.path, self._size)
        with bf.BlobFile(self.path, "ab") as file:
            file.write(content)
        self._size += len(content)
        self._waiting, self._failed = "", False


def _replace(path: str, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def _complete_lines(text: str) -> str:
    return text[: text.rfind("\n") + 1]


def _cut_incomplete_line(path: str) -> None:
    text = _read(path)
    if text != _complete_lines(text):
        _replace(path, _complete_lines(text))
