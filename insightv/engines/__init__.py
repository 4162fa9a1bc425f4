"""Models that complete chats with pictures, behind one interface."""

from __future__ import annotations

from pathlib import Path

from insightv.engines.base import Completion, Engine, Request, Sampling
from insightv.engines.config import EngineConfig, SamplingConfig
from insightv.pictures import Pictures

__all__ = [
    "Completion",
    "Engine",
    "EngineConfig",
    "Request",
    "Sampling",
    "SamplingConfig",
    "load_engine",
]


def load_engine(
    model: str | Path,
    config: EngineConfig,
    pictures: Pictures,
    logs: Path | None = None,
    share: float = 1.0,
) -> Engine:
    """Loads a model folder into the configured kind of engine.

    Args:
        model: A folder in Hugging Face format.
        config: How to run it.
        pictures: Where requests find their pictures.
        logs: Folder for what a server says that is started for it.
        share: Its part of the GPUs, where other engines run beside it.

    Raises:
        UserError: The folder or the configuration is wrong.
    """
    config.validate()
    # Imported when an engine is wanted: torch takes seconds, and the command line is instant.
    if config.kind == "server":
        from insightv.engines.server.engine import ServerEngine

        return ServerEngine(model, config, pictures, logs, share)
    from insightv.engines.transformers import TransformersEngine

    return TransformersEngine(model, config, pictures)
