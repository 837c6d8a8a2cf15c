"""Flags from shapes: published models, bare state dicts, contradictions."""

import numpy as np
import pytest
import torch

from improved_diffusion import checkpoint
from improved_diffusion.architecture import (
    PRESETS,
    RECIPES,
    complete_flags,
    flags_from_shapes,
    known_presets,
    preset_flags,
)
from improved_diffusion.script_util import (
    create_model_and_diffusion,
    load_model_and_diffusion,
    model_and_diffusion_defaults,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)
from improved_diffusion.training_script import TRAINING_FLAGS

# The published models under the names of the golden file and of the presets.
PUBLISHED = {
    "lsun_uncond_100M": "lsun_bedroom",
    "imagenet64_uncond_100M": "imagenet64",
    "imagenet64_cond_270M": "imagenet64_cond",
    "cifar10_uncond_50M": "cifar10",
    "upsample_cond": "upsampler",
}
NETWORK = {
    "image_size": 32,
    "num_channels": 32,
    "num_res_blocks": 1,
    "num_heads": 2,
    "channel_mult": "1,2",
    "attention_resolutions": "16",
    "use_scale_shift_norm": False,
    "diffusion_steps": 20,
    "rescale_timesteps": False,
}
UNTOLD = {
    name: {**model_and_diffusion_defaults(), **NETWORK}[name]
    for name in (
        "image_size",
        "num_heads",
        "diffusion_steps",
        "noise_schedule",
        "rescale_timesteps",
    )
}


def defaults_of(preset):
    if "large_size" in PRESETS[preset]:
        return sr_model_and_diffusion_defaults()
    return model_and_diffusion_defaults()


@pytest.fixture(params=sorted(PUBLISHED))
def published(request, golden):
    """Shapes of a published state dict, its preset and the golden file's network flags."""
    entry = golden("state_dicts.json")[request.param]
    return entry["state_dict"], PUBLISHED[request.param], entry["flags"]


def test_a_preset_builds_the_published_network(published):
    shapes, preset, network = published
    flags = complete_flags("x.pt", shapes, {}, defaults_of(preset), preset)
    for name in ("num_channels", "num_heads", "class_cond", "learn_sigma", "use_scale_shift_norm"):
        assert flags[name] == network[name], name
    create = create_model_and_diffusion
    if "large_size" in flags:
        create = sr_create_model_and_diffusion
    with torch.device("meta"):
        model, _ = create(**flags)
    own = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert own == shapes


def test_processes_of_the_presets():
    """As published with the checkpoints: steps, schedule, rescaling of timesteps."""
    said = {
        name: tuple(
            preset_flags(name, defaults_of(name))[flag]
            for flag in ("diffusion_steps", "noise_schedule", "rescale_timesteps", "num_heads")
        )
        for name in PRESETS
    }
    assert said == {
        "cifar10": (4000, "cosine", True, 4),
        "imagenet64": (4000, "cosine", True, 4),
        "imagenet64_cond": (4000, "cosine", False, 4),
        "lsun_bedroom": (1000, "linear", False, 1),
        "upsampler": (4000, "linear", False, 4),
    }


def test_a_recipe_sets_what_it_names_and_no_more():
    training = {name: default for name, (default, _) in TRAINING_FLAGS.items()}
    defaults = {**model_and_diffusion_defaults(), **training}
    recipe = preset_flags("brats", defaults)
    assert recipe == {**RECIPES["brats"], "lr": 2.5e-4}
    assert preset_flags("brats", {**defaults, "num_channels": 32})["lr"] == 1e-3
    assert all(type(value) is type(defaults[name]) for name, value in recipe.items())
    assert recipe["predict_v"] and not recipe["learn_sigma"]
    # Sizes and widths depend on the user's images and card.
    assert not recipe.keys() & {"image_size", "num_channels", "in_channels", "channel_mult"}
    model_flags = model_and_diffusion_defaults()
    assert preset_flags("brats", model_flags).keys() == recipe.keys() & model_flags.keys()
    assert "brats" not in known_presets(sr_model_and_diffusion_defaults())


