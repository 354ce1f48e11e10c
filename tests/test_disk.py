"""Blocks of K and V in files: found again or not there, whatever happens to the files, the disk or who writes."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, BinaryIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.cache.digest import digest_of
from pippin.cache.disk import BLOCK, BlockFiles, Rows, block_keys, decode, encode, open_new, root_key
from pippin.errors import ConfigError

SOAK = bool(os.environ.get("PIPPIN_SOAK"))
ROOT = root_key(["a model"])
SIZE = 64 * BLOCK * 4 + 512  # about what a file of these tests takes


def tokens_of(name: int, blocks: int) -> list[int]:
    return [Random(name).randrange(1000) for _ in range(blocks * BLOCK)]


def arrays_of(key: bytes, width: int = 32) -> list[Rows]:
    """K and V that tell whose they are."""
    source = np.random.default_rng(list(key))
    return [source.integers(0, 2**16, (BLOCK, 2, width), np.uint16) for _ in range(2)]


def put(files: BlockFiles, name: int, blocks: int = 1) -> list[bytes]:
    """Writes a prefix as the engine does: in order, and then in use."""
    tokens = tokens_of(name, blocks)
    keys = block_keys(ROOT, tokens, blocks)
    for i, key in enumerate(keys):
        files.write(key, tokens[i * BLOCK : (i + 1) * BLOCK], arrays_of(key))
    files.touch(keys)
    return keys


def get(files: BlockFiles, name: int, block: int = 0) -> bool:
    """Whether a block is there; if so it is right."""
    tokens = tokens_of(name, block + 1)
    key = block_keys(ROOT, tokens, block + 1)[block]
    found = files.read(key, tokens[block * BLOCK :])
    if found is not None:
        for a, b in zip(found, arrays_of(key), strict=True):
            assert np.array_equal(a, b)
    return found is not None


def taken(directory: Path) -> int:
    total = 0
    for file in directory.glob("*/*"):
        with suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


# --- keys and files ---


@given(st.lists(st.integers(0, 2**31 - 1), min_size=2 * BLOCK, max_size=3 * BLOCK), st.data())
def test_a_key_hangs_on_every_token_before_and_on_the_model(tokens: list[int], data: st.DataObject) -> None:
    count = len(tokens) // BLOCK
    keys = block_keys(ROOT, tokens, count)
    assert block_keys(ROOT, tokens[: count * BLOCK], count) == keys
    at = data.draw(st.integers(0, count * BLOCK - 1))
    other = [*tokens]
    other[at] ^= 1
    for i, (a, b) in enumerate(zip(keys, block_keys(ROOT, other, count), strict=True)):
        assert (a == b) == (i < at // BLOCK)
    assert not set(keys) & set(block_keys(root_key(["another"]), tokens, count))
    assert root_key(["a", "b"]) != root_key(["ab"])


DTYPES = [np.uint8, np.uint16, np.uint32]


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(1, 4), st.integers(1, 9)), max_size=4), st.data())
def test_a_file_gives_what_was_put_in_or_is_refused(shapes: list[tuple[Any, int, int]], data: st.DataObject) -> None:
    source = np.random.default_rng(7)
    arrays = [source.integers(0, 200, (BLOCK, heads, dim)).astype(dtype) for dtype, heads, dim in shapes]
    tokens = tokens_of(1, 1)
    whole = b"".join(encode(b"k" * 32, tokens, arrays))
    for a, b in zip(decode(io.BytesIO(whole), b"k" * 32, tokens), arrays, strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)
    at = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytes([*whole[:at], whole[at] ^ data.draw(st.integers(1, 255)), *whole[at + 1 :]])
    for broken in (flipped, whole[:at], whole + b"x"):
        with pytest.raises(ValueError, match=r"checksum|not a file"):
            decode(io.BytesIO(broken), b"k" * 32, tokens)
    for key, other in ((b"l" * 32, tokens), (b"k" * 32, [*tokens[:-1], -1])):
        with pytest.raises(ValueError, match="another prefix"):
            decode(io.BytesIO(whole), key, other)


def test_files_of_an_older_format_go(tmp_path: Path) -> None:
    files = BlockFiles(tmp_path, 10**6)
    (key,) = put(files, 1)
    old = files.path(key).with_suffix(".kv")
    old.write_bytes(b"as it was before")
    assert get(files, 1)
    files.scan()
    assert get(files, 1)
    assert not old.exists()
    assert files.counts.drops["outdated"] == 1


def test_a_file_is_read_where_it_is_wanted(tmp_path: Path) -> None:
    files, tokens = BlockFiles(tmp_path, 10**6), tokens_of(1, 1)
    (key,) = put(files, 1)
    whole = b"".join(a.tobytes() for a in arrays_of(key))
    memory = np.zeros(len(whole) + 8, np.uint8)
    assert files.read(key, tokens, memory[4:-4]) is not None
    assert memory.tobytes() == bytes(4) + whole + bytes(4)
    assert files.read(key, tokens, memory) is None, "of another layout"
    assert files.counts.drops["corrupt"] == 1
    assert not files.has(key)


def test_a_broken_file_is_dropped_and_counted(tmp_path: Path) -> None:
    files = BlockFiles(tmp_path, 1 << 30)
    for name in range(20):
        (key,) = put(files, name)
        path = files.path(key)
        data = bytearray(path.read_bytes())
        at = Random(name).randrange(len(data))
        if name % 3:
            data[at] ^= 1 << name % 8
        else:
            del data[at:]
        path.write_bytes(data)
        assert not get(files, name)
        assert not path.exists()
        put(files, name)
        assert get(files, name)
    assert files.counts.drops["corrupt"] == 20


def test_another_server_finds_them_and_so_does_the_next_run(tmp_path: Path) -> None:
    first, second = BlockFiles(tmp_path, 1 << 30), BlockFiles(tmp_path, 1 << 30)
    keys = put(first, 1, 3)
    assert all(second.has(key) for key in keys)
    assert all(get(second, 1, i) for i in range(3))
    third = BlockFiles(tmp_path, 1 << 30)
    third.scan()
    assert all(third.known(key) for key in keys)
    assert third.counts.bytes == taken(tmp_path) == first.counts.bytes
    assert not get(third, 2)
    assert third.counts.drops["corrupt"] == 0


# --- the bound ---


def test_what_was_not_used_for_longest_goes_first_and_ends_before_beginnings(tmp_path: Path) -> None:
    files = BlockFiles(tmp_path, 100 * SIZE)
    old, used = put(files, 1, 12), put(files, 2, 4)
    time.sleep(0.01)
    for name in range(100, 300):
        put(files, name)
        files.touch(used)
        assert taken(tmp_path) <= 100 * SIZE
        kept = [files.path(key).exists() for key in old]
        if not all(kept):
            break
    assert any(kept)
    assert kept == sorted(kept, reverse=True)
    assert all(files.path(key).exists() for key in used)
    assert files.counts.drops["evicted"] == kept.count(False)


def test_two_servers_together_stay_within_the_bound(tmp_path: Path) -> None:
    most = 128 * SIZE
    servers = [BlockFiles(tmp_path, most) for _ in range(2)]
    worst = 0

    def serve(files: BlockFiles, seed: int) -> None:
        nonlocal worst
        rng = Random(seed)
        for _ in range(120):
            name = rng.randrange(100)
            if not get(files, name, rng.randrange(3)):
                put(files, name, 3)
            worst = max(worst, taken(tmp_path))

    threads = [threading.Thread(target=serve, args=(files, i)) for i, files in enumerate(servers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most / 2 < worst <= most
    assert all(files.counts.drops["corrupt"] == 0 for files in servers)
    assert sum(files.counts.read_blocks for files in servers) > 20


# --- faults ---

WRITER = """
import sys
from itertools import count
from pathlib import Path
from pippin.cache.disk import BlockFiles
from tests.test_disk import put
files = BlockFiles(Path(sys.argv[1]), int(sys.argv[2]))
print("ready", flush=True)
for name in count(int(sys.argv[3])):
    put(files, name, 4)
