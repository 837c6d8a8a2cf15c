"""Whether samples help a segmenter: a compact U-Net trained on real and on synthetic slices.

The network, its loss and the Dice score are MONAI's, the Wilcoxon test is scipy's; both come with
``pip install 'improved-diffusion[eval]'``.

Legend: N slices, C image channels, H rows, W columns, P patients, R regions of :data:`REGIONS`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from improved_diffusion.batches import EpochBatches
from improved_diffusion.brats import LABEL_NAMES, MASK_CODES
from improved_diffusion.evaluation.intervals import BOOTSTRAP_DRAWS
from improved_diffusion.seeds import derive_seed

# The network's classes are the label codes' places: 0 background, 1 necrotic core, 2 oedema,
# 3 enhancing tumour (label 4 in BraTS up to 2022).
CLASS_NAMES = [LABEL_NAMES[code] for code in MASK_CODES]
# What is scored -> its classes: every label, and the two unions of the BraTS challenge. The third
# of its regions, the enhancing tumour, is a label.
REGIONS = {
    "whole tumour": (1, 2, 3),
    "tumour core": (1, 3),
    "enhancing tumour": (3,),
    "oedema": (2,),
    "necrotic core": (1,),
}
EMPTY_RULE = (
    "A region that a patient's slices do not show scores 1 if none of it is predicted there, and 0 "
    "otherwise, as in the BraTS challenge (MONAI: ignore_empty=False)."
)

FEATURES = (16, 16, 32, 64, 128, 16)  # of the network's five levels, and of its last layer
LEAST_SIZE = 32  # the lowest level then has 2 x 2 pixels; of one there is no variance

REPLACED = re.compile(r"real-([1-9]\d?)%replaced")
ARMS = ("real", "synthetic", "real+synthetic", "real-20%replaced")


@dataclass(frozen=True)
class Slices:
    """Slices in memory.

    :param images: uint8 [N, C, H, W].
    :param classes: uint8 [N, H, W], see :data:`CLASS_NAMES`.
    :param names: N names, each once.
    :param patients: whose slice each is, N names.
    """

    images: np.ndarray
    classes: np.ndarray
    names: list[str]
    patients: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def part(self, start: int, stop: int) -> Slices:
        """Slices ``start`` to ``stop - 1``, which share the memory."""
        own = slice(start, stop)
        return Slices(self.images[own], self.classes[own], self.names[own], self.patients[own])

    def digest(self) -> str:
        """SHA-256 of all that is in them."""
        digest = hashlib.sha256(repr((self.images.shape, self.names, self.patients)).encode())
        digest.update(np.ascontiguousarray(self.images))
        digest.update(np.ascontiguousarray(self.classes))
        return digest.hexdigest()


@dataclass(frozen=True)
class Data:
    """All slices of an evaluation.

    :param channels: names of the images' C channels.
    :param pool: the real training slices, then the synthetic ones.
    :param real: the former, in the pool's memory.
    :param synthetic: the latter, in the pool's memory; there may be none.
    :param test: real slices of other patients.
    """

    channels: list[str]
    pool: Slices
    real: Slices
    synthetic: Slices
    test: Slices


def check_installed() -> None:
    """Refuse to start without the packages that only this module needs.

    :raises ValueError: MONAI or scipy is not installed.
    """
    for name in ("monai", "scipy"):
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"the segmenter needs MONAI and scipy, but {name} is not installed: "
                "pip install 'improved-diffusion[eval]'"
            )


# ------------------------------------------------------------------------------------------- arms


def parse_arms(text: str) -> list[str]:
    """``"real,synthetic"`` -> ["real", "synthetic"].

    :raises ValueError: an unknown or repeated arm.
    """
    arms = [name.strip() for name in text.split(",")]
    for arm in arms:
        if arm not in ARMS and not REPLACED.fullmatch(arm):
            raise ValueError(
                f"--arms {text}: there is no arm {arm!r}; choose from {', '.join(ARMS)}, the last "
                "with any share from 1% to 99%"
            )
        if arms.count(arm) > 1:
            raise ValueError(f"--arms {text}: {arm} is named more than once")
    return arms


def training_slices(
    arm: str, patients: Sequence[str], num_synthetic: int, seed: int
) -> tuple[np.ndarray, list[str]]:
    """Which slices an arm trains on, by number: the real ones first, then the synthetic ones.

    An arm takes a set as a whole, however many slices the other one has. Slices are replaced by
    patient, because a patient's slices resemble each other, so that single ones would hardly be
    missed: as many patients, drawn by the seed, as bring their share of the real slices nearest to
    the arm's (at least one, never all). A synthetic slice, drawn without replacement, stands in
    the place of each of theirs, so that all other slices keep their place in the training order.

    :param patients: the real slices' patients.
    :returns: int64 [slices of the arm], and the patients that were replaced.
    :raises ValueError: more slices to replace than there are synthetic ones, or a single patient.
    """
    real, synthetic = np.arange(len(patients)), len(patients) + np.arange(num_synthetic)
    match = REPLACED.fullmatch(arm)
    if match is None:
        parts = {"real": [real], "synthetic": [synthetic], "real+synthetic": [real, synthetic]}
        return np.concatenate(parts[arm]), []
    rng = np.random.default_rng((seed, *b"replaced"))
    names = np.array(list(dict.fromkeys(patients)))
    if len(names) < 2:
        raise ValueError(
            f"--arms {arm}: there is one training patient only, {names[0]}; leave the arm out"
        )
    names = rng.permutation(names)
    counts = np.cumsum([patients.count(name) for name in names])[:-1]
    share = counts / len(patients)
    last = int(np.abs(share - int(match[1]) / 100).argmin())
    if counts[last] > num_synthetic:
        raise ValueError(
            f"--arms {arm}: {counts[last]} real slices are to be replaced, but there are "
            f"{num_synthetic} synthetic ones; draw more, or leave the arm out"
        )
    replaced = sorted(names[: last + 1].tolist())
    picks = real.copy()
    picks[np.isin(patients, replaced)] = rng.choice(synthetic, counts[last], replace=False)
    return picks, replaced


# -------------------------------------------------------------------------------------- segmenter


def build_network(in_channels: int, seed: int) -> nn.Module:
    """MONAI's basic U-Net (Falk et al. 2019), half a million weights that follow the seed.

    It takes float32 [N, C, H, W] of 32 pixels or more and gives a logit for each class,
    [N, 4, H, W].
    """
    from monai.networks.nets import BasicUNet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "segmenter", 0))
        return BasicUNet(
            spatial_dims=2,
            in_channels=in_channels,
            out_channels=len(CLASS_NAMES),
            features=FEATURES,
        )


def train(
    network: nn.Module,
    slices: Slices,
    picks: np.ndarray,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    device: torch.device,
    on_step: Callable[[], None] = lambda: None,
) -> float:
    """Minimise Dice loss plus cross-entropy by AdamW, whose rate falls to 0 along a cosine.

    The Dice loss takes the tumour's labels, each over the whole batch, because most slices lack
    one of them. Batches are cut from shuffled epochs, see :class:`.batches.EpochBatches`. Their
    order and the changes of :func:`augmented` follow the seed, not the slices.

    :param slices: of which those numbered ``picks`` are trained on.
    :returns: the mean loss over the last tenth of the steps.
    """
    from monai.losses import DiceCELoss

    loss_of = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = EpochBatches(
        len(picks), batch_size, derive_seed(seed, "order", 0), 0, 0, 1, shuffle=True
    )
    network.to(device).train()
    last = max(1, steps // 10)
    total = torch.zeros((), device=device)  # on the device: reading it every step would wait
    for step, places in zip(range(steps), order):
        chosen = picks[places]
        generator = torch.Generator().manual_seed(derive_seed(seed, "augmentation", step))
        images, classes = augmented(
            to_unit_range(slices.images[chosen]),
            torch.from_numpy(slices.classes[chosen])[:, None].long(),
            generator,
        )
        loss = loss_of(network(images.to(device)), classes.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step >= steps - last:
            total += loss.detach()
        on_step()
    return float(total) / last


def to_unit_range(images: np.ndarray) -> torch.Tensor:
    """Levels, uint8, to float32 in [-1, 1]."""
    return torch.from_numpy(images).float() / 127.5 - 1


def augmented(
    images: torch.Tensor, classes: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mirror every second slice, by chance, left to right; brighten or darken every channel.

    A slice's rows run from one side of the head to the other. The brightness is multiplied by 0.75
    to 1.25, for each slice and channel, and black stays black: scaled by a volume's maximum, one
    tissue differs between patients too.

    :param images: float32 [N, C, H, W], -1 is black.
    :param classes: int64 [N, 1, H, W].
    :returns: the two, changed.
    """
    n, channels = images.shape[:2]
    mirror = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    brightness = 0.75 + 0.5 * torch.rand(n, channels, 1, 1, generator=generator)
    images = (images + 1) * brightness - 1
    return (
        torch.where(mirror, images.flip(2), images),
        torch.where(mirror, classes.flip(2), classes),
    )


