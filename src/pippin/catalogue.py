"""Which architectures are served, by what, and what was checked of each: the outcome of ``make sweep-models``."""

from __future__ import annotations

from importlib.resources import files

import msgspec

FORMATS = (
    "float32, float16, bfloat16; affine 2 to 8 bits, mxfp4, mxfp8, nvfp4; AWQ (4 bits) and GPTQ (2, 4, 8 bits, no "
    "desc_act); fp8 with ue8m0 scales; bitnet. Other fp8, compressed-tensors and modelopt (NVFP4) where mlx-lm's class "
    "unpacks them (DeepSeek V3, Kimi, Mistral 4 …). GGUF of Llama, Qwen2 and Qwen3 with F32, F16, BF16, "
    "Q8_0, Q4_0, Q4_1, Q6_K and Q2_K"
)
"""What checkpoints may hold, of any architecture but for the last: what mlx-lm reads, and GPTQ."""

ON_LOAD = "--quantization mlx_q4, mlx_q8 (any that is not quantized); pippin convert --q-bits 2, 3, 4, 5, 6, 8"


UNTRIED = "not swept"
"""How the refusal begins of those that nobody has tried: when one is loaded, the probe decides."""


class Architecture(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An architecture of mlx-lm: its attention ``backend`` and the checks that it passed, or why it is not served."""

    architecture: str
    backend: str = ""
    checks: tuple[str, ...] = ()
    refusal: str = ""


def architectures(containing: str = "") -> list[Architecture]:
    """All that were swept, by name; only those whose name has ``containing`` in it."""
    text = (files("pippin") / "models" / "checked.json").read_bytes()
    found = msgspec.json.decode(text, type=list[Architecture])
    return [a for a in found if containing.lower() in a.architecture.lower()]
