"""Data between sites: what is missing, and copies of it from folders, over HTTP and from an S3-compatible service."""

import fcntl
import os
import random
import resource
import socket
import subprocess
import threading
import time
from dataclasses import replace

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from qipan.cli.storage import app as commands
from qipan.errors import InvalidInput, NotAllowed, OverLimit, QipanError, Unreachable
from qipan.hardware import BoardId, Storage
from qipan.staging import (
    CHUNK_BYTES,
    Bucket,
    Manifest,
    Place,
    StagedFile,
    checked,
    newest,
    outdated,
    plan,
    unnamed,
)
from qipan.transfer import Progress, Stager, fetch, open_storage, reading
from qipan.transfer.fetch import Pace, hashes
from qipan.transfer.serve import server

A, B, C = ("a" * 64, "b" * 64, "c" * 64)


def manifest(*files: StagedFile, **changes) -> Manifest:
    return replace(Manifest("t", 1, 0.0, 0.0, 4, files), **changes)


def at(folder, **options) -> Storage:
    return Storage("s", BoardId("here"), 0, 0.0, 0.0, url=str(folder), options=options)


def fill(folder, sizes, seed=1):
    for path, size in sizes.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(random.Random(f"{seed}{path}").randbytes(size))


def same(one, other) -> bool:
    names = [sorted(p.relative_to(f).as_posix() for p in f.rglob("*") if p.is_file()) for f in (one, other)]
    return names[0] == names[1] and all((one / n).read_bytes() == (other / n).read_bytes() for n in names[0])


# ---- decisions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["http://[::1", "https://h:²", "s3://", "https://x y"])
def test_an_address_of_a_storage_that_is_none_is_named(url):
    with pytest.raises(InvalidInput, match="cannot be opened"):
        open_storage(Storage("dc/fs", BoardId("dc"), 0, 0.0, 0.0, url=url))


def test_a_storage_in_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="cannot be opened"):
        open_storage(at(tmp_path / "file"))


def test_what_is_missing_is_asked_for_once_however_often_it_stands():
    whole = manifest(StagedFile("x", 10, (A, B, C)), StagedFile("best/x", 4, (B,)))
    work = plan(whole, {(Place("x", 0), A)}, {C: "the old copy"})
    assert [(one.chunk, one.length, one.to, one.found) for one in work] == [
        (B, 4, (Place("x", 4), Place("best/x", 0)), None),
        (C, 2, (Place("x", 8),), "the old copy"),
    ]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.sets(st.integers(0, 40)))
