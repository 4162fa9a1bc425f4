"""How a model is run, and how tokens are drawn."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hpc.config import unhashed, unhashed_factory
from hpc.errors import UserError
from insightv.engines.base import Sampling
from insightv.engines.server.config import ServerConfig


@dataclass
class SamplingConfig:
    """How tokens are drawn, as a section of a configuration (see ``Sampling``).

    Attributes:
        temperature: 0 is greedy.
        top_p: Nucleus; 1 is off.
        repetition_penalty: 1 is off.
        max_tokens: Most tokens of one call.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_tokens: int = 1024

    def sampling(self) -> Sampling:
        """As an engine takes it."""
        return Sampling(self.temperature, self.top_p, self.repetition_penalty, self.max_tokens)

    def validate(self, name: str) -> None:
        """Checks the values; ``name`` is the section's, for the message.

        Raises:
            UserError: One of them is not possible.
        """
        for field, value, allowed, fine in (
            ("temperature", self.temperature, "0 or more", self.temperature >= 0),
            ("top_p", self.top_p, "above 0, at most 1", 0 < self.top_p <= 1),
            (
                "repetition_penalty",
                self.repetition_penalty,
                "above 0",
                self.repetition_penalty > 0,
            ),
            ("max_tokens", self.max_tokens, "1 or more", self.max_tokens >= 1),
        ):
            if not fine:
                raise UserError(f"{name}.{field} is {value}: use {allowed}")


KINDS = ("transformers", "server")
DTYPES = ("auto", "float32", "bfloat16", "float16")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass
class EngineConfig:
    """How a model is run; nothing here is meant to change what it says.

    (Padding and the composition of a batch move logits by rounding, as in any engine.)

    Attributes:
        kind: ``transformers``: a model of transformers in this process; ``server``: behind HTTP,
            as ``server`` says.
        server: Which server. Of the other keys one that is started here is told ``dtype``,
            ``context`` and ``threads``, and ``transformers serve`` the ``device``; ``encoders`` and
            ``cache_mb`` hold on our side.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1``, …
        dtype: Of the weights: ``auto`` (bfloat16 on a GPU, else float32), ``float32``,
            ``bfloat16`` or ``float16``.
        autocast: Compute matrix products in bfloat16 while the weights stay as they are; worth
            it on CPUs with bfloat16 units.
        batch_size: Most rows of a batch.
        batch_tokens: Most tokens of a batch, prompts, replies and padding together, and of what
            is remembered for the batches after it: at most two full batches, and only where the
            running one leaves room. The default keeps the keys and values of an 8B model with
            grouped queries near 34 GB.
        context: Longest prompt plus reply in tokens; 0 takes what the model was made for.
        threads: CPU threads of the model; 0 leaves it to torch.
        encoders: Threads that read and resize pictures beside the model.
        cache_mb: Memory for encoded pictures, which all paths and steps of a question share.
    """

    kind: str = unhashed("transformers")
    device: str = unhashed("auto")
    dtype: str = unhashed("auto")
    autocast: bool = unhashed(False)
    batch_size: int = unhashed(32)
    batch_tokens: int = unhashed(262_144)
    context: int = unhashed(0)
    threads: int = unhashed(0)
    encoders: int = unhashed(2)
    cache_mb: int = unhashed(512)
    server: ServerConfig = unhashed_factory(ServerConfig)

    def validate(self, name: str = "engine") -> None:
        """Checks what types cannot; ``name`` is the section's, for the message.

        Raises:
            UserError: An unknown kind, device or type, or a number out of range.
        """
        if self.kind not in KINDS:
            raise UserError(f"{name}.kind is {self.kind!r}: use {', '.join(KINDS)}")
        if not _DEVICE.fullmatch(self.device):
            raise UserError(f"{name}.device is {self.device!r}: use auto, cpu, cuda or cuda:N")
        if self.dtype not in DTYPES:
            raise UserError(f"{name}.dtype is {self.dtype!r}: use {', '.join(DTYPES)}")
        for key in ("batch_size", "batch_tokens", "encoders"):
            if getattr(self, key) < 1:
                raise UserError(f"{name}.{key} is {getattr(self, key)}: it must be at least 1")
        for key in ("context", "threads", "cache_mb"):
            if getattr(self, key) < 0:
                raise UserError(f"{name}.{key} is {getattr(self, key)}: it must not be negative")
        if self.kind == "server":
            self.server.validate(f"{name}.server")
