"""Averages of a run's weights with lengths chosen after training (Karras et al. 2024)."""

from improved_diffusion import cli
from improved_diffusion.posthoc_script import reconstruct

if __name__ == "__main__":
    cli.run(lambda: reconstruct(__doc__))
