"""Prefixes between the pool and the disk: written behind requests that end, read ahead of requests that begin.

A request whose prompt goes on in files waits here while a thread reads them; others run meanwhile. What is read goes
into the tree, and the request is handed on, to find it there. Writing is the same the other way: the tree is asked for
an ended request's tokens, their K and V are copied on the device, and a thread writes them out. Nothing is pinned:
what the tree gives up on the way is not written, or computed.

Windowed layers' K and V are in files of their own (``cache.disk_windows``), for blocks whose windows were still there.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pippin.cache.canary import KVCanary
from pippin.cache.digest import digest_of
from pippin.cache.disk import BLOCK, LEAST_BLOCKS, BlockFiles, Rows, block_keys, root_key
from pippin.cache.disk_windows import WindowBlocks, window_key
from pippin.cache.windows import WindowPages
from pippin.config import EngineConfig
from pippin.disk_reads import PLACES, Block, BlockReads
from pippin.errors import ConfigError
from pippin.messages import ModelInfo
from pippin.restore_choice import RestoreChoice
from pippin.scheduler import Scheduler
from pippin.types import Request, Token

log = logging.getLogger(__name__)

_AHEAD = 16  # blocks of a request that are read before those before them are in the pool
_RESTORING = 2  # requests that read at a time
_TURN_BYTES = 64 << 20  # copied to and from the pool between two steps, each
_WRITING_BYTES = 256 << 20  # copied out of the pool and not written yet
_JOBS = 256  # ended requests that wait to be written
PATIENCE = 5.0
"""Seconds that a request waits for a block. A disk that takes longer is left alone for a minute."""
_PAUSE = 60.0


def copy_bytes(slot_bytes: int) -> int:
    """The most that blocks on their way take beside the pool, where a token has ``slot_bytes``."""
    turn, writing = _blocks_of(slot_bytes * BLOCK)
    reading = PLACES + 2 * turn  # in memory that the device can read, and then twice in its own
    return (writing + turn + reading) * slot_bytes * BLOCK


def _blocks_of(block_bytes: int) -> tuple[int, int]:
    """How many blocks are copied in a turn, and how many may wait for the writer."""
    return max(1, _TURN_BYTES // block_bytes), max(1, _WRITING_BYTES // block_bytes)


class Array(Protocol):
    """An array of the device, which numpy can take."""

    def __array__(self) -> Rows: ...


class Device(Protocol):
    """Who has the pool; ``runner.MlxModelRunner`` is the real one."""

    def read_slots(self, slots: Sequence[int], windowed: bool = False) -> Sequence[Array]:
        """Queues a copy of K and V of whole pages: a layer's rows [n, …] each, of windowed layers or of all others."""
        ...

    def write_slots(self, slots: Sequence[int], rows: Sequence[Rows], windowed: bool = False) -> None:
        """Queues the writing of such rows, before the next step."""
        ...

    def landing(self, count: int) -> npt.NDArray[np.uint8]:
        """Memory that it can read, uint8 [count, bytes]: places for so many files of layers that see everything."""
        ...

    def write_landed(self, slots: Sequence[int], places: Sequence[int], skip: int = 0) -> None:
        """``write_slots`` of what files left in ``places``, but for their first ``skip`` tokens."""
        ...


@dataclass(slots=True, eq=False)
class _Restore:
    """A request that waits for blocks ``at`` … len(keys) - 1 of its prompt; ``reads`` are those of the next ones.

    Of windowed layers it needs what comes from token ``first`` on.
    """

    request: Request
    keys: list[bytes]
    at: int
    first: int
    reads: deque[Future[Block | None]] = field(default_factory=deque)
    began: float | None = None
    since: float = 0.0
    tokens: int = 0
    """That it has put into the pool."""

    @property
    def end(self) -> int:
        return len(self.keys) * BLOCK

    def files(self, block: int) -> tuple[bytes, ...]:
        """The keys of the files that it needs of a block."""
        key = self.keys[block]
        return (key, window_key(key)) if (block + 1) * BLOCK > self.first else (key,)


