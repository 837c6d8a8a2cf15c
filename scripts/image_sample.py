"""Draw samples from a trained model and write them as a folder."""

from improved_diffusion import cli
from improved_diffusion.sampling_script import sample

if __name__ == "__main__":
    cli.run(lambda: sample(__doc__))
