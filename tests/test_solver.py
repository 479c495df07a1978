"""HiGHS says nothing on standard output."""

import os
import re
from pathlib import Path

import numpy as np
import pytest

import qipan
from qipan.solver import linprog, standard_output_kept_clean

pytestmark = pytest.mark.computes


def test_a_solve_gives_its_answer():
    assert linprog(np.array([1.0, 2.0]), A_ub=[[-1.0, -1.0]], b_ub=[-3.0]).fun == pytest.approx(3.0)


def test_what_a_library_writes_while_it_solves_goes_to_standard_error(capfd):
    with standard_output_kept_clean():
        os.write(1, b"a line of its own\n")
    os.write(1, b"ours\n")
    told = capfd.readouterr()
    assert (told.out, told.err) == ("ours\n", "a line of its own\n")


def test_nobody_solves_past_it():
    source = Path(qipan.__file__).parent
    past = re.compile(r"from scipy\.optimize import .*\b(milp|linprog)\b|\boptimize\.(milp|linprog)\(")
    found = [
        str(path.relative_to(source))
        for path in sorted(source.rglob("*.py"))
        if past.search(path.read_text())
    ]
    assert found == ["solver.py"]
