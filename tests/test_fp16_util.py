"""Half-precision convolutions and master parameters."""

import numpy as np
import pytest
import torch
from torch import nn

from improved_diffusion import fp16_util

SHAPES = [(2, 3), (), (4,), (1, 2, 1, 3)]  # 6 + 1 + 4 + 6 = 17 numbers


def half_params():
    """Parameters that hold 0, 0.25, 0.5, ... in their order: float16 has these exactly."""
    values = np.arange(17) / 4
    parts = np.split(values, [6, 7, 11])
    return [
        nn.Parameter(torch.tensor(part.reshape(shape), dtype=torch.float16))
        for part, shape in zip(parts, SHAPES, strict=True)
    ]


# ------------------------------------------------------------------------------- master parameters


def test_master_params_are_one_flat_float32_copy():
    params = half_params()
    masters = fp16_util.make_master_params(iter(params))
    assert isinstance(masters, list) and len(masters) == 1
    (master,) = masters
    assert isinstance(master, nn.Parameter) and master.requires_grad and master.is_leaf
    assert master.dtype == torch.float32
    assert torch.equal(master.detach(), torch.arange(17) / 4)
    with torch.no_grad():
        master.zero_()
    assert params[2].tolist() == [1.75, 2, 2.25, 2.5]  # a copy


def test_master_params_of_float32_parameters_are_a_copy_too():
    param = nn.Parameter(torch.ones(3))
    (master,) = fp16_util.make_master_params([param])
    with torch.no_grad():
        master.zero_()
    assert param.tolist() == [1, 1, 1]


def test_unflatten_gives_the_shapes_back_in_float32():
    params = half_params()
    parts = fp16_util.unflatten_master_params(iter(params), fp16_util.make_master_params(params))
    assert [tuple(part.shape) for part in parts] == SHAPES
    for part, param in zip(parts, params, strict=True):
        assert part.dtype == torch.float32 and not part.requires_grad
        assert part.tolist() == param.tolist()


def test_unflatten_keeps_what_float16_cannot_hold():
    params = [nn.Parameter(torch.zeros(2, 1, dtype=torch.float16))]
    masters = [nn.Parameter(torch.tensor([1 + 2**-20, 1e5]))]
    (part,) = fp16_util.unflatten_master_params(params, masters)
    assert part.tolist() == [[1 + 2**-20], [1e5]]


def test_gradients_are_flattened_in_order():
    params = half_params()
    for number, param in enumerate(params):
        param.grad = torch.full_like(param, number + 1)
    params[0].grad[1, 0] = 0.125
    masters = fp16_util.make_master_params(params)
    fp16_util.model_grads_to_master_grads(iter(params), masters)
    expected = [1, 1, 1, 0.125, 1, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4]
    assert masters[0].grad.tolist() == expected
    assert masters[0].grad.dtype == torch.float32
    assert params[3].grad.dtype == torch.float16
    params[0].grad.zero_()
    assert masters[0].grad.tolist() == expected  # a copy


def test_gradients_of_a_second_step_replace_the_first():
    param = nn.Parameter(torch.zeros(2))
    masters = fp16_util.make_master_params([param])
    for value in (3.0, 5.0):
        param.grad = torch.full((2,), value)
        fp16_util.model_grads_to_master_grads([param], masters)
    assert masters[0].grad.tolist() == [5, 5]


def test_master_values_are_cast_back_into_the_same_parameters():
    params = half_params()
    storages = [param.data_ptr() for param in params]
    values = torch.arange(17) * 3 + 2.0**-13
    fp16_util.master_params_to_model_params(iter(params), [nn.Parameter(values)])
    expected = values.half().tolist()
    assert [number for param in params for number in param.flatten().tolist()] == expected
    assert expected[1] == 3.0 and expected[0] == 2.0**-13  # rounded to 11 bits
    for param, shape, storage in zip(params, SHAPES, storages, strict=True):
        assert param.dtype == torch.float16 and tuple(param.shape) == shape
        assert param.data_ptr() == storage and param.requires_grad and param.grad_fn is None


def test_a_step_too_small_for_float16_adds_up_in_the_master():
    param = nn.Parameter(torch.ones(1, dtype=torch.float16))
    masters = fp16_util.make_master_params([param])
    for step in range(1, 5):
        param.grad = torch.full_like(param, -1)
        fp16_util.model_grads_to_master_grads([param], masters)
        with torch.no_grad():
            masters[0] -= 2.0**-12 * masters[0].grad
        fp16_util.master_params_to_model_params([param], masters)
        # Beside 1, float16 has 1 + 2 ** -10 next, and rounds 1 + 2 ** -11 to the even 1.
        assert masters[0].item() == 1 + step * 2.0**-12
        assert param.item() == (1 if step < 3 else 1 + 2.0**-10)


def test_zero_grad_leaves_none_alone():
    with_grad, without = nn.Parameter(torch.ones(2, 2).half()), nn.Parameter(torch.ones(3))
    (with_grad * torch.tensor([[1.0, 2], [3, 4]]).half()).sum().backward()
    assert with_grad.grad.tolist() == [[1, 2], [3, 4]]
    fp16_util.zero_grad(iter([with_grad, without]))
    assert without.grad is None
    assert with_grad.grad.tolist() == [[0, 0], [0, 0]]
    assert with_grad.grad.dtype == torch.float16 and not with_grad.grad.requires_grad
    assert with_grad.tolist() == [[1, 1], [1, 1]]


# ------------------------------------------------------------------------------------ convolutions


def network():
    return nn.Sequential(
        nn.Conv1d(1, 2, 3),
        nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.GroupNorm(1, 2)),
        nn.Conv3d(2, 1, 1),
        nn.Linear(2, 2),
        nn.Embedding(3, 2),
        nn.BatchNorm2d(2),
    )


CONVOLUTIONS = {"0.weight", "0.bias", "1.0.weight", "2.weight", "2.bias"}


@pytest.mark.parametrize(
    ("convert", "before", "after"),
    [
        (fp16_util.convert_module_to_f16, torch.float32, torch.float16),
        (fp16_util.convert_module_to_f32, torch.float16, torch.float32),
    ],
)
def test_only_convolutions_are_converted(convert, before, after):
    net = network().to(before)
    net.apply(convert)
    state = {name: value for name, value in net.state_dict().items() if value.is_floating_point()}
    assert len(state) == 14 and state.keys() > CONVOLUTIONS
    for name, value in state.items():
        assert value.dtype == (after if name in CONVOLUTIONS else before), name


def test_conversion_rounds_the_values_and_keeps_the_parameters():
    conv = nn.Conv2d(1, 1, 1)
    with torch.no_grad():
        conv.weight.fill_(1 + 2.0**-12)
        conv.bias.fill_(-0.75)
    params = list(conv.parameters())
    conv.apply(fp16_util.convert_module_to_f16)
    assert conv.weight.item() == 1 and conv.bias.item() == -0.75
    conv.apply(fp16_util.convert_module_to_f32)
    assert conv.weight.item() == 1 and conv.bias.item() == -0.75
    assert [id(param) for param in conv.parameters()] == [id(param) for param in params]
