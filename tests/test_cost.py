"""Operations and memory of a training step, against counts by hand and against measurements."""

import pytest
import torch
from torch import nn

from improved_diffusion.cost import (
    free_memory,
    is_out_of_memory,
    largest_microbatch,
    sampling_memory,
    training_cost,
)
from improved_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults

PUBLISHED = {
    **model_and_diffusion_defaults(),
    "in_channels": 2,
    "image_size": 256,
    "num_heads": 1,
    "use_scale_shift_norm": False,
    "attention_resolutions": "16",
}


class TwoConvolutions(nn.Module):
    """Everything about it can be counted by hand."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.second = nn.Conv2d(8, 2, 1, bias=False)

    def forward(self, x, t):
        return self.second(self.first(x))


def test_counted_by_hand():
    cost = training_cost(TwoConvolutions(), (2, 16, 16), averages=2)
    parameters = 2 * 8 * 9 + 8 * 2
    assert cost.parameters == parameters
    # A multiplication and an addition for each weight at each of 256 positions.
    assert cost.forward_flops == 2 * parameters * 256
    # Backward as much for the weights and again for the input, which the first layer leaves out.
    assert cost.training_flops == 2 * (3 * 16 + 2 * 144) * 256
    # Parameter, gradient, two moments, two averages: six float32 numbers.
    assert cost.state_bytes == 6 * 4 * parameters


def test_activations_by_hand():
    """At the peak, in the second layer's backward pass, four tensors are alive."""
    cost = training_cost(TwoConvolutions(), (2, 16, 16))
    # Input, the first layer's output, the gradients of both outputs, and the timestep.
    assert cost.image_bytes == 4 * (256 * (2 + 8 + 2 + 8) + 1)


def test_memory_of_sampling_by_hand():
    """Without gradients: input, the first layer's output, the second's, and the timestep."""
    assert sampling_memory(TwoConvolutions(), (2, 16, 16)) == 4 * (256 * (2 + 8 + 2) + 1)


@pytest.fixture(scope="module")
def published():
    with torch.device("meta"):
        return create_model_and_diffusion(**PUBLISHED)[0]


@pytest.fixture(scope="module")
def whole(published):
    """What the report's network costs in float32."""
    return training_cost(published, (2, 256, 256))


def test_the_reports_network(whole):
    """Measured before: 113,673,220 parameters, 497 GFLOP forward, 1,491 with the way back, and
    2,168 MiB of parameters, gradients, moments and average."""
    assert whole.parameters == 113_673_220
    assert whole.forward_flops / 1e9 == pytest.approx(497, abs=0.5)
    assert whole.training_flops / 1e9 == pytest.approx(1491, abs=0.5)
    assert whole.state_bytes / 2**20 == pytest.approx(2168, abs=0.5)
    # 2,046 MiB was the peak of one image in float32.
    assert whole.image_bytes / 2**20 == pytest.approx(2046, rel=0.1)


def test_shorter_types_and_checkpointing_need_less(published, whole):
    published.compute_dtype = torch.bfloat16
    short = training_cost(published, (2, 256, 256), dtype=torch.bfloat16)
    published.compute_dtype = None
    assert 0.5 < short.image_bytes / whole.image_bytes < 0.6
    assert short.state_bytes - whole.state_bytes == 2 * whole.parameters
    with torch.device("meta"):
        model, _ = create_model_and_diffusion(**{**PUBLISHED, "use_checkpoint": True})
    recomputed = training_cost(model, (2, 256, 256))
    assert recomputed.image_bytes < 0.45 * whole.image_bytes
    assert 1.1 < recomputed.training_flops / whole.training_flops < 1.34  # at most a third pass


def test_parameters_are_left_alone():
    model = TwoConvolutions()
    before = [p.detach().clone() for p in model.parameters()]
    training_cost(model, (2, 16, 16))
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
    assert all(p.grad is None and p.device.type == "cpu" for p in model.parameters())


@pytest.mark.parametrize(
    ("free", "expected"),
    [(1000, 6), (0, 1), (100, 1), (400, 1), (10**9, 32), (1100, 7)],
)
def test_what_fits(free, expected):
    # 85 % of what is free, less 200, in images of 100.
    assert largest_microbatch(100, 200, free, 32) == expected


def test_memory_that_is_there():
    free = free_memory(torch.device("cpu"))
    assert 2**26 < free < 2**46


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("shapes do not fit"), False),
        (MemoryError(), False),
    ],
)
def test_which_errors_are_about_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_sampling_the_reports_network_keeps_nothing_it_does_not_need(published):
    """At the peak, in a block of the last level: two skips and a convolution's output of 128
    channels, the block's input and its normalised copy of 256; and what is as large as an image.
    """
    plane = 4 * 256 * 256
    peak = sampling_memory(published, (2, 256, 256))
    assert (2 * 128 + 128 + 2 * 256) * plane < peak < 1.15 * (2 * 128 + 128 + 2 * 256) * plane
