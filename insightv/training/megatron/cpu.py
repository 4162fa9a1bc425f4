"""What megatron-core needs to run where there is no CUDA device.

megatron-core 0.16.1 asks for its device with ``torch.cuda.current_device()`` or by the name
``"cuda"`` all over its source, also where the computation is the same on a CPU and gloo:
``tensor_parallel/mappings.py`` and ``pipeline_parallel/p2p_communication.py`` (buffers),
``pipeline_parallel/schedules.py`` (token counts), ``tensor_parallel/random.py`` (generator
states), ``optimizer/optimizer.py`` and ``clip_grads.py`` (scalars, ``Tensor.type()`` compared
with ``"torch.cuda.FloatTensor"``). Here those calls are answered with the CPU. So the same
code path that trains on GPUs is tested without one.

Where a CUDA device exists, `install` returns at once and `calls` is an empty context: nothing
is replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
_TYPES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


class _Nothing:
    """A stream or event of a device that computes in order: nothing to wait for."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_, **__: None


class _OnCpu(TorchFunctionMode):
    """Tensors asked for on ``cuda`` come on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.type and len(args) == 1 and not kwargs:
            return _TYPES.get(args[0].dtype) or func(*args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if func is Tensor.to:
            args = tuple(CPU if _is_cuda(value) else value for value in args)
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def calls() -> AbstractContextManager[Any]:
    """Inside it megatron-core may be called; a CUDA device makes it an empty context."""
    return nullcontext() if torch.cuda.is_available() else _OnCpu()


def install() -> None:
    """Answers ``torch.cuda`` queries with the CPU, once a process; a no-op with CUDA.

    Call it before megatron-core is imported.
    """
    if torch.cuda.is_available() or getattr(torch.cuda, "_answered_by_cpu", False):
        return
    cuda: Any = torch.cuda
    answers: dict[str, Any] = {
        "current_device": lambda: CPU,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "max_memory_reserved": lambda *_: 0,
        "get_device_capability": lambda *_: (0, 0),
        "is_current_stream_capturing": lambda: False,
        "current_stream": _Nothing,
        "default_stream": _Nothing,
        "stream": _Nothing,
        "Stream": _Nothing,
        "Event": _Nothing,
        "_answered_by_cpu": True,
    }
    for name, answer in answers.items():
        setattr(cuda, name, answer)
    cuda.random.get_rng_state = cuda.get_rng_state
    cuda.random.set_rng_state = cuda.set_rng_state
    # This one goes past torch.cuda to the C API.
    import megatron.core.tensor_parallel.random as random

    def get_state(*_: Any, **__: Any) -> Tensor:
        return torch.get_rng_state()

    def set_state(state: Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    random._get_cuda_rng_state, random._set_cuda_rng_state = get_state, set_state
