"""Sampling as its definitions read, in float64 and without any array tricks; what sampler.py is tested against."""

from __future__ import annotations

import math
from collections import Counter

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pippin.types import Request, SamplingParams

Floats = npt.NDArray[np.float64]
MASK = 2**64 - 1


def edited_logits(logits: Floats, request: Request, tokens: list[int], vocab: int) -> Floats:
    """Logits of one row after penalties, bias and prohibitions; ``tokens`` are all that exist, newest included."""
    p = request.params
    out = np.array(logits[:vocab], np.float64)
    answer = Counter(tokens[request.num_prompt :])
    for i in range(vocab):
        if i in tokens:
            out[i] = out[i] / p.repetition_penalty if out[i] > 0 else out[i] * p.repetition_penalty
        out[i] -= p.frequency_penalty * answer[i] + p.presence_penalty * (answer[i] > 0)
        out[i] += p.logit_bias.get(i, 0.0)
        stops = set(p.stop_token_ids) | (set() if p.ignore_eos else request.eos)
        if i in stops and len(tokens) - request.num_prompt < p.min_new_tokens:
            out[i] = -math.inf
    return out


def probabilities(edited: Floats, temperature: float) -> Floats:
    """softmax(logits / temperature)"""
    scaled = (edited - edited.max()) / temperature
    weights = np.exp(scaled)
    return np.asarray(weights / weights.sum())


def kept(p: Floats, params: SamplingParams, slack: float = 0.0) -> set[int]:
    """The ids that all filters leave. ``slack`` widens (narrows, if negative) the limits of top_p and min_p."""
    ranked = sorted(range(len(p)), key=lambda i: (-p[i], i))
    left, mass = set(), 0.0
    for rank, i in enumerate(ranked):
        in_k = params.top_k < 0 or rank < params.top_k
        in_p = params.top_p == 1 or mass < params.top_p + slack or rank == 0
        in_min = p[i] >= params.min_p * p[ranked[0]] - slack or rank == 0
        if in_k and in_p and in_min:
            left.add(i)
        mass += p[i]
    return left


def filtered(p: Floats, params: SamplingParams) -> Floats:
    """The distribution that is drawn from."""
    left = kept(p, params)
    out = np.array([q if i in left else 0.0 for i, q in enumerate(p)])
    return np.asarray(out / out.sum())


def noise(seed: int, position: int, vocab: int) -> Floats:
    """Gumbel noise of a row, from MLX's uniform numbers of the row's key."""

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
        return z ^ (z >> 31)

    key = mix(mix(seed & MASK) + position * 0x9E3779B97F4A7C15 & MASK)
    uniform = mx.random.uniform(shape=(vocab,), key=mx.array([key >> 32, key & 0xFFFFFFFF], dtype=mx.uint32))
    return np.asarray(-np.log(-np.log1p(-np.maximum(np.asarray(uniform, np.float64), 2.0**-33))))
