"""Flags, and what is built from them: networks, processes, and both from a checkpoint."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from improved_diffusion import __version__, brats, checkpoint, dist_util, schedules
from improved_diffusion.architecture import (
    CHANNEL_MULT,
    NO_PRESET,
    RECIPES,
    complete_flags,
    known_presets,
    parse_numbers,
    preset_flags,
    same_value,
)
from improved_diffusion.encodings import (
    ENCODINGS,
    GREY,
    MaskEncoding,
    network_channels,
    network_logits,
)
from improved_diffusion.gaussian_diffusion import (
    NOT_FROM_NOISE,
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
)
from improved_diffusion.label_posterior import LabelPosterior
from improved_diffusion.losses import MIN_SNR_GAMMA, SIGMOID_BIAS, UNIFORM, WEIGHTINGS
from improved_diffusion.respace import SpacedDiffusion, space_timesteps
from improved_diffusion.unet import SelfConditionedModel, SuperResModel, UNetModel

NUM_CLASSES = 1000
AUTO = "auto"
SIGMA_GRADIENTS = (AUTO, "full", "head")

HELP = {
    "in_channels": "channels of the images; by default as many as --channels names",
    "mask_encoding": f"form of the mask in the network: {', '.join(ENCODINGS)}",
    "image_size": "width and height at which the network works; slices of another size are resized",
    "num_channels": "base width of the U-Net, a multiple of 32",
    "num_res_blocks": "residual blocks per level of the U-Net",
    "num_heads": "attention heads",
    "num_heads_upsample": "attention heads on the way up (-1: as --num_heads)",
    "attention_resolutions": "image sizes at which attention is used, separated by commas",
    "channel_mult": "width of each level as a multiple of --num_channels, separated by commas; "
    "empty: by image size, for 32, 64, 128, 256 and 512",
    "dropout": "dropout rate in the residual blocks",
    "class_cond": "a class-conditional model, told by labels what to draw",
    "num_classes": "classes of a class-conditional model; 0: as many as the data have",
    "use_checkpoint": "save memory by computing activations again in the backward pass",
    "use_scale_shift_norm": "the timestep scales and shifts normalised activations (FiLM)",
    "learn_sigma": "learn the variance of the reverse steps",
    "sigma_small": "without --learn_sigma: the posterior's variance instead of beta",
    "diffusion_steps": "timesteps of the process",
    "noise_schedule": f"how noise grows over the timesteps: {', '.join(schedules.NAMES)}",
    "snr_shift": "multiply the schedule's signal-to-noise ratio by this number; auto: by "
    "(64 / image size)^2, which adds the noise that larger images need",
    "zero_terminal_snr": "let the schedule end in pure noise, with --predict_v or --predict_xstart",
    "timestep_respacing": "use fewer timesteps: 250, or 10,15,20 for sections, or ddim50; "
    "empty: all",
    "use_kl": "minimise the variational bound L_vlb instead of L_hybrid",
    "predict_xstart": "the network predicts the image instead of the noise",
    "predict_v": "the network predicts the velocity instead of the noise",
    "self_condition": "the network also sees its previous prediction of the image",
    "rescale_timesteps": "tell the network the timesteps as floats from 0 to 1000",
    "rescale_learned_sigmas": "weight the bound's term by diffusion_steps / 1000",
    "loss_weighting": "how the squared error is weighted over the timesteps: "
    f"{', '.join(WEIGHTINGS)}; uniform is not at all, the others are the same whatever the network "
    "predicts",
    "min_snr_gamma": "of --loss_weighting min_snr: where the weight stops to grow",
    "sigma_gradient": "what the bound trains to learn the variance: full: the whole network; head: "
    "the variance's rows of the last layer; auto: head with --predict_xstart, else full",
    "large_size": "size of the images to make",
    "small_size": "size of the images to start from",
}

# A flag of these must have its training value; the others may change from use to use.
FIXED_BY_TRAINING = (
    "in_channels",
    "mask_encoding",
    "image_size",
    "large_size",
    "small_size",
    "num_channels",
    "num_res_blocks",
    "num_heads",
    "num_heads_upsample",
    "attention_resolutions",
    "channel_mult",
    "class_cond",
    "num_classes",
    "use_scale_shift_norm",
    "learn_sigma",
    "diffusion_steps",
    "noise_schedule",
    "predict_xstart",
    "predict_v",
    "self_condition",
    "rescale_timesteps",
    "snr_shift",
    "zero_terminal_snr",
)


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Flags of the network and the process with the defaults of the report's tables 2 and 3."""
    return {
        "in_channels": 3,
        "mask_encoding": GREY,
        "image_size": 64,
        "num_channels": 128,
        "num_res_blocks": 2,
        "num_heads": 4,
        "num_heads_upsample": -1,
        "attention_resolutions": "16,8",
        "channel_mult": "",
        "dropout": 0.0,
        "class_cond": False,
        "num_classes": 0,
        "use_checkpoint": False,
        "use_scale_shift_norm": True,
        "learn_sigma": True,
        "sigma_small": False,
        "diffusion_steps": 1000,
        "noise_schedule": "linear",
        "snr_shift": "1",
        "zero_terminal_snr": False,
        "timestep_respacing": "",
        "use_kl": False,
        "predict_xstart": False,
        "predict_v": False,
        "self_condition": False,
        "rescale_timesteps": True,
        "rescale_learned_sigmas": True,
        "loss_weighting": UNIFORM,
        "min_snr_gamma": MIN_SNR_GAMMA,
        "sigma_gradient": AUTO,
    }


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """The same for a super-resolution model, with two sizes instead of one."""
    flags = model_and_diffusion_defaults()
    del flags["image_size"], flags["mask_encoding"], flags["self_condition"]
    return {"large_size": 256, "small_size": 64, **flags}


