"""Whether samples are copies of training slices.

Every sample is compared with every training slice, by correlation of the pixels and by distance in
a feature space. How near an unseen slice comes to the training slices by itself is told by real
slices of held-out patients, compared in the same way: :func:`report` counts the samples that are
nearer to the training slices than 99 % of those.

The search is exact: all pairs, in float32, block by block. With 2 x 2 flips it needs no more
products than without: an image is the sum of parts that are even or odd in its rows and its
columns, products of parts of different parity are 0, and a flip changes only the sign of the odd
parts.

Legend: N samples, M training slices, C channels, H, W height and width, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from improved_diffusion.brats import MASK_CHANNEL, snap_mask
from improved_diffusion.evaluation.validity import check_samples
from improved_diffusion.parallel import Progress, no_progress

# Height and width at which slices are compared, if they are larger.
SIZE = 64
# A channel whose levels deviate less from their mean than rounding does is constant.
LEAST_DEVIATION = 0.5
# Rings of frequencies, of equal width, from 0 to the highest along an axis; some more lie beyond.
RINGS = 12
# Below this, power is rounding.
LEAST_POWER = 1e-6
# Of a correlation; what follows is the rounding of sums in float32.
DECIMALS = 5
# How a training slice is turned before it is compared. In BraTS slices the rows are the patient's
# left-right axis, so that the vertical flip is a mirrored patient.
FLIPS = ("none", "horizontal", "vertical", "both")
# Flip -> sign of the parts that are even-even, even-odd, odd-even, odd-odd in rows and columns.
_SIGNS = torch.tensor(
    [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float32
)

# Held-out slices that are less near than what counts as a copy.
HELD_OUT_SHARE = 0.99
BOOTSTRAP_DRAWS = 1000

# Slices that are compared at once: 5 channels of so many training slices are 500 MB as float32.
SAMPLE_BLOCK, TRAIN_BLOCK = 512, 6144


@dataclass(frozen=True)
class Neighbours:
    """The nearest training slice of each of N samples, by one measure."""

    value: np.ndarray  # float64 [N], correlation or distance; NaN where there is none
    index: np.ndarray  # int64 [N], of the training slice; -1 where there is none
    flip: np.ndarray  # int64 [N], of FLIPS: how the training slice is turned
    distance: bool = False  # whether a small value is near, instead of a large one

    @property
    def nearness(self) -> np.ndarray:
        """float64 [N], larger is nearer."""
        return -self.value if self.distance else self.value


@dataclass(frozen=True)
class Nearest:
    """What :func:`nearest` found."""

    joint: Neighbours
    channels: dict[str, Neighbours]


def shrink(
    images: np.ndarray | Iterable[np.ndarray],
    channels: Sequence[str],
    *,
    out: np.ndarray | None = None,
    progress: Progress = no_progress,
) -> np.ndarray:
    """Slices as they are compared: at most 64 pixels high and wide, their masks snapped to codes.

    Larger slices are averaged over equal areas. What is shrunk already stays as it is, so a large
    set can be shrunk once, block by block, before several comparisons.

    :param images: uint8 [N, H, W, C], memory-mapped or not, or blocks of them.
    :param channels: names of the C channels.
    :param out: where to write them, such as a memory map of the shape that :func:`shrunk_shape`
        gives; None: memory, 20 KB for each slice of 5 channels. Not for blocks.
    :returns: uint8 [N, min(H, 64), min(W, 64), C].
    :raises ValueError: another shape or data type, or names that do not fit.
    """
    if not isinstance(images, np.ndarray):
        return np.concatenate([_shrunk(np.array(block), channels) for block in images])
    check_samples(images, channels)
    found = np.empty(shrunk_shape(images.shape), np.uint8) if out is None else out
    starts = range(0, len(images), SAMPLE_BLOCK)
    for start in progress(starts, total=len(starts), desc="shrinking", unit="block"):
        rows = slice(start, start + SAMPLE_BLOCK)
        found[rows] = _shrunk(np.array(images[rows]), channels)
    return found


def shrunk_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Of slices [N, H, W, C] after :func:`shrink`."""
    count, height, width, channels = shape
    return count, min(height, SIZE), min(width, SIZE), channels


def _shrunk(images: np.ndarray, channels: Sequence[str]) -> np.ndarray:
    check_samples(images, channels)
    size = [min(side, SIZE) for side in images.shape[1:3]]
    if list(images.shape[1:3]) != size:
        levels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        levels = functional.adaptive_avg_pool2d(levels, size).round().byte()
        images = levels.permute(0, 2, 3, 1).numpy().copy()
    for index, name in enumerate(channels):
        if name == MASK_CHANNEL:
            images[..., index] = snap_mask(images[..., index])
    return images


