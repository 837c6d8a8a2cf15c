import json
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Small tensors are faster on one thread, and tests run side by side."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden():
    """Load a file of golden numbers by its name."""

    def read(name):
        path = GOLDEN / name
        return json.loads(path.read_text()) if path.suffix == ".json" else np.load(path)

    return read


def relative_error(value, expected):
    """Norm of the difference over the norm of what is expected."""
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    assert value.shape == expected.shape
    return np.linalg.norm(value - expected) / np.linalg.norm(expected)
