"""A model as stages see it, and a run's pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hpc.stages import Context, Counts, Mapper
from insightv.config import ChainConfig
from insightv.folders import model_folder
from insightv.pictures import Pictures
from insightv.prompting import Prompts, load_prompts

if TYPE_CHECKING:
    from insightv.engines import Engine, EngineConfig

Load = Callable[[Context], Mapper]
Run = Callable[[Context], Counts | None]


@dataclass(frozen=True)
class Source:
    """A model as stages see it.

    Attributes:
        path: What the configuration names, or its folder in the run.
        prompts: The set it is spoken to with.
        stage: The stage that makes it; empty for configured ones.
        digest: Of a configured one.
        engine_config: How it is run, if not like the others.
    """

    path: str
    prompts: str
    stage: str = ""
    digest: str = ""
    engine_config: EngineConfig | None = field(default=None, compare=False)

    @property
    def shape(self) -> dict[str, str]:
        """What a stage that uses it is known by; a trained one also by the stage behind it."""
        model = self.path if self.stage else self.digest
        return {"model": model, "prompts": self.texts.version}

    @property
    def after(self) -> tuple[str, ...]:
        """What must be complete before it can be loaded."""
        return (self.stage,) if self.stage else ()

    @property
    def texts(self) -> Prompts:
        """Its prompts."""
        return load_prompts(self.prompts)

    def folder(self, run: Path) -> Path:
        """Where it is."""
        return run / self.path if self.stage else model_folder(self.path)

    def engine(self, config: ChainConfig, context: Context, among: int = 1) -> Engine:
        """The model, loaded, with every picture of the run.

        Args:
            config: The chain's.
            context: The stage's.
            among: How many engines the stage runs at once.
        """
        from insightv.engines import load_engine

        return load_engine(
            self.folder(context.run),
            self.engine_config or config.engine,
            pictures(context.run),
            context.directory / "logs",
            1 / among,
        )


def pictures(run: Path) -> Pictures:
    """Every picture of a run."""
    return Pictures(sorted(run.glob("stages/questions-*/pictures")))