@torch.no_grad()
def nearest(
    samples: np.ndarray,
    train: np.ndarray,
    channels: Sequence[str],
    *,
    sample_groups: np.ndarray | None = None,
    train_groups: np.ndarray | None = None,
    progress: Progress = no_progress,
) -> Nearest:
    """The training slice with the highest correlation, of each channel and of all together.

    Slices are compared at 64 x 64 pixels, see :func:`shrink`, with the training slice as it is and
    flipped. Correlation ignores a channel's brightness and contrast. A constant channel, such as an
    empty mask, has none: such a sample gets no neighbour by that channel.

    Blur must not look like memory: of a blurred image the plain correlation with nearly every slice
    is higher, because what is left of it is what all slices share. So the spectrum of every image
    is brought to the training slices' first: in each of 17 rings of frequencies the same share of
    the power. A filter that treats all directions alike then changes little, and copies, blurred or
    not, keep a correlation near 1. The mask is compared as it is.

    The joint correlation is the mean of the image channels' own, for one training slice and one
    flip. There a channel that is constant in one of the slices counts 0, in both not at all. The
    mask counts only where it is the one channel: two slices without tumour have nothing to differ
    in, so that slices without tumour would be nearer than others, and how many a set has of them
    would decide how near it is.

    :param samples: uint8 [N, H, W, C]. Of larger ones a shrunk copy is made in memory, 20 KB each;
        what :func:`shrink` has made, memory-mapped or not, is read block by block.
    :param train: uint8 [M, H, W, C].
    :param channels: names of the C channels.
    :param sample_groups: [N], whose slice each sample is (a number or a name), where it is a real
        one; training slices of the same group are left out. ``train_groups``: [M].
    :raises ValueError: another shape or data type, names that do not fit, sets of different sizes,
        or groups of only one set.
    """
    samples, train = _small(samples, channels), _small(train, channels)
    if samples.shape[1:] != train.shape[1:]:
        raise ValueError(
            f"the samples [N, H, W, C] are {list(samples.shape)}, the training slices "
            f"{list(train.shape)}: compare slices of one size with the same channels"
        )
    same_group = _same_group(sample_groups, train_groups, len(samples), len(train))
    searches = [_Search(len(samples)) for _ in channels]
    joined = [i for i, name in enumerate(channels) if name != MASK_CHANNEL or len(channels) == 1]
    joint_search = _Search(len(samples))
    constant = torch.zeros(len(channels), len(samples), dtype=torch.bool)
    reference = _mean_spectrum(train)
    for rows, columns in _blocks(len(samples), len(train), progress):
        if rows.start == 0:
            of_train = _shrunk(np.array(train[columns]), channels)
            train_parts, train_constant = _parts(of_train, channels, reference)
        own = _shrunk(np.array(samples[rows]), channels)
        parts, own_constant = _parts(own, channels, reference)
        constant[:, rows] = own_constant
        excluded = same_group(rows, columns)
        joint = torch.zeros(4, rows.stop - rows.start, columns.stop - columns.start)
        for channel, search in enumerate(searches):
            products = parts[channel] @ train_parts[channel].mT  # [4, b, m]
            if channel in joined:
                joint += products
            scores = _best_flip(products)
            scores[:, train_constant[channel]] = -math.inf
            search.update(scores, excluded, rows, columns, products)
        # How many channels are not constant in both slices: [b, m].
        shared = len(joined) - own_constant[joined].float().T @ train_constant[joined].float()
        scores = _best_flip(joint).div_(shared).masked_fill_(shared == 0, -math.inf)
        joint_search.update(scores, excluded, rows, columns, joint)
    for channel, search in enumerate(searches):
        search.value[constant[channel]] = -math.inf
    joint_search.value[constant[joined].all(dim=0)] = -math.inf
    return Nearest(
        joint_search.found(), {name: own.found() for name, own in zip(channels, searches)}
    )


def _small(images: np.ndarray, channels: Sequence[str]) -> np.ndarray:
    """Slices of at most 64 pixels, with masks raw or not; what is so small stays where it is."""
    check_samples(images, channels)
    return images if images.shape == shrunk_shape(images.shape) else shrink(images, channels)


