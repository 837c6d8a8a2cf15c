"""Sample from five_channel_brats: see ../README.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments import sample

if __name__ == "__main__":
    sample("five_channel_brats")
