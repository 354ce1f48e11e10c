"""What a benchmark found: one line of JSON for each thing measured, the same for every kind of benchmark."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from pippin import __version__
from pippin.errors import ConfigError

PACKAGES = ("mlx", "mlx-lm", "transformers", "torch")

Value = str | int | float | bool | None | list[str | int | float | None]


class BenchResult(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement.

    ``kind`` is the benchmark (``one-batch``, ``offline``, ``serving``), ``side`` who was measured (``pippin``,
    ``mlx-lm``, ``torch``, a server's kind). ``settings`` are what was asked for, ``figures`` what came of it: seconds,
    tokens a second, bytes, shares from 0 to 1, by names that say which; None where a figure has no meaning. ``commit``
    is that of the checkout that ran, None outside of one; ``when`` is UTC, ISO 8601.
    """

    kind: str
    run_name: str
    side: str
    model: str
    device: str
    settings: dict[str, Value]
    figures: dict[str, Value]
    versions: dict[str, str]
    commit: str | None
    when: str


def make_result(
    kind: str,
    *,
    run_name: str,
    side: str,
    model: str,
    device: str,
    settings: dict[str, Value],
    figures: dict[str, Value],
    versions: dict[str, str] | None = None,
) -> BenchResult:
    """A result of now, by this program and the packages beside it; ``versions`` adds those of what was measured."""
    return BenchResult(
        kind=kind,
        run_name=run_name,
        side=side,
        model=model,
        device=device,
        settings=settings,
        figures=figures,
        versions=package_versions() | (versions or {}),
        commit=commit(),
        when=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def package_versions() -> dict[str, str]:
    """Versions that figures depend on; packages that are not installed are left out."""
    found = {"pippin": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the checkout that this file is in, with ``+`` if files differ from it; None elsewhere."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + "+" * bool(_git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    if subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=here, capture_output=True).returncode:
        raise OSError("this file is not of a checkout")  # installed somewhere inside another project's
    done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def to_line(result: BenchResult) -> str:
    """One line of JSON, without its end."""
    return msgspec.json.encode(result).decode()


def append(path: Path, results: Iterable[BenchResult], flag: str = "--result-filename") -> None:
    """Adds a line for each to a file, which is made if it is not there.

    Raises ConfigError naming ``flag`` if it can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.writelines(msgspec.json.encode(result) + b"\n" for result in results)
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror}", flag) from error


def read(paths: Sequence[Path]) -> list[BenchResult]:
    """All results of some files, in order. Raises ConfigError naming the file and line that is none."""
    found = []
    for path in paths:
        try:
            lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
        except OSError as error:
            raise ConfigError(f"{path} can't be read: {error.strerror}") from error
        for number, text in enumerate(lines, 1):
            try:
                found.append(msgspec.json.decode(text, type=BenchResult))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise ConfigError(f"{path}, line {number}, is no benchmark result: {error}") from error
    return found
