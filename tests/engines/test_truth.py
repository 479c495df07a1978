"""What docs/engines.md says that each engine was tested on is what this run has."""

import importlib.metadata
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROWS = {
    row[1]: row[2]
    for row in re.finditer(
        r"^\| `(\w+)` \|.*\| ([^|]*) \|$", Path("docs/engines.md").read_text(), re.MULTILINE
    )
}


def test_slurm_is_the_version_that_the_docs_name():
    if shutil.which("slurmctld") is None:
        pytest.skip("Slurm is not installed, so its tests do not run here")
    version = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True).stdout.split()[1]
    assert f"Slurm {'.'.join(version.split('.')[:2])})" in ROWS["slurm"]
    assert all(shutil.which(name) for name in ("slurmctld", "slurmd", "slurmdbd", "sacct", "slurmrestd"))


def test_ray_is_the_version_that_the_docs_name():
    version = importlib.metadata.version("ray")
    assert f"Ray {'.'.join(version.split('.')[:2])})" in ROWS["ray"]


def test_kubernetes_ran_on_what_the_docs_say():
    """The docs say that no real cluster was at hand: whoever runs this with one changes that line with the run."""
    assert ("no real cluster was at hand" in ROWS["kubernetes"]) == ("KUBECONFIG" not in os.environ)
