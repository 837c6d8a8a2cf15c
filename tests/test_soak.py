"""A run that is killed again and again; `make soak` does it some hundred times."""

import os
import subprocess
import sys
from pathlib import Path

import soak


def test_a_run_that_is_killed_three_times_ends_as_one_that_was_not():
    # In a process of its own: a fork of one that other tests have used may lack their threads.
    root = Path(soak.__file__).resolve().parents[1]
    command = [sys.executable, soak.__file__, "--kills", "3", "--seed", "5", "--steps", "60"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout
    assert result.stdout.startswith("3 kills survived"), result.stdout
    assert result.stdout.endswith("0 at a stop; wrong: 0\n")
