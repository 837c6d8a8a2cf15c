"""Endless batches: their order, their parts, their errors."""

import itertools
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from improved_diffusion.batches import EpochBatches, endless_batches

REPOSITORY = Path(__file__).resolve().parents[1]


class Numbers(Dataset):
    """Item i: an image [1, 1, 2] of i and -i, and a dict that tells it in three types."""

    def __init__(self, count, errors=None):
        self.count = count
        self.errors = errors or {}

    def __len__(self):
        return self.count

    def __getitem__(self, idx):
        if idx in self.errors:
            raise self.errors[idx]
        image = np.array([[[idx, -idx]]], dtype=np.float32)
        low_res = torch.full((1, 1, 1), idx / 4)
        return image, {"y": idx, "z": np.array(10 * idx, dtype=np.int64), "low_res": low_res}


def index_lists(count, *, start=0, rank=0, world_size=1, shuffle=False, seed=0, num_items=10):
    """The first index lists of two per process."""
    batches = EpochBatches(num_items, 2, seed, start, rank, world_size, shuffle)
    return list(itertools.islice(batches, count))


def numbers(data, count):
    return [next(data)[0][:, 0, 0, 0].int().tolist() for _ in range(count)]


def epochs(seed, count, num_items):
    """The items of the first epochs, one after the other."""
    orders = [np.random.default_rng((seed, epoch)).permutation(num_items) for epoch in range(count)]
    return np.concatenate(orders).tolist()


# ------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("num_items", [10, 11, 3, 2])
def test_every_epoch_visits_every_item_once(num_items):
    batches = index_lists(3 * num_items, shuffle=True, seed=4, num_items=num_items)
    assert all(len(batch) == 2 for batch in batches)
    seen = list(itertools.chain(*batches))
    assert seen == epochs(4, 6, num_items)
    for epoch in range(6):
        own = seen[epoch * num_items : (epoch + 1) * num_items]
        assert sorted(own) == list(range(num_items))


def test_without_shuffling_every_epoch_is_in_order():
    assert index_lists(5, num_items=5) == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]]
    assert all(type(index) is int for index in index_lists(1)[0])


def test_epochs_and_seeds_have_orders_of_their_own():
    def epoch(number, seed):
        return itertools.chain(*index_lists(5, start=10 * number, shuffle=True, seed=seed))

    orders = [tuple(epoch(number, seed)) for number in (0, 1, 2) for seed in (0, 1, 2)]
    assert len(set(orders)) == 9


def test_ranks_share_a_batch_in_contiguous_parts():
    # 11 items, 4 per batch of both.
    parts = [index_lists(3, rank=rank, world_size=2, num_items=11) for rank in (0, 1)]
    assert parts == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10, 0]]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_together_see_every_item_once_in_an_epoch(world_size):
    parts = [
        index_lists(26, rank=rank, world_size=world_size, shuffle=True, seed=9, num_items=13)
        for rank in range(world_size)
    ]
    together = [item for turn in zip(*parts) for batch in turn for item in batch]
    assert together == epochs(9, 4 * world_size, 13)[: len(together)]


@pytest.mark.parametrize("start", range(0, 26, 5))
@pytest.mark.parametrize("world_size", [1, 3])
def test_start_goes_on_in_its_epoch(start, world_size):
    """Whatever number of processes came that far."""
    for rank in range(world_size):
        got = index_lists(
            3, start=start, rank=rank, world_size=world_size, shuffle=True, seed=1, num_items=11
        )
        every = epochs(1, 5, 11)
        for turn, indices in enumerate(got):
            begin = start + 2 * (turn * world_size + rank)
            assert indices == every[begin : begin + 2]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_come_in_the_order_of_seed_start_and_rank(num_workers):
    data = endless_batches(
        Numbers(9), 2, seed=6, start=12, rank=1, world_size=2, num_workers=num_workers
    )
    every = epochs(6, 3, 9)
    assert numbers(data, 3) == [every[14:16], every[18:20], every[22:24]]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_seed_leaves_the_global_random_state_alone(num_workers):
    before = torch.get_rng_state()
    numbers(endless_batches(Numbers(5), 2, seed=1, num_workers=num_workers), 5)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_without_a_seed_torch_draws_the_order(num_workers):
    plain = DataLoader(
        list(range(7)), batch_size=3, shuffle=True, num_workers=num_workers, drop_last=True
    )

    def reference():
        while True:
            yield from plain

    def run(data, read):
        torch.manual_seed(5)
        # A draw between two batches: an epoch's order must be drawn at the same moment, too.
        seen = [(read(next(data)), torch.rand(()).item()) for _ in range(5)]
        return seen, torch.get_rng_state()

    theirs, their_state = run(reference(), lambda batch: batch.tolist())
    data = endless_batches(Numbers(7), 3, seed=None, num_workers=num_workers)
    ours, our_state = run(data, lambda batch: batch[1]["y"].tolist())
    assert ours == theirs
    assert torch.equal(our_state, their_state)
    epochs = {tuple(ours[batch][0] + ours[batch + 1][0]) for batch in (0, 2)}
    assert len(epochs) == 2 and tuple(range(6)) not in epochs  # shuffled at all


