"""Checkpoints: what is in the files, written atomically, read safely, found again.

A run's checkpoint at step S (the number of completed optimizer steps) is a set of files::

    model{S:06d}.pt             the weights
    ema_{rate}_{S:06d}.pt       their moving averages, one file for each rate
    opt{S:06d}.pt               the optimizer's state and all else that continuing needs

Weight files are plain state dicts, as openai/improved-diffusion writes and reads them. What the
weights alone don't tell (flags, channel names, step) travels in the state dict's ``_metadata``,
which ``torch.save`` keeps, a strict ``load_state_dict`` ignores, and which adds no key.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import blobfile as bf
import torch

from improved_diffusion.files import atomic_write, is_remote

METADATA_KEY = "improved_diffusion"
SUPERSEDED = "superseded"
_STEP = re.compile(r"(\d+)\.pt$")
_MODEL = re.compile(r"^model(\d{6,})\.pt$")
_RUN_FILE = re.compile(r"^(model|opt|ema_[0-9.e-]+_)(\d{6,})\.pt$")


def model_name(step: int) -> str:
    """File name of the weights at ``step``."""
    return f"model{step:06d}.pt"


def ema_name(rate: float, step: int) -> str:
    """File name of the moving average with ``rate`` at ``step``."""
    return f"ema_{rate}_{step:06d}.pt"


def opt_name(step: int) -> str:
    """File name of the optimizer's state at ``step``."""
    return f"opt{step:06d}.pt"


def save(content: Any, path: str) -> None:
    """Write ``content`` with ``torch.save`` so that ``path`` is never half-written.

    :raises OSError: if it cannot be written; ``path`` is then as it was.
    """
    try:
        with atomic_write(path) as file:
            torch.save(content, file)
    except RuntimeError as error:  # what torch makes of a failed write
        raise OSError(f"cannot write {path}: {error}") from error


def load(path: str, map_location: Any = "cpu") -> Any:
    """Read what :func:`save` or the reference wrote. Nothing in the file is executed.

    :raises ValueError: for a missing file, one that is damaged or no checkpoint, and one that
        holds anything but tensors, numbers, strings and containers of these.
    """
    if not bf.exists(path) or bf.isdir(path):
        raise ValueError(f"there is no checkpoint file {path}; check the path")
    with bf.BlobFile(path, "rb") as file:
        source = io.BytesIO(file.read()) if is_remote(path) else file
        try:
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


def training_flags(path: str, step: int) -> dict[str, Any]:
    """The command line's values of the run that wrote the model file ``path`` at ``step``.

    Empty for files of the reference.
    """
    content = load(sibling(path, opt_name(step)))
    return dict(content.get("training", {}).get("flags", {})) if isinstance(content, dict) else {}


def sibling(path: str, name: str) -> str:
    """The file ``name`` in the folder of ``path``."""
    return bf.join(bf.dirname(path) or ".", name)


def complete_steps(folder: str) -> list[int]:
    """Ascending steps of which ``folder`` holds the optimizer and the model, written last."""
    if not bf.isdir(folder):
        return []
    names = set(bf.listdir(folder))
    steps = sorted(int(match.group(1)) for name in names if (match := _MODEL.match(name)))
    return [step for step in steps if opt_name(step) in names]


def holds_run(folder: str) -> bool:
    """Whether a training run has written to ``folder``."""
    return bf.isdir(folder) and any(
        _RUN_FILE.match(name) or name == "progress.csv" for name in bf.listdir(folder)
    )


def find_resume_checkpoint(resume_checkpoint: str, out_dir: str) -> str:
    """The model file from which a run into ``out_dir`` goes on; ``""``: from the beginning.

    :param resume_checkpoint: the flag: a path, ``latest`` (the newest complete checkpoint in
        ``out_dir``; the beginning where there is none yet) or ``""``.
    :raises ValueError: if ``out_dir`` holds another run, which would be overwritten.
    """
    if resume_checkpoint == "latest":
        steps = complete_steps(out_dir)
        return bf.join(out_dir, model_name(steps[-1])) if steps else ""
    elsewhere = not resume_checkpoint or os.path.abspath(
        bf.dirname(resume_checkpoint) or "."
    ) != os.path.abspath(out_dir)
    if elsewhere and holds_run(out_dir):
        raise ValueError(
            f"--out_dir {out_dir} already holds a run; continue it with "
            "--resume_checkpoint latest, or choose another --out_dir"
        )
    return resume_checkpoint


def supersede(folder: str, step: int) -> list[str]:
    """Move the checkpoint files in ``folder`` that are newer than ``step`` into ``superseded/``.

    An earlier file of the same name there is kept under another one.

    :return: the names of the files moved.
    """
    newer = [
        name
        for name in sorted(bf.listdir(folder))
        if (match := _RUN_FILE.match(name)) and int(match.group(2)) > step
    ]
    if newer:
        target = Path(folder) / SUPERSEDED
        target.mkdir(exist_ok=True)
        for name in newer:
            free = target / name
            count = 1
            while free.exists():
                count += 1
                free = target / f"{Path(name).stem}_{count}.pt"
            os.replace(Path(folder) / name, free)
    return newer
