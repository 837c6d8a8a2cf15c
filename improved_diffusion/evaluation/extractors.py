"""Networks and formulas that turn images into features, on which sets of images are compared.

Three are known, by the names that :func:`open_extractor` takes: ``random`` needs no file, and what
is measured on it is never called FID; ``inception`` and ``radimagenet`` read their weights from a
file that the user names. Nothing is downloaded.

A network sees three channels. One channel enters it as three equal ones, three as they are, and
more as several composites, see :func:`composites`, whose features lie side by side. Features of
the channels one by one would not do for channels together: distances on them hardly notice
channels that were shuffled between slices.

Shapes: images are uint8 [N, H, W, C], or [N, H, W] for one channel; features are float64 [N, D].
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import blobfile as bf
import numpy as np
import torch

from improved_diffusion import checkpoint
from improved_diffusion.evaluation import distribution, inception, resnet

# How the SHA-256 of weights-inception-2015-12-05-6726825d.pth starts, as its name tells.
INCEPTION_SHA256 = "6726825d"
LEAST_DIGITS = 8  # of a hash that a user gives

EXTRACTORS = ("random", "inception", "radimagenet")


@dataclass(frozen=True)
class Extractor:
    """Images to features.

    :param name: what results name it.
    :param sha256: hexadecimal hash of its weights' file; empty where it needs none.
    :param frechet_name: what the Frechet distance on its features is called.
    :param kernel_name: what the kernel distance on its features is called.
    :param scaled: whether features are to be scaled by the real set's deviations before distances
        are taken. Networks that define a metric define its scale too.
    :param of_batch: uint8 [N, H, W, C] to features [N, D].
    :param batch_size: how many images at once.
    """

    name: str
    sha256: str
    frechet_name: str
    kernel_name: str
    scaled: bool
    of_batch: Callable[[np.ndarray], np.ndarray]
    batch_size: int

    def __call__(
        self,
        images: np.ndarray,
        progress: Callable[[int], object] | None = None,
        *,
        chosen: np.ndarray | None = None,
    ) -> np.ndarray:
        """Features of images, which are read batch by batch and may be a memory map.

        :param images: uint8 [N, H, W, C] or [N, H, W]. Masks are images of their grey levels,
            which are not snapped to codes.
        :param progress: is called after each batch with its number of images.
        :param chosen: numbers of the images whose features to take, [N]; None: all.
        :return: float64 [N, D].
        :raises ValueError: images of another type or shape.
        """
        if images.ndim == 3:
            images = images[..., None]
        if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
            raise ValueError(
                "images are a uint8 array of shape [N, H, W, C], none of them 0, found "
                f"{images.dtype} {list(images.shape)}"
            )
        chosen = np.arange(len(images)) if chosen is None else chosen
        parts = []
        for start in range(0, len(chosen), self.batch_size):
            batch = images[chosen[start : start + self.batch_size]]
            parts.append(self.of_batch(batch).astype(np.float64))
            if progress is not None:
                progress(len(batch))
        return np.concatenate(parts)


def random() -> Extractor:
    """Fixed random convolutions and radial power spectra, see :func:`distribution.features`."""
    return Extractor(
        name="random convolutions and power spectra",
        sha256="",
        frechet_name="Frechet distance of random features",
        kernel_name="kernel distance of random features",
        scaled=True,
        of_batch=distribution.features,
        batch_size=256,
    )


def inception_v3(
    path: str, sha256: str = INCEPTION_SHA256, device: torch.device | str = "cpu"
) -> Extractor:
    """The network of FID and KID, see :mod:`improved_diffusion.evaluation.inception`.

    :param path: of ``weights-inception-2015-12-05-6726825d.pth``.
    :param sha256: how the file's hash starts; with another file than the published one the
        distances are not FID and KID.
    :raises ValueError: a missing file, another hash, or other contents.
    """
    network = inception.InceptionV3()
    weights, digest = read_weights(path, sha256)
    load_into(network, weights, path, "the FID Inception network")
    published = digest.startswith(INCEPTION_SHA256)
    return _of_network(
        network,
        inception.prepare,
        device,
        name="Inception-v3 of FID" if published else "Inception-v3 with other weights",
        sha256=digest,
        frechet_name="FID" if published else "Frechet distance of Inception features",
        kernel_name="KID" if published else "kernel distance of Inception features",
    )


def radimagenet_resnet50(
    path: str, sha256: str = "", device: torch.device | str = "cpu"
) -> Extractor:
    """RadImageNet's ResNet-50, see :mod:`improved_diffusion.evaluation.resnet`.

    :param path: of ``RadImageNet_pytorch/ResNet50.pt``, or the same weights under torchvision's
        names.
    :param sha256: how the file's hash must start. The authors publish none, so that without it
        any file of these shapes is taken, and results tell its hash.
    :raises ValueError: a missing file, another hash, or other contents.
    """
    network = resnet.ResNet50()
    weights, digest = read_weights(path, sha256)
    load_into(network, resnet.with_own_names(weights), path, "RadImageNet's ResNet-50")
    return _of_network(
        network,
        resnet.prepare,
        device,
        name="RadImageNet ResNet-50",
        sha256=digest,
        frechet_name="Frechet distance of RadImageNet features",
        kernel_name="kernel distance of RadImageNet features",
    )


def open_extractor(
    name: str, path: str = "", sha256: str = "", device: torch.device | str = "cpu"
) -> Extractor:
    """An extractor by its name in :data:`EXTRACTORS`.

    :param path: of the weights; empty for ``random``.
    :param sha256: how the weights' hash must start; empty for the published one, where it is
        known.
    :raises ValueError: an unknown name, a file that is missing or too many, or see the extractor.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"--extractor {name}: choose from {', '.join(EXTRACTORS)}")
    if name == "random":
        if path or sha256:
            raise ValueError(f"--extractor random needs no weights, but {path or sha256} is given")
        return random()
    if not path:
        raise ValueError(
            f"--extractor {name} needs its weights, which are not downloaded: name their file with "
            "--extractor_weights"
        )
    if name == "inception":
        return inception_v3(path, sha256 or INCEPTION_SHA256, device)
    return radimagenet_resnet50(path, sha256, device)


