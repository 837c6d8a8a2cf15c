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


# ------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize(("num_items", "per_epoch"), [(10, 5), (11, 5), (3, 1)])
def test_an_epoch_visits_every_item_once_and_drops_the_rest(num_items, per_epoch):
    batches = index_lists(3 * per_epoch, shuffle=True, seed=4, num_items=num_items)
    for epoch in range(3):
        mine = np.concatenate(batches[epoch * per_epoch : (epoch + 1) * per_epoch]).tolist()
        permutation = np.random.default_rng((4, epoch)).permutation(num_items)
        assert mine == permutation[: 2 * per_epoch].tolist()
        assert len(set(mine)) == num_items // 2 * 2


def test_without_shuffling_every_epoch_is_in_order():
    first = [[0, 1], [2, 3]]
    assert index_lists(5, num_items=5) == [*first, *first, [0, 1]]
    assert all(type(index) is int for index in index_lists(1)[0])


def test_epochs_and_seeds_have_orders_of_their_own():
    def epoch(number, seed):
        return np.concatenate(index_lists(5, start=5 * number, shuffle=True, seed=seed)).tolist()

    orders = [tuple(epoch(number, seed)) for number in (0, 1, 2) for seed in (0, 1, 2)]
    assert len(set(orders)) == 9


def test_ranks_share_a_batch_in_contiguous_parts():
    # 11 items, 4 per batch of both: 8 in an epoch.
    parts = [index_lists(3, rank=rank, world_size=2, num_items=11) for rank in (0, 1)]
    assert parts == [[[0, 1], [4, 5], [0, 1]], [[2, 3], [6, 7], [2, 3]]]


def test_ranks_share_a_shuffled_epoch():
    parts = [
        index_lists(4, rank=rank, world_size=3, shuffle=True, seed=9, num_items=13)
        for rank in range(3)
    ]
    for epoch in range(2):
        order = np.random.default_rng((9, epoch)).permutation(13).tolist()
        for batch in range(2):
            shared = np.concatenate([part[2 * epoch + batch] for part in parts])
            assert shared.tolist() == order[6 * batch : 6 * batch + 6]


@pytest.mark.parametrize("start", range(6))
def test_start_goes_on_in_its_epoch(start):
    # 11 items in batches of 4: 2 batches in an epoch.
    got = index_lists(3, start=start, rank=1, world_size=2, shuffle=True, seed=1, num_items=11)
    for batch, indices in zip(range(start, start + 3), got, strict=True):
        order = np.random.default_rng((1, batch // 2)).permutation(11).tolist()
        begin = 4 * (batch % 2) + 2
        assert indices == order[begin : begin + 2]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_come_in_the_order_of_seed_start_and_rank(num_workers):
    data = endless_batches(
        Numbers(9),
        2,
        seed=6,
        start_batch=3,
        rank=1,
        world_size=2,
        num_workers=num_workers,
    )
    orders = [np.random.default_rng((6, epoch)).permutation(9).tolist() for epoch in (1, 2)]
    assert numbers(data, 3) == [orders[0][6:8], orders[1][2:4], orders[1][6:8]]


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
    for settings in ({"start_batch": 1}, {"rank": 0, "world_size": 2}):
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
