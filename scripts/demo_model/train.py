"""Trains the demo model, then its draft, in a given time.

Worker processes write fresh text all the while; the network sees rows that begin where a document begins.
The rate falls to zero by the clock, so that every run ends with a finished model.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from demo_model.corpus import token_ids, token_stream
from demo_model.network import DRAFT, MAIN, Network, Shape, restore, save
from demo_model.optimizer import Optimizer

READ_WEIGHT = 0.1  # of tokens that are only read: enough to continue any text, too little to cost capacity
LENGTHS = ((0.0, 1024), (0.6, 2048), (0.9, 4096))  # rows grow with the share of the time that has passed


def write_text(tokenizer_file: str, seed: int, queue: Queue[Any]) -> None:
    """A worker: puts (tokens, document starts) into the queue, for ever."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one worker a core is enough
    tokenizer = Tokenizer.from_file(tokenizer_file)
    stream = token_stream(tokenizer, seed)
    while True:
        rows = [row for _ in range(16) for row in next(stream)]
        starts = np.cumsum([0, *map(len, rows[:-1])])
        queue.put((np.concatenate(rows).view(np.int16), starts))


class Pool:
    """All text written so far, on the device; the sign bit marks what is to be learned."""

    def __init__(self, queue: Queue[Any], device: str, capacity: int) -> None:
        self.queue, self.device = queue, device
        self.tokens = torch.zeros(capacity, dtype=torch.int16, device=device)
        self.starts = torch.zeros(capacity // 64, dtype=torch.int64, device=device)
        self.filled = self.documents = 0

    @property
    def full(self) -> bool:
        return self.filled + 2_000_000 > len(self.tokens)

    def fill(self, at_least: int = 0) -> None:
        """Takes what the workers have ready, and waits until there are ``at_least`` tokens."""
        while not self.full and (self.filled < at_least or not self.queue.empty()):
            tokens, starts = self.queue.get()
            self.tokens[self.filled : self.filled + len(tokens)] = torch.from_numpy(tokens).to(self.device)
            place = slice(self.documents, self.documents + len(starts))
            self.starts[place] = torch.from_numpy(starts).to(self.device) + self.filled
            self.filled += len(tokens)
            self.documents += len(starts)

    def rows(self, count: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets and weights, each [count, length]; every row begins with a document."""
        starts = self.starts[torch.randint(self.documents, (count,), device=self.device)]
        starts = starts.clamp(max=self.filled - length - 1)
        raw = self.tokens[starts[:, None] + torch.arange(length + 1, device=self.device)]
        tokens = raw.long() & 0x7FFF
        weights = torch.where(raw[:, 1:] < 0, 1.0, READ_WEIGHT)
        return tokens[:, :-1], tokens[:, 1:], weights


def cross_entropy(features: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    logits = F.linear(features, head).float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def divergence(features: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, weights: Tensor) -> Tensor:
    """Of the draft's distribution from the teacher's, in nats a token."""
    ours = F.linear(features, head).float().log_softmax(-1)
    theirs = F.linear(teacher, teacher_head).float().log_softmax(-1)
    losses = (theirs.exp() * (theirs - ours)).sum(-1)
    return (losses * weights).sum() / weights.sum()


Loss = Callable[[Network, Tensor, Tensor, Tensor], Tensor]  # network, inputs, targets, weights


@dataclass(frozen=True, slots=True)
class Run:
    """What both trainings share."""

    pool: Pool
    device: str
    batch_tokens: int
    compiled: bool
    peak: float
    start: Path | None

    def compile(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(function, dynamic=False) if self.compiled else function

    def network(self, shape: Shape, name: str) -> Network:
        """A new network, or the one called ``name`` to go on with."""
        network = Network(shape)
        if self.start:
            restore(network, self.start / name)
        network.to(self.device)
        if self.compiled:
            for layer in network.layers:
                layer.compile(dynamic=False)
        return network


def fit(run: Run, network: Network, loss_of: Loss, minutes: float) -> None:
    """Trains for so long: a short warm-up, full rate for 40 % of the time, then linearly down to nothing."""
    optimizer = Optimizer(network)
    began, step, seen = time.monotonic(), 0, 0
    while (progress := (time.monotonic() - began) / (60 * minutes)) < 1:
        length = [n for start, n in LENGTHS if start <= progress][-1]
        tokens, targets, weights = run.pool.rows(run.batch_tokens // length, length)
        with torch.autocast(run.device, torch.bfloat16, enabled=run.compiled):
            loss = loss_of(network, tokens, targets, weights)
        loss.backward()
        optimizer.step(run.peak * min(1.0, (step + 1) / 200, (1 - progress) / 0.6))
        run.pool.fill()
        step, seen = step + 1, seen + tokens.numel()
        if step % 100 == 0 or step in (1, 20):  # also the only place where the host waits for the device
            spent = time.monotonic() - began
            print(
                f"{spent:6.1f} s  step {step:6}  rows of {length}  loss {loss.item():.4f}  "
                f"{seen / 1e6:.0f} M tokens, {seen / spent / 1e6:.2f} M/s; {run.pool.filled / 1e6:.0f} M written",
                flush=True,
            )


def train_main(run: Run, shape: Shape, minutes: float) -> Network:
    loss = run.compile(cross_entropy)
    network = run.network(shape, "pippin-demo")
    fit(run, network, lambda n, x, y, w: loss(n(x), n.embed_tokens.weight, y, w), minutes)
    return network


def train_draft(run: Run, shape: Shape, teacher: Network, minutes: float) -> Network:
    """The draft learns the teacher's probabilities, not the text: what counts is how often they agree."""
    loss = run.compile(divergence)
    network = run.network(shape, "pippin-demo-draft")

    def loss_of(n: Network, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = teacher(x)
        return loss(n(x), n.embed_tokens.weight, theirs, teacher.embed_tokens.weight.detach(), w)

    fit(run, network, loss_of, minutes)
    return network


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="directory to write both models to")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json of tokenizer.py")
    parser.add_argument("--minutes", type=float, default=8.0, help="for the model")
    parser.add_argument("--draft-minutes", type=float, default=1.5)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--text", type=int, default=1_000_000_000, help="tokens kept at most")
    parser.add_argument("--batch-tokens", type=int, default=131_072)
    parser.add_argument("--peak", type=float, default=1.0, help="share of the usual rates")
    parser.add_argument("--start", type=Path, help="directory of both models to go on with, instead of new ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a network of no use, to try the script")
    return parser.parse_args()


def main() -> None:
    arguments = options()
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # one for each length of row, in either training
    device = "cuda" if torch.cuda.is_available() else "cpu"
    context = multiprocessing.get_context("spawn")
    queue = context.Queue(maxsize=64)
    for i in range(arguments.workers):
        seed = 1_000_000 * arguments.seed + i + 1
        context.Process(target=write_text, args=(str(arguments.tokenizer), seed, queue), daemon=True).start()
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
    ends = token_ids(tokenizer, "<|im_end|>", "<|endoftext|>")
    pool = Pool(queue, device, arguments.text)
    pool.fill(at_least=min(20_000_000, arguments.text // 4))
    run = Run(pool, device, arguments.batch_tokens, device == "cuda", arguments.peak, arguments.start)
    shapes = (Shape(64, 2, 2, 2, 128), Shape(64, 1, 2, 2, 64)) if arguments.tiny else (MAIN, DRAFT)
    network = train_main(run, shapes[0], arguments.minutes)
    save(network, arguments.output / "pippin-demo", ends)
    draft = train_draft(run, shapes[1], network, arguments.draft_minutes)
    save(draft, arguments.output / "pippin-demo-draft", ends)


if __name__ == "__main__":
    main()