def read_weights(path: str, sha256: str) -> tuple[OrderedDict[str, torch.Tensor], str]:
    """A state dict and the hash of its file, which is compared before anything is loaded.

    :param sha256: how the hash must start; empty: any.
    :raises ValueError: a missing file, another hash, or a file that holds no state dict.
    """
    expected = sha256.lower()
    if expected and (len(expected) < LEAST_DIGITS or set(expected) - set("0123456789abcdef")):
        raise ValueError(
            f"a SHA-256 is given by its first {LEAST_DIGITS} or more hexadecimal digits, found "
            f"{sha256!r}"
        )
    if not bf.exists(path) or bf.isdir(path):
        raise ValueError(f"there is no file of weights {path}; check the path")
    digest = checkpoint.sha256(path)
    if not digest.startswith(expected):
        raise ValueError(
            f"{path} has the SHA-256 {digest}, expected one that starts with {expected}: name the "
            "published file, or give this file's own hash to use it all the same"
        )
    return checkpoint.load_weights(path), digest


def load_into(
    network: torch.nn.Module, weights: OrderedDict[str, torch.Tensor], path: str, what: str
) -> None:
    """Load ``weights``, which came from ``path``, key by key; counts of batches do not matter.

    :raises ValueError: naming the first difference, if there is one.
    """
    own = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in weights.items()}
    for name in [*own, *found]:
        if name.endswith("num_batches_tracked"):
            continue
        if own.get(name) != found.get(name):
            raise ValueError(
                f"{path} holds other weights than {what}: {name} is "
                f"{found.get(name, 'missing')} in the file, expected {own.get(name, 'none')}"
            )
    network.load_state_dict(weights, strict=False)


def _of_network(
    network: torch.nn.Module,
    prepare: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device | str,
    **about: str,
) -> Extractor:
    """On GPUs torch rounds convolutions to TF32 unless :func:`fp16_util.allow_tf32` forbids it."""
    network.eval().requires_grad_(False).to(device)

    @torch.inference_mode()
    def of_batch(images: np.ndarray) -> np.ndarray:
        levels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)  # [N, C, H, W]
        features = [
            network(prepare(levels[:, list(three)])) for three in composites(levels.shape[1])
        ]
        return torch.cat(features, dim=1).cpu().numpy()

    return Extractor(scaled=False, of_batch=of_batch, batch_size=32, **about)


def composites(channels: int) -> list[tuple[int, int, int]]:
    """Indices of the channels that enter a network as red, green and blue, time after time.

    Each channel is in one composite or more, and each composite shares a channel with the next:
    channels that do not belong together meet somewhere. Their order is that of the channels, which
    a comparison keeps.

    >>> composites(1), composites(2), composites(3)
    ([(0, 0, 0)], [(0, 1, 1)], [(0, 1, 2)])
    >>> composites(4), composites(5)
    ([(0, 1, 2), (1, 2, 3)], [(0, 1, 2), (2, 3, 4)])
    """
    if channels <= 3:
        last = channels - 1
        return [(0, min(1, last), last)]
    starts = [min(start, channels - 3) for start in range(0, channels - 1, 2)]
    return [(start, start + 1, start + 2) for start in starts]
