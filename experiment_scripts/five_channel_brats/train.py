"""Train five_channel_brats: see ../README.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments import train

if __name__ == "__main__":
    train("five_channel_brats")
