"""A machine without MLX gets advice by name, and OpenBLAS only counts before MLX is there."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest

from pippin.backend import NoBackendError, advice, find_temporary_files, preload_openblas


@pytest.mark.parametrize(
    ("system", "machine", "says"),
    [
        ("Darwin", "x86_64", "Intel Macs"),
        ("Darwin", "arm64", "macOS 14"),
        ("Linux", "x86_64", "mlx[cpu]"),
        ("Linux", "aarch64", "mlx[cuda13]"),
        ("Linux", "riscv64", "no build for Linux on riscv64"),
        ("Windows", "AMD64", "no build for Windows"),
    ],
)
def test_advice_names_the_machine(system: str, machine: str, says: str) -> None:
    assert says in advice(system, machine, "libmlx.so: cannot open shared object file")


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)


def test_missing_backend_is_an_import_error_with_advice() -> None:
    # None in sys.modules is how Python itself says that a module can't be imported.
    done = run(
        "import sys; sys.modules['mlx.core'] = None\n"
        "from pippin.backend import prepare\n"
        "try: prepare()\n"
        "except ImportError as error: print(error)"
    )
    assert "pip" in done.stdout or "Intel" in done.stdout, done.stderr


def test_a_temporary_directory_that_is_gone_is_replaced() -> None:
    code = "import os; from pippin.backend import prepare; prepare(); print(os.path.isdir(os.environ['TMPDIR']))"
    done = run(f"import os; os.environ['TMPDIR'] = '/nowhere/at/all'\n{code}")
    assert done.stdout.strip() == "True", done.stderr


def test_without_any_temporary_directory_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere/at/all"])
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(NoBackendError, match="TMPDIR"):
        find_temporary_files()


def test_preloading_after_mlx_is_refused() -> None:
    import mlx.core  # noqa: F401

    assert not preload_openblas()


def test_the_engine_prepares_before_it_imports_mlx() -> None:
    done = run(
        "import sys; sys.modules['mlx.core'] = None\n"
        "try: import pippin.core\n"
        "except ImportError as error: print(type(error).__name__)"
    )
    assert done.stdout.strip() == "NoBackendError", done.stderr


def test_a_thread_that_used_mlx_lets_the_process_end() -> None:
    code = (
        "import threading\n"
        "from pippin.backend import leave_thread, prepare\n"
        "def work():\n"
        "    prepare()\n"
        "    import mlx.core as mx\n"
        "    x = mx.random.normal((512, 512))\n"
        "    mx.eval(x @ x)\n"
        "    leave_thread()\n"
        "thread = threading.Thread(target=work)\n"
        "thread.start()\n"
        "thread.join()"
    )
    # Without leave_thread about every second process aborts.
    assert [run(code).returncode for _ in range(8)] == [0] * 8


@pytest.mark.skipif(sys.platform != "linux", reason="for MLX's CUDA build")
@pytest.mark.parametrize("given", [None, "7"])
def test_a_whole_step_fits_into_mlxs_buffers_unless_somebody_wants_otherwise(given: str | None) -> None:
    code = "import os; from pippin.backend import prepare; prepare(); print(os.environ['MLX_MAX_MB_PER_BUFFER'])"
    environment = {k: v for k, v in os.environ.items() if k != "MLX_MAX_MB_PER_BUFFER"}
    environment |= {} if given is None else {"MLX_MAX_MB_PER_BUFFER": given}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (given or "4096")
