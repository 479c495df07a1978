"""The docs are tested: commands, keys, modules and files that they must name."""

import re
from pathlib import Path

import pytest

import qipan
from qipan.cli.app import app
from qipan.workload.parse import KEYS

README, ARCHITECTURE = Path("README.md").read_text(), Path("ARCHITECTURE.md").read_text()
DOCS = README + "".join(path.read_text() for path in sorted(Path("docs").rglob("*.md")))


@pytest.mark.parametrize(
    "command", [command.name or command.callback.__name__ for command in app.registered_commands]
)
def test_every_command_stands_in_the_docs(command):
    assert re.search(rf"qipan {command}\b|`{command}`", DOCS), f"no document names `qipan {command}`"


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_the_task_file_stands_in_its_page(key):
    assert re.search(rf"^{key}:", Path("docs/task-file.md").read_text(), re.MULTILINE)


def test_every_module_stands_on_the_map():
    root = Path(qipan.__file__).parent
    for path in root.iterdir():
        name = path.stem if path.suffix == ".py" else path.name if path.is_dir() else ""
        if name and not name.startswith("_"):
            assert f"`{name}`" in ARCHITECTURE or f"`{name}/`" in ARCHITECTURE, f"{name} is not on the map"


def test_files_that_the_readme_names_are_there():
    for name in re.findall(r"examples/[\w.-]+|docs/[\w./-]+\.md", README + ARCHITECTURE):
        assert Path(name).exists(), name


def test_the_docs_name_no_machine_path():
    for path in [Path("README.md"), *Path("docs").rglob("*.md"), *Path("src").rglob("*.py")]:
        assert "/work/" not in path.read_text(), path
