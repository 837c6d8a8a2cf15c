"""Checkpoints: what is in the files, written atomically, read safely, found again.

A run's checkpoint at step S (the number of completed optimizer steps) is a set of files::

    model{S:06d}.pt             the weights
    ema_{rate}_{S:06d}.pt       their moving averages, one file for each rate
    ema_p{length}_{S:06d}.pt    their power averages (:mod:`improved_diffusion.power_ema`), if any
    opt{S:06d}.pt               the optimizer's state and all else that continuing needs

The power averages are also snapshots, from which averages of other lengths are made after the
training; so they may stand at more steps than the rest, and stay when the rest is thinned out.

Weight files are plain state dicts, as openai/improved-diffusion writes and reads them. What the
weights alone don't tell (flags, channel names, step) travels in the state dict's ``_metadata``,
which ``torch.save`` keeps, a strict ``load_state_dict`` ignores, and which adds no key.

Two checksums guard a set. Every file is a zip archive with a CRC-32 of each member, which PyTorch
writes but does not read; :func:`load` does. The model's file, written last, holds the SHA-256 of
the files beside it, so that :func:`verify` finds one that is damaged, missing or of another run.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import pickle
import re
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import blobfile as bf
import torch

from improved_diffusion.files import atomic_write, is_remote
from improved_diffusion.input_files import open_file

METADATA_KEY = "improved_diffusion"
SUPERSEDED = "superseded"
LOCK = ".lock"
_STEP = re.compile(r"(\d+)\.pt$")
_MODEL = re.compile(r"^model(\d{6,})\.pt$")
_SNAPSHOT = re.compile(r"^ema_p(0\.\d+)_(\d{6,})\.pt$")
_RUN_FILE = re.compile(r"^(model|opt|ema_(?:p|posthoc_)?[0-9.e-]+_)(\d{6,})\.pt$")


def model_name(step: int) -> str:
    """File name of the weights at ``step``."""
    return f"model{step:06d}.pt"


def ema_name(rate: float, step: int) -> str:
    """File name of the moving average with ``rate`` at ``step``."""
    return f"ema_{rate}_{step:06d}.pt"


def snapshot_name(sigma_rel: float, step: int) -> str:
    """File name of the power average of relative length ``sigma_rel`` at ``step``."""
    return f"ema_p{sigma_rel}_{step:06d}.pt"


def posthoc_name(sigma_rel: float, step: int) -> str:
    """File name of a power average that was made from others after the training."""
    return f"ema_posthoc_{sigma_rel}_{step:06d}.pt"


def opt_name(step: int) -> str:
    """File name of the optimizer's state at ``step``."""
    return f"opt{step:06d}.pt"


class _Hashed:
    """A file to write to, and the SHA-256 of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save(content: Any, path: str) -> str:
    """Write ``content`` with ``torch.save`` so that ``path`` is never half-written.

    :return: the hexadecimal SHA-256 of the file.
    :raises OSError: if it cannot be written; ``path`` is then as it was.
    """
    try:
        with atomic_write(path) as file:
            hashed = _Hashed(file)
            torch.save(content, hashed)
    except RuntimeError as error:  # what torch makes of a failed write
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"cannot write {path}: {reason}") from error
    return hashed.digest.hexdigest()


def load(path: str, map_location: Any = "cpu") -> Any:
    """Read what :func:`save` or the reference wrote. Nothing in the file is executed.

    :raises ValueError: for a missing file, one that is damaged or no checkpoint, and one that
        holds anything but tensors, numbers, strings and containers of these.
    """
    if not bf.exists(path) or bf.isdir(path):
        raise ValueError(f"there is no checkpoint file {path}; check the path")
    with open_file(path) as file:
        source = io.BytesIO(file.read()) if is_remote(path) else file
        try:
            _check_members(source)
            return torch.load(source, map_location=map_location, weights_only=True)
        except Exception as error:  # what arbitrary bytes raise has no bound
            if isinstance(error, pickle.UnpicklingError) and re.search(
                "global|class|function", str(error), re.IGNORECASE
            ):
                raise ValueError(
                    f"{path} holds more than tensors and plain values, which could run code when "
                    "opened; it was not loaded. Use a checkpoint that holds a plain state dict"
                ) from error
            raise ValueError(_unreadable(path)) from error


def _check_members(file: BinaryIO) -> None:
    """Compare the members of a zip archive with their checksums; other files pass unseen.

    :raises zipfile.BadZipFile: one that differs, or that ``torch.save`` would not write.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                # PyTorch takes a member that calls itself a folder for empty, and its tensor then
                # is whatever was in memory.
                if member.compress_type != zipfile.ZIP_STORED or member.external_attr & 0x10:
                    raise zipfile.BadZipFile(f"{member.filename} is compressed, or a folder")
                with archive.open(member) as content:
                    while content.read(1 << 20):
                        pass
    file.seek(0)


