"""What the command line shows: loading, a conversation, an answer as it comes.

Answers go to stdout, all else to stderr.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import time
from collections.abc import Generator, Iterator, Mapping
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from pippin.engine import Engine
from pippin.errors import RequestError
from pippin.messages import ModelInfo
from pippin.messages import Progress as Loading

STAGES = {
    "download": "downloading",
    "load": "reading weights",
    "quantize": "quantizing",
    "unpack": "reading PyTorch's files",
    "save": "writing",
    "probe": "checking attention",
    "compile": "compiling steps",
    "warm-up": "warming up",
}

HELP = """\
/reset          forget the conversation
/system TEXT    set the system prompt, and forget the conversation
/help           this
/exit           leave; so does Ctrl-D
Ctrl-C stops an answer, not the program."""


class LoadingBar:
    """A bar on stderr while a model loads, gone when it is there; nothing where stderr is no terminal.

    Call it with each Progress event, from any thread.
    """

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        self._console = Console(stderr=True)
        self._progress = Progress(*columns, console=self._console, transient=True)
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress.start()
            self._task = self._progress.add_task("starting", total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar away before the end of the ``with``."""
        if self._task is not None:  # stopping one that never started prints an empty line
            self._progress.stop()

    def __call__(self, event: Loading) -> None:
        if self._task is not None:
            stage = STAGES.get(event.stage, event.stage)
            self._progress.update(self._task, description=stage, total=event.total, completed=event.done)


def ready(info: ModelInfo, url: str, name: str | None, needs_key: bool, has_page: bool) -> str:
    """What ``pippin serve`` says when it is ready: where, what, how much, a request to try, and the web page."""
    form = f"{info.dtype}, {info.quantization}" if info.quantization else info.dtype
    header = """ -H "Authorization: Bearer $API_KEY" """.rstrip() if needs_key else ""
    model = name or info.model_path
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello!"}]})
    return "\n".join(
        (
            f"Pippin serves {model} at {url}",
            f"  {info.model_type}, {form}, on {info.device}; context {info.context_length} tokens",
            f"  at most {info.max_running_requests} requests at once; attention: {info.attention_backend}; memory:",
            budget(info),
            f'Try: curl {url}/v1/chat/completions{header} -H "Content-Type: application/json" -d {shlex.quote(body)}',
            *([f"Chat and dashboard: {reachable(url)}/"] if has_page else []),
        )
    )


def reachable(url: str) -> str:
    """The URL for a browser on this machine: who listens everywhere has no address that one can go to."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def budget(info: ModelInfo) -> str:
    """The memory budget, a line a part, as ``--dry-run`` prints it and ``ready`` does at start."""
    states, copies, steps = info.state_bytes, info.copy_bytes, info.activation_bytes
    parts = (
        ("weights", info.weight_bytes, ""),
        (f"KV cache, {info.max_total_tokens} slots", info.pool_bytes, _windows(info)),
        ("recurrent states and their snapshots", states, ""),
        ("activations of the largest step, measured", steps, ""),
        ("copies on their way to and from the disk", copies, ""),
        ("together", info.weight_bytes + info.pool_bytes + states + steps + copies, "of"),
        ("the budget", info.budget_bytes, f"of {info.device_bytes / 2**20:.0f} MiB ({info.device})"),
    )
    return "\n".join(f"  {name:<42}{size / 2**20:>9.0f} MiB {note}".rstrip() for name, size, note in parts if size)


def _windows(info: ModelInfo) -> str:
    return f"({info.window_slots} in layers that see the last {info.window} tokens)" if info.window_slots else ""


def show(answers: Generator[dict[str, Any], None, None], out: TextIO) -> dict[str, Any]:
    """Writes a streamed answer as it comes; the last dict comes back. Ctrl-C ends the answer, and is no error."""
    shown, last = 0, dict[str, Any]()
    try:
        for last in answers:
            out.write(last["text"][shown:])
            out.flush()
            shown = len(last["text"])
    except KeyboardInterrupt:
        answers.close()
    out.write("\n")
    out.flush()
    return last


def summary(answer: Mapping[str, Any], seconds: float) -> str:
    """One line on an answer: how long, how fast, how much of the prompt was cached."""
    if not answer:
        return "stopped"
    meta = answer["meta_info"]
    speed = meta["completion_tokens"] / max(seconds, 1e-9)
    ended = "" if meta["finish_reason"] and meta["finish_reason"]["type"] == "stop" else " · cut short"
    return (
        f"{meta['completion_tokens']} tokens · {speed:.0f} tok/s · "
        f"{meta['cached_tokens']} of {meta['prompt_tokens']} prompt tokens cached{ended}"
    )


class Conversation:
    """A chat in the terminal: each turn sends the whole history, and the prefix cache makes that cheap."""

    def __init__(self, engine: Engine, params: Mapping[str, Any], system: str | None = None) -> None:
        self._engine = engine
        self._params = params
        self._system = system
        self._console = Console(stderr=True, highlight=False)
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def run(self, out: TextIO) -> bool:
        """Reads lines until the input ends or /exit; False if any was refused."""
        answered = True
        for line in lines(self._console):
            if line.startswith("/"):
                if not self._command(line):
                    break
            elif line.strip():
                answered &= self._turn(line, out)
        return answered

    def _turn(self, text: str, out: TextIO) -> bool:
        """False if the message was refused."""
        self.messages.append({"role": "user", "content": text})
        began = time.perf_counter()
        try:
            answer = show(self._engine.chat(self.messages, self._params, stream=True), out)
        except RequestError as error:  # too long by now, or the template does not like it: the chat goes on
            self.messages.pop()
            self._console.print(f"[red]{escape(str(error))}[/red]; /reset starts over")
            return False
        self.messages.append({"role": "assistant", "content": answer.get("text", "")})
        self._console.print(f"[dim]{summary(answer, time.perf_counter() - began)}[/dim]")
        return True

    def _command(self, line: str) -> bool:
        """False to leave."""
        name, _, rest = line.partition(" ")
        match name:
            case "/exit" | "/quit" | "/bye":
                return False
            case "/reset":
                self.reset()
                self._console.print("[dim]a new conversation[/dim]")
            case "/system":
                self._system = rest.strip() or None
                self.reset()
                self._console.print(f"[dim]system prompt: {self._system or 'none'}[/dim]")
            case "/help":
                self._console.print(HELP, markup=False)
            case _:
                self._console.print(f"{name} is no command; /help lists them", markup=False)
        return True


def lines(console: Console) -> Iterator[str]:
    """What the user types, with history where there is a terminal. Ctrl-C drops the line, Ctrl-D ends."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - arrow keys and history for input()
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print("\n[dim]Ctrl-D or /exit leaves[/dim]")
            continue
        yield line
