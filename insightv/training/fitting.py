"""Whether a training can be made with the processes and GPUs that a cluster profile gives it.

Asked before anything is queued, where there may be neither a GPU nor the base's own machine: what
can be told from numbers is told, and what a folder says is held against them as far as it can be
read here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hpc.errors import UserError, one_line
from hpc.stages import Package
from insightv.training.config import TrainConfig

if TYPE_CHECKING:
    from hpc.cluster import Resources
    from insightv.training.megatron.estimate import Memory
    from insightv.training.memory import Base

PACKAGES = {
    "deepspeed": (
        Package("accelerate", "accelerate", "pip install -c constraints.txt '.[deepspeed]'"),
        Package("deepspeed", "deepspeed", "pip install -c constraints.txt '.[deepspeed]'"),
    ),
    "megatron": (
        Package("megatron-core", "megatron.core", "pip install -c constraints.txt '.[megatron]'"),
    ),
}
"""What a training imports beside torch and transformers, by its backend."""


def fit(stage: str, training: TrainConfig, base: Path, asked: Resources) -> str:
    """Holds a training against what it gets.

    Args:
        stage: Its name in the chain.
        training: What shapes it.
        base: Folder of the model that its own descends from.
        asked: What the profile gives it.

    Returns:
        Its layout and the memory of a rank, for a plan; empty for one process of torch that
        was to be one and whose GPU is not known.

    Raises:
        UserError: It cannot be divided among so many processes, or does not fit into the memory
            of their GPUs.
    """
    ranks = asked.nodes * asked.tasks
    given = f"{_count(asked.nodes, 'node')} x {_count(asked.tasks, 'task')}"
    if training.backend == "torch":
        unused = f"; {given} of the profile are not used" if ranks > 1 else ""
        if not asked.gpu_memory:
            return f"one process of backend=torch{unused}" if unused else ""
        ranks, given = 1, f"one process{unused}"
    elif asked.gpus and asked.tasks > asked.gpus:
        raise UserError(
            f"stage {stage}: the profile gives it {asked.tasks} tasks a node and {asked.gpus} "
            "GPUs: ranks cannot share one; set both to the same"
        )
    said = _laid(stage, training, ranks, asked, given)
    if not (base / "config.json").is_file():
        return f"{said}; {base} is not here: memory is not estimated"
    try:
        from insightv.training.memory import base_of

        found = base_of(base)
    except Exception as error:  # what transformers raises of a folder is of many kinds
        return f"{said}; {base} cannot be read here ({one_line(error)}): memory is not estimated"
    if training.backend == "megatron":
        _refuse_shape(stage, training, found, given)
    return f"{said}, {_held(stage, training, found, ranks, asked, given)}"


def _laid(stage: str, training: TrainConfig, ranks: int, asked: Resources, given: str) -> str:
    """How the ranks are used, in words."""
    if training.backend == "torch":
        return given
    said, copies = f"ZeRO-{training.deepspeed.zero_stage} over {_count(ranks, 'rank')}", ranks
    if training.backend == "megatron":
        layout = training.megatron
        tensor, pipeline = layout.tensor_parallel, layout.pipeline_parallel
        whole = layout.model_ranks
        if min(tensor, pipeline) < 1 or ranks % whole:
            alone = " (`insightv run` starts one process only)" if ranks == 1 else ""
            raise UserError(
                f"stage {stage}: megatron.tensor_parallel {tensor} x pipeline_parallel {pipeline} "
                f"wants a multiple of {whole} ranks, and the profile gives {given} = {ranks}"
                f"{alone}: change nodes or tasks of `training` there, or the layout"
            )
        copies = ranks // whole
        said = f"TP {tensor} x PP {pipeline} x DP {copies} on {given}"
        if asked.tasks % tensor:
            said += "; tensor parallel ranks of several nodes, which is slow"
    if training.batch_size < copies:
        said += f"; batch_size {training.batch_size} leaves {copies - training.batch_size} idle"
    return said


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _refuse_shape(stage: str, training: TrainConfig, base: Base, given: str) -> None:
    """Refuses what the megatron backend would refuse of this base."""
    from insightv.training.megatron.families import dialect_of, shape_of

    try:
        shape = shape_of(base.config)
        dialect_of(base.config.model_type, base.names.__contains__, [])
        training.megatron.validate(shape)
    except UserError as error:
        raise UserError(f"stage {stage} ({given}): {error}") from None


def _held(
    stage: str, training: TrainConfig, base: Base, ranks: int, asked: Resources, given: str
) -> str:
    """The memory of a rank, in words; refuses what is more than its GPU's."""
    from insightv.training.memory import needed

    memory = needed(training, base, ranks)
    parts = ", ".join(
        f"{name} {size / 1e9:.1f}" for name, size in vars(memory).items() if size >= 5e7
    )
    said = f"about {memory.total / 1e9:.1f} GB a rank ({parts}; computed, not measured)"
    if asked.gpus and asked.gpu_memory and memory.total > asked.gpu_memory * 1e9:
        raise UserError(
            f"stage {stage}: backend={training.backend} on {given} needs {said}, and a GPU there "
            f"has {asked.gpu_memory:g} (gpu_memory): {_remedy(training, memory)}"
        )
    return said


def _remedy(training: TrainConfig, memory: Memory) -> str:
    """What would need less."""
    ways = []
    if 4 * memory.activations > memory.total:
        ways = [] if training.recompute else ["set recompute=true"]
        ways.append("lower tokens_per_micro_batch")
    if training.backend == "torch":
        ways.append("use backend=deepspeed or megatron on more GPUs")
    elif training.backend == "megatron":
        ways.append("raise megatron.tensor_parallel or pipeline_parallel")
    else:
        ways.append("give it more nodes")
        if training.deepspeed.zero_stage < 3:
            ways.append(f"raise deepspeed.zero_stage above {training.deepspeed.zero_stage}")
    return ", or ".join(ways)
