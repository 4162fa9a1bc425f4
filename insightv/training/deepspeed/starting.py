"""How DeepSpeed 0.19.8 is imported, configured and made to do what this backend needs."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from hpc.errors import UserError
from insightv import models
from insightv.training.config import TrainConfig

BUCKET = 10**8
"""Numbers that are exchanged at once: 0.4 GB."""


def imported() -> Any:
    """The deepspeed package; called within `insightv.models.deepspeed_told`.

    Raises:
        UserError: It is not installed.
    """
    try:
        import accelerate  # noqa: F401  (transformers cuts a model through it)
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"backend=deepspeed needs {error.name}: pip install -e '.[deepspeed]'"
        ) from None
    # It calls functions that torch 2.13 has newer names for.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Nothing is compiled on the nodes: the extension it would build speeds up inference only.
    deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It keeps the groups of an earlier training, which are gone with it.
    deepspeed.utils.groups._release_process_group_references(None)
    return deepspeed


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    zero: dict[str, Any] = {
        "stage": config.deepspeed.zero_stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if config.deepspeed.offload:
        pinned = models.pick_device(config.device).startswith("cuda")
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    return {
        "train_micro_batch_size_per_gpu": 1,  # ours are made by tokens; this divides nothing
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.grad_clip,
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": True},
        # Gradients are summed in fp32, over micro-batches and over ranks.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        # torch's AdamW runs on a CPU too, without anything to compile.
        "zero_force_ds_cpu_optimizer": False,
    }


@contextmanager
def cut_while_loading(settings: dict[str, Any]) -> Iterator[None]:
    """Models that transformers loads meanwhile are cut over the ranks, tensor by tensor."""
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    kept = HfDeepSpeedConfig(settings)  # transformers holds a weak reference to it
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del kept


@contextmanager
def norms_up_to(bound: float, optimizer: Any) -> Iterator[list[float]]:
    """Lets DeepSpeed take a gradient norm above ``bound`` for one that is no number (0.19.8).

    Each of its optimizers asks that of the global norm, the same on all ranks, before it changes
    anything; and then leaves the step out.

    Yields:
        The norm, once it is known; nothing if it is no number.
    """
    module: Any = sys.modules[type(optimizer).__module__]
    invalid, norms = module.is_invalid_grad_norm, []

    def refused(norm: Tensor) -> bool:
        if invalid(norm):
            return True
        norms.append(float(norm))
        return norms[-1] > bound

    module.is_invalid_grad_norm = refused
    try:
        yield norms
    finally:
        module.is_invalid_grad_norm = invalid
