"""The base install plans and talks to servers, and stays small."""

import subprocess
import sys
from pathlib import Path

import pytest

LIMIT_BYTES = 120 * 10**6


@pytest.mark.slow
def test_the_base_install_is_small_and_answers(tmp_path):
    target = tmp_path / "base"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(target)], check=True)
    python = target / "bin" / "python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-compile",
        "--disable-pip-version-check",
    ]
    subprocess.run([*pip, "--require-hashes", "-r", "requirements-base.lock"], check=True)
    subprocess.run([*pip, "--no-deps", "."], check=True)
    size = sum(
        path.stat().st_size
        for path in (target / "lib").rglob("*")
        if path.is_file() and not path.is_symlink()
    )
    assert size <= LIMIT_BYTES, f"{size / 1e6:.1f} MB"
    assert subprocess.run([str(target / "bin" / "qipan"), "--help"], capture_output=True).returncode == 0
    done = subprocess.run(
        [str(target / "bin" / "qipan"), "ps", "--store", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 106, done.stderr


def test_the_lock_names_no_host():
    for name in ("requirements.lock", "requirements-demo.lock", "requirements-base.lock"):
        assert "://" not in Path(name).read_text()