def test_what_shapes_cannot_tell_is_asked_for_by_name(published):
    shapes, preset, _ = published
    sizes = ["--large_size, --small_size"] if preset == "upsampler" else ["--image_size"]
    with pytest.raises(ValueError) as caught:
        complete_flags("x.pt", shapes, {}, defaults_of(preset))
    for part in (*sizes, "--noise_schedule", "--num_heads", "--rescale_timesteps", preset):
        assert part in str(caught.value)


def test_the_published_command_lines_suffice(published):
    """They name sizes, steps and schedule; heads and rescaling are the published model's."""
    shapes, preset, _ = published
    defaults = defaults_of(preset)
    named = ("image_size", "large_size", "small_size", "diffusion_steps", "noise_schedule")
    full = preset_flags(preset, defaults)
    given = {name: full[name] for name in named if name in defaults}
    assert complete_flags("x.pt", shapes, given, defaults) == {**full, **given}


def test_wrong_heads_and_contradictions_name_both_values(published):
    shapes, preset, _ = published
    defaults = defaults_of(preset)
    full = preset_flags(preset, defaults)
    heads = full["num_heads"]
    for given, claimed in (({"num_heads": heads + 1}, ""), ({"num_heads": heads + 1}, preset)):
        with pytest.raises(ValueError, match=f"--num_heads {heads + 1} .* --num_heads {heads};"):
            complete_flags("x.pt", shapes, given, defaults, claimed)
    width = full["num_channels"]
    with pytest.raises(ValueError, match=f"--num_channels 64 contradicts x.pt, .* say {width};"):
        complete_flags("x.pt", shapes, {"num_channels": 64}, defaults)
    with pytest.raises(ValueError, match=r"--learn_sigma False .* True"):
        complete_flags("x.pt", shapes, {"learn_sigma": False}, defaults)
    for name, said, there in (("snr_shift", "2", "1"), ("zero_terminal_snr", True, False)):
        with pytest.raises(ValueError, match=f"--{name} {said} .* --{name} {there};"):
            complete_flags("x.pt", shapes, {**full, name: said}, defaults)
    assert complete_flags("x.pt", shapes, {**full, "snr_shift": "1.0"}, defaults)


def test_another_model_of_published_shapes(golden):
    shapes = golden("state_dicts.json")["lsun_uncond_100M"]["state_dict"]
    given = {**UNTOLD, "image_size": 256, "num_heads": 4, "noise_schedule": "cosine"}
    flags = complete_flags("x.pt", shapes, given, model_and_diffusion_defaults(), "none")
    assert (flags["num_heads"], flags["noise_schedule"]) == (4, "cosine")
    with pytest.raises(ValueError, match="it has 2"):
        complete_flags("x.pt", shapes, {}, model_and_diffusion_defaults(), "cifar10")
    with pytest.raises(ValueError, match="presets are cifar10"):
        complete_flags("x.pt", shapes, {}, model_and_diffusion_defaults(), "upsampler")


@pytest.fixture
def bare(tmp_path):
    """Save the weights of a small network as the reference does: no flags inside."""

    def save(create=create_model_and_diffusion, **changes):
        sr = create is sr_create_model_and_diffusion
        defaults = sr_model_and_diffusion_defaults() if sr else model_and_diffusion_defaults()
        flags = {**defaults, **{k: v for k, v in NETWORK.items() if k in defaults}, **changes}
        torch.manual_seed(0)
        model, _ = create(**flags)
        path = str(tmp_path / "model000001.pt")
        torch.save(dict(model.state_dict()), path)
        return path, model, flags

    return save


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"in_channels": 5, "learn_sigma": False},
        {"class_cond": True, "num_classes": 7, "use_scale_shift_norm": True},
        {"attention_resolutions": "32,16", "num_res_blocks": 2},
        {"attention_resolutions": "8", "channel_mult": "1,1,2"},
        {"channel_mult": "1,3,2", "num_channels": 64, "in_channels": 1},
    ],
)
def test_a_bare_state_dict_tells_its_network(bare, changes):
    path, model, flags = bare(**changes)
    loaded = load_model_and_diffusion(path, dict(UNTOLD))
    assert {k: loaded.flags[k] for k in flags} == flags
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    assert len(loaded.classes) == changes.get("num_classes", 0)