def test_what_is_placed_and_what_is_planned_are_the_whole(sizes, cut):
    files = tuple(
        StagedFile(f"f{n}", size, tuple(f"{n + i % 2:064x}" for i in range(-(-size // 4))))
        for n, size in enumerate(sizes)
    )
    whole = checked(manifest(*files))
    places = sorted(whole.placed(), key=lambda one: (one[0].path, one[0].offset))
    placed = {one for number, one in enumerate(places) if number in cut}
    planned = [(place, one.chunk) for one in plan(whole, placed, {}) for place in one.to]
    assert len(planned) == len(set(planned))
    assert set(planned) | placed == whole.placed()
    assert not set(planned) & placed


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x", "a/../../x", "a//x", "", "a\0b", "a\\b", ".", "\udcff"]
)
def test_a_manifest_that_leaves_its_folder_is_refused(path):
    with pytest.raises(InvalidInput, match="is no path below a folder"):
        checked(manifest(StagedFile(path, 4, (A,))))


def test_a_manifest_whose_sizes_do_not_fit_is_refused():
    with pytest.raises(InvalidInput, match="2 chunks for 4 bytes"):
        checked(manifest(StagedFile("x", 4, (A, B))))
    with pytest.raises(InvalidInput, match="no BLAKE3 name"):
        checked(manifest(StagedFile("x", 4, ("../../x",))))


def test_a_bucket_gives_its_rate():
    bucket, now_s, sent = Bucket(100.0, 50, 0.0), 0.0, 0
    while now_s < 100:
        now_s += bucket.take(30, now_s)
        sent += 30
    assert sent == pytest.approx(100 * 100 + 50, abs=60)


def test_the_newest_is_that_with_most_work_in_it():
    older, newer = manifest(attempt=2, saved_s=5.0, written_s=9.0), manifest(attempt=2, saved_s=6.0)
    assert newest([("a", older), ("b", newer), ("c", newer)]) == ("b", newer)
    assert newest([]) is None


def test_what_is_old_may_go_and_what_nothing_names_goes_later():
    assert outdated({"old": 10.0, "new": 90.0}, 100.0, 50.0) == ["old"]
    assert unnamed({A: 0.0, B: 0.0, C: 9_000.0}, {B}, 10_000.0) == [A]


# ---- copies ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def there(tmp_path):
    fill(tmp_path / "there", {"step-1/model": 3 * CHUNK_BYTES + 17, "step-1/COMMIT": 40, "empty": 0})
    return tmp_path / "there"


def test_a_folder_comes_whole_and_again_only_what_changed(tmp_path, there):
    storage = open_storage(at(tmp_path / "storage"))
    first = storage.publish(there, "t")
    fetch(storage, first.manifest, tmp_path / "here", progress := Progress())
    assert same(there, tmp_path / "here")
    assert progress.sent_bytes == first.new_bytes == 3 * CHUNK_BYTES + 57
    (there / "step-1/COMMIT").write_text("another")
    (there / "empty").rename(there / "renamed")
    second = storage.publish(there, "t")
    assert second.new_bytes == 7
    fetch(storage, storage.manifest("t"), tmp_path / "here", progress := Progress())
    assert same(there, tmp_path / "here")
    assert progress.sent_bytes == 7


class Cut:
    """A storage whose link is cut after some chunks."""

    def __init__(self, storage, after):
        self.storage_id, self._storage, self.left = "cut", storage, after

    def pieces(self, chunk):
        self.left -= 1
        pieces = self._storage.pieces(chunk)
        if self.left < 0:
            yield next(pieces)
            raise Unreachable("cut in the middle of a chunk")
        yield from pieces


def test_a_cut_copy_goes_on_and_nothing_verified_is_sent_again(tmp_path, there):
    storage = open_storage(at(tmp_path / "storage"))
    whole, sent = storage.publish(there, "t").manifest, 0
    for after in (2, 1):
        with pytest.raises(Unreachable):
            fetch(Cut(storage, after), whole, tmp_path / "here", progress := Progress(), workers=1)
        sent += progress.sent_bytes
        assert not (tmp_path / "here").exists(), "a folder is exchanged whole"
    fetch(storage, whole, tmp_path / "here", progress := Progress())
    assert same(there, tmp_path / "here")
    assert sent + progress.sent_bytes == whole.size_bytes


def test_other_bytes_than_the_name_says_are_refused(tmp_path, there):
    storage = open_storage(at(tmp_path / "storage"))
    whole = storage.publish(there, "t").manifest
    chunk = whole.files[2].chunks[1]
    path = tmp_path / "storage/chunks" / chunk[:2] / chunk
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(QipanError, match="came with other bytes"):
        fetch(storage, whole, tmp_path / "here", Progress())
    assert chunk not in {found for _, found in hashes(tmp_path / "here.qipan-incoming", CHUNK_BYTES)}
    assert not (tmp_path / "here").exists()


def test_a_full_storage_refuses_and_what_nothing_names_is_let_go(tmp_path, there):
    storage = open_storage(replace(at(tmp_path / "storage"), capacity_bytes=4 * CHUNK_BYTES))
    storage.publish(there, "t")
    fill(tmp_path / "more", {"x": CHUNK_BYTES})
    with pytest.raises(OverLimit, match="is full"):
        storage.publish(tmp_path / "more", "u")
    for path in (tmp_path / "storage").rglob("*"):
        os.utime(path, (1, 1))
    storage.publish(tmp_path / "none", "t")
    assert storage.release(1e12, 2e12) == 3 * CHUNK_BYTES + 57
    assert [found.name for found in storage.manifests()] == ["t"]
    storage.publish(tmp_path / "more", "u")


def test_one_large_file_does_not_overfill_a_storage(tmp_path, there):
    storage = open_storage(replace(at(tmp_path / "storage"), capacity_bytes=2 * CHUNK_BYTES))
    with pytest.raises(OverLimit, match="is full"):
        storage.publish(there, "t")
    kept = [path.stat().st_size for path in (tmp_path / "storage").rglob("*") if path.is_file()]
    assert sum(kept) <= 2 * CHUNK_BYTES


def test_over_http_with_its_token_only(tmp_path, there):
    storage = open_storage(at(tmp_path / "storage"))
    whole = storage.publish(there, "a/b").manifest
    serving = server(tmp_path / "storage", "127.0.0.1", 0, "secret")
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{serving.server_port}"
    for name in ("secret", "wrong"):
        (tmp_path / name).write_text(name)
    try:
        remote = open_storage(at(url, token_file=str(tmp_path / "secret")))
        assert remote.manifest("a/b") == whole
        assert remote.manifest("c") is None
        fetch(remote, whole, tmp_path / "here", Progress())
        assert same(there, tmp_path / "here")
        with pytest.raises(NotAllowed):
            open_storage(at(url, token_file=str(tmp_path / "wrong"))).manifest("a/b")
        with socket.create_connection(("127.0.0.1", serving.server_port)) as raw:
            raw.sendall(
                b"GET /../secret HTTP/1.1\r\nAuthorization: Bearer secret\r\nConnection: close\r\n\r\n"
            )
            assert raw.recv(100).startswith(b"HTTP/1.1 404")
    finally:
        serving.shutdown()
        serving.server_close()
    with pytest.raises(Unreachable, match="does not answer"):
        open_storage(at(url, token_file=str(tmp_path / "secret"))).manifest("a/b")


@pytest.fixture
def certificate(tmp_path):
    """(certificate, key) of 127.0.0.1, signed by itself."""
    files = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", "/CN=s",
         "-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE", "-addext", "keyUsage=digitalSignature",
         "-out", str(files[0]), "-keyout", str(files[1])],
        check=True, capture_output=True,
    )  # fmt: skip
    return files


def test_over_tls_chunks_come_from_whom_the_reader_trusts(tmp_path, there, certificate):
    whole = open_storage(at(tmp_path / "storage")).publish(there, "a").manifest
    serving = server(tmp_path / "storage", "127.0.0.1", 0, "secret", *certificate)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    (tmp_path / "token").write_text("secret")
    url, token = f"https://127.0.0.1:{serving.server_port}", str(tmp_path / "token")
    try:
        fetch(open_storage(at(url, token_file=token, ca_file=str(certificate[0]))), whole, tmp_path / "here", Progress())  # fmt: skip
        assert same(there, tmp_path / "here")
        with pytest.raises(Unreachable, match="does not answer"):
            list(
                open_storage(at(url, token_file=token)).pieces(
                    next(one.chunks[0] for one in whole.files if one.chunks)
                )
            )
    finally:
        serving.shutdown()
        serving.server_close()


def test_a_process_with_thousands_of_open_files_reads_on():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    here, there = socket.socketpair()
    with here, there, socket.socket(fileno=fcntl.fcntl(here, fcntl.F_DUPFD, 1500)) as high:
        assert not reading._more(high)
        there.send(b"x")
        assert reading._more(high)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_line_closed_between_chunks_is_opened_anew_and_a_body_cut_short_is_told(tmp_path):
    """The server answers once a line: the second answer is four bytes short, the third has no length."""
    answers = iter([b"Content-Length: 4\r\n\r\nabcd", b"Content-Length: 8\r\n\r\nabcd", b"\r\nabcd"])
    with socket.create_server(("127.0.0.1", 0)) as door:

        def serve() -> None:
            for answer in answers:
                link = door.accept()[0]
                link.recv(4096)
                link.sendall(b"HTTP/1.1 200 OK\r\n" + answer)
                link.close()

        threading.Thread(target=serve, daemon=True).start()
        storage = open_storage(at(f"http://127.0.0.1:{door.getsockname()[1]}"))
        assert b"".join(storage.pieces(A)) == b"abcd"
        for _ in range(2):
            with pytest.raises(Unreachable, match="does not answer"):
                list(storage.pieces(A))


def test_an_s3_compatible_service(tmp_path, there):
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer("127.0.0.1", 0)
    moto.start()
    try:
        endpoint = "http://{}:{}".format(*moto.get_host_and_port())
        httpx.put(f"{endpoint}/bucket").raise_for_status()
        keys = tmp_path / "keys"
        keys.write_text("access_key_id = test\nsecret_access_key = test\n")
        storage = open_storage(at("s3://bucket/qipan", endpoint=endpoint, credentials=str(keys)))
        assert storage.publish(there, "t").new_bytes == 3 * CHUNK_BYTES + 57
        assert storage.publish(there, "t").new_bytes == 0
        fetch(storage, storage.manifest("t"), tmp_path / "here", Progress())
        assert same(there, tmp_path / "here")
        assert storage.release(0.0, 1.0) == 0
    finally:
        moto.stop()


def test_a_link_is_used_for_its_share_only(tmp_path, there):
    storage = open_storage(at(tmp_path / "storage"))
    whole, waited = storage.publish(there, "t").manifest, []
    pace = Pace(CHUNK_BYTES / 2, CHUNK_BYTES, lambda: 0.0, waited.append)
    fetch(storage, whole, tmp_path / "here", Progress(), pace, workers=1)
    assert max(waited) == pytest.approx(4, abs=0.1), (
        "three chunks at half a chunk a second, the first at once"
    )


def test_a_storage_that_cannot_be_is_refused():
    with pytest.raises(InvalidInput, match="is neither a folder"):
        open_storage(at("ftp://x/y"))
    with pytest.raises(InvalidInput, match="no absolute path"):
        open_storage(at("some/folder"))
    with pytest.raises(InvalidInput, match="no option 'endpoint' for file"):
        open_storage(at("/tmp/x", endpoint="y"))


def get(*words):
    """`qipan storage get`, in this process."""
    return CliRunner().invoke(commands, ["get", *map(str, words)])


def test_a_folder_that_holds_something_is_replaced_only_when_that_is_said(tmp_path, there):
    open_storage(at(tmp_path / "storage")).publish(there, "t")
    fill(tmp_path, {"here/mine": 10, "here.before/mine": 10, "here.incoming/mine": 10})
    refused = get(tmp_path / "storage", "t", tmp_path / "here").exception
    assert isinstance(refused, InvalidInput)
    assert "say --replace" in str(refused)
    assert (tmp_path / "here/mine").exists()
    assert get(tmp_path / "storage", "t", tmp_path / "here", "--replace").exit_code == 0
    assert same(there, tmp_path / "here")
    assert (tmp_path / "here.before/mine").exists()
    assert (tmp_path / "here.incoming/mine").exists()


def test_a_folder_comes_to_where_one_stands(tmp_path, there, monkeypatch):
    open_storage(at(tmp_path / "storage")).publish(there, "t")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert get(tmp_path / "storage", "t", ".").exit_code == 0
    assert same(there, tmp_path / "here")


# ---- keeping -----------------------------------------------------------------------------------------------------------


def waited_for(look):
    end_s = time.monotonic() + 60
    while (found := look()) is None:
        assert time.monotonic() < end_s
        time.sleep(0.01)
    return found


@pytest.mark.parametrize("odd", [b"a\\b", b"\xff"])
def test_a_file_whose_name_no_reader_takes_is_not_kept(tmp_path, odd):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / os.fsdecode(odd)).write_text("x")
    storage = open_storage(at(tmp_path / "storage"))
    with pytest.raises(InvalidInput, match="is no path below a folder"):
        storage.publish(tmp_path / "odd", "t")
    assert storage.manifests() == []


