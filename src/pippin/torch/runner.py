"""``TorchModelRunner``: the engine's steps on transformers' models. The reference, and the baseline of MLX."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

import mlx.core as mx
import numpy as np
import torch

from pippin.attention.padded import Padded
from pippin.flight import InFlight, Masks, PromptRows, check_slots, prompt_rows, score_prompts, wait_for_masks
from pippin.mask_table import MaskTable
from pippin.penalties import TokenCounts
from pippin.sampler import Sampled, allow, sample, sampling_inputs
from pippin.torch.bridge import torch_to_mlx
from pippin.torch.store import Rows, TorchKVStore, lay_out
from pippin.types import Batch, Work


class TorchModelRunner:
    """Runs batches for one model of transformers, on whatever device it is.

    A step is done when ``launch`` returns. Works are padded rows of as few forwards as pad little, K and V are gathered
    from slots, attention is transformers' own. Tokens are drawn by our sampler, by MLX, so that the noise of (seed,
    position) is the same. ``_last_token`` holds the newest token of each row of the device tables, as
    MlxModelRunner's does.
    """

    def __init__(self, model: Any, store: TorchKVStore, *, max_running: int, vocab_size: int) -> None:
        self.model = model
        self.store = store
        self._vocab_size = vocab_size
        self._token_counts = TokenCounts()
        self._padded = Padded("padded", grouped=False)
        self._masks = MaskTable(vocab_size)
        self._last_token = [0] * (max_running + 1)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def launch(self, batch: Batch) -> InFlight:
        """Runs a step; the flight is there to be read."""
        forwards = self._padded.forwards(batch.works)
        works = tuple(chain.from_iterable(forwards))
        samples = [i for i, w in enumerate(works) if w.samples]
        prompts = tuple(prompt_rows(works))
        logits = self._forward(forwards, prompts)
        sampled, values, draws = None, None, None
        if samples:
            drawing = [works[i] for i in samples]
            draws = partial(self._draw, drawing, [w.request.row for w in drawing], logits[: len(samples)])
            if not wait_for_masks(drawing):
                sampled, draws = draws(None), None
        if prompts:
            values = score_prompts(works, prompts, logits[len(samples) :], self._vocab_size)
        return InFlight(batch, works, sampled, prompts, values, draws)

    def _draw(self, works: Sequence[Work], rows: Sequence[int], logits: mx.array, masks: Masks | None) -> Sampled:
        """Draws for rows of logits, one a work, and keeps the tokens by ``rows``, the requests' at launch."""
        plan, inputs = sampling_inputs(works, self._vocab_size, counts=self._token_counts)
        if masks is not None:
            plan, inputs = allow(plan, inputs, self._masks.rows(masks(works)(), len(works)))
        last_inputs = mx.array([self._token(w, w.end - 1) for w in works], dtype=mx.int32)
        sampled = sample(logits, plan, inputs, last_inputs)
        for row, token in zip(rows, np.asarray(sampled.tokens), strict=True):
            self._last_token[row] = int(token)
        return sampled

    def logits(self, batch: Batch) -> mx.array:
        """Runs a batch to the logits of its sampling works, [n, vocab] float32, and draws nothing."""
        forwards = self._padded.forwards(batch.works)
        drawing = [w for w in chain.from_iterable(forwards) if w.samples]
        logits = self._forward(forwards, ()).astype(mx.float32)
        at = {id(work): row for row, work in enumerate(drawing)}
        return logits[mx.array([at[id(w)] for w in batch.works if w.samples], dtype=mx.int32)]

    def reset(self) -> None:
        """Starts over with an empty store."""
        self._masks.reset()
        for keys, values in self.store.layers:
            keys.zero_()
            values.zero_()

    def _forward(self, forwards: Sequence[Sequence[Work]], prompts: Sequence[PromptRows]) -> mx.array:
        """Logits of the works that sample, in order, and behind them of the prompts' rows: [n, vocab]."""
        heads: list[torch.Tensor] = []
        tails: list[torch.Tensor] = []
        first = 0
        for works in forwards:
            for work in works:
                check_slots(work, self.store.num_slots)
            mine = [p for p in prompts if first <= p.work < first + len(works)]
            wanted = [(i, w.end - w.start - 1) for i, w in enumerate(works) if w.samples]
            count = len(wanted)
            for p in mine:
                start = works[p.work - first].start
                wanted += [(p.work - first, t - 1 - start) for t in range(p.first, p.first + p.count)]
            logits = self._run(lay_out(works, self._last_token, self.store.device), wanted)
            heads.append(logits[:count])
            tails.append(logits[count:])
            first += len(works)
        return torch_to_mlx(torch.cat([*heads, *tails]))

    def _run(self, rows: Rows, wanted: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Logits [n, vocab] at (row, column) of the new tokens; the head runs on columns that anybody wants."""
        columns = sorted({column for _, column in wanted}) or [0]
        kept = {"logits_to_keep": torch.tensor(columns, device=self.store.device)} if self._keeps_logits else {}
        with torch.inference_mode():
            logits = self.model(
                input_ids=rows.tokens,
                position_ids=rows.positions,
                attention_mask=rows.attended,
                past_key_values=self.store.cache(rows),
                use_cache=True,
                **kept,
            ).logits
            at = {column: i for i, column in enumerate(columns)} if kept else {c: c for c in columns}
            return logits[[row for row, _ in wanted], [at[column] for _, column in wanted]]

    def _token(self, work: Work, index: int) -> int:
        tokens = work.request.tokens
        return tokens[index] if index < len(tokens) else self._last_token[work.request.row]