def test_default_widths_belong_to_their_size(bare):
    path, _, _ = bare(channel_mult="")
    assert load_model_and_diffusion(path, dict(UNTOLD)).flags["channel_mult"] == ""
    other = {**UNTOLD, "image_size": 64}
    with pytest.raises(ValueError, match=r"--image_size 64 contradicts .* 1,2,2,2 of 32;"):
        load_model_and_diffusion(path, other)
    wide = load_model_and_diffusion(path, {**other, "channel_mult": "1,2,2,2"})
    assert (wide.flags["image_size"], wide.flags["channel_mult"]) == (64, "1,2,2,2")


@pytest.mark.parametrize("missing", sorted(UNTOLD))
def test_each_untold_flag_is_needed(bare, missing):
    path, _, _ = bare()
    given = {name: value for name, value in UNTOLD.items() if name != missing}
    with pytest.raises(ValueError, match=rf"give --{missing}$"):
        load_model_and_diffusion(path, given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_heads": 3}, r"--num_heads 3 does not divide the 64 channels"),
        ({"num_res_blocks": 2}, r"--num_res_blocks 2 contradicts .* say 1;"),
        ({"attention_resolutions": "16,8,32"}, r"--attention_resolutions 16,8,32 .* say 16;"),
        ({"attention_resolutions": "a"}, r"--attention_resolutions a: expected numbers"),
        ({"channel_mult": "1,1"}, r"--channel_mult 1,1 contradicts .* say 1,2;"),
        ({"in_channels": 2}, r"--in_channels 2 contradicts .* say 3;"),
        ({"channels": "T1CE,Seg"}, r"--in_channels 2 contradicts .* say 3;"),
        ({"class_cond": True}, r"--class_cond True contradicts .* say False;"),
        ({"preset": "cifar10"}, r"is not cifar10, which has --num_channels 128: it has 32"),
        ({"preset": "nothing"}, r"--preset nothing: this script's presets are cifar10, "),
    ],
)
def test_contradictions(bare, given, message):
    path, _, _ = bare()
    with pytest.raises(ValueError, match=message):
        load_model_and_diffusion(path, {**UNTOLD, **given})


def test_equivalent_spellings_do_not_contradict(bare):
    path, _, _ = bare()
    given = {**UNTOLD, "attention_resolutions": "16,7", "channel_mult": "1.0,2"}
    assert load_model_and_diffusion(path, given).flags["attention_resolutions"] == "16"


SR_UNTOLD = {
    **{name: value for name, value in UNTOLD.items() if name != "image_size"},
    "large_size": 32,
    "small_size": 16,
}


def test_a_bare_super_resolution_model(bare):
    path, _, flags = bare(
        sr_create_model_and_diffusion, large_size=32, small_size=16, in_channels=2
    )
    given = {**SR_UNTOLD, "in_channels": 2}
    loaded = load_model_and_diffusion(path, given, super_res=True)
    assert {k: loaded.flags[k] for k in flags} == flags


def test_kinds_of_networks_are_not_confused(bare):
    # 4 in, 4 out: two channels with a learned variance and a low-resolution image, or four.
    path, _, _ = bare(sr_create_model_and_diffusion, large_size=32, small_size=16, in_channels=2)
    with pytest.raises(ValueError, match="of 2 or 4 channels: give --in_channels 2"):
        load_model_and_diffusion(path, dict(SR_UNTOLD), super_res=True)
    with pytest.raises(ValueError, match="of 4 or 2 channels: give --in_channels 4"):
        load_model_and_diffusion(path, dict(UNTOLD))
    path, _, _ = bare(
        sr_create_model_and_diffusion, large_size=32, small_size=16, learn_sigma=False
    )
    with pytest.raises(ValueError, match=r"use super_res_sample\.py"):
        load_model_and_diffusion(path, dict(UNTOLD))
    path, _, _ = bare()
    with pytest.raises(ValueError, match="3 input and 6 output channels"):
        load_model_and_diffusion(path, dict(SR_UNTOLD), super_res=True)