def create_model_and_diffusion(
    image_size: int,
    class_cond: bool,
    learn_sigma: bool,
    sigma_small: bool,
    num_channels: int,
    num_res_blocks: int,
    num_heads: int,
    num_heads_upsample: int,
    attention_resolutions: str,
    dropout: float,
    diffusion_steps: int,
    noise_schedule: str,
    timestep_respacing: str,
    use_kl: bool,
    predict_xstart: bool,
    rescale_timesteps: bool,
    rescale_learned_sigmas: bool,
    use_checkpoint: bool,
    use_scale_shift_norm: bool,
    in_channels: int = 3,
    channel_mult: str = "",
    predict_v: bool = False,
    num_classes: int = 0,
    mask_encoding: str = GREY,
    self_condition: bool = False,
    snr_shift: str = "1",
    zero_terminal_snr: bool = False,
    loss_weighting: str = UNIFORM,
    min_snr_gamma: float = MIN_SNR_GAMMA,
    sigma_gradient: str = AUTO,
    labels: LabelPosterior | None = None,
) -> tuple[UNetModel, GaussianDiffusion]:
    """A network and its process; the arguments are the flags of :data:`HELP`.

    :param labels: the :attr:`~improved_diffusion.encodings.MaskEncoding.posterior` of the mask's
        encoding, which depends on the channels' names.
    :raises ValueError: for settings that do not fit each other.
    """
    if bool(labels) != bool(network_logits(mask_encoding)):
        raise ValueError(
            f"mask_encoding {mask_encoding} and labels {labels} do not fit: give the posterior of "
            "MaskEncoding(mask_encoding, channels)"
        )
    model = create_model(
        image_size,
        num_channels,
        num_res_blocks,
        learn_sigma=learn_sigma,
        class_cond=class_cond,
        use_checkpoint=use_checkpoint,
        attention_resolutions=attention_resolutions,
        num_heads=num_heads,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        dropout=dropout,
        in_channels=in_channels,
        channel_mult=channel_mult,
        num_classes=num_classes,
        mask_encoding=mask_encoding,
        self_condition=self_condition,
        detach_variance=_detaches(sigma_gradient, learn_sigma, predict_xstart, use_kl),
    )
    diffusion = create_gaussian_diffusion(
        steps=diffusion_steps,
        learn_sigma=learn_sigma,
        sigma_small=sigma_small,
        noise_schedule=noise_schedule,
        use_kl=use_kl,
        predict_xstart=predict_xstart,
        rescale_timesteps=rescale_timesteps,
        rescale_learned_sigmas=rescale_learned_sigmas,
        timestep_respacing=timestep_respacing,
        predict_v=predict_v,
        self_condition=self_condition,
        snr_shift=schedules.parse_snr_shift(snr_shift, image_size),
        zero_terminal_snr=zero_terminal_snr,
        loss_weighting=loss_weighting,
        min_snr_gamma=min_snr_gamma,
        labels=labels,
    )
    return model, diffusion