@dataclass(slots=True, eq=False)
class _Save:
    """An ended request's tokens, of which blocks from ``at`` on are still to be copied, of one kind of layers."""

    tokens: list[Token]
    keys: list[bytes]
    windowed: bool = False
    at: int = 0


@dataclass(frozen=True, slots=True)
class _Copied:
    """Blocks that were copied out of the pool, perhaps not yet: rows [len(keys) * BLOCK, …] of each array."""

    tokens: list[Token]
    keys: list[bytes]
    rows: Sequence[Array]


def open_tier(
    config: EngineConfig,
    info: ModelInfo,
    facts: Sequence[str],
    scheduler: Scheduler,
    device: Device,
    *,
    slot_bytes: int,
    chunk: int,
    canary: KVCanary | None = None,
    windows: WindowPages | None = None,
) -> DiskTier:
    """The tier that ``config`` asks for. ``facts``: what K and V hang on beside the model's and tokenizer's files;
    ``chunk``: the most prompt tokens of a step.

    Raises ConfigError if the directory or its size can't serve.
    """
    assert config.kv_disk is not None
    directory, most, block = Path(config.kv_disk).expanduser(), int(config.kv_disk_gb * 2**30), slot_bytes * BLOCK
    if BLOCK % info.page_size:
        raise ConfigError(f"needs pages that divide {BLOCK} tokens, not of {info.page_size} (--page-size)", "--kv-disk")
    if most < LEAST_BLOCKS * block:
        least = LEAST_BLOCKS * block / 2**30
        raise ConfigError(f"{BLOCK} tokens of this model take {block} bytes; at least {least:.3g}", "--kv-disk-gb")
    files = BlockFiles(directory, most)
    homes = [Path(info.weights_path), Path(info.tokenizer_path)]
    began = time.monotonic()
    try:
        digest = digest_of([home for home in homes if home.is_dir()], directory / "digests.json")
    except OSError as error:
        raise ConfigError(
            f"the model's files can't be read again to tell them from others ({error})", "--kv-disk"
        ) from error
    log.info("kv disk: model %s, read in %.1f s", digest[:12], time.monotonic() - began)
    if windows is not None:
        facts = [*facts, f"layers that see {windows.table.reach} apart"]
    blocks, root = WindowBlocks(windows) if windows is not None else None, root_key([digest, *facts])
    choice = RestoreChoice(config.kv_disk_restore == "always", chunk=chunk)
    return DiskTier(files, root, scheduler, device, block_bytes=block, canary=canary, windows=blocks, choice=choice)


