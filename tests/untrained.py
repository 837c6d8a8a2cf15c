"""An untrained checkpoint that is quick to sample from."""

import torch

from improved_diffusion import checkpoint
from improved_diffusion.encodings import MaskEncoding
from improved_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults

FLAGS = {
    **model_and_diffusion_defaults(),
    "in_channels": 2,
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,1",
    "attention_resolutions": "8",
    "num_heads": 1,
    "diffusion_steps": 50,
}


def save(path, channels, **changes):
    """Write a model of these flags with random weights; gives the path as text."""
    torch.manual_seed(0)
    flags = {**FLAGS, **changes}
    labels = MaskEncoding(flags["mask_encoding"], channels, flags["in_channels"]).posterior
    model, _ = create_model_and_diffusion(**flags, labels=labels)
    for p in model.parameters():  # the last layers start at zero
        torch.nn.init.normal_(p, std=0.1)
    metadata = {"flags": flags, "channels": channels, "step": 3}
    checkpoint.save(checkpoint.with_metadata(model.state_dict(), metadata), str(path))
    return str(path)
