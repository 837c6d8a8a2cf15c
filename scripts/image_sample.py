"""Draw samples from a trained model and write them as a folder."""

from typing import Any

from improved_diffusion import __version__, checkpoint, cli, dist_util
from improved_diffusion.samples import write_sample_folder
from improved_diffusion.sampling import draw_batches
from improved_diffusion.script_util import (
    given_flags,
    load_model_and_diffusion,
    script_parser,
)

# Flag: default and explanation.
SAMPLING_FLAGS: dict[str, tuple[Any, str]] = {
    "model_path": ("", "model or EMA file, e.g. Checkpoints/ema_0.9999_060000.pt"),
    "channels": (
        "",
        "names of the channels, e.g. T1CE,Seg, for a checkpoint that does not hold them",
    ),
    "sample_dir": ("Samples", "folder to make"),
    "num_samples": (10_000, "samples to draw"),
    "batch_size": (16, "samples drawn at a time"),
    "use_ddim": (False, "deterministic DDIM steps instead of ancestral ones"),
    "clip_denoised": (True, "limit every step's predicted image to [-1, 1]"),
    "seed": (0, "seed of the noise; sample i depends on it and i alone"),
}


def main() -> None:
    parser = script_parser(__doc__, "sampling", SAMPLING_FLAGS)
    args = parser.parse_args()
    dist_util.setup_dist()
    if not args.model_path:
        raise ValueError("--model_path is missing; name a model or EMA file")
    for flag in ("num_samples", "batch_size"):
        if vars(args)[flag] < 1:
            raise ValueError(f"--{flag} {vars(args)[flag]}: give 1 or more")

    loaded = load_model_and_diffusion(args.model_path, given_flags(parser))
    if loaded.flags["class_cond"]:
        raise ValueError(f"{args.model_path} is class-conditional, which is not supported yet")
    model = loaded.model.to(dist_util.dev()).eval()
    size = loaded.flags["image_size"]

    batches = draw_batches(
        model,
        loaded.diffusion,
        args.num_samples,
        args.batch_size,
        (loaded.flags["in_channels"], size, size),
        seed=args.seed,
        device=dist_util.dev(),
        use_ddim=args.use_ddim,
        clip_denoised=args.clip_denoised,
        progress=True,
    )
    record = {
        "checkpoint": args.model_path,
        "checkpoint_sha256": checkpoint.sha256(args.model_path),
        "step": loaded.metadata.get("step"),
        "flags": {**vars(args), **loaded.flags},
        "device": str(dist_util.dev()),
        "version": __version__,
    }
    write_sample_folder(args.sample_dir, loaded.channels, batches, record)
    print(f"wrote {args.num_samples} samples to {args.sample_dir}")


if __name__ == "__main__":
    cli.run(main)