def create_model(
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    learn_sigma: bool,
    class_cond: bool,
    use_checkpoint: bool,
    attention_resolutions: str,
    num_heads: int,
    num_heads_upsample: int,
    use_scale_shift_norm: bool,
    dropout: float,
    in_channels: int = 3,
    channel_mult: str = "",
    num_classes: int = 0,
    mask_encoding: str = GREY,
    self_condition: bool = False,
    detach_variance: bool = False,
) -> UNetModel:
    """A network for images of ``in_channels`` channels, the mask among them encoded."""
    width, logits = network_channels(mask_encoding, in_channels), network_logits(mask_encoding)
    network = SelfConditionedModel if self_condition else UNetModel
    return network(
        in_channels=width,
        model_channels=num_channels,
        out_channels=width * (2 if learn_sigma else 1) + logits,
        num_res_blocks=num_res_blocks,
        dropout=dropout,
        num_classes=_classes(class_cond, num_classes),
        use_checkpoint=use_checkpoint,
        num_heads=num_heads,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        detach_variance=detach_variance,
        label_logits=logits,
        **_levels(image_size, channel_mult, attention_resolutions),
    )


def sr_create_model_and_diffusion(
    large_size: int,
    small_size: int,
    class_cond: bool,
    learn_sigma: bool,
    num_channels: int,
    num_res_blocks: int,
    num_heads: int,
    num_heads_upsample: int,
    attention_resolutions: str,
    dropout: float,
    diffusion_steps: int,
    noise_schedule: str,
    timestep_respacing: str,
    use_kl: bool,
    predict_xstart: bool,
    rescale_timesteps: bool,
    rescale_learned_sigmas: bool,
    use_checkpoint: bool,
    use_scale_shift_norm: bool,
    in_channels: int = 3,
    channel_mult: str = "",
    predict_v: bool = False,
    num_classes: int = 0,
    sigma_small: bool = False,
    snr_shift: str = "1",
    zero_terminal_snr: bool = False,
    loss_weighting: str = UNIFORM,
    min_snr_gamma: float = MIN_SNR_GAMMA,
    sigma_gradient: str = AUTO,
) -> tuple[SuperResModel, GaussianDiffusion]:
    """A super-resolution network and its process."""
    model = sr_create_model(
        large_size,
        small_size,
        num_channels,
        num_res_blocks,
        learn_sigma=learn_sigma,
        class_cond=class_cond,
        use_checkpoint=use_checkpoint,
        attention_resolutions=attention_resolutions,
        num_heads=num_heads,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        dropout=dropout,
        in_channels=in_channels,
        channel_mult=channel_mult,
        num_classes=num_classes,
        detach_variance=_detaches(sigma_gradient, learn_sigma, predict_xstart, use_kl),
    )
    diffusion = create_gaussian_diffusion(
        steps=diffusion_steps,
        learn_sigma=learn_sigma,
        sigma_small=sigma_small,
        noise_schedule=noise_schedule,
        use_kl=use_kl,
        predict_xstart=predict_xstart,
        rescale_timesteps=rescale_timesteps,
        rescale_learned_sigmas=rescale_learned_sigmas,
        timestep_respacing=timestep_respacing,
        predict_v=predict_v,
        snr_shift=schedules.parse_snr_shift(snr_shift, large_size),
        zero_terminal_snr=zero_terminal_snr,
        loss_weighting=loss_weighting,
        min_snr_gamma=min_snr_gamma,
    )
    return model, diffusion


def sr_create_model(
    large_size: int,
    small_size: int,
    num_channels: int,
    num_res_blocks: int,
    learn_sigma: bool,
    class_cond: bool,
    use_checkpoint: bool,
    attention_resolutions: str,
    num_heads: int,
    num_heads_upsample: int,
    use_scale_shift_norm: bool,
    dropout: float,
    in_channels: int = 3,
    channel_mult: str = "",
    num_classes: int = 0,
    detach_variance: bool = False,
) -> SuperResModel:
    """A network that makes images of ``large_size``; it takes any smaller ``small_size``."""
    if not 0 < small_size <= large_size:
        raise ValueError(
            f"--small_size {small_size} must be between 1 and --large_size {large_size}"
        )
    return SuperResModel(
        in_channels,
        model_channels=num_channels,
        out_channels=in_channels * (2 if learn_sigma else 1),
        num_res_blocks=num_res_blocks,
        dropout=dropout,
        num_classes=_classes(class_cond, num_classes),
        use_checkpoint=use_checkpoint,
        num_heads=num_heads,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        detach_variance=detach_variance,
        **_levels(large_size, channel_mult, attention_resolutions),
    )