def test_a_task_is_kept_after_one_that_cannot_be_and_beside_a_manifest_that_cannot_be_read(tmp_path, there):
    (tmp_path / "storage/manifests").mkdir(parents=True)
    (tmp_path / "storage/manifests" / f"{A}.json").write_text("{}")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / os.fsdecode(b"\xff")).write_text("x")
    own = at(tmp_path / "storage")
    stager = Stager(own, [own])
    stager.keep("a", tmp_path / "odd", 1, 0.0)
    assert waited_for(lambda: stager.settle("b", there, 1, 0.0)) == ""
    assert waited_for(lambda: stager.settle("b", there, 2, 0.0)) == ""


def brought(stager, folder, attempt, saved_s=0.0):
    """The end of a copy that is asked for until it comes."""

    def look():
        found = stager.arrive("t", folder, attempt, saved_s)
        return found if found.state != "coming" else None

    return waited_for(look)


def two_sites(tmp_path, capacity_bytes=0):
    """A stager of `here`, and the storage of `away`."""
    own = replace(at(tmp_path / "own"), capacity_bytes=capacity_bytes)
    other = replace(at(tmp_path / "other"), site=BoardId("away"))
    return Stager(own, [own, other], again_s=0.0), open_storage(other)


def test_a_copy_that_nobody_waited_for_does_not_answer_for_a_newer_one(tmp_path, there):
    stager, away = two_sites(tmp_path)
    away.publish(there, "t", 2)
    stager.arrive("t", tmp_path / "here", 2, 0.0)
    waited_for(lambda: stager._copies["t"].ended)
    (there / "step-1/COMMIT").write_text("of attempt 4")
    away.publish(there, "t", 4)
    assert brought(stager, tmp_path / "here", 4).state == "here"
    assert same(there, tmp_path / "here")


def test_what_could_not_be_kept_is_not_replaced_by_older_work(tmp_path, there):
    stager, away = two_sites(tmp_path, capacity_bytes=1)
    away.publish(there, "t", 4)
    fill(tmp_path / "here", {"newest": 100})
    assert "is full" in waited_for(lambda: stager.settle("t", tmp_path / "here", 5, 0.0))
    for one in (stager, two_sites(tmp_path)[0]):  # and when the board has started again
        assert brought(one, tmp_path / "here", 5).state == "here"
        assert (tmp_path / "here/newest").exists()
    away.publish(there, "t", 6)
    assert brought(stager, tmp_path / "here", 6).state == "here"
    assert same(there, tmp_path / "here")