"""


@pytest.mark.timeout(1200)
def test_killed_in_the_middle_of_writes(tmp_path: Path) -> None:
    """Whatever is there is whole, what was begun is cleared away, and the next server starts and goes on."""
    rng, most, orphans = Random(1), 400 * SIZE, 0
    for round in range(50 if SOAK else 4):
        code = [sys.executable, "-c", WRITER, str(tmp_path), str(most), str(round * 10_000)]
        with subprocess.Popen(code, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(rng.random() * 0.2)
            child.send_signal(signal.SIGKILL)
        orphans += len([*tmp_path.glob("*/*.tmp")])
        files = BlockFiles(tmp_path, most)
        files.scan()
        assert not [*tmp_path.glob("*/*.tmp")]
        assert taken(tmp_path) <= most
        found = 0
        while get(files, round * 10_000 + found // 4, found % 4):
            found += 1
        assert files.counts.drops["corrupt"] == 0
        put(files, round * 10_000 + 9_999)
        assert get(files, round * 10_000 + 9_999)
    if SOAK:
        assert orphans


def test_a_file_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    files, other = BlockFiles(tmp_path, 1 << 30), BlockFiles(tmp_path, 1 << 30)
    seen = []

    class Watched(io.FileIO):
        def write(self, data: Any) -> int:
            other.scan()
            seen.append(len([*tmp_path.glob("*/*.tmp")]))
            return super().write(data) or 0

    files._open = lambda path: Watched(path, "xb")
    put(files, 1)
    assert set(seen) == {1}
    assert get(other, 1)
    (tmp_path / "ab").mkdir(exist_ok=True)
    (tmp_path / "ab" / "left.tmp").write_bytes(b"half")
    other.scan()
    assert not [*tmp_path.glob("*/*.tmp")]


class FullDisk:
    """Files that take ``room`` bytes in all, and then no more."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self, path: Path) -> BinaryIO:
        disk = self

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                disk.room -= len(data)
                if disk.room < 0:
                    super().write(data[: len(data) // 2])
                    raise OSError(errno.ENOSPC, "No space left on device")
                return super().write(data) or 0

        return File(path, "xb")


def test_a_full_disk_costs_the_block_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = BlockFiles(tmp_path, 1 << 30, FullDisk(5 * SIZE))
    for name in range(12):
        put(files, name)
    assert not [*tmp_path.glob("*/*.tmp")]
    stored = [name for name in range(12) if get(files, name)]
    assert stored == list(range(len(stored)))
    assert 3 <= len(stored) <= 5
    assert files.counts.drops == {"evicted": 0, "full": 12 - len(stored)}
    assert files.refuses
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 60)
    files._open = open_new
    put(files, 50)
    assert get(files, 50)


def test_a_disk_without_room_for_the_directory_is_no_failed_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", full)
        files = BlockFiles(tmp_path / "new", 1 << 30)
        files.scan()
        put(files, 1)
        assert not get(files, 1)
    with pytest.raises(ConfigError, match=r"--kv-disk: .* can't be used"):
        BlockFiles(Path(__file__), 1 << 30)


@pytest.mark.skipif(not SOAK or os.geteuid() != 0, reason="mounts a file system: make soak, as root")
def test_a_file_system_that_is_really_full(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={40 * SIZE}", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        files = BlockFiles(tmp_path, 1 << 30)
        for name in range(60):
            put(files, name)
        found = sum(get(files, name) for name in range(60))
        assert 10 < found < 60
        assert files.counts.drops["full"] == 60 - found
        assert digest_of([Path(__file__).parent], tmp_path / "digests.json")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_prompts_are_for_their_owner_alone(tmp_path: Path) -> None:
    files = BlockFiles(tmp_path / "new", 1 << 30)
    (key,) = put(files, 1)
    assert [p.stat().st_mode & 0o077 for p in (files.path(key), files.path(key).parent, tmp_path / "new")] == [0, 0, 0]


# --- the model's digest ---


def test_a_digest_is_of_what_the_files_contain(tmp_path: Path) -> None:
    model, memo = tmp_path / "model", tmp_path / "memo.json"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "config.json").write_text("{}")
    (model / "README.md").write_text("words")
    first = digest_of([model], memo)
    assert digest_of([model], memo) == first
    assert digest_of([model, model], tmp_path / "none.json") == first
    (model / "README.md").write_text("others")
    assert digest_of([model], memo) == first
    (model / "chat_template.jinja").write_text("{{ messages }}")
    second = digest_of([model], memo)
    (model / "model.safetensors").write_bytes(b"Weights")
    assert len({first, second, digest_of([model], memo)}) == 3
    for junk in (b"", b"\xff\x00", b"[1]", b'{"a": 1}'):
        memo.write_bytes(junk)
        assert digest_of([model], memo) == digest_of([model], tmp_path / "none.json")


def test_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    memo = tmp_path / "memo" / "digests"
    memo.parent.mkdir()
    first = digest_of([tmp_path], memo)
    monkeypatch.setattr("pippin.cache.digest._digest", lambda _: pytest.fail("read again"))
    assert digest_of([tmp_path], memo) == first