def _classes(class_cond: bool, num_classes: int) -> int | None:
    """The network's number of classes; where nothing is said, the reference's."""
    if num_classes < 0 or (num_classes and not class_cond):
        raise ValueError(
            f"--num_classes {num_classes} with --class_cond {class_cond}: give 1 or more classes "
            "and --class_cond True, or neither"
        )
    return (num_classes or NUM_CLASSES) if class_cond else None


def _detaches(sigma_gradient: str, learn_sigma: bool, predict_xstart: bool, use_kl: bool) -> bool:
    """Whether the bound is to train no more than the variance's rows of the last layer.

    With x_0 prediction its gradient would drown the mean's in the layers that the two share: at low
    noise the error of x_0 is far larger than the narrow range from the posterior's variance to
    beta. The bound alone, --use_kl, is minimised as it is.
    """
    if sigma_gradient not in SIGMA_GRADIENTS:
        raise ValueError(
            f"--sigma_gradient {sigma_gradient}: choose from {', '.join(SIGMA_GRADIENTS)}"
        )
    if sigma_gradient == "head" and not learn_sigma:
        raise ValueError(
            "--sigma_gradient head is about a learned variance; add --learn_sigma True, or leave "
            "it out"
        )
    if sigma_gradient == AUTO:
        return learn_sigma and predict_xstart and not use_kl
    return sigma_gradient == "head"


def _levels(image_size: int, channel_mult: str, attention_resolutions: str) -> dict[str, Any]:
    """The U-Net's levels from the flags: widths, and the factors at which attention is used."""
    if channel_mult:
        mult = parse_numbers("channel_mult", channel_mult, float)
    elif image_size in CHANNEL_MULT:
        mult = CHANNEL_MULT[image_size]
    else:
        known = ", ".join(str(size) for size in sorted(CHANNEL_MULT))
        raise ValueError(
            f"--image_size {image_size} has no default widths (sizes {known} do); "
            "give --channel_mult, for example 1,2,3,4"
        )
    deepest = 2 ** (len(mult) - 1)
    if image_size % deepest:
        raise ValueError(
            f"--image_size {image_size} cannot be halved {len(mult) - 1} times, as the "
            f"{len(mult)} levels of the U-Net need: choose a multiple of {deepest}, or fewer "
            "numbers in --channel_mult"
        )
    resolutions = parse_numbers("attention_resolutions", attention_resolutions, int)
    for resolution in resolutions:
        if not 0 < resolution <= image_size or image_size % resolution:
            raise ValueError(
                f"--attention_resolutions {attention_resolutions}: {resolution} is not "
                f"--image_size {image_size} divided by a whole number"
            )
    return {
        "channel_mult": mult,
        "attention_resolutions": tuple(image_size // resolution for resolution in resolutions),
    }


def create_gaussian_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str | Sequence[int] = "",
    predict_v: bool = False,
    self_condition: bool = False,
    snr_shift: float = 1.0,
    zero_terminal_snr: bool = False,
    loss_weighting: str = UNIFORM,
    min_snr_gamma: float = MIN_SNR_GAMMA,
    labels: LabelPosterior | None = None,
) -> SpacedDiffusion:
    """A process; ``timestep_respacing`` as for :func:`respace.space_timesteps`, empty: all steps.

    The shift comes after the zero terminal signal-to-noise ratio, which it leaves at zero. It also
    shifts the bias of the sigmoid weighting, so that the weights follow the image, not the size.

    :param snr_shift: see :func:`schedules.shift_snr`.
    :raises ValueError: for unknown or contradictory settings.
    """
    if predict_xstart and predict_v:
        raise ValueError("--predict_xstart and --predict_v exclude each other; set at most one")
    if predict_xstart:
        mean_type = ModelMeanType.START_X
    elif predict_v:
        mean_type = ModelMeanType.VELOCITY
    else:
        mean_type = ModelMeanType.EPSILON
    if zero_terminal_snr and mean_type is ModelMeanType.EPSILON:
        raise ValueError(NOT_FROM_NOISE)
    betas = schedules.get_named_beta_schedule(noise_schedule, steps)
    if zero_terminal_snr:
        betas = schedules.end_without_signal(betas)
    betas = schedules.shift_snr(betas, snr_shift)
    if learn_sigma:
        var_type = ModelVarType.LEARNED_RANGE
    elif sigma_small:
        var_type = ModelVarType.FIXED_SMALL
    else:
        var_type = ModelVarType.FIXED_LARGE
    if use_kl:
        loss_type = LossType.RESCALED_KL
    elif rescale_learned_sigmas:
        loss_type = LossType.RESCALED_MSE
    else:
        loss_type = LossType.MSE
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=betas,
        model_mean_type=mean_type,
        model_var_type=var_type,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
        self_condition=self_condition,
        loss_weighting=loss_weighting,
        min_snr_gamma=min_snr_gamma,
        sigmoid_bias=SIGMOID_BIAS + math.log(snr_shift),
        labels=labels,
    )