def test_kinds_of_own_checkpoints_are_not_confused(bare, tmp_path):
    for super_res, other in ((True, "image_sample.py"), (False, "super_res_sample.py")):
        create = create_model_and_diffusion if super_res else sr_create_model_and_diffusion
        _, model, flags = bare(create)
        path = str(tmp_path / "own.pt")
        checkpoint.save(checkpoint.with_metadata(model.state_dict(), {"flags": flags}), path)
        with pytest.raises(ValueError, match=other):
            load_model_and_diffusion(path, {}, super_res=super_res)


def test_a_preset_must_agree_with_an_own_checkpoint(bare, tmp_path):
    _, model, flags = bare()
    path = str(tmp_path / "own.pt")
    checkpoint.save(checkpoint.with_metadata(model.state_dict(), {"flags": flags}), path)
    with pytest.raises(ValueError, match=r"--preset cifar10 contradicts .* --num_channels 32"):
        load_model_and_diffusion(path, {"preset": "cifar10"})


def test_a_recipe_must_agree_with_an_own_checkpoint(bare, tmp_path):
    recipe = preset_flags("brats", model_and_diffusion_defaults())
    path, model, flags = bare(**{**recipe, "mask_encoding": "grey"})  # as there is no mask
    with pytest.raises(ValueError, match="brats is a way to train, not a published model"):
        load_model_and_diffusion(path, {"preset": "brats"})
    own = str(tmp_path / "own.pt")
    checkpoint.save(checkpoint.with_metadata(model.state_dict(), {"flags": flags}), own)
    assert load_model_and_diffusion(own, {"preset": "brats"}).flags == flags
    other = checkpoint.with_metadata(model.state_dict(), {"flags": {**flags, "predict_v": False}})
    checkpoint.save(other, own)
    with pytest.raises(ValueError, match=r"--preset brats contradicts .* with --predict_v False"):
        load_model_and_diffusion(own, {"preset": "brats"})


def test_guided_diffusion_is_refused_by_name(bare):
    """Its blocks that change the resolution are residual blocks: other keys, and no ``op``."""
    path, model, _ = bare()
    weights = dict(model.state_dict())
    for key in [key for key in weights if ".op." in key]:
        del weights[key]
    block = "input_blocks.1.0."
    for key in [key for key in weights if key.startswith(block)]:
        weights[key.replace(block, "input_blocks.2.0.")] = weights[key]
        weights[key.replace(block, "output_blocks.1.2.")] = weights[key]
    torch.save(weights, path)
    with pytest.raises(ValueError, match="checkpoint of guided-diffusion"):
        load_model_and_diffusion(path, dict(UNTOLD))


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match=r"x\.pt holds no U-Net .* input_blocks\.0"):
        flags_from_shapes({"conv.weight": (3, 3)}, "x.pt")


def test_averaged_resampling_is_refused(bare):
    """Without convolutions between the levels nothing tells where they are."""
    path, model, _ = bare()
    weights = {name: value for name, value in model.state_dict().items() if ".op." not in name}
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"no parameter input_blocks\.2"):
        load_model_and_diffusion(path, dict(UNTOLD))


def test_ours_without_flags_is_what_it_was(bare):
    """The same weights give the same output whether the flags come from inside or from shapes."""
    path, model, _ = bare()
    x = torch.from_numpy(np.random.RandomState(0).randn(2, 3, 32, 32)).float()
    t = torch.tensor([3, 7])
    loaded = load_model_and_diffusion(path, dict(UNTOLD))
    with torch.no_grad():
        assert torch.equal(loaded.model.eval()(x, t), model.eval()(x, t))
