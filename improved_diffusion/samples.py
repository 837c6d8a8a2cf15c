"""The sample folder: raw levels, slices in the layout of the training data, picture, record.

::

    samples_{N}x{H}x{W}x{C}.npz   arr_0: uint8 [N, H, W, C], as the network made them;
                                  arr_1: int64 [N], the classes' numbers, where there are classes
    T1CE/sample_000000_T1ce.png   a folder for each channel, as a slice folder has them;
    Seg/sample_000000_seg.png     masks hold the nearest label code
    images/sample_000000.png      instead of these, where the channels have no names: RGB or grey
                                  pictures; with classes, named for them: images/cat_000000.png
    nifti/sample_000000/          a volume of one slice for each channel, if asked for
    grid.png                      the first samples, absolute grey range, masks in label colours
    samples.json                  how they were made

The folder grows as ``<folder>.partial``. Samples are written as they are drawn, and memory does
not grow with their number. In ``.work`` lie a file of all raw levels, a byte for each sample that
tells whether it is complete, and what the samples were begun with; a new start that fits goes on
from there. The raw levels go when all else is written, the rest of ``.work`` when the folder has
its name. Several processes share the batches that are left.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from improved_diffusion import dist_util, figures
from improved_diffusion.brats import MASK_CHANNEL, slice_name, snap_mask
from improved_diffusion.files import atomic_write
from improved_diffusion.nifti_export import write_volumes
from improved_diffusion.sampling import batches

GRID_SAMPLES = 32
PICTURES = "images"
FORMATS = ("npz", "png", "nifti")

WORK = ".work"
LOCK, SETTINGS, LEVELS, COMPLETE = "lock", "settings.json", "levels", "complete"


def parse_formats(text: str) -> tuple[str, ...]:
    """``"npz,png"`` -> ("npz", "png"), in the order of :data:`FORMATS`.

    :raises ValueError: an unknown name, or none.
    """
    names = text.split(",")
    if not set(names) <= set(FORMATS):
        raise ValueError(f"--format {text}: choose one or more of {','.join(FORMATS)}")
    return tuple(name for name in FORMATS if name in names)


def begun_with(folder: str) -> dict[str, Any]:
    """The settings of the samples that were begun for ``folder``; empty where there are none."""
    return _settings_in(_partial(folder) / WORK)


def _settings_in(work: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return json.loads((work / SETTINGS).read_text())
    return {}


def count_complete(folder: str) -> int:
    """How many samples of those that were begun for ``folder`` are complete."""
    with suppress(OSError):
        return int(np.fromfile(_partial(folder) / WORK / COMPLETE, dtype=np.uint8).sum())
    return 0


def _partial(folder: str) -> Path:
    target = Path(os.path.abspath(folder))
    return target.with_name(f"{target.name}.partial")


def write_sample_folder(
    folder: str,
    channels: Sequence[str],
    draw: Callable[[range], np.ndarray],
    record: dict[str, Any],
    *,
    num_samples: int,
    batch_size: int,
    shape: Sequence[int],
    settings: dict[str, Any] | None = None,
    labels: np.ndarray | None = None,
    classes: Sequence[str] = (),
    formats: Sequence[str] = ("npz", "png"),
    geometry: dict[str, Any] | None = None,
    on_start: Callable[[int], None] = lambda left: None,
) -> None:
    """Draw and write the samples that are not there yet; the folder has its name when complete.

    Under several processes (:mod:`improved_diffusion.dist_util`) all call this, and each draws
    its share of the batches.

    :param channels: names of the channels in the arrays' order; empty for ordinary pictures.
    :param draw: called with the numbers of a batch's samples; gives uint8 [len, H, W, C].
    :param record: further entries for ``samples.json``.
    :param shape: (H, W, C).
    :param settings: plain values that determine the samples, each under the name that the user
        knows it by, e.g. ``--seed``: samples are continued only with equal ones.
    :param labels: the number of each sample's class, [num_samples]; None: there are no classes.
    :param classes: names of the classes by number.
    :param geometry: see :func:`improved_diffusion.nifti_export.geometry_of`; for ``nifti``.
    :param on_start: called with how many batches are left for this process.
    :raises ValueError: if ``folder`` already holds something, or samples were begun with other
        settings, or another program is writing them.
    :raises OSError: if it cannot be written.
    """
    target, partial = Path(folder), _partial(folder)
    settings = json.loads(json.dumps({**(settings or {}), "--num_samples": num_samples}))
    size = (num_samples, *shape)
    sample_bytes = int(np.prod(shape))
    work = partial / WORK
    with ExitStack() as open_files:
        if dist_util.on_first(lambda: _is_written(target, settings)):
            return
        if dist_util.on_first(lambda: _open_work(folder, settings, size, open_files)):
            dist_util.on_first(lambda: _give_name(partial, target))
            return
        start = time.monotonic()
        levels = open_files.enter_context(open(work / LEVELS, "r+b"))
        complete = open_files.enter_context(open(work / COMPLETE, "r+b"))
        flags = np.frombuffer(complete.read(), dtype=np.uint8)
        left = [own for own in batches(num_samples, batch_size) if not flags[own].all()]
        dist_util.barrier()  # before anyone changes what the others have just read
        own_share = left[dist_util.rank() :: dist_util.world_size()]
        on_start(len(own_share))
        for indices in own_share:
            drawn = draw(indices)
            written: list[Path] = []
            try:
                for index, sample in zip(indices, drawn):
                    name = "sample" if labels is None or channels else classes[labels[index]]
                    stem = f"{name}_{index:06d}"
                    if "png" in formats:
                        written += _write_pictures(partial, stem, sample, channels)
                    if "nifti" in formats:
                        written += write_volumes(
                            partial / "nifti", stem, sample, channels, geometry
                        )
                for path in written:
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
                content = np.ascontiguousarray(drawn).tobytes()
                _write_at(levels, indices.start * sample_bytes, content)
                # Only now, so that what is complete is complete at whatever moment this ends, were
                # it by a power failure.
                _write_at(complete, indices.start, bytes([1]) * len(indices))
            except OSError as error:
                raise OSError(
                    f"cannot write to {partial}: {error.strerror or error}; what is complete stays "
                    "there, and the same command continues it"
                ) from error
        dist_util.barrier()
        seconds = time.monotonic() - start

        def finish() -> None:
            drawn = sum(len(own) for own in left)
            about = {
                "channels": list(channels),
                **({} if labels is None else {"classes": list(classes)}),
                "shape": list(size),
                **({"seconds_per_sample": round(seconds / drawn, 4)} if drawn else {}),
                **record,
            }
            _finish(partial, size, labels, channels, formats, about)
            (work / LEVELS).unlink()
            _give_name(partial, target)

        dist_util.on_first(finish)


def _give_name(partial: Path, target: Path) -> None:
    partial.rename(target)  # in the place of an empty folder, if there is one
    _remove_work(target)


def _remove_work(target: Path) -> None:
    # The settings last, by which a start after an interruption knows that only this was left.
    for name in (LEVELS, COMPLETE, LOCK, SETTINGS):
        (target / WORK / name).unlink(missing_ok=True)
    (target / WORK).rmdir()


def _is_written(target: Path, settings: dict[str, Any]) -> bool:
    """Whether a start with the same settings was interrupted after its last file; tidies up."""
    if _settings_in(target / WORK) != settings:
        return False
    _remove_work(target)
    return True


def _open_work(
    folder: str, settings: dict[str, Any], shape: tuple[int, ...], open_files: ExitStack
) -> bool:
    """Make the folder, or see that it can be continued, and keep others away.

    :param open_files: receives the lock.
    :return: whether it only lacks its name.
    """
    target, partial = Path(folder), _partial(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(
            f"--sample_dir {folder} already holds something, and nothing is overwritten; "
            "choose another folder"
        )
    work = partial / WORK
    ours = not partial.exists() or (
        partial.is_dir()
        and (begun_with(folder) or all(path.name == WORK for path in partial.iterdir()))
    )
    if not ours:
        raise ValueError(
            f"{partial} is in the way and holds no samples that could be continued; move it away, "
            "or choose another --sample_dir"
        )
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / LOCK, "wb")  # noqa: SIM115
        open_files.enter_context(lock)
    except OSError as error:
        raise OSError(
            f"--sample_dir {folder} cannot be made ({error.strerror}); choose another folder"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another program is writing samples to {partial}; wait for it, or choose another "
            "--sample_dir"
        ) from None
    known = begun_with(folder)  # with the lock, so that no one else is just writing them
    for name, value in settings.items():
        if known and known.get(name) != value:
            raise ValueError(
                f"the samples in {partial} were begun with {name} {known.get(name)}, not {value}; "
                "give the same flags to continue them, choose another --sample_dir, or delete "
                "that folder"
            )
    if not known:
        for name, size in ((LEVELS, int(np.prod(shape))), (COMPLETE, shape[0])):
            with open(work / name, "wb") as file:
                file.truncate(size)
        with atomic_write(str(work / SETTINGS)) as file:
            file.write(json.dumps(settings, indent=1).encode())
    elif done := count_complete(folder):
        print(f"continuing: {done} of {shape[0]} samples are there", flush=True)
    return not (work / LEVELS).exists()


def _write_at(file: BinaryIO, offset: int, content: bytes) -> None:
    file.seek(offset)
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def _finish(
    partial: Path,
    shape: tuple[int, ...],
    labels: np.ndarray | None,
    channels: Sequence[str],
    formats: Sequence[str],
    record: dict[str, Any],
) -> None:
    """Write what needs all samples: the npz, the picture and the record."""
    raw = partial / WORK / LEVELS
    if "npz" in formats:
        path = partial / f"samples_{'x'.join(map(str, shape))}.npz"
        with atomic_write(str(path)) as file, zipfile.ZipFile(file, "w") as archive:
            with _member(archive, "arr_0", np.uint8, shape) as member, open(raw, "rb") as levels:
                shutil.copyfileobj(levels, member, 2**22)
            if labels is not None:
                with _member(archive, "arr_1", np.int64, shape[:1]) as member:
                    member.write(np.asarray(labels, dtype=np.int64).tobytes())
    shown = min(GRID_SAMPLES, shape[0])
    first = np.fromfile(raw, dtype=np.uint8, count=shown * int(np.prod(shape[1:])))
    grid = figures.sample_grid(first.reshape(shown, *shape[1:]), list(channels) or None)
    figures.save_grid(grid, str(partial / "grid.png"))
    with atomic_write(str(partial / "samples.json")) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())


def _member(archive: zipfile.ZipFile, name: str, kind: type, shape: tuple[int, ...]) -> BinaryIO:
    """An array of an npz, of which its content is still to be written.

    Its date is the zip format's first, so that equal samples make equal files.
    """
    member = archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(kind)),
        "fortran_order": False,
        "shape": shape,
    }
    np.lib.format.write_array_header_1_0(member, header)
    return member


def _write_pictures(
    folder: Path, stem: str, sample: np.ndarray, channels: Sequence[str]
) -> list[Path]:
    """One sample, uint8 [H, W, C], as a PNG for each channel, or as one RGB or grey picture.

    Other numbers of channels without names make no picture.

    :return: the files.
    """
    written = []
    if channels:
        for i, channel in enumerate(channels):
            panel = np.ascontiguousarray(sample[:, :, i])
            if channel == MASK_CHANNEL:
                panel = snap_mask(panel)
            (folder / channel).mkdir(exist_ok=True)
            written.append(folder / channel / slice_name(stem, channel))
            Image.fromarray(panel).save(written[-1])
        return written
    if sample.shape[2] == 1:
        sample = sample[:, :, 0]
    if sample.ndim == 2 or sample.shape[2] == 3:
        (folder / PICTURES).mkdir(exist_ok=True)
        written.append(folder / PICTURES / f"{stem}.png")
        Image.fromarray(np.ascontiguousarray(sample)).save(written[-1])
    return written
