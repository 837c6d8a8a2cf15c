"""Train a diffusion model on BraTS slices, or on a folder of ordinary pictures."""

from improved_diffusion import cli
from improved_diffusion.training_script import train

if __name__ == "__main__":
    cli.run(lambda: train(__doc__))
