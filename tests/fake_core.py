"""An engine without a model: answers are a known function of the prompt, so that everything above can be tested.

Not a mock: it takes requests, steps, aborts and flushes as the real core does, and counts slots.
"""

from __future__ import annotations

import fcntl
import math
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pippin.config import EngineConfig
from pippin.errors import ConfigError, ModelError, RequestError
from pippin.messages import (
    AdaptersChanged,
    LoadAdapter,
    Marks,
    ModelInfo,
    Output,
    ProfileStarted,
    Progress,
    StartProfile,
    Stats,
    StepOutput,
    StopProfile,
    Submit,
    UnloadAdapter,
)
from pippin.profile.marks import READ, STEP, Label
from pippin.types import Finish, Pooling, TokenLogprob

ROOT = Path(__file__).resolve().parents[1]
PYTHONPATH = os.pathsep.join((str(ROOT / "src"), str(ROOT)))
"""With which a child finds this file, and the same Pippin as its parent."""

VOCAB = 300
EOS = 256
CONTEXT = 1024
KILL = 299  # a prompt of this token kills the process, as a GPU out of memory does
HANG = 297  # a prompt of this token makes steps that never end
RAISE = 298  # a prompt of this token breaks `add` in a way that nobody foresaw
STEP_SECONDS = 0.001


def next_token(tokens: list[int], seed: int) -> int:
    """A printable byte that depends on the whole sequence and the seed."""
    return 97 + (sum(tokens) * 31 + len(tokens) * 7 + seed) % 26


def expected(prompt: list[int], count: int, seed: int = 0) -> list[int]:
    """The answer that a FakeCore gives."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, seed))
    return tokens[len(prompt) :]


def fake_info(model: str = "fake") -> ModelInfo:
    return ModelInfo(
        model_path=model,
        tokenizer_path=model,
        model_type="fake",
        dtype="float32",
        quantization=None,
        vocab_size=VOCAB,
        context_length=CONTEXT,
        eos_token_ids=[EOS],
        attention_backend="rows",
        attention_reason="there is no attention",
        max_total_tokens=100_000,
        max_running_requests=32,
        chunked_prefill_size=512,
        page_size=1,
        weight_bytes=0,
        pool_bytes=0,
        device="none",
        pooling="last",
    )


def fake_vector(tokens: list[int], pooling: Pooling) -> list[float]:
    """A vector that depends on the whole prompt: of 8 numbers, or a log probability for each label."""
    if pooling.kind == "labels":
        return [-1.0 - (sum(tokens) + label) % 5 for label in pooling.labels]
    return [float((sum(tokens) * (i + 3) + len(tokens)) % 17 - 8) for i in range(8)]


class Gate:
    """What a test holds steps with, in whatever process they are: a lock on a file that says how many have begun."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    @contextmanager
    def held(self) -> Iterator[int]:
        """No step begins in the block; gives how many have. One of them may still be under way."""
        with self.path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield int(file.read() or 0)

    def enter(self, step: int) -> None:
        with self.path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(b"%d" % step)


