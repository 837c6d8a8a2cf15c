"""Train a segmenter on real, synthetic and mixed slices and score it on real test patients."""

from improved_diffusion import cli
from improved_diffusion.segmentation_script import evaluate

if __name__ == "__main__":
    cli.run(lambda: evaluate(__doc__))
