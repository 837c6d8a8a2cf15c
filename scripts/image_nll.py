"""Bits per dimension of real images under a trained model."""

from improved_diffusion import cli
from improved_diffusion.likelihood import evaluate

if __name__ == "__main__":
    cli.run(lambda: evaluate(__doc__))
