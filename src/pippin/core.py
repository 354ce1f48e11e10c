"""The engine's core: schedule a step, queue it, finish the one before.

One thread owns it: MLX's arrays belong to the thread that built them. ``worker`` drives it, in a child process or
in a thread; nothing below calls upward.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from pippin.backend import prepare

prepare()  # before any import of MLX: it is what makes that work, and fast

import msgspec

from pippin.bounds import OUT_OF_MEMORY, kind_of, unqueued
from pippin.cache.canary import KVCanary
from pippin.constrained import GrammarRequests
from pippin.errors import ModelError, RequestError
from pippin.flight import Flight, ModelRunner
from pippin.grammar.compiler import GrammarCompiler
from pippin.kvdisk import DiskTier
from pippin.memory import memory_in_use
from pippin.messages import (
    AdaptersChanged,
    LoadAdapter,
    ModelInfo,
    Output,
    StartProfile,
    Stats,
    StepOutput,
    StopProfile,
    Submit,
    UnloadAdapter,
    output_of,
)
from pippin.models.lora import Adapter, Adapters
from pippin.profile.engine import Tell, open_profile
from pippin.profile.steps import StepProfile, TimedRunner
from pippin.scheduler import Scheduler
from pippin.types import Batch, Finish, Pooling, Request, RowResult, SamplingParams, Token, failed
from pippin.watermarks import MemoryWatch

log = logging.getLogger(__name__)


COMPILE_WAIT = 0.005
"""Seconds that a step with nothing to do waits for a grammar: how late a command may be obeyed meanwhile."""


class EngineCore:
    """Requests in, a StepOutput a step out.

    With ``overlap``, step n+1 is scheduled and built before step n is read, whoever joins, leaves or finishes. Where a
    request has a grammar, the step's draws are built after that, while the device runs the rest of the step: its mask
    hangs on the token that step n drew. ``grammars`` is None where requests with grammars are refused. ``traces``
    counts steps that were compiled since the start, ``replays`` those that were launched as recorded.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        info: ModelInfo,
        *,
        overlap: bool = True,
        grammars: GrammarCompiler | None = None,
        traces: Callable[[], int] = lambda: 0,
        replays: Callable[[], int] = lambda: 0,
        canary: KVCanary | None = None,
        memory: MemoryWatch | None = None,
        disk: DiskTier | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        self.info = info
        self._memory = memory
        self._traces = traces
        self._replays = replays
        self._canary = canary
        self._disk = disk
        self._adapters = adapters
        self._scheduler = scheduler
        self._runner = runner
        self._overlap = self._may_overlap = overlap
        self._eos = frozenset(info.eos_token_ids)
        self._grammars = GrammarRequests(grammars, scheduler)
        self._in_flight: Flight | None = None
        self._profile: StepProfile | None = None
        self._notices: list[Output] = []
        self._note: Callable[[Sequence[str]], None] = lambda ids: None
        self._steps = 0
        self._overlapped = 0
        self._seconds = 0.0

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do or to say."""
        busy = self._in_flight is not None or bool(self._notices) or bool(self._grammars)
        return busy or self._scheduler.has_work or (self._disk is not None and self._disk.busy)

    @property
    def stats(self) -> Stats:
        now, peak = memory_in_use()
        stats = self._scheduler.stats(
            steps=self._steps,
            overlapped_steps=self._overlapped,
            step_seconds=self._seconds,
            graph_traces=self._traces(),
            graph_replays=self._replays(),
        )
        wrong = self._canary.num_mismatches if self._canary is not None else 0
        more = {} if self._disk is None else self._disk.stats()
        watch = self._memory
        return msgspec.structs.replace(
            stats,
            memory_bytes=now,
            memory_peak_bytes=peak,
            memory_process_bytes=watch.latest.held if watch is not None else 0,
            memory_level=watch.level if watch is not None else "ok",
            kv_canary_mismatches=wrong,
            **more,
        )

    def add(self, submit: Submit) -> None:
        """Queues a request. Raises RequestError if its tokens can't be served."""
        if not submit.tokens:
            raise RequestError("the prompt is empty; it needs at least one token", "prompt")
        worst = max(submit.tokens) if min(submit.tokens) >= 0 else min(submit.tokens)
        if not 0 <= worst < self.info.vocab_size:
            raise RequestError(f"token id {worst} is not in the vocabulary (0 to {self.info.vocab_size - 1})", "prompt")
        if self._disk is not None and self._disk.holds(submit.id):
            raise RequestError(f"a request with id {submit.id!r} is running already", "rid")
        request = Request(
            id=submit.id,
            tokens=list(submit.tokens),
            num_prompt=submit.num_prompt,
            params=submit.params,
            priority=submit.priority,
            arrival=time.monotonic(),
            eos=self._eos,
            pooling=submit.pooling,
            adapter=self._adapter_of(submit.params),
        )
        self._check_pooling(request.pooling)
        if request.params.grammar is None:
            self._begin(request)
        else:
            self._grammars.submit(request)

    def _adapter_of(self, params: SamplingParams) -> Adapter | None:
        if params.lora_path is None:
            return None
        if self._adapters is None:
            raise RequestError("LoRA adapters run on MLX only; leave --device torch out", "lora_path")
        return self._adapters.find(params.lora_path)

    def change_adapters(self, command: LoadAdapter | UnloadAdapter) -> AdaptersChanged:
        """Loads or forgets a LoRA adapter; the requests that run go on as they are."""
        if self._adapters is None:
            return AdaptersChanged(command.id, {}, "LoRA adapters run on MLX only; leave --device torch out")
        error, field, status = "", None, 400
        try:
            if isinstance(command, LoadAdapter):
                self._adapters.load(command.name, command.path)
            else:
                self._adapters.unload(command.name)
        except RequestError as refused:
            error, field, status = refused.message, "lora_name", refused.status
        except ModelError as refused:
            error, field = str(refused), "lora_path"
        return AdaptersChanged(command.id, dict(self._adapters.paths), error, field, status)

    def _check_pooling(self, pooling: Pooling | None) -> None:
        if pooling is None:
            if self.info.is_embedding:
                raise RequestError("this model makes vectors of texts, and generates none; see /v1/embeddings", "model")
            return
        if not self.info.pooling:
            raise RequestError("vectors of prompts are computed on MLX only; leave --device torch out")
        if any(not 0 <= t < self.info.vocab_size for t in pooling.labels):
            raise RequestError(f"label token ids must be between 0 and {self.info.vocab_size - 1}", "label_token_ids")

    def _begin(self, request: Request) -> None:
        """Hands a request to the scheduler. Raises RequestError if it can't be served."""
        if request.matcher is not None and request.matcher.ended:  # a resumed stream that had reached its end
            request.finish = Finish("stop")
        elif self._disk is not None and request.adapter is None and self._disk.begin(request):
            return
        else:
            self._scheduler.add(request)
        if request.finish is not None:
            self._notices.append(output_of(request))

    def _begin_compiled(self) -> None:
        """Hands on requests whose grammars are ready, each or the reason why not."""
        for request in self._grammars.compiled():
            try:
                if request.finish is None:
                    self._begin(request)
                    continue
            except RequestError as error:
                request.finish = failed(error)
            except Exception as error:
                log.exception("request %s could not be queued", request.id)
                request.finish = unqueued(error)
            self._notices.append(output_of(request))

    def _move(self, disk: DiskTier) -> None:
        """Moves K and V between the pool and the disk, and queues requests that have got theirs."""
        try:
            ready = disk.turn()
        except Exception as error:
            log.exception("K and V could not be moved between the pool and the disk")
            kind = kind_of(error)
        else:
            for request in ready:
                try:
                    self._scheduler.add(request)
                except RequestError as error:
                    request.finish = failed(error)
                if request.finish is not None:
                    self._notices.append(output_of(request))
            return
        self._drop(Batch(()), kind, self._notices)

    def _keep(self, request: Request) -> None:
        """What an ended request has computed is offered to the disk."""
        if request.adapter is not None:  # the files are of the model as it is
            return
        if self._disk is not None and request.finish is not None and request.finish.reason != "error":
            self._disk.offer(request.tokens)

    def close(self) -> None:
        """Ends threads. What has been copied for the disk is written. Raises nothing."""
        self._grammars.close()
        if self._disk is not None:
            try:
                self._disk.close()
            except Exception:
                log.exception("what waited for the disk could not be written")

    def abort(self, id: str) -> None:
        """Ends a request now; the next step reports it. Its slots are free at once. Unknown ids are ignored."""
        request = self._grammars.abort(id)
        if request is None and self._disk is not None:
            request = self._disk.abort(id)
        if request is None and (request := self._scheduler.abort(id)) is not None:
            self._keep(request)
        if request is not None:
            request.finish = Finish("abort")
            self._notices.append(output_of(request))

    def flush(self) -> None:
        """Empties the prefix cache, and gives back memory that nobody uses. Raises RequestError while requests run.

        A step still in flight for requests that have ended is no obstacle: whatever takes its slots runs after it.
        """
        if self._scheduler.has_work or (self._disk is not None and self._disk.num_restoring):
            raise RequestError(
                "the cache can't be flushed while requests run; try again when they are done", status=409
            )
        self._scheduler.flush()
        if self._memory is not None:
            self._memory.shrink()

    def profile(self, command: StartProfile | StopProfile, tell: Tell) -> None:
        """Begins to record steps, or ends it; ``tell`` hears the answer, and spans as they come.

        A step in flight is read first, and what it drew is told by the next ``step``.
        """
        self._settle()
        if isinstance(command, StopProfile):
            if self._profile is not None:
                self._profile.end()
            return
        running, device = self._profile is not None, self.info.device
        profile = open_profile(command, tell, device=device, running=running, steps=self._steps, on_end=self._unprofile)
        if profile is not None:
            self._profile, self._runner = profile, TimedRunner(self._runner, profile)
            self._overlap = self._may_overlap and not profile.alone

    def watch(self, note: Callable[[Sequence[str]], None]) -> None:
        """From here on ``note`` is told the ids of each step's requests before it is queued."""
        self._note = note

    def _unprofile(self) -> None:
        if isinstance(self._runner, TimedRunner):
            self._runner = self._runner.leave()
        self._profile, self._overlap = None, self._may_overlap

    def _settle(self) -> None:
        """Reads the step in flight now."""
        flight, self._in_flight = self._in_flight, None
        if flight is not None:
            self._finish(flight, self._notices)

    def step(self) -> StepOutput | None:
        """One turn: queue the next step, finish the one before. None if there was nothing to do or to say.

        A step that fails is done again request by request; who fails alone ends, with a Finish. Raises if the device
        is lost.
        """
        began = time.perf_counter()
        if self._grammars:
            self._begin_compiled()
        if self._disk is not None and self._disk.busy:
            self._move(self._disk)
        if self._scheduler.has_suspects:
            self._settle()
        overlap = self._overlap and not self._scheduler.has_suspects
        outputs, self._notices = self._notices, []
        if self._memory is not None and self._memory.look():
            self._scheduler.planner.held = self._memory.level != "ok"
            if self._memory.level == "hard":
                self._scheduler.shed()
        batch = self._scheduler.schedule()
        self._note_mending(outputs)
        if self._profile is not None:
            self._profile.scheduled(began, batch)
        if self._canary is not None and batch is not None:
            batch = self._check(self._canary, batch, outputs)
        launched = self._launch(batch, outputs) if batch is not None else None
        if overlap:
            previous, self._in_flight = self._in_flight, launched
            self._overlapped += previous is not None and launched is not None
            if previous is not None:
                self._finish(previous, outputs)
            if self._in_flight is not None and self._draw(self._in_flight, outputs):
                self._grammars.look_ahead(self._in_flight.batch.works, self._in_flight.drawn)
        else:
            previous, self._in_flight = launched, launched
            if launched is not None and self._draw(launched, outputs):
                self._in_flight = None
                self._finish(launched, outputs)
        if batch is None and previous is None and not outputs:
            if self._grammars:
                self._grammars.wait(COMPILE_WAIT)
            elif self._disk is not None:
                self._disk.wait(COMPILE_WAIT)
            return None
        self._seconds += time.perf_counter() - began
        return StepOutput(outputs, self.stats)

    def _check(self, canary: KVCanary, batch: Batch, outputs: list[Output]) -> Batch | None:
        """The batch, if all that it reads is what it should be.

        Otherwise it is not launched: whose slots are wrong ends, and all others start over with an empty cache, since
        nobody knows which slots can be trusted.
        """
        faulty: dict[Request, Finish] = {}
        for mismatch in canary.check(batch):
            log.error("kv canary: %s", mismatch)
            faulty[mismatch.request] = Finish("error", None, f"the KV cache is not what it should be: {mismatch}")
        if not faulty:
            return batch
        self._forget_slots()
        self._scheduler.start_over(batch, faulty)
        outputs += map(output_of, faulty)
        return None

    def _launch(self, batch: Batch, outputs: list[Output]) -> Flight | None:
        self._steps += 1
        self._note([work.request.id for work in batch.works])
        if self._disk is not None:
            self._disk.choice.launched(batch, self._traces())
        try:
            return self._runner.launch(batch)
        except Exception as error:
            log.exception("a step of %d requests could not be queued", len(batch.works))
            kind = kind_of(error)
        self._drop(batch, kind, outputs)
        return None

    def _finish(self, flight: Flight, outputs: list[Output]) -> None:
        try:
            results = flight.read()
        except Exception as error:
            log.exception("a step of %d requests failed", len(flight.batch.works))
            kind = kind_of(error)
        else:
            if self._disk is not None:
                self._disk.choice.finished(flight.batch, self._traces())
            profile = self._profile
            outputs += (
                self._outputs(flight.batch, results)
                if profile is None
                else profile.finishing(self._outputs, flight.batch, results)
            )
            return
        self._drop(flight.batch, kind, outputs)

    def _draw(self, flight: Flight, outputs: list[Output]) -> bool:
        """Queues the draws of a step that waits for masks; False if that failed, and the step with it."""
        waiting = [w for w in flight.batch.works if w.samples and w.request.matcher is not None]
        if not waiting:
            return True
        try:
            for work in waiting:
                self._force(work.request, outputs)
            flight.draw(lambda works: self._grammars.masks(works, outputs))
            return True
        except Exception as error:
            log.exception("the draws of a step of %d requests could not be queued", len(flight.batch.works))
            kind = kind_of(error)
        self._drop(flight.batch, kind, outputs)
        return False

    def _force(self, request: Request, outputs: list[Output]) -> None:
        forced = self._grammars.force(request)
        if forced is not None:
            self._keep(request)
            outputs.append(forced)

    def _outputs(self, batch: Batch, results: Sequence[RowResult]) -> list[Output]:
        """What the step added to each request that is still wanted."""
        drawn: dict[Request, tuple[Token, RowResult]] = {}
        for work, result in zip(batch.works, results, strict=True):
            request, token = work.request, result.token if work.samples and result.finite else None
            if request.matcher is None or token is None:
                continue
            if request.finish is None and work.end == len(request.tokens):
                drawn[request] = token, result
        if drawn:
            ends = self._grammars.follow_all([(request, token) for request, (token, _) in drawn.items()])
            for request, finish in ends.items():
                drawn[request][1].finish = finish
        found = []
        for update in self._scheduler.finish(batch, results):
            request, result = update.request, update.result
            self._keep(request)
            found.append(
                output_of(
                    request,
                    (result.token,) if result.token is not None else (),
                    result.logprob,
                    result.prompt_logprobs,
                    vector_of(request),
                )
            )
        for request in self._scheduler.distrusted():
            if self._disk is not None and request.adapter is None:
                self._disk.discard(request.tokens)
        self._note_mending(found)
        return found

    def _note_mending(self, outputs: list[Output]) -> None:
        """What the scheduler had to mend: who ended with it is told, and nobody else knows of slots any more."""
        ended = self._scheduler.mended()
        if ended is None:
            return
        outputs += map(output_of, ended)
        self._forget_slots()

    def _forget_slots(self) -> None:
        if self._canary is not None:
            self._canary.reset()
        if self._disk is not None:
            self._disk.reset()

    def _drop(self, batch: Batch, kind: str, outputs: list[Output]) -> None:
        """Takes back a step that failed, and the one in flight: their requests run again one by one, from nothing.

        After one that found no memory they run in smaller steps. One that fails alone is failed. Raises what ``reset``
        does, if the device is lost. Not to be called while the error is handled: its traceback keeps the pool alive
        that ``reset`` replaces.
        """
        parts = [batch] if self._in_flight is None else [batch, self._in_flight.batch]
        self._in_flight = None  # it holds the pool that ``reset`` replaces
        short = kind == OUT_OF_MEMORY
        finish = Finish("error", None, f"the engine failed on this request ({kind})", status=503 if short else 500)
        guilty = self._scheduler.drop(parts, finish, short)
        if guilty is not None:
            outputs.append(output_of(guilty))
        self._runner.reset()
        if short and self._memory is not None:
            self._memory.shrink()
        self._forget_slots()


def vector_of(request: Request) -> bytes:
    """What a request with ``pooling`` asked for, as ``Output.pooled`` has it."""
    if request.pooling is None or request.pooled is None:
        return b""
    mean = request.pooling.kind == "mean"
    return (request.pooled / request.num_prompt if mean else request.pooled).astype("<f4").tobytes()
