"""The engine's core: schedule a step, queue it, finish the one before.

One thread owns it: MLX's arrays belong to the thread that built them. ``worker`` drives it, in a child process or
in a thread; nothing below calls upward.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

from pippin.backend import prepare

prepare()  # before any import of MLX: it is what makes that work, and fast

import mlx.nn as nn
import mlx_lm
import msgspec
import numpy as np
import numpy.typing as npt

import pippin
from pippin import kernels
from pippin.cache.canary import KVCanary
from pippin.cache.layout import bytes_per_slot
from pippin.cache.radix import RadixCache
from pippin.cache.slots import SlotAllocator
from pippin.cache.snapshots import NONE, Snapshots
from pippin.claims import claims_folder, share
from pippin.config import EngineConfig
from pippin.errors import ConfigError, ModelError, RequestError
from pippin.grammar.compiler import GrammarCompiler, compiler_of
from pippin.grammar.matcher import GrammarMatcher
from pippin.kvdisk import DiskTier, open_tier
from pippin.memory import (
    Limits,
    MemoryPlan,
    device_bytes,
    limit_buffers,
    limit_rows,
    limits,
    memory_in_use,
    memory_key,
    on_gpu,
    plan_memory,
    set_wired_limit,
    use_device,
    watch_memory,
)
from pippin.models.load import LoadedModel, load_mlx_model
from pippin.models.lora import Adapter, Adapters
from pippin.models.vocabulary import Vocabulary, read_vocabulary
from pippin.probe import Choice, choose_attention, measure_activations
from pippin.profile.engine import Tell, open_profile
from pippin.profile.steps import StepProfile, TimedRunner
from pippin.runner import Flight, MlxModelRunner, ModelRunner
from pippin.scheduler import Scheduler
from pippin.torch import require_torch
from pippin.types import (
    AdaptersChanged,
    Batch,
    Finish,
    LoadAdapter,
    ModelInfo,
    Output,
    Pooling,
    Progress,
    Request,
    RowResult,
    SamplingParams,
    StartProfile,
    Stats,
    StepOutput,
    StopProfile,
    Submit,
    UnloadAdapter,
    Work,
)
from pippin.watermarks import MemoryWatch

log = logging.getLogger(__name__)


COMPILE_WAIT = 0.005
"""Seconds that a step with nothing to do waits for a grammar: how late a command may be obeyed meanwhile."""


LEAST_FORCED = 2
"""How many tokens must be forced at once to be appended. Fewer are drawn, from masks that leave nothing else: rows of
several new tokens cost a step more than they save."""


class EngineCore:
    """Requests in, a StepOutput a step out.

    With ``overlap``, step n+1 is scheduled and built before step n is read, whoever joins, leaves or finishes. Where a
    request has a grammar, the step's draws are built after that, while the device runs the rest of the step: its mask
    hangs on the token that step n drew. ``grammars`` is None where requests with grammars are refused. ``traces``
    counts steps that were compiled since the start.
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
        canary: KVCanary | None = None,
        memory: MemoryWatch | None = None,
        disk: DiskTier | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        self.info = info
        self._memory = memory
        self._traces = traces
        self._canary = canary
        self._disk = disk
        self._adapters = adapters
        self._scheduler = scheduler
        self._runner = runner
        self._overlap = self._may_overlap = overlap
        self._eos = frozenset(info.eos_token_ids)
        self._grammars = grammars
        self._compiling: dict[str, tuple[Request, Future[GrammarMatcher]]] = {}
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
        busy = self._in_flight is not None or bool(self._notices) or bool(self._compiling)
        return busy or self._scheduler.has_work or (self._disk is not None and self._disk.busy)

    @property
    def stats(self) -> Stats:
        now, peak = memory_in_use()
        stats = self._scheduler.stats(
            steps=self._steps,
            overlapped_steps=self._overlapped,
            step_seconds=self._seconds,
            graph_traces=self._traces(),
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
        grammar = request.params.grammar
        if grammar is None:
            self._begin(request)
        elif self._grammars is None:
            raise RequestError(f"{grammar.field}: grammars are switched off (--grammar-backend)", grammar.field)
        elif request.id in self._compiling:
            raise RequestError(f"a request with id {request.id!r} is running already", "rid")
        else:
            generated = request.tokens[request.num_prompt :]
            future = self._grammars.submit(grammar, generated, request.params.ignore_eos)
            self._compiling[request.id] = request, future

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
            self._notices.append(Output(request.id, finish=request.finish))

    def _begin_compiled(self) -> None:
        """Hands on requests whose grammars are ready, each or the reason why not."""
        for request, future in [*self._compiling.values()]:
            if not future.done():
                continue
            del self._compiling[request.id]
            try:
                request.matcher = future.result()
                self._begin(request)
            except RequestError as error:
                self._notices.append(Output(request.id, finish=failed(error)))
            except Exception as error:
                log.exception("the grammar of request %s could not be compiled", request.id)
                message = f"the grammar could not be compiled ({type(error).__name__})"
                self._notices.append(Output(request.id, finish=Finish("error", None, message)))

    def _move(self, disk: DiskTier) -> None:
        """Moves K and V between the pool and the disk, and queues requests that have got theirs."""
        try:
            ready = disk.turn()
        except Exception as error:
            log.exception("K and V could not be moved between the pool and the disk")
            kind = type(error).__name__
        else:
            for request in ready:
                try:
                    self._scheduler.add(request)
                except RequestError as error:
                    request.finish = failed(error)
                if request.finish is not None:
                    self._notices.append(Output(request.id, finish=request.finish))
            return
        self._drop(Batch(()), kind, self._notices)

    def _keep(self, request: Request) -> None:
        """What an ended request has computed is offered to the disk."""
        if request.adapter is not None:  # the files are of the model as it is
            return
        if self._disk is not None and request.finish is not None and request.finish.reason != "error":
            self._disk.offer(request.tokens)

    def close(self) -> None:
        """Ends threads. What waits to be written to the disk is."""
        if self._disk is not None:
            self._disk.close()

    def abort(self, id: str) -> None:
        """Ends a request now; the next step reports it. Its slots are free at once. Unknown ids are ignored."""
        compiling = self._compiling.pop(id, None)
        request = compiling[0] if compiling is not None else self._disk.abort(id) if self._disk is not None else None
        if request is None and (request := self._scheduler.abort(id)) is not None:
            self._keep(request)
        if request is not None:
            ended = Output(id, [], [], [], request.num_cached, Finish("abort"), request.miss, request.waited)
            self._notices.append(ended)

    def flush(self) -> None:
        """Empties the prefix cache. Raises RequestError while requests run.

        A step still in flight for requests that have ended is no obstacle: whatever takes its slots runs after it.
        """
        if self._scheduler.has_work or (self._disk is not None and self._disk.num_restoring):
            raise RequestError(
                "the cache can't be flushed while requests run; try again when they are done", status=409
            )
        self._scheduler.flush()

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
        if self._compiling:
            self._begin_compiled()
        if self._disk is not None and self._disk.busy:
            self._move(self._disk)
        if self._scheduler.has_suspects:
            self._settle()
        overlap = self._overlap and not self._scheduler.has_suspects
        outputs, self._notices = self._notices, []
        if self._memory is not None and self._memory.look():
            self._scheduler.held = self._memory.level != "ok"
            if self._memory.level == "hard":
                self._scheduler.shed()
        batch = self._scheduler.schedule()
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
            if self._in_flight is not None:
                self._draw(self._in_flight, outputs)
        else:
            previous, self._in_flight = launched, launched
            if launched is not None and self._draw(launched, outputs):
                self._in_flight = None
                self._finish(launched, outputs)
        if batch is None and previous is None and not outputs:
            if self._compiling:
                wait([future for _, future in self._compiling.values()], COMPILE_WAIT, FIRST_COMPLETED)
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
        canary.reset()
        if self._disk is not None:
            self._disk.reset()
        self._scheduler.start_over(batch, faulty)
        outputs += [Output(r.id, num_cached=r.num_cached, finish=r.finish, miss=r.miss) for r in faulty]
        return None

    def _launch(self, batch: Batch, outputs: list[Output]) -> Flight | None:
        self._steps += 1
        self._note([work.request.id for work in batch.works])
        try:
            return self._runner.launch(batch)
        except Exception as error:
            log.exception("a step of %d requests could not be queued", len(batch.works))
            kind = type(error).__name__
        self._drop(batch, kind, outputs)
        return None

    def _finish(self, flight: Flight, outputs: list[Output]) -> None:
        try:
            results = flight.read()
        except Exception as error:
            log.exception("a step of %d requests failed", len(flight.batch.works))
            kind = type(error).__name__
        else:
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
            flight.draw(lambda works: self._masks(works, outputs))
            return True
        except Exception as error:
            log.exception("the draws of a step of %d requests could not be queued", len(flight.batch.works))
            kind = type(error).__name__
        self._drop(flight.batch, kind, outputs)
        return False

    def _force(self, request: Request, outputs: list[Output]) -> None:
        """Appends what the request's grammar leaves no choice of: the step's draw is ignored, the next computes on.

        With logprobs such tokens are drawn one by one, from masks that allow nothing else: each needs its logits.
        """
        matcher = request.matcher
        params = request.params
        if matcher is None or request.finish is not None or params.logprobs or params.prompt_logprobs:
            return
        tokens = matcher.forced()
        if len(tokens) < LEAST_FORCED:
            return
        finish = self._follow(request, tokens)
        if finish is not None and finish.reason == "error":
            self._scheduler.fail(request, finish)
            tokens = []
        elif tokens:
            tokens = self._scheduler.force(request, tokens, finish)
            self._keep(request)
        if tokens or request.finish is not None:
            outputs.append(Output(request.id, tokens, num_cached=request.num_cached, finish=request.finish))

    def _follow(self, request: Request, tokens: Sequence[int]) -> Finish | None:
        """Takes a request's next tokens into its grammar; returns how it ends, if it does."""
        matcher = request.matcher
        if matcher is None:
            return None
        try:
            for token in tokens:
                matcher.take(token)
        except RequestError as error:
            return failed(error)
        except Exception as error:
            log.exception("the grammar of request %s failed", request.id)
            return Finish("error", None, f"the grammar of this request failed ({type(error).__name__})")
        return Finish("stop") if matcher.ended else None

    def _masks(self, works: Sequence[Work], outputs: list[Output]) -> Callable[[], npt.NDArray[np.uint32]]:
        """What each work may draw, in a while. A request whose grammar can't go on fails then, alone."""
        assert self._grammars is not None
        made = self._grammars.fill(works)

        def masks() -> npt.NDArray[np.uint32]:
            bits, failures = made.result()
            for row, error in failures.items():
                request = works[row].request
                self._scheduler.fail(request, failed(error))
                outputs.append(Output(request.id, num_cached=request.num_cached, finish=request.finish))
            return bits

        return masks

    def _outputs(self, batch: Batch, results: Sequence[RowResult]) -> list[Output]:
        """What the step added to each request that is still wanted."""
        for work, result in zip(batch.works, results, strict=True):
            request, drawn = work.request, work.samples and result.finite and result.token is not None
            if drawn and request.finish is None and work.end == len(request.tokens):
                result.finish = self._follow(request, [result.token] if result.token is not None else [])
        found = []
        for update in self._scheduler.finish(batch, results):
            request, result = update.request, update.result
            self._keep(request)
            found.append(
                Output(
                    request.id,
                    tokens=[result.token] if result.token is not None else [],
                    logprobs=[result.logprob] if result.logprob is not None else [],
                    prompt_logprobs=list(result.prompt_logprobs),
                    num_cached=request.num_cached,
                    finish=request.finish,
                    miss=request.miss,
                    waited=request.waited,
                    pooled=vector_of(request),
                )
            )
        return found

    def _drop(self, batch: Batch, kind: str, outputs: list[Output]) -> None:
        """Takes back a step that failed, and the one in flight: their requests run again one by one, from nothing.

        One that fails alone is failed. Raises what ``reset`` does, if the device is lost. Not to be called while the
        error is handled: its traceback keeps the pool alive that ``reset`` replaces.
        """
        parts = [batch] if self._in_flight is None else [batch, self._in_flight.batch]
        self._in_flight = None  # it holds the pool that ``reset`` replaces
        finish = Finish("error", None, f"the engine failed on this request ({kind})")
        guilty = self._scheduler.drop(parts, finish)
        if guilty is not None:
            outputs.append(Output(guilty.id, num_cached=guilty.num_cached, finish=finish))
        self._runner.reset()
        if self._canary is not None:
            self._canary.reset()
        if self._disk is not None:
            self._disk.reset()


def vector_of(request: Request) -> bytes:
    """What a request with ``pooling`` asked for, as ``Output.pooled`` has it."""
    if request.pooling is None or request.pooled is None:
        return b""
    mean = request.pooling.kind == "mean"
    return (request.pooled / request.num_prompt if mean else request.pooled).astype("<f4").tobytes()


def failed(error: RequestError) -> Finish:
    """How a request ends that can't be served."""
    return Finish("error", None, error.message, error.field, error.status)


PAGE = 16
"""Slots of a page where none is asked for and kernels read by page: small tables, few changes, prefixes cut little."""


def load_core(config: EngineConfig, progress: Callable[[Progress], None] | None = None) -> EngineCore:
    """Loads a model and makes everything that serves it; ``progress`` hears of the stages on the way.

    Raises ModelError if the model can't be loaded or served exactly, ConfigError if an option can't be met.
    """
    return over_runner(*load_runner(config, progress), config)


def load_runner(
    config: EngineConfig, progress: Callable[[Progress], None] | None = None
) -> tuple[ModelRunner, ModelInfo]:
    """Loads a model and makes what runs its steps, pool included; raises as ``load_core`` does."""
    if config.device.startswith("torch"):
        require_torch("--device")
        if config.kv_cache_dtype != "auto":
            raise ConfigError("K and V are quantized on MLX's devices alone; leave it out", "--kv-cache-dtype")
        if config.kv_disk is not None:
            raise ConfigError("goes with MLX's devices alone; leave it out with --device torch", "--kv-disk")
        from pippin.torch.load import load_torch_runner

        return load_torch_runner(config, progress or (lambda _: None))
    use_device(config.device)
    return build_runner(load_mlx_model(config.model_path, config, progress), config, progress or (lambda _: None))


def build_core(loaded: LoadedModel, config: EngineConfig, tell: Callable[[Progress], None]) -> EngineCore:
    """Makes everything that serves a loaded model; raises as ``load_core`` does."""
    return over_runner(*build_runner(loaded, config, tell), config)


def build_runner(
    loaded: LoadedModel, config: EngineConfig, tell: Callable[[Progress], None]
) -> tuple[MlxModelRunner, ModelInfo]:
    """Makes what runs a loaded model's steps; raises as ``load_core`` does."""
    tell(Progress("probe", 0, 2))
    choice = choose_attention(loaded.model, config.attention_backend, loaded.vocab_size)
    choice = choice.with_kv_cache_dtype(config.kv_cache_dtype)
    # A recurrent state can be reused where a page ends: with pages of one slot, that is wherever it was kept.
    config = config.with_pages(PAGE if kernels.backend() and not choice.layout.states else 1)
    log.info("attention backend %s: %s", choice.backend.name, choice.reason)
    tell(Progress("probe", 1, 2))
    sizes = limit_rows(config, choice, limits(config), loaded.weight_bytes)
    activations = measure_activations(
        loaded.model,
        choice,
        chunk=min(sizes.chunk, loaded.context_length - 1),
        max_running=sizes.max_running,
        vocab_size=loaded.vocab_size,
        context_length=loaded.context_length,
    )
    with share(claims_folder(memory_key())) as shared:
        others = 0 if config.disable_memory_sharing else shared.others
        if others:
            log.info("other engines on this machine have claimed %.2f GB, which is left to them", others / 1e9)
        plan = plan_memory(
            config,
            choice,
            weight_bytes=loaded.weight_bytes,
            activation_bytes=activations,
            context_length=loaded.context_length,
            max_running=sizes.max_running,
            device=max(0, device_bytes() - others),
        )
        if not config.disable_memory_sharing:
            shared.claim(plan.total_bytes, loaded.model)
    limit_buffers(plan)
    set_wired_limit(config)
    tell(Progress("probe", 2, 2))
    vocabulary = read_vocabulary(Path(config.tokenizer_path or loaded.path), loaded.vocab_size)
    pool = choice.pool(plan.slots + config.page_size, config.page_size)
    runner = MlxModelRunner(
        loaded.model,
        choice.backend,
        pool,
        max_running=sizes.max_running,
        vocab_size=vocabulary.size,
        graph_rows=0 if config.disable_graph else config.graph_max_rows,
        fusions=choice.fusions,
    )
    if not config.skip_server_warmup:
        runner.warm_up(loaded.context_length, lambda done, whole: tell(Progress("compile", done, whole)))
    return runner, _info(config, loaded, choice, plan, sizes, vocabulary)


def load_adapters(model: nn.Module, config: EngineConfig) -> Adapters:
    """The model's LoRA adapters, those of ``--lora-paths`` loaded. Raises ConfigError that names the one at fault."""
    adapters = Adapters(model)
    for given in config.lora_paths or []:
        name, _, path = given.partition("=")
        try:
            adapters.load(name, path or name)
        except (RequestError, ModelError) as error:
            raise ConfigError(f"{given}: {error}", "--lora-paths") from error
    return adapters


def over_runner(runner: ModelRunner, info: ModelInfo, config: EngineConfig) -> EngineCore:
    """An engine over a runner that holds what ``info`` says."""
    allocator = SlotAllocator(info.max_total_tokens // info.page_size + 1, info.page_size)
    states = runner.pool.states if isinstance(runner, MlxModelRunner) else None
    snapshots = NONE if states is None else Snapshots(states, info.max_mamba_cache_size)
    scheduler = Scheduler(
        allocator,
        RadixCache(allocator, enabled=not config.disable_radix_cache, snapshots=snapshots),
        max_running=info.max_running_requests,
        chunk=info.chunked_prefill_size,
        policy=config.schedule_policy,
        context_length=info.context_length,
    )
    # torch computes a step as it is launched: there is nothing to overlap it with, only tokens to hold back.
    overlap = not config.disable_overlap_schedule and not config.device.startswith("torch")
    traces = runner.traces if isinstance(runner, MlxModelRunner) else (lambda: 0)
    adapters = load_adapters(runner.model, config) if isinstance(runner, MlxModelRunner) else None
    if adapters is not None:
        info = msgspec.structs.replace(info, lora_paths=dict(adapters.paths))
    canary = KVCanary(allocator.num_pages * allocator.page_size) if config.kv_canary != "none" else None
    return EngineCore(
        scheduler,
        runner,
        info,
        overlap=overlap,
        grammars=compiler_of(config, info),
        traces=traces,
        canary=canary,
        adapters=adapters,
        memory=watch_memory(info) if info.budget_bytes else None,
        disk=_disk(runner, info, config, scheduler, canary),
    )


def _disk(
    runner: ModelRunner, info: ModelInfo, config: EngineConfig, scheduler: Scheduler, canary: KVCanary | None
) -> DiskTier | None:
    """The prefix cache on disk, if it is asked for. Raises ConfigError where it can't be had."""
    if config.kv_disk is None or not isinstance(runner, MlxModelRunner):
        return None
    if runner.pool.states is not None:
        raise ConfigError(
            f"{info.model_type} keeps recurrent state, and a prefix on disk has K and V alone; leave it out",
            "--kv-disk",
        )
    if any(shape and shape.packing for shape in runner.pool.shapes):
        raise ConfigError(
            "what it keeps would be quantized a second time; leave it out with --kv-cache-dtype", "--kv-disk"
        )
    versions = (pippin.__version__, mlx_lm.__version__)
    return open_tier(
        config,
        info,
        [*versions, str(info.dtype), str(info.quantization), *map(str, runner.pool.shapes)],
        scheduler,
        runner,
        slot_bytes=bytes_per_slot(runner.pool.shapes),
        canary=canary,
    )


def _info(
    config: EngineConfig,
    loaded: LoadedModel,
    choice: Choice,
    plan: MemoryPlan,
    sizes: Limits,
    vocabulary: Vocabulary,
) -> ModelInfo:
    return ModelInfo(
        model_path=config.model_path or loaded.path.name,
        weights_path=str(loaded.path),
        tokenizer_path=config.tokenizer_path or str(loaded.path),
        model_type=loaded.model_type,
        dtype=str(loaded.dtype).removeprefix("mlx.core."),
        quantization=loaded.quantization,
        vocab_size=vocabulary.size,
        context_length=loaded.context_length,
        eos_token_ids=list(dict.fromkeys([*loaded.eos_token_ids, *vocabulary.eos_ids])),
        attention_backend=choice.backend.name,
        attention_reason=choice.reason,
        max_total_tokens=plan.slots,
        max_running_requests=sizes.max_running,
        chunked_prefill_size=sizes.chunk,
        page_size=config.page_size,
        weight_bytes=plan.weight_bytes,
        activation_bytes=plan.activation_bytes,
        budget_bytes=plan.budget_bytes,
        device_bytes=plan.device_bytes,
        pool_bytes=plan.pool_bytes,
        max_mamba_cache_size=plan.snapshots,
        state_bytes=plan.state_bytes + plan.snapshot_bytes,
        is_embedding=loaded.vectors.only,
        pooling=loaded.vectors.pooling,
        normalizes=loaded.vectors.normalizes,
        device="gpu" if on_gpu() else "cpu",
    )
