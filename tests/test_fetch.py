"""Fetching: hashes, half-made folders, two processes at once, and what the user is told."""

import dataclasses
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from textrl import fetch

INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"


def tar_gz(path: Path | io.BytesIO, members: dict[str, bytes]) -> None:
    """Write a .tar.gz."""
    where = {"name": path} if isinstance(path, Path) else {"fileobj": path}
    with tarfile.open(**where, mode="w:gz") as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def fake_sdist(path: Path, members: dict[str, bytes]) -> str:
    """Write an sdist with `members` in the archive inside it; return its sha256."""
    inner = io.BytesIO()
    tar_gz(inner, members)
    tar_gz(path, {INNER: inner.getvalue()})
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that cannot reach anything."""
    monkeypatch.setenv("TEXTRL_CACHE", str(tmp_path / "cache"))
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return tmp_path / "cache"


@pytest.fixture
def ratings_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small sdist in `downloads/`, with its hash pinned in place of the real one."""
    path = cache / "downloads" / fetch.VADER.file
    path.parent.mkdir(parents=True)
    sha256 = fake_sdist(path, {"hutto/tweets_GroundTruth.txt": b"1\t2\tgood", "hutto/paper.pdf": b"x"})
    monkeypatch.setattr(fetch, "VADER", dataclasses.replace(fetch.VADER, sha256=sha256))
    return path


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TEXTRL_CACHE", str(tmp_path))
    assert fetch.cache_dir() == tmp_path
    monkeypatch.delenv("TEXTRL_CACHE")
    monkeypatch.setattr(os, "name", "posix")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch.cache_dir() == tmp_path / "textrl"


def test_a_file_already_there_needs_no_network(ratings_file: Path, cache: Path) -> None:
    folder = fetch.vader_sources()
    assert [path.name for path in folder.iterdir()] == ["tweets_GroundTruth.txt"]
    assert (folder / "tweets_GroundTruth.txt").read_bytes() == b"1\t2\tgood"
    assert not (cache / ".partial").exists()
    ratings_file.unlink()
    assert fetch.vader_sources() == folder  # the second call reads nothing


def test_no_network_is_one_line_that_says_where_the_file_may_be_put(cache: Path) -> None:
    with pytest.raises(fetch.FetchError) as error:
        fetch.vader_sources()
    message = str(error.value)
    assert "\n" not in message
    assert str(cache / "downloads" / fetch.VADER.file) in message
    assert fetch.VADER.sha256 in message
    assert not (cache / "vader-ratings").exists()


def test_a_partial_download_is_not_taken_for_a_whole_one(ratings_file: Path, cache: Path) -> None:
    ratings_file.write_bytes(ratings_file.read_bytes()[:-1])
    with pytest.raises(fetch.FetchError, match=fetch.VADER.file):
        fetch.vader_sources()
    assert not (cache / "vader-ratings").exists()


def test_a_wrong_hash_names_both_hashes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        (Path(command[command.index("--dest") + 1]) / fetch.VADER.file).write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    with pytest.raises(fetch.FetchError) as error:
        fetch.vader_sources()
    assert hashlib.sha256(b"something else").hexdigest() in str(error.value)
    assert fetch.VADER.sha256 in str(error.value)
    assert not list((cache).glob("downloads/*"))


def test_reasons_are_one_line() -> None:
    got = "a" * 64
    mismatch = f"ERROR: THESE PACKAGES DO NOT MATCH\n    x:\n        Expected sha256 bb\n         Got  {got}\n"
    assert fetch._reason(mismatch) == f"what came has sha256 {got}"
    assert fetch._reason("WARNING: x\nERROR: Could not install: No space left on device\n\n[notice] y") == (
        "Could not install: No space left on device"
    )
    assert fetch._reason("/bin/python: No module named pip\n") == "/bin/python: No module named pip"
    retry = "WARNING: Retrying after 'x: Failed to establish a new connection: [Errno -3] unreachable')': /simple"
    assert fetch._reason(retry) == "no network (Failed to establish a new connection: [Errno -3] unreachable)"
    assert fetch._reason("") == "pip gave no reason"


def test_no_member_is_written_outside_the_folder(
    ratings_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = fake_sdist(ratings_file, {"../../../evil_GroundTruth.txt": b"1", "/tmp/evil_anonDataRatings.txt": b"2"})
    monkeypatch.setattr(fetch, "VADER", dataclasses.replace(fetch.VADER, sha256=sha256))
    folder = fetch.vader_sources()
    inside = {folder / "evil_GroundTruth.txt", folder / "evil_anonDataRatings.txt"}
    assert set(cache.parent.rglob("*evil*")) == inside


def test_a_link_in_the_archive_is_refused(ratings_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        link = tarfile.TarInfo("x_GroundTruth.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    tar_gz(ratings_file, {INNER: inner.getvalue()})
    sha256 = hashlib.sha256(ratings_file.read_bytes()).hexdigest()
    monkeypatch.setattr(fetch, "VADER", dataclasses.replace(fetch.VADER, sha256=sha256))
    with pytest.raises(fetch.FetchError, match="link"):
        fetch.vader_sources()


def test_a_killed_run_leaves_no_folder_and_the_next_one_starts_clean(
    ratings_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_source: object, target: Path) -> None:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fetch, "_copy", killed)
        fetch.vader_sources()
    assert not (cache / "vader-ratings").exists()
    assert (fetch.vader_sources() / "tweets_GroundTruth.txt").read_bytes() == b"1\t2\tgood"


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TEXTRL_CACHE", str(tmp_path / "file"))
    with pytest.raises(fetch.FetchError, match="TEXTRL_CACHE must name a folder that can be written") as error:
        fetch.vader_sources()
    assert "\n" not in str(error.value)


def test_two_at_once_build_it_once(ratings_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []
    inside = threading.Semaphore()
    extract = fetch._extract_ratings

    def build(sdist: Path, folder: Path) -> None:
        assert inside.acquire(blocking=False), "two builds at the same time"
        extract(sdist, folder)
        built.append(folder)
        inside.release()

    monkeypatch.setattr(fetch, "_extract_ratings", build)
    threads = [threading.Thread(target=fetch.vader_sources) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_importing_fetch_loads_no_torch() -> None:
    code = "import sys, textrl.fetch; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
