"""What the shapes of a state dict tell about its network, and the published networks by name.

A file without flags inside (as openai/improved-diffusion writes it) fixes most of what the flags
say: widths, blocks, attention levels, channels, classes. The rest (:data:`NOT_IN_SHAPES`) must be
named, because a network with another value loads just as well and samples noise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from improved_diffusion.schedules import parse_snr_shift

Shapes = Mapping[str, Sequence[int]]

# Width of each level by image size; 32, 64 and 256 are the reference's.
CHANNEL_MULT: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}

# What decides a model's output and leaves no trace in its shapes.
NOT_IN_SHAPES = (
    "image_size",
    "large_size",
    "small_size",
    "diffusion_steps",
    "noise_schedule",
    "num_heads",
    "rescale_timesteps",
)
# What else leaves none there, and has its default in the published models.
TRACELESS = (
    "num_heads_upsample",
    "predict_xstart",
    "predict_v",
    "snr_shift",
    "zero_terminal_snr",
)
# What openai's published command lines always name.
ALWAYS_NAMED = NOT_IN_SHAPES[:5]
NO_PRESET = "none"

_IMAGENET_DIFFUSION = {"diffusion_steps": 4000, "noise_schedule": "cosine"}

# The flags of the models that Nichol & Dhariwal published with their code; what a preset leaves out
# has the flag's default.
PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": {
        "image_size": 32,
        "num_channels": 128,
        "num_res_blocks": 3,
        "dropout": 0.3,
        **_IMAGENET_DIFFUSION,
    },
    "imagenet64": {
        "image_size": 64,
        "num_channels": 128,
        "num_res_blocks": 3,
        **_IMAGENET_DIFFUSION,
    },
    "imagenet64_cond": {
        "image_size": 64,
        "num_channels": 192,
        "num_res_blocks": 3,
        "class_cond": True,
        "num_classes": 1000,
        "rescale_learned_sigmas": False,
        "rescale_timesteps": False,
        **_IMAGENET_DIFFUSION,
    },
    "lsun_bedroom": {
        "image_size": 256,
        "num_channels": 128,
        "num_res_blocks": 2,
        "num_heads": 1,
        "use_scale_shift_norm": False,
        "attention_resolutions": "16",
        "diffusion_steps": 1000,
        "noise_schedule": "linear",
        "rescale_learned_sigmas": False,
        "rescale_timesteps": False,
    },
    "upsampler": {
        "large_size": 256,
        "small_size": 64,
        "num_channels": 192,
        "num_res_blocks": 2,
        "class_cond": True,
        "num_classes": 1000,
        "diffusion_steps": 4000,
        "noise_schedule": "linear",
        "rescale_learned_sigmas": False,
        "rescale_timesteps": False,
    },
}

# Ways to train, for a network of any size: flags of the process, which docs/recipe.md measures, and
# of the training, where the report's defaults would be one image at a time.
RECIPES: dict[str, dict[str, Any]] = {
    "brats": {
        "predict_v": True,
        "learn_sigma": False,
        "sigma_small": True,
        "noise_schedule": "cosine",
        "loss_weighting": "debiased",
        "mask_encoding": "labels",
        "batch_size": 16,
        "microbatch": "auto",
        "warmup_steps": 100,
        "grad_clip": 1.0,
    },
}
# A recipe's learning rate times --num_channels. Adam's best rate falls with the width (Yang et al.
# 2021, table 3); 1e-3 at 32 channels is what docs/recipe.md measures.
RECIPE_LR_TIMES_WIDTH = 0.032


def parse_numbers(flag: str, text: str, kind: type) -> tuple[Any, ...]:
    """``"16,8"`` -> (16, 8): the numbers of a flag, of the type ``kind``.

    :raises ValueError: anything else.
    """
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(
            f"--{flag} {text}: expected numbers separated by commas, for example 16,8"
        ) from None


def same_value(name: str, said: Any, there: Any, image_size: int) -> bool:
    """Whether two values of the flag ``name`` mean the same for a model of this size."""
    if name == "snr_shift":
        return parse_snr_shift(said, image_size) == parse_snr_shift(there, image_size)
    return said == there


def flags_from_shapes(
    shapes: Shapes, path: str, super_res: bool = False, self_condition: bool = False
) -> dict[str, Any]:
    """The flags that the shapes of a U-Net's state dict determine.

    :param shapes: parameter names and shapes.
    :param path: the file they come from, for messages.
    :param super_res: the network takes a low-resolution image beside the noisy one.
    :param self_condition: the network takes its previous prediction beside the noisy image.
    :return: ``in_channels``, ``num_channels``, ``num_res_blocks``, ``learn_sigma``, ``class_cond``,
        ``num_classes``, ``use_scale_shift_norm``; ``channel_mult`` as a tuple of numbers, and
        ``attention_resolutions`` as the tuple of levels (0 is the finest) that have attention.
        Without ``super_res`` also ``self_condition``.
    :raises ValueError: if the shapes are not those of such a network.
    """
    try:
        blocks = _input_blocks(shapes)
        width, inputs = shapes["input_blocks.0.0.weight"][:2]
        outputs = shapes["out.2.weight"][0]
        emb_rows = shapes["input_blocks.1.0.emb_layers.1.weight"][0]
        first = shapes["input_blocks.1.0.out_layers.0.weight"][0]
    except KeyError as error:
        raise ValueError(
            f"{path} holds no U-Net of improved-diffusion: it has no parameter {error.args[0]}"
        ) from error
    if any(re.match(r"output_blocks\.\d+\.[12]\.in_layers", name) for name in shapes):
        raise ValueError(
            f"{path} is a checkpoint of guided-diffusion, whose residual blocks change the "
            "resolution (--resblock_updown): that network does not exist here; sample from it "
            "with guided-diffusion's own scripts"
        )

    levels: list[list[str]] = [[]]
    for name in blocks[1:]:
        if f"{name}.0.op.weight" in shapes:
            levels.append([])
        elif f"{name}.0.in_layers.2.weight" in shapes:
            levels[-1].append(name)
        else:
            raise ValueError(f"{path}: {name} is no block of improved-diffusion's U-Net")
    counts = {len(level) for level in levels}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"{path} is no U-Net of improved-diffusion: its levels have "
            f"{', '.join(str(len(level)) for level in levels)} residual blocks instead of equal "
            "numbers"
        )
    widths = [shapes[f"{level[0]}.0.out_layers.0.weight"][0] for level in levels]

    two_images = super_res or self_condition
    channels = inputs // 2 if two_images else inputs
    if (two_images and inputs % 2) or outputs not in (channels, 2 * channels):
        kind = "self-conditioned model" if self_condition else "model"
        kind = "super-resolution model" if super_res else kind
        other = ""
        if not two_images and inputs % 2 == 0 and outputs == inputs // 2:
            other = (
                "; it is a super-resolution model: use super_res_sample.py, or a self-conditioned "
                "one: give --self_condition True"
            )
        raise ValueError(
            f"{path} has {inputs} input and {outputs} output channels, which no {kind} of this "
            f"package has{other}"
        )
    classes = shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else 0
    return {
        "in_channels": channels,
        "num_channels": width,
        "num_res_blocks": counts.pop(),
        "channel_mult": tuple(own / width for own in widths),
        "attention_resolutions": tuple(
            number
            for number, level in enumerate(levels)
            if any(f"{name}.1.qkv.weight" in shapes for name in level)
        ),
        "learn_sigma": outputs == 2 * channels,
        "use_scale_shift_norm": emb_rows == 2 * first,
        "class_cond": classes > 0,
        "num_classes": classes,
        **({} if super_res else {"self_condition": self_condition}),
    }


def _input_blocks(shapes: Shapes) -> list[str]:
    """``input_blocks.0`` and so on, without gaps."""
    numbers = {
        int(match[1]) for name in shapes if (match := re.match(r"input_blocks\.(\d+)", name))
    }
    count = max(numbers, default=-1) + 1
    missing = sorted(set(range(max(count, 2))) - numbers)
    if missing:
        raise KeyError(f"input_blocks.{missing[0]}")
    return [f"input_blocks.{number}" for number in range(count)]


def known_presets(defaults: Mapping[str, Any]) -> list[str]:
    """Names of the presets and recipes for a script that has the model flags ``defaults``."""
    recipes = RECIPES if "image_size" in defaults else {}
    published = [name for name, flags in PRESETS.items() if flags.keys() <= defaults.keys()]
    return [*published, *recipes]


def preset_flags(name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """All model flags of a published model; of a recipe those of ``defaults`` that it names.

    A recipe also sets the learning rate, which depends on the network's width.

    :param defaults: the flags of the script that asks, as they are without the preset.
    :raises ValueError: an unknown preset, or one for the other kind of network.
    """
    known = known_presets(defaults)
    if name not in known:
        raise ValueError(f"--preset {name}: this script's presets are {', '.join(known)}")
    if name in RECIPES:
        # A width of 0 is refused later.
        lr = RECIPE_LR_TIMES_WIDTH / max(1, defaults["num_channels"])
        recipe = {**RECIPES[name], "lr": lr}
        return {flag: value for flag, value in recipe.items() if flag in defaults}
    return {**defaults, **PRESETS[name]}


def complete_flags(
    path: str,
    shapes: Shapes,
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    preset: str = "",
) -> dict[str, Any]:
    """All model flags of a state dict that holds none: from its shapes and what the user named.

    :param path: the file, for messages.
    :param given: the flags that the user named.
    :param defaults: all model flags with their defaults; those with a ``large_size`` belong to a
        super-resolution network.
    :param preset: the published model that the file is said to be; ``none``: it is not one of
        them, though its shapes may be the same; empty: nothing was said. Then a file that has a
        published model's shapes must not contradict it.
    :raises ValueError: for a flag that contradicts the shapes or the preset, naming both values,
        and for flags that are missing.
    """
    size_flag = "large_size" if "large_size" in defaults else "image_size"
    if preset in RECIPES:
        raise ValueError(
            f"{path} holds no flags, and --preset {preset} is a way to train, not a published "
            "model: name the flags with which the file was trained instead"
        )
    # The shapes of a self-conditioned network may be another's too: it is what the user says.
    own = flags_from_shapes(
        shapes,
        path,
        super_res=size_flag == "large_size",
        self_condition=given.get("self_condition", False),
    )
    published: dict[str, Any] = {}
    named_preset = preset not in ("", NO_PRESET)
    if named_preset:
        published = preset_flags(preset, defaults)
        if difference := _difference(own, published, own, size_flag):
            name, said, there = difference
            raise ValueError(f"{path} is not {preset}, which has --{name} {said}: it has {there}")
    elif not preset:
        preset = next(iter(_presets_with(own, defaults, size_flag)), "")
        published = preset_flags(preset, defaults) if preset else {}

    flags = {**defaults, **published, **given}
    of_any_size = [name for name in given if name not in ("attention_resolutions", "channel_mult")]
    for names in (of_any_size, given):
        if names is given and not (published or size_flag in given):
            break  # asked for below
        if difference := _difference(own, flags, names, size_flag):
            name, said, there = difference
            raise ValueError(
                f"--{name} {said} contradicts {path}, whose shapes say {there}; leave the flag out"
            )
    for name in (*NOT_IN_SHAPES, *TRACELESS):
        if not published or name not in given:
            continue
        if not same_value(name, given[name], published[name], published[size_flag]):
            raise ValueError(
                f"--{name} {given[name]} contradicts {path}, which has the shapes of the published "
                f"{preset} with --{name} {published[name]}; correct the flag, or give --preset "
                f"{NO_PRESET} if it is another model"
            )
    if not named_preset:
        missing = [name for name in NOT_IN_SHAPES if name in defaults and name not in given]
        if published:
            # openai's published command lines leave the others to their defaults.
            missing = missing if any(name in missing for name in ALWAYS_NAMED) else []
        if missing:
            raise ValueError(
                f"{path} holds no flags, and its shapes don't tell how it was trained: give "
                f"{', '.join(f'--{name}' for name in missing)}"
                + (f", or --preset {preset} if it is that model" if published else "")
            )
    if not published:
        # Widths that are another size's defaults were most likely trained at that size.
        sizes = [size for size, widths in CHANNEL_MULT.items() if widths == own["channel_mult"]]
        if sizes and given[size_flag] not in sizes and "channel_mult" not in given:
            raise ValueError(
                f"--{size_flag} {given[size_flag]} contradicts {path}, whose levels have the "
                f"widths {_text('channel_mult', own, 0)} of {sizes[0]}; correct the size, or give "
                "--channel_mult too"
            )
        if _may_be_the_other_kind(own, size_flag) and "in_channels" not in given:
            images = own["in_channels"]
            other = f"{images // 2}" if size_flag == "image_size" else f"{2 * images}"
            also = ""
            if size_flag == "image_size":
                also = f", or if it is self-conditioned --self_condition True (of {other} channels)"
            raise ValueError(
                f"{path} may be an ordinary or a super-resolution model, of {images} or {other} "
                f"channels: give --in_channels {images}, or use the other script{also}"
            )
    size = flags[size_flag]
    texts = {
        "attention_resolutions": _text("attention_resolutions", own, size),
        "channel_mult": ""
        if CHANNEL_MULT.get(size) == own["channel_mult"]
        else _text("channel_mult", own, size),
    }
    return {name: {**flags, **own, **texts}[name] for name in defaults}


def _presets_with(own: Mapping[str, Any], defaults: Mapping[str, Any], size_flag: str) -> list[str]:
    """The presets whose networks have the shapes that say ``own``."""
    return [
        name
        for name, flags in PRESETS.items()
        if flags.keys() <= defaults.keys()
        and _difference(own, {**defaults, **flags}, own, size_flag) is None
    ]


def _difference(
    own: Mapping[str, Any], flags: Mapping[str, Any], names: Iterable[str], size_flag: str
) -> tuple[str, str, str] | None:
    """The first of ``names`` in which ``flags`` differ from the shapes: name and both values."""
    size = flags[size_flag]
    for name, there in own.items():
        said = flags[name]
        if name not in names or (name == "num_classes" and not said):
            continue
        if name == "channel_mult":
            widths = parse_numbers(name, said, float) if said else CHANNEL_MULT.get(size, ())
            same = widths == there
            said = said or _numbers_text(widths)
        elif name == "attention_resolutions":
            levels = range(len(own["channel_mult"]))
            wanted = parse_numbers(name, said, int)
            same = {level for level in levels if size / 2**level in wanted} == set(there)
        else:
            same = said == there
        if not same:
            return name, str(said), _text(name, own, size)
    return None


def _text(name: str, own: Mapping[str, Any], size: int) -> str:
    """What the shapes say, as the flag would be written for images of ``size``."""
    if name == "attention_resolutions":
        return ",".join(str(size // 2**level) for level in own[name])
    return _numbers_text(own[name]) if name == "channel_mult" else str(own[name])


def _numbers_text(numbers: Iterable[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


def _may_be_the_other_kind(own: Mapping[str, Any], size_flag: str) -> bool:
    """Whether a network with and one without a low-resolution input could have these shapes."""
    if size_flag == "large_size":
        return own["learn_sigma"]
    plain = not own["learn_sigma"] and not own["self_condition"]
    return plain and own["in_channels"] % 2 == 0
