"""Whether a worker's models have the GPUs that a cluster profile gives it.

Asked before anything is queued; what a worker finds when it runs is up to the server.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hpc.errors import UserError

if TYPE_CHECKING:
    from hpc.cluster import Resources
    from insightv.engines.config import EngineConfig
    from insightv.engines.server.config import ServerConfig

_SIZES = {
    "--tensor-parallel-size": "tensor",
    "-tp": "tensor",
    "--tp": "tensor",
    "--tp-size": "tensor",
    "--pipeline-parallel-size": "pipeline",
    "-pp": "pipeline",
    "--pp-size": "pipeline",
    "--data-parallel-size": "data",
    "-dp": "data",
    "--dp": "data",
    "--dp-size": "data",
}
"""Words of vLLM and SGLang that say over how many GPUs one server spreads."""
_WITHIN = ("--enable-dp-attention", "--data-parallel-size-local")
"""With these, data parallel ranks are not all GPUs of their own here."""


def usable(engines: Sequence[EngineConfig]) -> int | None:
    """GPUs that a worker with these engines computes on; None: as many as it gets.

    Engines of one worker share its GPUs, so the one that wants most decides.
    """
    wanted = [_wanted(engine) for engine in engines]
    known = [count for count in wanted if count is not None]
    return max(known, default=0) if len(known) == len(wanted) else None


def fit(stage: str, engines: Sequence[EngineConfig], asked: Resources) -> str:
    """Holds the servers that a worker starts against the GPUs it gets.

    A profile without GPUs is not held against anything: servers compute on processors too.

    Args:
        stage: Its name in the chain.
        engines: Those of its models.
        asked: What the profile gives each worker.

    Returns:
        Nothing that a plan should tell.

    Raises:
        UserError: The servers need more GPUs, or cannot divide them.
    """
    for engine in engines:
        server, wanted = engine.server, _wanted(engine)
        if engine.kind != "server" or not server.command or not asked.gpus or wanted == 0:
            continue
        count = server.replicas
        if wanted is not None and wanted > asked.gpus:
            raise UserError(
                f"stage {stage}: engine.server wants {wanted} GPUs a worker (replicas {count} x "
                f"{wanted // count} by its options), and the profile gives {asked.gpus}; write "
                f"`stages: {{{stage}: {{gpus: {wanted}}}}}` there, or `gpus` for all of its kind, "
                "or ask less of the engine"
            )
        if asked.gpus % count:
            raise UserError(
                f"stage {stage}: engine.server.replicas is {count}, and the {asked.gpus} GPUs that "
                "the profile gives a worker cannot be divided so; give it a multiple (gpus), or "
                "change replicas"
            )
    return ""


def _wanted(engine: EngineConfig) -> int | None:
    """GPUs of one engine; None where only its command knows."""
    server = engine.server
    if engine.kind == "server" and server.url:
        return 0  # they are elsewhere
    if engine.kind == "server" and server.preset != "transformers":
        each = _each(server)
        return None if each is None else each * server.replicas
    if engine.device == "cpu":
        return 0
    return server.replicas if engine.kind == "server" else 1


def _each(server: ServerConfig) -> int | None:
    """GPUs that one server spreads over, as its words tell; None where they do not."""
    words = [*server.command, *server.options]
    sizes = dict(_told(words))
    if any(word.partition("=")[0].replace("_", "-") in _WITHIN for word in words):
        sizes.pop("data", None)
    known = sizes or server.preset not in ("", "llamacpp")  # which takes all GPUs that it sees
    return math.prod(sizes.values()) if known else None


def _told(words: Sequence[str]) -> Iterator[tuple[str, int]]:
    """The parallel sizes among a command's words, as ``--name N`` or ``--name=N``."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        what = _SIZES.get(name.replace("_", "-"))
        number = value if equals else following
        if what and number.isdigit() and int(number):
            yield what, int(number)