class DiskTier:
    """The engine's way to ``files``. One thread calls it: ``turn`` between any two steps.

    ``root`` is the key of the empty prefix. ``block_bytes`` is what a block takes.
    """

    def __init__(
        self,
        files: BlockFiles,
        root: bytes,
        scheduler: Scheduler,
        device: Device,
        *,
        block_bytes: int,
        canary: KVCanary | None = None,
        windows: WindowBlocks | None = None,
        choice: RestoreChoice | None = None,
    ) -> None:
        self.choice = choice or RestoreChoice()
        self.hit_tokens = 0
        """Tokens that were read and put into the pool."""
        self._files = files
        self._root = root
        self._scheduler = scheduler
        self._device = device
        self._canary = canary
        self._windows = windows
        self._turn_blocks, self._most_writing = _blocks_of(block_bytes)
        self._restoring: dict[str, _Restore] = {}
        self._saves: deque[_Save] = deque()
        self._copied: list[_Copied] = []
        self._writes: deque[Future[None]] = deque()
        self._queued: set[bytes] = set()
        self._ready: list[Request] = []
        self._reads = BlockReads(files, device.landing(PLACES))
        self._writer = ThreadPoolExecutor(1, "kv-disk-write")
        self._paused = 0.0
        self._writer.submit(files.scan)

    @property
    def busy(self) -> bool:
        """Whether ``turn`` has anything to do."""
        return bool(self._restoring or self._ready or self._saves or self._copied)

    @property
    def num_restoring(self) -> int:
        """Requests that wait for the disk."""
        return len(self._restoring) + len(self._ready)

    def stats(self) -> dict[str, Any]:
        """Its fields of ``Stats``."""
        counts = self._files.counts
        restored, computed = self.choice.rates()
        return {
            "kv_disk_computed_prefixes": self.choice.computed_prefixes,
            "kv_disk_computed_tokens": self.choice.computed_tokens,
            "kv_disk_restore_rate": restored,
            "kv_disk_compute_rate": computed,
            "kv_disk_restoring": self.num_restoring,
            "kv_disk_hit_tokens": self.hit_tokens,
            "kv_disk_bytes": counts.bytes,
            "kv_disk_read_bytes": counts.read_bytes,
            "kv_disk_written_bytes": counts.written_bytes,
            "kv_disk_drops": dict(counts.drops),
        }

    def holds(self, id: str) -> bool:
        return id in self._restoring or any(r.id == id for r in self._ready)

    def begin(self, request: Request) -> bool:
        """Takes a request whose prompt goes on in files; ``turn`` gives it back.

        Raises RequestError if it can't be served.
        """
        tokens, holdings = request.tokens, self._scheduler.holdings
        count, known = holdings.reusable(request) // BLOCK, holdings.known(request)
        if known // BLOCK == count or time.monotonic() < self._paused:
            return False
        slots, keys = holdings.cached_slots(tokens, count * BLOCK), block_keys(self._root, tokens, count)
        begin = len(slots) // BLOCK
        self._cut(keys, slots, begin)
        if len(keys) * BLOCK <= known:
            return False
        end = self.choice.end(known, len(keys) * BLOCK)
        if end <= known:
            return False
        tried = keys[: end // BLOCK]
        self._cut(tried, slots, begin)
        keys = tried if len(tried) * BLOCK > known else keys  # windows may be nowhere but at its end
        restore = _Restore(request, keys, begin, len(keys) * BLOCK)
        if self._windows is not None:
            restore.at, restore.first = self._windows.ready(slots, restore.end), self._windows.first(restore.end)
        self._scheduler.check(request)
        self._restoring[request.id] = restore
        return True

    def _cut(self, keys: list[bytes], slots: array[int], begin: int) -> None:
        """Leaves the blocks that can be restored, where those before ``begin`` are in memory."""
        if self._windows is not None:
            del keys[self._windows.end(keys, slots[: len(keys) * BLOCK], self._files.has) :]
            return
        while begin < len(keys) and self._files.has(keys[begin]):
            begin += 1
        del keys[begin:]

    def abort(self, id: str) -> Request | None:
        """Gives a request up; None if it isn't here."""
        restore = self._restoring.pop(id, None)
        if restore is not None:
            return restore.request
        found = next((r for r in self._ready if r.id == id), None)
        if found is not None:
            self._ready.remove(found)
        return found

    def offer(self, tokens: Sequence[Token]) -> None:
        """A request has ended: what the tree has of its tokens is worth keeping."""
        count = len(tokens) // BLOCK
        if not count or self._files.refuses:
            return
        save = _Save([*tokens[: count * BLOCK]], block_keys(self._root, tokens, count))
        if self._windows is not None:  # first what goes first
            self._saves.append(_Save(save.tokens, [*map(window_key, save.keys)], windowed=True))
        self._saves.append(save)
        while len(self._saves) > (_JOBS if self._windows is None else 2 * _JOBS):
            self._give_up(self._saves.popleft(), "behind")

    def discard(self, tokens: Sequence[Token]) -> None:
        """What is kept of these tokens may be what gave numbers that are not finite: it goes."""
        keys = block_keys(self._root, tokens, len(tokens) // BLOCK)
        if self._windows is not None:
            keys += map(window_key, keys)
        self._writer.submit(self._files.remove, keys, "not_finite")

    def turn(self) -> list[Request]:
        """Moves what can be moved without waiting; returns requests that have all that they will get.

        May raise whatever the device does; ``reset`` is to follow then.
        """
        self._write_copied()
        self._restore()
        self._copy()
        ready, self._ready = self._ready, []
        return ready

    def wait(self, seconds: float) -> None:
        """Waits until a turn has something to do."""
        pending = [r.reads[0] for r in self._restoring.values() if r.reads]
        if self._saves and self._is_behind():
            pending.append(self._writes[0])  # type: ignore[arg-type]
        if pending:
            wait(pending, seconds, FIRST_COMPLETED)
        elif self._restoring and not self._ready:
            time.sleep(seconds)  # for a place

    def reset(self) -> None:
        """The pool has been emptied, and nothing of it is to be trusted: requests go on without what they wait for."""
        self._ready += [restore.request for restore in self._restoring.values()]
        self._restoring.clear()
        self._saves.clear()
        for copied in self._copied:
            self._queued.difference_update(copied.keys)
        self._copied.clear()

    def close(self) -> None:
        """Writes what has been copied."""
        self._write_copied()
        self._reads.close()
        self._writer.shutdown()

    # --- from the disk ---

    def _restore(self) -> None:
        """Puts blocks that have been read into the pool, for the requests that came first."""
        left = self._turn_blocks
        for restore in [*self._restoring.values()][:_RESTORING]:
            self._read_ahead(restore)
            taken, goes_on = self._take(restore, left)
            left -= taken
            if not goes_on:
                del self._restoring[restore.request.id]
                if restore.began is not None:
                    self.choice.restored(restore.tokens, time.monotonic() - restore.began)
                self._writer.submit(self._files.touch, [k for i in range(restore.at) for k in restore.files(i)])
                self._ready.append(restore.request)

    def _read_ahead(self, restore: _Restore) -> None:
        """Goes on after what others have put into the tree meanwhile, and reads on."""
        slots = self._scheduler.holdings.cached_slots(restore.request.tokens, restore.end)
        known = len(slots) // BLOCK if self._windows is None else self._windows.ready(slots, restore.end)
        if restore.began is None or restore.at < known:
            restore.since = time.monotonic()
            restore.began = restore.began or restore.since
        while restore.at < known:
            restore.at += 1
            if restore.reads:
                restore.reads.popleft()
        tokens = restore.request.tokens
        for at in range(restore.at + len(restore.reads), min(restore.at + _AHEAD, len(restore.keys))):
            read = self._reads.ask(restore.files(at), tokens[at * BLOCK : (at + 1) * BLOCK])
            if read is None:
                break
            restore.reads.append(read)

    def _take(self, restore: _Restore, most: int) -> tuple[int, bool]:
        """Up to ``most`` blocks into the pool: how many, and whether there are more to wait for."""
        blocks: list[Block] = []
        goes_on = restore.at < len(restore.keys)
        while goes_on and restore.reads and restore.reads[0].done() and len(blocks) < most:
            block = restore.reads.popleft().result()
            goes_on = block is not None
            blocks += [block] if block is not None else []
        if blocks:
            restore.since = time.monotonic()
            goes_on = self._put(restore, blocks) and goes_on and restore.at < len(restore.keys)
        elif (
            goes_on and not (restore.reads and restore.reads[0].done()) and time.monotonic() - restore.since > PATIENCE
        ):
            log.warning("kv disk: a block was not read within %.0f s; nothing is read for a minute", PATIENCE)
            self._paused, goes_on = time.monotonic() + _PAUSE, False
        return len(blocks), goes_on

    def _put(self, restore: _Restore, blocks: list[Block]) -> bool:
        """Writes blocks into slots of the tree; False if there is no room, or what comes before has gone."""
        tokens, begin = restore.request.tokens, restore.at * BLOCK
        end = begin + len(blocks) * BLOCK
        known = len(self._scheduler.holdings.cached_slots(tokens, end))
        slots = self._scheduler.holdings.adopt(tokens, begin, end)
        if slots is None:
            self._files.drop("no_room")
            return False
        if known < end:
            places = [block.place.index for block in blocks]
            self._device.write_landed(slots[known:], places, known - begin)
            if self._canary is not None:
                self._canary.restored(tokens, known, slots[known:])
        if self._windows is not None and not self._put_windows(self._windows, restore, blocks, slots):
            self._files.drop("no_room")
            return False
        self.hit_tokens += end - known
        restore.tokens += end - known
        restore.at += len(blocks)
        return True

    def _put_windows(self, windows: WindowBlocks, restore: _Restore, blocks: list[Block], slots: array[int]) -> bool:
        """Writes what windowed layers need of blocks, whose tokens end with ``slots``; False if there is no room."""
        last = [block.windowed for block in blocks if block.windowed is not None]
        begin = max(restore.first, len(slots) - len(last) * BLOCK)
        if begin >= len(slots):
            return True
        rows = [np.concatenate(parts)[begin - len(slots) :] for parts in zip(*last, strict=True)]
        found = windows.restore(slots[begin:], rows)
        if found is None:
            return False
        places, rows = found
        if places:
            self._device.write_slots([*places.values()], rows, windowed=True)
            if self._canary is not None:
                at = {begin + i: slot for i, slot in places.items()}
                self._canary.restored(restore.request.tokens, len(slots), (), at)
        return True

    # --- to the disk ---

    def _is_behind(self) -> bool:
        while self._writes and self._writes[0].done():
            self._writes.popleft()
        return len(self._writes) >= self._most_writing

    def _copy(self) -> None:
        """Copies the next blocks of an ended request out of the pool, if the writer keeps up."""
        while self._saves and not self._is_behind():
            save = self._saves[0]
            lacks = self._lacking(save)
            while save.at < len(save.keys) and (save.at in lacks or self._is_written(save.keys[save.at])):
                save.at += 1
            stop = save.at
            while (
                stop < min(len(save.keys), save.at + self._turn_blocks)
                and stop not in lacks
                and not self._is_written(save.keys[stop])
            ):
                stop += 1
            slots = self._scheduler.holdings.cached_slots(save.tokens, stop * BLOCK)
            stop = min(stop, len(slots) // BLOCK)
            if stop <= save.at:
                self._give_up(self._saves.popleft(), "evicted_first")
                continue
            rows = self._read_slots(slots[save.at * BLOCK : stop * BLOCK], save.windowed)
            tokens = save.tokens[save.at * BLOCK : stop * BLOCK]
            self._copied.append(_Copied(tokens, save.keys[save.at : stop], rows))
            self._queued.update(save.keys[save.at : stop])
            save.at = stop
            return

    def _lacking(self, save: _Save) -> set[int]:
        """Blocks that are nowhere in windowed layers any more, if those are what is to be copied."""
        if self._windows is None or not save.windowed:
            return set()
        here = self._windows.open(self._scheduler.holdings.cached_slots(save.tokens, len(save.tokens)))
        return {i for i in range(len(save.keys)) if i >= len(here) or not here[i]}

    def _read_slots(self, slots: array[int], windowed: bool) -> Sequence[Array]:
        if self._windows is None or not windowed:
            return self._device.read_slots(slots)
        return self._device.read_slots(self._windows.slots(slots), windowed=True)

    def _is_written(self, key: bytes) -> bool:
        """Whether it is there, or will be."""
        return key in self._queued or self._files.known(key)

    def _write(self, key: bytes, tokens: list[Token], rows: list[Rows]) -> None:
        """Runs in the writer's thread."""
        try:
            self._files.write(key, tokens, rows)
        finally:
            self._queued.discard(key)

    def _give_up(self, save: _Save, why: str) -> None:
        """What is left of it stays unwritten; what has been written is in use."""
        for _ in save.keys[save.at :]:
            self._files.drop(why)
        self._writer.submit(self._files.touch, save.keys[: save.at])

    def _write_copied(self) -> None:
        """Hands what was copied behind the last step to the writer: that step has been read, so it waits for little."""
        for copied in self._copied:
            arrays = [np.asarray(rows) for rows in copied.rows]
            for i, key in enumerate(copied.keys):
                tokens = copied.tokens[i * BLOCK : (i + 1) * BLOCK]
                part = [a[i * BLOCK : (i + 1) * BLOCK] for a in arrays]
                self._writes.append(self._writer.submit(self._write, key, tokens, part))
        self._copied.clear()
