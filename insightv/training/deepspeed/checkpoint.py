"""Checkpoints of a model whose fp32 weights and moments lie in ranges on many ranks.

DeepSpeed's own are pickles that fit one layout. Ours are safetensors under the tensors' names,
a file a rank: what some ranks wrote, any number of ranks reads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hpc.errors import UserError


@dataclass(frozen=True)
class Part:
    """Where this rank holds its part of a trained tensor.

    Attributes:
        flat: The fp32 weights of many tensors; the optimizer's state goes by it.
        at: Where the part begins in ``flat``.
        start: Where it begins in the tensor, flattened.
        count: Its numbers.
    """

    flat: Tensor
    at: int
    start: int
    count: int


def write(
    path: Path, ranks: int, steps: int, places: dict[str, list[int]], tensors: dict[str, Tensor]
) -> None:
    """Writes one rank's file.

    Args:
        path: A name that `Saved` looks for: ``zero-*.safetensors``.
        ranks: How many ranks write one each.
        steps: Optimizer steps behind it.
        places: For each tensor this rank holds a part of: where the part begins, how many
            numbers it has, and how many the whole tensor has.
        tensors: ``KIND.NAME`` of each part and kind (``weight``, ``exp_avg``, ...), flat; and
            what else is to be kept, under names that begin with ``random.``; on the CPU.
    """
    described = {"ranks": ranks, "steps": steps, "places": places}
    save_file(tensors, path, metadata={"zero": json.dumps(described)})


class Saved:
    """A checkpoint's parts, whichever ranks wrote them.

    Attributes:
        ranks: How many wrote it.
        steps: Optimizer steps behind it.
        sizes: How many numbers each trained tensor has.
    """

    def __init__(self, folder: Path):
        """Opens every file; nothing is read but their headers.

        Raises:
            UserError: One is missing or damaged.
        """
        self.sizes: dict[str, int] = {}
        self._pieces: dict[str, list[tuple[Any, int, int]]] = {}
        self._files = []
        for path in sorted(folder.glob("zero-*.safetensors")):
            try:
                file = safe_open(path, framework="pt")
                described = json.loads(file.metadata()["zero"])
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"checkpoint {path} is damaged ({error}); remove it") from None
            self._files.append(file)
            self.ranks, self.steps = int(described["ranks"]), int(described["steps"])
            for name, (start, count, size) in described["places"].items():
                self.sizes[name] = size
                self._pieces.setdefault(name, []).append((file, start, count))
        if not self._files or len(self._files) != self.ranks:
            raise UserError(f"checkpoint {folder} is not whole: it lacks files; remove it")

    def read(self, kind: str, name: str, start: int, into: Tensor) -> None:
        """Fills ``into`` with the numbers of a tensor from ``start`` on."""
        stop = start + len(into)
        for file, first, count in self._pieces[name]:
            a, b = max(start, first), min(stop, first + count)
            if a < b:
                piece = file.get_slice(f"{kind}.{name}")[a - first : b - first]
                into[a - start : b - start] = piece.to(into.device)

    def random(self, rank: int) -> dict[str, Tensor]:
        """A rank's random states, by name."""
        file = self._files[rank]
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith("random.")}  # noqa: SIM118