def _unreadable(path: str) -> str:
    return (
        f"{path} is no readable checkpoint ({bf.stat(path).size} bytes): it is damaged, truncated "
        "or another kind of file; use another checkpoint"
    )


def load_weights(path: str, map_location: Any = "cpu") -> OrderedDict[str, torch.Tensor]:
    """Read a state dict: parameter names and tensors.

    :raises ValueError: as :func:`load`, and for a file that holds something else.
    """
    content = load(path, map_location)
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(value, torch.Tensor) for value in content.values())
    ):
        raise ValueError(
            f"{path} holds no state dict of a network; name a model or ema file, "
            "such as model010000.pt or ema_0.9999_010000.pt"
        )
    return content


def with_metadata(
    weights: OrderedDict[str, torch.Tensor], metadata: dict[str, Any]
) -> OrderedDict[str, torch.Tensor]:
    """A state dict with ``metadata`` (plain values) attached, sharing the tensors."""
    result = OrderedDict(weights)
    result._metadata = {**getattr(weights, "_metadata", {}), METADATA_KEY: metadata}
    return result


def metadata_of(weights: OrderedDict[str, torch.Tensor]) -> dict[str, Any]:
    """What :func:`with_metadata` attached; empty for files that others wrote."""
    return dict(getattr(weights, "_metadata", {}).get(METADATA_KEY, {}))


