"""Small files that must never be found empty or half written: keys, tokens, what a store says of itself."""

import hashlib
import hmac
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qipan.cli.run import Running
from qipan.coordinator import Coordinator
from qipan.files import secret_in, write_whole
from qipan.host import Host
from qipan.queries import Queries
from qipan.store import StoreFolder
from qipan.workload.site import load_site

KILLED = """
import os, signal, sys
from pathlib import Path
from qipan.files import write_whole
setattr(os, sys.argv[1], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
write_whole(Path(sys.argv[2]), b"new" * 10_000)
"""


@pytest.mark.parametrize(
    ("at", "left"), [("fchmod", b"old"), ("fsync", b"old"), ("replace", b"old"), ("close", b"new" * 10_000)]
)
def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path, at, left):
    path = tmp_path / "key"
    path.write_bytes(b"old")
    assert subprocess.run([sys.executable, "-c", KILLED, at, str(path)]).returncode == -9
    assert path.read_bytes() == left
    write_whole(path, b"next", 0o640)
    assert path.read_bytes() == b"next"
    assert path.stat().st_mode & 0o777 == 0o640


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "key"
    write_whole(path, b"old")
    code = "import resource, signal, sys; from pathlib import Path; from qipan.files import write_whole; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); write_whole(Path(sys.argv[1]), bytes(1000))"
    ran = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert "File too large" in ran.stderr
    assert path.read_bytes() == b"old"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_secret_is_made_once_and_an_empty_file_holds_none(tmp_path):
    path = tmp_path / "key"
    path.touch()
    assert secret_in(path, lambda: b"one") == b"one"
    assert secret_in(path, lambda: b"two") == b"one"
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["receipt.key", "rounds.key"])
def test_an_empty_key_signs_nothing_and_is_made_anew(tmp_path, name):
    boards = SimpleNamespace(folder=tmp_path)
    (tmp_path / name).touch(0o600)
    sign = {
        "receipt.key": lambda: Queries(boards)._sign(b"t"),
        "rounds.key": lambda: Coordinator(boards).key("t"),
    }[name]
    signed = sign()
    assert signed != hmac.new(b"", b"t", hashlib.sha256).hexdigest()
    assert len((tmp_path / name).read_bytes()) >= 32
    assert sign() == signed


def test_an_empty_database_file_names_no_database(tmp_path):
    (tmp_path / "database").touch()
    assert StoreFolder(tmp_path).place("cn") == tmp_path / "cn.db"
    made = StoreFolder(tmp_path, "postgresql://somebody@127.0.0.1:1/none").place("cn")
    assert vars(StoreFolder(tmp_path).place("cn")) == vars(made)


def test_a_host_is_closed_when_what_comes_after_it_fails(tmp_path):
    closed = []

    class Seen(Host):
        def close(self) -> None:
            super().close()
            closed.append(self)

    (tmp_path / "login.key").mkdir()
    site = load_site(Path(__file__).with_name("tiny_site.yaml"))
    with pytest.raises(IsADirectoryError):
        Running(site, tmp_path, make_host=Seen)
    assert len(closed) == 1
