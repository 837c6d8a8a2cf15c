"""Make large images from the small ones that image_sample.py drew."""

from improved_diffusion import cli
from improved_diffusion.sampling_script import sample

if __name__ == "__main__":
    cli.run(lambda: sample(__doc__, super_res=True))
