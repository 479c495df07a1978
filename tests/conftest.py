import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
from xdist.scheduler import LoadScopeScheduling

from postgres import postgres

__all__ = ["postgres"]

#: files whose tests need no order and nothing but a core
COMPUTE = {
    path.name
    for path in Path(__file__).parent.glob("test_*.py")
    if "\npytestmark = pytest.mark.computes\n" in path.read_text()
}


class ByFile(LoadScopeScheduling):
    """The tests of a file run one after another, but those of a file that only computes go wherever a core is free."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return nodeid if Path(file).name in COMPUTE else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByFile:
    return ByFile(config, log)