@dataclass
class Loaded:
    """What a checkpoint gives, ready for use."""

    model: UNetModel
    diffusion: SpacedDiffusion
    flags: dict[str, Any]
    metadata: dict[str, Any]
    channels: list[str]  # names of the image channels; empty where nothing tells them
    classes: list[str]  # names of the classes; empty for a model without
    encoding: MaskEncoding  # of the mask among the channels


def load_model_and_diffusion(
    path: str, given: dict[str, Any] | None = None, *, super_res: bool = False
) -> Loaded:
    """Build the network and the process of a checkpoint and load its weights.

    :param path: a model or EMA file. For one that holds no flags (as the reference writes it) see
        :func:`improved_diffusion.architecture.complete_flags`.
    :param given: flags that the user named, ``preset`` and ``channels`` among them. Those that
        training has fixed must agree with the checkpoint's; the other model flags replace them.
    :param super_res: it is a super-resolution model, else it must not be one.
    :raises ValueError: for an unreadable file, a contradiction or another architecture.
    """
    given = dict(given or {})
    weights = checkpoint.load_weights(path)
    metadata = checkpoint.metadata_of(weights)
    trained = metadata.get("flags", {})
    channels = list(metadata.get("channels", []))
    if given.get("channels"):
        named = brats.parse_channels(given["channels"])
        if trained and named != channels:
            what = ",".join(channels) or "ordinary pictures"
            raise ValueError(
                f"--channels {given['channels']} contradicts the checkpoint {path}, which was "
                f"trained on {what}; leave the flag out"
            )
        channels = named
        if given.get("in_channels", len(named)) != len(named):
            raise ValueError(
                f"--in_channels {given['in_channels']} contradicts --channels "
                f"{','.join(channels)}; leave --in_channels out"
            )
        # A file without flags is told by their names how many channels it has.
        given["in_channels"] = len(named)

    defaults = sr_model_and_diffusion_defaults() if super_res else model_and_diffusion_defaults()
    preset = given.pop("preset", "")
    if trained:
        if ("large_size" in trained) != super_res:
            script = "image_sample.py" if super_res else "super_res_sample.py"
            raise ValueError(
                f"{path} is {'no' if super_res else 'a'} super-resolution model; sample from it "
                f"with {script}"
            )
        claimed = preset_flags(preset, defaults) if preset not in ("", NO_PRESET) else {}
        # A recipe's encoding is not used without a mask, and was another once.
        claimed.pop("mask_encoding", None)
        size = {**defaults, **trained}["large_size" if super_res else "image_size"]
        for name in FIXED_BY_TRAINING:
            said = {**claimed, **given}.get(name)
            # A checkpoint from before there was a flag was trained with its default.
            there = trained.get(name, defaults.get(name))
            if said is None or there is None or same_value(name, said, there, size):
                continue
            if name != "num_classes" or said:
                source = f"--{name} {said}" if name in given else f"--preset {preset}"
                raise ValueError(
                    f"{source} contradicts {path}, which was trained with --{name} {there}; "
                    "leave the flag out"
                )
        given = {name: value for name, value in given.items() if name != "num_classes" or value}
        flags = {name: {**defaults, **trained, **given}[name] for name in defaults}
    else:
        shapes = {name: tuple(value.shape) for name, value in weights.items()}
        if given.get("mask_encoding", GREY) != GREY:
            raise ValueError(
                f"--mask_encoding {given['mask_encoding']} contradicts {path}, which holds no "
                f"flags: the mask of such a model is {GREY}; leave the flag out"
            )
        named_flags = {name: value for name, value in given.items() if name in defaults}
        flags = complete_flags(path, shapes, named_flags, defaults, preset)
    encoding = MaskEncoding(flags.get("mask_encoding", GREY), channels, flags["in_channels"])
    if super_res:
        model, diffusion = sr_create_model_and_diffusion(**flags)
    else:
        model, diffusion = create_model_and_diffusion(**flags, labels=encoding.posterior)
    checkpoint.load_into(model, weights, path)
    classes = list(metadata.get("classes", []))
    if flags["class_cond"] and not classes:
        classes = [str(number) for number in range(model.num_classes)]
    return Loaded(model, diffusion, flags, metadata, channels, classes, encoding)