def load_into(model: torch.nn.Module, weights: OrderedDict[str, torch.Tensor], path: str) -> None:
    """Load ``weights``, which came from ``path``, into ``model``, key by key.

    :raises ValueError: naming what differs, if the architecture is another.
    """
    own = model.state_dict()
    differences = [
        *(f"{name} is missing in the file" for name in own if name not in weights),
        *(f"{name} is not in the model" for name in weights if name not in own),
        *(
            f"{name} is {list(weights[name].shape)} in the file and {list(own[name].shape)} here"
            for name in own
            if name in weights and weights[name].shape != own[name].shape
        ),
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(
            f"{path} is of another architecture than the model flags describe: "
            f"{'; '.join(differences[:3])}{more}. Give the flags with which it was trained"
        )
    model.load_state_dict(weights)


def sha256(path: str) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with bf.BlobFile(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def step_of(path: str, metadata: dict[str, Any]) -> int:
    """Completed steps of the checkpoint ``path``: from its metadata, else from its name.

    :raises ValueError: if neither tells.
    """
    if "step" in metadata:
        return int(metadata["step"])
    if match := _STEP.search(bf.basename(path)):
        return int(match.group(1))
    raise ValueError(
        f"{path}: its step is neither inside the file nor in its name; "
        "rename it to model<step>.pt, for example model010000.pt"
    )


def training_state(path: str, step: int) -> dict[str, Any]:
    """What the run that wrote the model file ``path`` at ``step`` keeps beside the optimizer's
    state: ``flags`` of its command line, ``samples`` (images seen) and more.

    Empty for files of the reference.
    """
    content = load(sibling(path, opt_name(step)))
    return dict(content.get("training", {})) if isinstance(content, dict) else {}


def sibling(path: str, name: str) -> str:
    """The file ``name`` in the folder of ``path``."""
    return bf.join(bf.dirname(path) or ".", name)


def verify(path: str, ema_rates: Iterable[float] = (), sigma_rels: Iterable[float] = ()) -> None:
    """See that the model file ``path`` and what belongs to it are there and undamaged.

    :param ema_rates: rates of the averages that are needed.
    :param sigma_rels: lengths of the power averages that are needed.
    :raises ValueError: naming the file that is not, and what to do.
    """
    weights = load_weights(path)
    metadata = metadata_of(weights)
    step = step_of(path, metadata)
    recorded = metadata.get("files", {})
    needed = {
        **{ema_name(rate, step): "its rate out of --ema_rate" for rate in ema_rates},
        **{
            snapshot_name(length, step): "its length out of --ema_sigma_rel"
            for length in sigma_rels
        },
    }
    for name in dict.fromkeys([*recorded, *needed]):
        beside = sibling(path, name)
        if not bf.exists(beside):
            advice = "restore it"
            if name in needed:
                advice += f", or leave {needed[name]}"
            raise ValueError(f"{beside} is missing beside {path}; {advice}")
        if name in recorded and sha256(beside) != recorded[name]:
            raise ValueError(
                f"{beside} is not the file that was saved with {path}: it is damaged, or another "
                "run's (the SHA-256 differs); restore it, or continue from an earlier step"
            )
    if not recorded:  # of a version or a program that keeps no checksums
        load(sibling(path, opt_name(step)))


def _names_in(folder: str) -> list[str]:
    # blobfile looks at each file, which may meanwhile have got its name.
    return list(bf.listdir(folder)) if is_remote(folder) else os.listdir(folder)


def complete_steps(folder: str) -> list[int]:
    """Ascending steps of which ``folder`` holds the optimizer and the model, written last."""
    if not bf.isdir(folder):
        return []
    names = set(_names_in(folder))
    steps = sorted(int(match.group(1)) for name in names if (match := _MODEL.match(name)))
    return [step for step in steps if opt_name(step) in names]


def snapshots(folder: str) -> list[tuple[int, float]]:
    """Ascending steps and lengths of the power averages in ``folder``."""
    if not bf.isdir(folder):
        return []
    found = map(_SNAPSHOT.match, _names_in(folder))
    return sorted((int(match.group(2)), float(match.group(1))) for match in found if match)


def holds_run(folder: str) -> bool:
    """Whether a training run has written to ``folder``."""
    return bf.isdir(folder) and any(
        _RUN_FILE.match(name) or name == "progress.csv" for name in _names_in(folder)
    )


def find_resume_checkpoint(resume_checkpoint: str, out_dir: str) -> tuple[str, list[str]]:
    """The model file from which a run into ``out_dir`` goes on; ``""``: from the beginning.

    :param resume_checkpoint: the flag: a path, ``latest`` (the newest complete and undamaged
        checkpoint in ``out_dir``; the beginning where there is none yet) or ``""``.
    :return: the file, and sentences about newer ones that cannot be used.
    :raises ValueError: if ``out_dir`` holds another run, which would be overwritten, or nothing
        but damaged checkpoints.
    """
    if resume_checkpoint == "latest":
        damaged = []
        for step in reversed(complete_steps(out_dir)):
            path = bf.join(out_dir, model_name(step))
            try:
                verify(path)
                return path, damaged
            except ValueError as error:
                damaged.append(str(error))
        if damaged:
            raise ValueError(
                f"{out_dir} holds no checkpoint that can be continued: {damaged[0]}; to begin "
                "anew choose another --out_dir"
            )
        return "", []
    elsewhere = not resume_checkpoint or os.path.abspath(
        bf.dirname(resume_checkpoint) or "."
    ) != os.path.abspath(out_dir)
    if elsewhere and holds_run(out_dir):
        raise ValueError(
            f"--out_dir {out_dir} already holds a run; continue it with "
            "--resume_checkpoint latest, or choose another --out_dir"
        )
    return resume_checkpoint, []


@contextmanager
def exclusive(folder: str) -> Iterator[None]:
    """Keep other trainings out of ``folder`` while this one writes to it.

    The folder is made if needed. The system frees it when the process ends, however it does, and
    does not ask its children, which may live for a moment longer. File systems that have no locks
    are trusted.

    :raises ValueError: another process is training there.
    :raises OSError: it cannot be made.
    """
    if is_remote(folder):
        yield
        return
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(os.path.join(folder, LOCK), "ab")  # noqa: SIM115
    except OSError as error:
        raise OSError(
            f"the folder {folder} cannot be made or written ({error.strerror}): choose another"
        ) from error
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"another process is training in {folder}; stop it first, or choose another "
                    "folder"
                ) from None
        yield


def remove_partial(folder: str) -> None:
    """Remove what a process that was killed while it saved has left half-written."""
    if not is_remote(folder):
        for path in Path(folder).glob("*.pt.partial"):
            if _RUN_FILE.match(path.name.removesuffix(".partial")):
                path.unlink()


def check_keep(keep: int) -> None:
    """:raises ValueError: a number of checkpoints that leaves none to fall back on."""
    if keep < 0 or keep == 1:
        raise ValueError(
            f"--keep_checkpoints {keep}: give 0 (all) or at least 2, the newest and one to fall "
            "back on if it is damaged"
        )


def to_thin_out(steps: Sequence[int], keep: int) -> list[int]:
    """Which of the ascending ``steps`` to remove so that ``keep`` are left.

    The two newest stay: the one to continue from, and one to fall back on. Of the others goes the
    one whose neighbours (the beginning included) are closest together, the older of equal ones, so
    that what stays is spread evenly over the run.
    """
    assert keep >= 2, keep
    left, removed = list(steps), []
    while len(left) > keep:
        after = left[1:]
        before = [0, *left]
        gaps = [after[i] - before[i] for i in range(len(left) - 2)]
        removed.append(left.pop(gaps.index(min(gaps))))
    return removed


def thin_out(folder: str, keep: int) -> list[int]:
    """Remove complete checkpoints from ``folder`` as :func:`to_thin_out` says; their steps.

    Power averages stay, those that were made after the training included.
    """
    removed = to_thin_out(complete_steps(folder), keep)
    for step in removed:
        names = [
            name
            for name in _names_in(folder)
            if (match := _RUN_FILE.match(name))
            and int(match.group(2)) == step
            and not name.startswith("ema_p")
        ]
        # The model's file first: without it the others are no checkpoint, whatever happens now.
        for name in sorted(names, key=lambda name: not _MODEL.match(name)):
            bf.remove(bf.join(folder, name))
    return removed


def size_in_bytes(parameters: int, averages: int) -> int:
    """Size of a checkpoint: weights, their averages, and AdamW's two moments, all float32."""
    return 4 * parameters * (1 + averages + 2)


def free_bytes(folder: str) -> int | None:
    """Room on the disk on which ``folder`` is, or is to be made; None where that is unknown."""
    if is_remote(folder):
        return None
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    with contextlib.suppress(OSError):
        return shutil.disk_usage(place).free
    return None


def supersede(folder: str, step: int) -> list[str]:
    """Move the checkpoint files in ``folder`` that are newer than ``step`` into ``superseded/``.

    A run that begins anew (-1) also leaves a copy of its progress.csv there. An earlier file of
    the same name there is kept under another one.

    :return: the names of the files moved.
    """
    newer = [
        name
        for name in sorted(_names_in(folder))
        if (match := _RUN_FILE.match(name)) and int(match.group(2)) > step
    ]
    for name in newer:
        os.replace(Path(folder) / name, _free_name(folder, name))
    progress = Path(folder) / "progress.csv"
    if step < 0 and progress.exists() and progress.stat().st_size:
        shutil.copyfile(progress, _free_name(folder, progress.name))
    return newer


def _free_name(folder: str, name: str) -> Path:
    target = Path(folder) / SUPERSEDED
    target.mkdir(exist_ok=True)
    path, count = target / name, 1
    while path.exists():
        count += 1
        path = target / f"{Path(name).stem}_{count}{Path(name).suffix}"
    return path
