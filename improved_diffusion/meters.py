"""What a training run counts between two rows of its log, without waiting for the device.

Shapes: N samples of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from improved_diffusion import dist_util

QUARTILES = 4


class LossMeter:
    """Means of finite loss terms: over all, over each quartile of the timesteps, each class.

    Sums stay on the device, so that adding to them does not wait for it.

    :param classes: names of the classes whose mean squared errors are told apart.
    """

    def __init__(self, num_timesteps: int, classes: Sequence[str] = ()) -> None:
        self.num_timesteps = num_timesteps
        self.classes = classes
        self._sums: dict[str, torch.Tensor] = {}  # [groups, 2]: sum and count of each

    def add(
        self, t: torch.Tensor, terms: dict[str, torch.Tensor], y: torch.Tensor | None = None
    ) -> None:
        """Take in terms [N] at timesteps [N] of samples of the classes ``y`` [N].

        Terms named ``mse_...``, of a single channel, are not divided into quartiles.
        """
        quartile = QUARTILES * t // self.num_timesteps
        for name, values in terms.items():
            if name.startswith("mse_"):
                self._add(name, torch.zeros_like(t), values, 1)
            else:
                self._add(name, quartile, values, QUARTILES)
        if self.classes and y is not None and "mse" in terms:
            self._add("mse_class", y, terms["mse"], len(self.classes))

    def _add(self, name: str, group: torch.Tensor, values: torch.Tensor, groups: int) -> None:
        finite = values.isfinite()
        pairs = torch.stack([torch.where(finite, values, 0), finite.to(values.dtype)], dim=1)
        sums = self._sums.setdefault(name, pairs.new_zeros(groups, 2))
        sums.index_add_(0, group, pairs)

    def read(self) -> dict[str, float]:
        """The means since the last reading, over all processes.

        ``loss``; ``loss_q0`` to ``q3``, ``mse_class_<name>`` where there are any samples.
        """
        means = {}
        for name, sums in self._sums.items():
            rows = dist_util.gather_rows(sums[None]).sum(dim=0).tolist()
            groups = [f"{name}_q{i}" for i in range(QUARTILES)]
            if name == "mse_class":
                groups = [f"{name}_{own}" for own in self.classes]
            elif total_count := sum(row[1] for row in rows):
                means[name] = sum(row[0] for row in rows) / total_count
            if len(rows) == len(groups):
                for group, (total, count) in zip(groups, rows):
                    if count:
                        means[group] = total / count
        self._sums.clear()
        return means

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What every process has added since the last reading: [processes, groups, 2]."""
        return {name: dist_util.gather_rows(sums[None]) for name, sums in self._sums.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from :meth:`state_dict`'s result, which may be of more or fewer processes.

        Files from before there were several processes hold [groups, 2].
        """
        rank, world_size = dist_util.rank(), dist_util.world_size()
        for name, sums in state.items():
            sums = sums.reshape(-1, *sums.shape[-2:])
            if len(sums) == world_size:
                self._sums[name] = sums[rank].clone()
            else:
                self._sums[name] = sums.sum(dim=0) * (rank == 0)


class SkippedSteps:
    """Counts the steps whose gradient was not finite, on the device, so that none waits for it."""

    def __init__(self, device: torch.device) -> None:
        # In all, those in a row up to now, the longest row since the last check, its last step.
        self._counts = torch.zeros(4, dtype=torch.int64, device=device)

    def add(self, step: int, finite: torch.Tensor) -> None:
        """Take in whether the gradient of ``step`` is finite."""
        total, row, longest, last = self._counts.unbind()
        row = torch.where(finite, 0, row + 1)
        last = torch.where(row > longest, step, last)
        self._counts = torch.stack([total + ~finite, row, torch.maximum(row, longest), last])

    @property
    def total(self) -> int:
        return int(self._counts[0])

    def longest_row(self) -> tuple[int, int]:
        """Length and last step of the longest row that was seen since the last call."""
        _, row, longest, last = self._counts.tolist()
        self._counts[2] = row
        return longest, last

    def state_dict(self) -> list[int]:
        return self._counts[:2].tolist()

    def load_state_dict(self, state: list[int]) -> None:
        total, row = state
        self._counts.copy_(torch.tensor([total, row, row, 0]))
