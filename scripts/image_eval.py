"""Evaluate samples: are they valid slices, distributed like real ones, and new?"""

from improved_diffusion import cli
from improved_diffusion.evaluation_script import evaluate

if __name__ == "__main__":
    cli.run(lambda: evaluate(__doc__))
