"""Train a model that makes large images from small ones of the same channels."""

from improved_diffusion import cli
from improved_diffusion.training_script import train

if __name__ == "__main__":
    cli.run(lambda: train(__doc__, super_res=True))