@torch.no_grad()
def predict(
    network: nn.Module, images: np.ndarray, *, batch_size: int, device: torch.device
) -> np.ndarray:
    """The likeliest class of every pixel: uint8 [N, H, W] of uint8 [N, C, H, W]."""
    network.to(device).eval()
    parts = []
    for start in range(0, len(images), batch_size):
        logits = network(to_unit_range(images[start : start + batch_size]).to(device))
        parts.append(logits.argmax(dim=1).byte().cpu().numpy())
    return np.concatenate(parts)


# ----------------------------------------------------------------------------------------- scores


def regions_of(classes: np.ndarray) -> np.ndarray:
    """Where each region of :data:`REGIONS` lies: bool [R, ...] of classes [...]."""
    return np.stack([np.isin(classes, own) for own in REGIONS.values()])


def dice_per_patient(
    predicted: np.ndarray, truth: np.ndarray, patients: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Dice, 2 |A and B| / (|A| + |B|), of every region over all slices of a patient together.

    :param predicted: classes, uint8 [N, H, W]; so is ``truth``.
    :param patients: whose slice each is.
    :returns: patient -> region -> Dice in [0, 1], to six decimals; see :data:`EMPTY_RULE`.
    """
    from monai.metrics import compute_dice

    found = {}
    for patient in dict.fromkeys(patients):
        own = np.array([name == patient for name in patients])
        a, b = (torch.from_numpy(regions_of(x[own]))[None] for x in (predicted, truth))
        scores = compute_dice(a, b, include_background=True, ignore_empty=False)  # [1, R]
        found[patient] = {name: round(float(x), 6) for name, x in zip(REGIONS, scores[0])}
    return found


def patients_without(truth: np.ndarray, patients: Sequence[str]) -> dict[str, int]:
    """Region -> how many patients show none of it; arguments as of :func:`dice_per_patient`."""
    shown = regions_of(truth).any(axis=(2, 3))  # [R, N]
    names = list(dict.fromkeys(patients))
    return {
        region: sum(not own[np.array(patients) == name].any() for name in names)
        for region, own in zip(REGIONS, shown)
    }


# -------------------------------------------------------------------------------------- statistics


def compare(values: np.ndarray, reference: np.ndarray) -> dict[str, float | int]:
    """Wilcoxon's signed-rank test, two-sided, and the median difference of paired values [P].

    Pairs without a difference are left out of the test, as Wilcoxon did; without any other p is 1.
    The interval is the 95 % percentile interval of bootstrap draws of the pairs, from a fixed seed.

    :returns: ``patients`` (P), ``median_difference`` (values - reference), ``low``, ``high``,
        ``p``, and ``least_p``, below which p cannot fall with that many pairs that differ.
    """
    from scipy.stats import wilcoxon

    differences = np.asarray(values, np.float64) - np.asarray(reference, np.float64)
    n = len(differences)
    different = np.count_nonzero(differences)
    draws = np.random.default_rng(0).integers(0, n, (BOOTSTRAP_DRAWS, n))
    low, high = np.percentile(np.median(differences[draws], axis=1), [2.5, 97.5])
    return {
        "patients": n,
        "median_difference": float(np.median(differences)),
        "low": float(low),
        "high": float(high),
        "p": float(wilcoxon(differences).pvalue) if different else 1.0,
        "least_p": min(1.0, 2.0 / 2**different),
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979): the chance of any false one stays bounded.

    The smallest of m is multiplied by m, the next by m - 1 and so on; none may fall below the one
    before it, or rise above 1.
    """
    corrected = [0.0] * len(p_values)
    least = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = least
    return corrected