@torch.no_grad()
def nearest_features(
    samples: np.ndarray,
    train: np.ndarray,
    *,
    sample_groups: np.ndarray | None = None,
    train_groups: np.ndarray | None = None,
    progress: Progress = no_progress,
) -> Neighbours:
    """The training slice at the smallest Euclidean distance in a feature space, without flips.

    :param samples: features [N, D], scaled as those of the training slices: see
        :func:`improved_diffusion.evaluation.distribution.scale`.
    :param train: features [M, D].
    :param sample_groups: as for :func:`nearest`; so is ``train_groups``.
    :raises ValueError: sets of different features, or groups of only one set.
    """
    if samples.ndim != 2 or samples.shape[1:] != train.shape[1:] or 0 in (len(samples), len(train)):
        raise ValueError(
            f"expected features [N, D] and [M, D] of one kind, found {list(samples.shape)} and "
            f"{list(train.shape)}"
        )
    same_group = _same_group(sample_groups, train_groups, len(samples), len(train))
    search = _Search(len(samples))
    a, b = (torch.from_numpy(np.asarray(own, dtype=np.float32)) for own in (samples, train))
    squares = b.square().sum(dim=1)
    for rows, columns in _blocks(len(samples), len(train), progress):
        # |a - b|^2 without |a|^2, which is one for all b.
        scores = 2 * a[rows] @ b[columns].T - squares[columns]
        search.update(scores, same_group(rows, columns), rows, columns)
    found = search.found()
    # Of near copies the sum above leaves little but rounding.
    gap = np.asarray(samples, np.float64) - np.asarray(train, np.float64)[found.index]
    distance = np.where(found.index < 0, np.nan, np.sqrt(np.einsum("nd,nd->n", gap, gap)))
    return Neighbours(distance, found.index, found.flip, distance=True)


class _Search:
    """The best score so far of each of N samples, and where it was."""

    def __init__(self, count: int) -> None:
        self.value = torch.full((count,), -math.inf)
        self.index = torch.full((count,), -1)
        self.flip = torch.zeros(count, dtype=torch.int64)

    def update(
        self,
        scores: torch.Tensor,
        excluded: torch.Tensor | None,
        rows: slice,
        columns: slice,
        products: torch.Tensor | None = None,
    ) -> None:
        """Take in the scores [b, m] of a block; ``products`` [4, b, m] tell the flip."""
        if excluded is not None:
            scores[excluded] = -math.inf
        best = scores.amax(dim=1)
        better = torch.nonzero(best > self.value[rows]).flatten()
        column = scores[better].argmax(dim=1)
        at = better + rows.start
        self.value[at] = best[better]
        self.index[at] = column + columns.start
        if products is not None:
            self.flip[at] = (_SIGNS @ products[:, better, column]).argmax(dim=0)

    def found(self) -> Neighbours:
        there = self.value.isfinite().numpy()
        return Neighbours(
            np.where(there, self.value.double().numpy().clip(max=1).round(DECIMALS), np.nan),
            np.where(there, self.index.numpy(), -1),
            np.where(there, self.flip.numpy(), 0),
        )


def _same_group(
    sample_groups: np.ndarray | None, train_groups: np.ndarray | None, n: int, m: int
) -> Callable[[slice, slice], torch.Tensor | None]:
    """What tells which pairs of a block, bool [b, m], are of one group; None without groups."""
    if sample_groups is None and train_groups is None:
        return lambda rows, columns: None
    found = [0 if own is None else len(own) for own in (sample_groups, train_groups)]
    if found != [n, m]:
        raise ValueError(
            f"the groups of {n} samples and {m} training slices were expected, one for each, found "
            f"{found[0]} and {found[1]}"
        )
    _, numbers = np.unique(np.concatenate([sample_groups, train_groups]), return_inverse=True)
    of_samples, of_train = torch.from_numpy(numbers[:n]), torch.from_numpy(numbers[n:])
    return lambda rows, columns: of_samples[rows, None] == of_train[columns]


def _blocks(n: int, m: int, progress: Progress) -> Iterator[tuple[slice, slice]]:
    """Blocks of samples within blocks of training slices."""
    pairs = [
        (slice(row, min(row + SAMPLE_BLOCK, n)), slice(column, min(column + TRAIN_BLOCK, m)))
        for column in range(0, m, TRAIN_BLOCK)
        for row in range(0, n, SAMPLE_BLOCK)
    ]
    return progress(pairs, total=len(pairs), desc="comparing", unit="block")