def test_without_a_seed_and_shuffling_the_order_is_kept():
    data = endless_batches(Numbers(5), 2, seed=None, deterministic=True, num_workers=0)
    assert numbers(data, 3) == [[0, 1], [2, 3], [0, 1]]


def test_a_start_or_a_share_needs_a_seed():
    for settings in ({"start": 1}, {"rank": 0, "world_size": 2}):
        with pytest.raises(AssertionError):
            endless_batches(Numbers(5), 2, seed=None, **settings)
    with pytest.raises(AssertionError):
        endless_batches(Numbers(5), 2, seed=0, rank=2, world_size=2)


# --------------------------------------------------------------------------------- items and errors


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_and_dicts_become_tensors(num_workers):
    data = endless_batches(Numbers(4), 3, seed=0, deterministic=True, num_workers=num_workers)
    batch = next(data)
    assert type(batch) is tuple
    images, cond = batch
    assert torch.equal(images, torch.tensor([[[[0.0, 0]]], [[[1, -1]]], [[[2, -2]]]]))
    assert images.dtype == torch.float32
    assert set(cond) == {"y", "z", "low_res"}
    assert torch.equal(cond["y"], torch.tensor([0, 1, 2])) and cond["y"].dtype == torch.int64
    assert torch.equal(cond["z"], torch.tensor([0, 10, 20])) and cond["z"].dtype == torch.int64
    assert torch.equal(cond["low_res"], torch.tensor([0, 0.25, 0.5]).reshape(3, 1, 1, 1))


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_value_error_arrives_as_it_was_raised(num_workers, seed):
    items = Numbers(6, {3: ValueError("item 3 is broken"), 2: ValueError("item 2 is broken")})
    data = endless_batches(items, 2, seed=seed, deterministic=True, num_workers=num_workers)
    assert numbers(data, 1) == [[0, 1]]
    with pytest.raises(ValueError) as caught:
        next(data)
    assert type(caught.value) is ValueError and caught.value.args == ("item 2 is broken",)


def test_other_errors_are_not_held_back():
    data = endless_batches(
        Numbers(2, {1: KeyError("oops")}), 2, seed=0, deterministic=True, num_workers=0
    )
    with pytest.raises(KeyError, match="oops"):
        next(data)


def test_a_process_that_another_error_ends_does_not_hang(tmp_path):
    """A worker ignores the signal by which Python ends child processes at its own exit."""
    program = textwrap.dedent(
        f"""
        import signal, sys
        sys.path.insert(0, {str(REPOSITORY)!r})
        from improved_diffusion.batches import endless_batches

        class Broken:
            def __len__(self):
                return 2

            def __getitem__(self, idx):
                raise KeyError("oops")

        data = endless_batches(Broken(), 2, seed=0, num_workers=1)
        try:
            next(data)
        finally:
            signal.alarm(5)  # kills this process if it is still there
        """
    )
    # Into a file: a worker that is left over would keep a pipe open.
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.run([sys.executable, "-c", program], stderr=stderr, timeout=60)
    assert "oops" in (tmp_path / "stderr").read_text()
    assert process.returncode == 1
