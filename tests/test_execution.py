"""How a network is run changes its speed and memory, not what it computes beyond rounding."""

import pytest
import torch

from improved_diffusion import execution, logger
from improved_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults

CPU = torch.device("cpu")


def network(**flags):
    torch.manual_seed(0)
    model, _ = create_model_and_diffusion(
        **{
            **model_and_diffusion_defaults(),
            "image_size": 16,
            "num_channels": 32,
            "num_res_blocks": 1,
            "channel_mult": "1,2",
            "attention_resolutions": "8",
            "num_heads": 1,
            **flags,
        }
    )
    for p in model.parameters():  # the last layers start at zero, and would hide the others
        torch.nn.init.normal_(p, std=0.1)
    return model


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, 16, 16, generator=generator), torch.tensor([0.0, 500.0, 999.0])


@pytest.mark.parametrize(("name", "error"), [("float32", 1e-4), ("bfloat16", 0.03)])
@pytest.mark.parametrize("film", [True, False])
def test_sampling_computes_what_training_does(name, error, film):
    model = network(use_scale_shift_norm=film, dropout=0.5).eval()
    x, t = inputs()
    expected = model(x, t).detach()
    ready = execution.for_sampling(model, getattr(torch, name), "auto", CPU, evaluations=10**6)
    with torch.no_grad():
        output = ready(x, t)
    assert output.dtype == torch.float32
    assert (output - expected).norm() < error * expected.norm()
    assert (output != expected).any() or name == "float32"
    # Without gradients the skips and activations are used up; a second call sees none of it.
    with torch.no_grad():
        assert torch.equal(ready(x, t), output)


def test_sampling_converts_all_convolutions_but_the_first_and_the_last():
    model = network()
    execution.for_sampling(model, torch.bfloat16, "off", CPU, evaluations=1)
    types = {
        name.removesuffix(".weight"): p.dtype
        for name, p in model.named_parameters()
        if p.dim() >= 3 and name.endswith("weight")
    }
    kept = {name for name, dtype in types.items() if dtype == torch.float32}
    assert kept == {"input_blocks.0.0", "out.2"}
    assert set(types.values()) == {torch.float32, torch.bfloat16}
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_features_are_unchanged_where_activations_are_overwritten():
    model = network().eval()
    x, t = inputs()
    expected = model.get_feature_vectors(x, t)
    with torch.no_grad():
        features = model.get_feature_vectors(x, t)
    for name, values in expected.items():
        for own, other in zip(features[name], values):
            torch.testing.assert_close(own, other.detach())
    torch.testing.assert_close(
        model.out(features["up"][-1]), model(x, t), msg="the last block's output is untouched"
    )


def test_compile_modes():
    model = network()
    assert execution.for_training(model, torch.float32, "auto", CPU) == (model, None)
    for call in (
        lambda: execution.for_training(network(), torch.float32, "fast", CPU),
        lambda: execution.for_sampling(network(), torch.float32, "fast", CPU, evaluations=1),
    ):
        with pytest.raises(ValueError, match="--compile fast: choose from auto, on, off"):
            call()


def test_a_network_that_cannot_be_compiled_is_run_as_it_is(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler")

    logger.reset()
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: broken)
    model = network()
    ready = execution.for_sampling(model, torch.float32, "on", CPU, evaluations=1)
    x, t = inputs()
    with torch.no_grad():
        assert torch.equal(ready(x, t), model(x, t))
    assert "torch.compile failed, going on without it: no compiler" in capsys.readouterr().out
