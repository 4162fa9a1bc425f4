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


def load_engine(model: str | Path, config: EngineConfig, pictures: Pictures) -> Engine:
    """Loads a model folder into the configured kind of engine.

    Args:
        model: A folder in Hugging Face format.
        config: How to run it.
        pictures: Where requests find their pictures.

    Raises:
        UserError: The folder or the configuration is wrong.
    """
    config.validate()
    # Imported when an engine is wanted: torch takes seconds, and the command line is instant.
    from insightv.engines.transformers import TransformersEngine

    return TransformersEngine(model, config, pictures)
