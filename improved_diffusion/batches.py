"""Endless training batches from a data set of items ``(image, labels and the like)``.

Legend: N batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import atexit
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

Batch = tuple[torch.Tensor, dict[str, torch.Tensor]]


def endless_batches(
    dataset: Dataset,
    batch_size: int,
    *,
    seed: int | None,
    deterministic: bool = False,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 1,
) -> Iterator[Batch]:
    """Batches of ``dataset`` without end: [N, C, H, W] and a dict of tensors [N, ...].

    Every epoch visits every item once, over all processes. The batches are cut from the epochs one
    after the other, so all are full, and one may hold the end of an epoch and the next one's
    beginning.

    :param dataset: items ``(image [C, H, W], dict)``. A ``ValueError`` that it raises is raised
        here, also where a worker process meets it.
    :param batch_size: N, items per batch and process.
    :param seed: the order of an epoch depends on it and the epoch's number alone; None: torch's
        global generator draws the order, as in openai/improved-diffusion.
    :param deterministic: keep the data set's own order in every epoch.
    :param start: items that an earlier run has consumed, over all its processes; the next one
        comes first. Needs a seed.
    :param rank: of this process; with ``world_size`` processes a batch of
        ``batch_size * world_size`` items is shared out in contiguous parts.
    :param num_workers: processes that read items; 0: read in this one.
    """
    assert 0 <= rank < world_size, (rank, world_size)
    if seed is None:
        assert (start, world_size) == (0, 1), "without a seed there is no order to continue"
        order: dict[str, Any] = {
            "batch_size": batch_size,
            "shuffle": not deterministic,
            "drop_last": True,
        }
    else:
        batches = EpochBatches(
            len(dataset), batch_size, seed, start, rank, world_size, shuffle=not deterministic
        )
        # A generator of its own: starting the loader must not disturb the global random state.
        order = {"batch_sampler": batches, "generator": torch.Generator().manual_seed(seed)}
    loader = DataLoader(
        ErrorsAsItems(dataset),
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available(),
        **order,
    )
    return _iterate(loader)


class EpochBatches(Sampler[list[int]]):
    """Index lists of one rank's batches, from item ``start`` of the epochs on and without end."""

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        seed: int,
        start: int,
        rank: int,
        world_size: int,
        shuffle: bool,
    ) -> None:
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle

        self._epoch = -1
        self._order = np.arange(0)

    def __iter__(self) -> Iterator[list[int]]:
        begin = self.start + self.rank * self.batch_size
        while True:
            yield self.items(begin, begin + self.batch_size)
            begin += self.batch_size * self.world_size

    def items(self, begin: int, end: int) -> list[int]:
        """Which items stand at the places from ``begin`` to below ``end`` of all epochs."""
        found: list[int] = []
        while begin < end:
            epoch, first = divmod(begin, self.num_items)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, np.arange(self.num_items)
                if self.shuffle:
                    rng = np.random.default_rng((self.seed, epoch))
                    self._order = rng.permutation(self._order)
            part = self._order[first : first + end - begin].tolist()
            found += part
            begin += len(part)
        return found


class ErrorsAsItems(Dataset):
    """An error as an item: raised in a worker it would arrive wrapped in a traceback.

    Any error, because the loader tells its workers of one by a signal that they ignore.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, idx: int) -> Any:
        try:
            return self.dataset[idx]
        except Exception as error:
            return error


def _collate(items: list[Any]) -> list[Any] | Exception:
    error = next((item for item in items if isinstance(item, Exception)), None)
    return error if error is not None else default_collate(items)


def ignore_signals(worker: int) -> None:
    """A signal to the whole process group must leave the main process batches to finish on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _iterate(loader: DataLoader) -> Iterator[Batch]:
    # The workers ignore the signal by which Python ends child processes at its own exit, so they
    # must be sent home before: dropping the only reference to the loader's iterator does that.
    # Registered after the iterator's own exit handlers, this runs ahead of them.
    epoch = [iter(loader)]
    atexit.register(epoch.clear)
    try:
        while True:
            while (batch := next(epoch[0], None)) is not None:
                if isinstance(batch, Exception):
                    raise batch
                yield tuple(batch)
            epoch[0] = iter(loader)
    finally:
        atexit.unregister(epoch.clear)
        epoch.clear()