def _parts(
    images: np.ndarray, channels: Sequence[str], reference: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels of mean 0 and norm 1, split by parity, and which of them are constant (then 0).

    :param images: uint8 [b, H, W, C].
    :param reference: the spectrum that the images are given, [C, rings].
    :returns: float32 [C, 4, b, K], even-even, even-odd, odd-even and odd-odd in rows and columns,
        each on the quarter of the pixels that tells the others; bool [C, b].
    """
    count, height, width, _ = images.shape
    parts = torch.empty(len(channels), 4, count, ((height + 1) // 2) * ((width + 1) // 2))
    constant = torch.empty(len(channels), count, dtype=torch.bool)
    for start in range(0, count, SAMPLE_BLOCK):
        rows = slice(start, start + SAMPLE_BLOCK)
        levels, constant[:, rows] = _comparable(images[rows], channels, reference)
        split = [own for of_rows in _split(levels, 2) for own in _split(of_rows, 3)]
        for part, own in enumerate(split):
            parts[:, part, rows] = own.flatten(2)
    return parts, constant


def _comparable(
    images: np.ndarray, channels: Sequence[str], reference: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels [C, b, H, W] of one spectrum, mean 0 and norm 1; which are constant (then 0)."""
    levels = _centred(images)
    constant = levels.flatten(2).norm(dim=2) <= LEAST_DEVIATION * math.sqrt(levels[0, 0].numel())
    spectrum, members, power = _spectrum(levels)
    gain = (reference[:, None] / power.clamp(min=LEAST_POWER)).sqrt()  # [C, b, rings]
    for index, name in enumerate(channels):
        if name == MASK_CHANNEL:
            gain[index] = 1
    spectrum *= (gain @ members.T).view(spectrum.shape)
    levels = torch.fft.irfft2(spectrum, s=levels.shape[2:])
    norm = levels.flatten(2).norm(dim=2).clamp(min=LEAST_POWER)
    return levels / norm.masked_fill(constant, math.inf)[:, :, None, None], constant


def _mean_spectrum(images: np.ndarray) -> torch.Tensor:
    """Mean share of each channel's power in each ring, [C, rings], of images [M, H, W, C]."""
    total = 0
    for start in range(0, len(images), SAMPLE_BLOCK):
        power = _spectrum(_centred(np.array(images[start : start + SAMPLE_BLOCK])))[2]
        total += (power / power.sum(dim=2, keepdim=True).clamp(min=LEAST_POWER)).sum(dim=1)
    return total / len(images)


def _centred(images: np.ndarray) -> torch.Tensor:
    levels = torch.from_numpy(images).permute(3, 0, 1, 2).float()  # [C, b, H, W]
    return levels - levels.mean(dim=(2, 3), keepdim=True)


def _spectrum(levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fourier coefficients of [C, b, H, W], which ring each belongs to, and the rings' power.

    :returns: complex [C, b, H, W // 2 + 1], float32 [H (W // 2 + 1), rings] of 0 and 1, and
        float32 [C, b, rings].
    """
    height, width = levels.shape[2:]
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width))
    members = functional.one_hot((radius * 2 * RINGS).ceil().long().flatten()).float()
    # Of a real image's columns, those between the first and the middle one stand for two.
    column = torch.arange(width // 2 + 1)
    twice = 1 + ((column > 0) & (2 * column < width)).float()
    spectrum = torch.fft.rfft2(levels)
    power = (spectrum.real.square() + spectrum.imag.square()) * twice
    return spectrum, members, power.flatten(2) @ members


def _split(levels: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The even and the odd part along an axis, on its first half, with equal norm together."""
    size = levels.shape[axis]
    first = levels.narrow(axis, 0, (size + 1) // 2)
    last = levels.flip(axis).narrow(axis, 0, (size + 1) // 2)
    even, odd = (first + last) / math.sqrt(2), (first - last) / math.sqrt(2)
    if size % 2:
        even.select(axis, size // 2).div_(math.sqrt(2))  # the middle is its own mirror image
    return even, odd


def _best_flip(products: torch.Tensor) -> torch.Tensor:
    """The largest of the four signed sums of _SIGNS, [b, m], of the parts' products [4, b, m]."""
    even, across, along, odd = products
    return torch.maximum(
        (even + across).add_((along + odd).abs_()), (even - across).add_((along - odd).abs_())
    )


def flipped(image: np.ndarray, flip: str) -> np.ndarray:
    """A training slice [H, W, C] as :func:`nearest` turned it; ``flip`` is one of FLIPS."""
    if flip in ("vertical", "both"):
        image = image[::-1]
    if flip in ("horizontal", "both"):
        image = image[:, ::-1]
    return image


# --- what the neighbours say ---------------------------------------------------------------------


def compare(
    samples: Neighbours,
    held_out: Neighbours,
    held_out_groups: np.ndarray | None = None,
    sample_groups: np.ndarray | None = None,
) -> dict[str, Any]:
    """Share of samples that are nearer to a training slice than 99 % of the held-out slices are.

    The threshold is the held-out slices' value of rank ceil(0.99 (M + 1)), or the nearest of all
    where there are fewer than 99. So ``expected``, the share of a model that memorises no more
    than chance, 1 - rank / (M + 1), is exact for every number M of independent held-out slices:
    1 % for 99, 199, ..., less in between, and 1 / (M + 1) for fewer than 99.

    The interval of 95 % covers the chance in both sets: 1,000 times the held-out patients are
    drawn anew with replacement, which moves the threshold, and the share of the samples above it
    is drawn from its posterior, Beta(above + 1/2, below + 1/2), whose width is above 0 also where
    no sample is above. No drawing has a nearer slice than the held-out ones, so with a handful of
    patients, or fewer than some hundred slices, the interval leans to large shares.

    :param held_out_groups: [M], the patient of each held-out slice; without, slices are drawn as
        if each were of another patient, which makes the interval too narrow.
    :param sample_groups: [N], the same of samples that are real slices: the posterior is then that
        of as many samples as there are patients, as if all slices of one were equal.
    :returns: ``threshold`` (a correlation, or a distance), ``samples`` and ``held_out`` (how many
        have a neighbour), ``expected``, and ``share``: ``{"value", "low", "high"}``. Without a
        sample or a held-out slice that has a neighbour: both numbers only.
    """
    found, there = np.isfinite(samples.nearness), np.isfinite(held_out.nearness)
    own = np.sort(samples.nearness[found])
    others = held_out.nearness[there]
    counts = {"samples": len(own), "held_out": len(others)}
    if not len(own) or not len(others):
        return counts

    def above(threshold: float) -> int:
        return len(own) - int(np.searchsorted(own, threshold, side="right"))

    rng = np.random.default_rng(0)
    groups = np.arange(len(others))
    if held_out_groups is not None:
        groups = np.asarray(held_out_groups)[there]
    members = [np.flatnonzero(groups == name) for name in np.unique(groups)]
    drawn_samples = len(own) if sample_groups is None else len(np.unique(sample_groups[found]))
    draws = []
    for _ in range(BOOTSTRAP_DRAWS):
        drawn = rng.integers(0, len(members), len(members))
        count = above(_threshold(others[np.concatenate([members[i] for i in drawn])]))
        count *= drawn_samples / len(own)
        draws.append(rng.beta(count + 0.5, drawn_samples - count + 0.5))
    low, high = np.percentile(draws, [2.5, 97.5])
    threshold = _threshold(others)
    value = above(threshold) / len(own)
    # The posterior never reaches the ends 0 and 1, which the value may.
    share = {"value": value, "low": float(min(low, value)), "high": float(max(high, value))}
    return {
        **counts,
        "threshold": -threshold if samples.distance else threshold,
        "expected": 1 - _rank(len(others)) / (len(others) + 1),
        "share": share,
    }


def _rank(count: int) -> int:
    # Rounded before: 0.99 * 100 is a little more than 99.
    return min(count, math.ceil(round(HELD_OUT_SHARE * (count + 1), 9)))


def _threshold(nearness: np.ndarray) -> float:
    return float(np.sort(nearness)[_rank(len(nearness)) - 1])


def report(
    samples: Nearest,
    held_out: Nearest,
    *,
    features: tuple[Neighbours, Neighbours] | None = None,
    held_out_groups: np.ndarray | None = None,
    sample_groups: np.ndarray | None = None,
    worst: int = 20,
) -> dict[str, Any]:
    """All comparisons of one set of samples, and its pairs that are most alike.

    :param features: the neighbours in feature space of the samples and of the held-out slices.
    :param held_out_groups: as for :func:`compare`; so is ``sample_groups``.
    :param worst: how many pairs.
    :returns: ``joint`` and ``features`` (where given) as of :func:`compare`; ``channels``: name ->
        the same; ``worst``: of the samples with the highest joint correlation, that first,
        ``{"index", "train_index", "flip", "correlation"}``.
    """

    def against(own: Neighbours, others: Neighbours) -> dict[str, Any]:
        return compare(own, others, held_out_groups, sample_groups)

    found: dict[str, Any] = {"joint": against(samples.joint, held_out.joint)}
    found["channels"] = {
        name: against(own, held_out.channels[name]) for name, own in samples.channels.items()
    }
    if features is not None:
        found["features"] = against(*features)
    joint = samples.joint
    order = np.argsort(-joint.nearness, kind="stable")  # NaN last
    found["worst"] = [
        {
            "index": i,
            "train_index": int(joint.index[i]),
            "flip": FLIPS[joint.flip[i]],
            "correlation": float(joint.value[i]),
        }
        for i in order[:worst].tolist()
        if joint.index[i] >= 0
    ]
    return found