def provenance(args: argparse.Namespace, loaded: Loaded) -> dict[str, Any]:
    """What a result's JSON file tells about how it was made.

    :param args: a script's flags, ``model_path`` among them; ``loaded`` is what that gave.
    """
    return {
        "checkpoint": args.model_path,
        "checkpoint_sha256": checkpoint.sha256(args.model_path),
        "step": loaded.metadata.get("step"),
        "flags": {**vars(args), **loaded.flags},
        "device": str(dist_util.dev()),
        "version": __version__,
    }


# Command lines


def add_dict_to_argparser(
    parser: argparse.ArgumentParser,
    default_dict: dict[str, Any],
    help_texts: Mapping[str, str] = HELP,
) -> None:
    """Add a flag for each entry, of its default's type and explained by ``help_texts``.

    ``None`` as a default stands for text. Booleans are given as ``True`` or ``False``.
    """
    for name, default in default_dict.items():
        kind: Any = str if default is None else type(default)
        help_text = help_texts.get(name, "")
        if default not in (None, ""):
            help_text = f"{help_text} (default: {default})".strip()
        parser.add_argument(
            f"--{name}",
            default=default,
            type=str2bool if kind is bool else kind,
            metavar=name.upper() if kind is not bool else "True|False",
            help=help_text.replace("%", "%%"),
        )


def script_parser(
    description: str, title: str, flags: Mapping[str, tuple[Any, str]], super_res: bool = False
) -> argparse.ArgumentParser:
    """A parser of a script's own flags (name: default and explanation) and the model's."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    defaults = {name: default for name, (default, _) in flags.items()}
    texts = {name: text for name, (_, text) in flags.items()}
    add_dict_to_argparser(parser.add_argument_group(title), defaults, texts)
    group = parser.add_argument_group(
        "network and process", "A checkpoint's own values count where there is one."
    )
    model_flags = sr_model_and_diffusion_defaults() if super_res else model_and_diffusion_defaults()
    presets = known_presets(model_flags)
    published = ", ".join(name for name in presets if name not in RECIPES)
    recipes = ", ".join(
        f"{name}, a recipe for BraTS slices; " for name in presets if name in RECIPES
    )
    group.add_argument(
        "--preset",
        default="",
        metavar="NAME",
        help=f"{recipes}the flags of a published model: {published}; {NO_PRESET}: a checkpoint "
        "without flags is not one of these",
    )
    add_dict_to_argparser(group, model_flags)
    return parser


def given_flags(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> dict[str, Any]:
    """Only the flags that ``argv`` (default: the command line) names, with their values."""
    unset = object()
    names = [action.dest for action in parser._actions if action.dest != "help"]
    # argparse gives a default only to what the namespace lacks.
    namespace = argparse.Namespace(**dict.fromkeys(names, unset))
    parser.parse_args(argv, namespace)
    return {name: value for name, value in vars(namespace).items() if value is not unset}


def model_flags_of(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``flags`` that describe the network and the process."""
    names = {**model_and_diffusion_defaults(), **sr_model_and_diffusion_defaults()}
    return {name: flags[name] for name in names if name in flags}


def args_to_dict(args: argparse.Namespace, keys: Iterable[str]) -> dict[str, Any]:
    """The entries ``keys`` of ``args``."""
    return {key: getattr(args, key) for key in keys}


def str2bool(v: str | bool) -> bool:
    """``True`` or ``False`` from their usual spellings.

    :raises argparse.ArgumentTypeError: for anything else.
    """
    if isinstance(v, bool):
        return v
    if v.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if v.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, not {v!r}")