class FakeCore:
    """Every request gets a token a step until its limit; ``seconds`` is how long a step takes.

    If there is a ``gate``, a step goes through it first.
    """

    def __init__(self, seconds: float = STEP_SECONDS, model: str = "fake") -> None:
        self.info = fake_info(model)
        self.seconds = seconds
        self.running: dict[str, tuple[Submit, list[int]]] = {}
        self.notices: list[Output] = []
        self.adapters: dict[str, str] = {}
        self.asked: list[Submit] = []
        self.seen: set[tuple[int, ...]] = set()
        self.steps = 0
        self.cached_tokens = 0
        self.prompt_tokens = 0
        self.marks: list[int] | None = None
        self.gate: Gate | None = None
        self.note: Callable[[Sequence[str]], None] = lambda ids: None
        self.closed = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.notices)

    @property
    def stats(self) -> Stats:
        used = sum(len(tokens) for _, tokens in self.running.values())
        cached = sum(map(len, self.seen))
        total = self.info.max_total_tokens
        return Stats(
            num_running=len(self.running),
            slots_total=total,
            slots_free=total - used - cached,
            slots_cached=cached,
            slots_evictable=cached,
            steps=self.steps,
            cached_tokens=self.cached_tokens,
            prompt_tokens=self.prompt_tokens,
        )

    def add(self, submit: Submit) -> None:
        if not submit.tokens:
            raise RequestError("the prompt is empty; it needs at least one token", "prompt")
        if RAISE in submit.tokens:
            raise ZeroDivisionError("unforeseen")
        if KILL in submit.tokens:
            os.kill(os.getpid(), signal.SIGKILL)
        name = submit.params.lora_path
        if name is not None and name not in self.adapters:
            raise RequestError(f"there is no LoRA adapter {name!r} here", "lora_path", 404)
        self.running[submit.id] = (submit, list(submit.tokens))
        self.asked = [*self.asked[-20:], submit]
        self.prompt_tokens += submit.num_prompt
        self.cached_tokens += self._num_cached(submit)

    def abort(self, id: str) -> None:
        if self.running.pop(id, None) is not None:
            self.notices.append(Output(id, finish=Finish("abort")))

    def flush(self) -> None:
        if self.has_work:
            raise RequestError("the cache can't be flushed while requests run", status=409)
        self.seen.clear()

    def watch(self, note: Callable[[Sequence[str]], None]) -> None:
        self.note = note

    def change_adapters(self, command: LoadAdapter | UnloadAdapter) -> AdaptersChanged:
        """Any path is an adapter, unless it is called missing; it changes nothing in the answers."""
        error = ""
        if isinstance(command, LoadAdapter):
            if command.path == "missing":
                error = "missing holds no LoRA adapter"
            else:
                self.adapters[command.name] = command.path
        elif self.adapters.pop(command.name, None) is None and command.name == "missing":
            error = f"there is no LoRA adapter {command.name!r} here"
        return AdaptersChanged(command.id, dict(self.adapters), error, "lora_path")

    def profile(self, command: StartProfile | StopProfile, tell: Callable[[ProfileStarted | Marks], None]) -> None:
        """Marks of its steps, as far as a core without a device has any."""
        if isinstance(command, StopProfile):
            noted, self.marks = self.marks, None
            if noted is not None:
                tell(Marks(command.id, noted, ended=True))
            return
        self.marks = []
        tell(ProfileStarted(command.id, time.perf_counter_ns(), os.getpid()))

    def close(self) -> None:
        self.closed += 1

    def step(self) -> StepOutput | None:
        if not self.has_work:
            return None
        began = time.perf_counter_ns()
        self.note([*self.running])
        if self.gate is not None:
            self.gate.enter(self.steps + 1)
        if any(HANG in submit.tokens for submit, _ in self.running.values()):
            time.sleep(1000)
        time.sleep(self.seconds)
        self.steps += 1
        if self.marks is not None:
            label = Label(len(self.running), 0, len(self.running), 0)
            self.marks += (STEP, 0, 0, began, self.steps, *label, READ, self.steps, began, time.perf_counter_ns())
        outputs, self.notices = self.notices, []
        for submit, tokens in list(self.running.values()):
            outputs.append(self._advance(submit, tokens))
        return StepOutput(outputs, self.stats)

    def _num_cached(self, submit: Submit) -> int:
        return submit.num_prompt - 1 if tuple(submit.tokens) in self.seen else 0

    def _advance(self, submit: Submit, tokens: list[int]) -> Output:
        params = submit.params
        if submit.pooling is not None:
            del self.running[submit.id]
            values = fake_vector(submit.tokens, submit.pooling)
            return Output(submit.id, finish=Finish("stop"), pooled=struct.pack(f"<{len(values)}f", *values))
        first = len(tokens) == submit.num_prompt
        cached = self._num_cached(submit)
        token = self.draw(submit, tokens)
        if params.logit_bias:
            token = max(params.logit_bias, key=lambda t: params.logit_bias[t])
        tokens.append(token)
        finish = None
        if token in params.stop_token_ids or (token == EOS and not params.ignore_eos):
            finish = Finish("stop", token)
        elif len(tokens) - submit.num_prompt >= params.max_new_tokens:
            finish = Finish("length")
        if finish is not None:
            del self.running[submit.id]
            self.seen.add(tuple(submit.tokens))
        return Output(
            submit.id,
            [token],
            [self._logprob(token, params.top_logprobs)] if params.logprobs else [],
            self._prompt_logprobs(submit) if first and params.prompt_logprobs else [],
            cached,
            finish,
        )

    def draw(self, submit: Submit, tokens: list[int]) -> int:
        params = submit.params
        return next_token(tokens, params.seed or 0 if params.temperature > 0 else 0)

    def _logprob(self, token: int, top: int) -> TokenLogprob:
        return TokenLogprob(token, -math.log(2), [(97 + i, -1.0 - i) for i in range(top)])

    def _prompt_logprobs(self, submit: Submit) -> list[TokenLogprob]:
        found = [self._logprob(t, submit.params.top_logprobs) for t in submit.tokens[: submit.num_prompt]]
        return [TokenLogprob(submit.tokens[0], None), *found[1:]]


class PoisonedCore(FakeCore):
    """Fails for good in its thirtieth step."""

    def step(self) -> StepOutput | None:
        if self.steps == 30:
            raise RuntimeError("the device is lost")
        return super().step()


def load(config: EngineConfig, progress: Callable[[Progress], None]) -> FakeCore:
    """``model_path`` says what happens: ``broken…`` fails, ``slow`` takes its time, ``fragile`` fails once its file
    is gone, ``poisoned`` does after a while, else a number of seconds a step.

    Of a path, the last part counts; a file ``gate`` in it is the engine's gate.
    """
    what = Path(config.model_path or "").name
    if what == "broken-model":
        raise ModelError("no such model")
    if what == "broken-option":
        raise ConfigError("must be even", "--page-size")
    if what == "broken-code":
        raise ZeroDivisionError("unforeseen")
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    progress(Progress("load", 1, 2))
    if what == "slow":
        time.sleep(1.5)
    if what == "fragile" and not Path(config.model_path or "").exists():
        raise ModelError("the model is gone")
    if what == "poisoned":
        return PoisonedCore(STEP_SECONDS)
    core = FakeCore(float(what) if what.replace(".", "").isdigit() else STEP_SECONDS, config.model_path or "")
    if config.model_path and (gate := Path(config.model_path) / "gate").exists():
        core.gate = Gate(gate)
    return core
