"""Writes a model folder in Hugging Face format, tensor after tensor, by one rank or several."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hpc.disk import share

FILE_BYTES = 4 * 2**30
"""A written file holds at most about so much, and so does a writing rank's memory."""
INDEX = "model.safetensors.index.json"


class Writer:
    """Writes a stage's tensors into files of bounded size.

    A disk that fails is remembered, for others are waiting for the next tensor: `check` raises.
    """

    def __init__(self, target: Path, stage: int):
        """Files go into ``target`` and are named by the stage's number."""
        self._target, self._stage, self._files = target, stage, 0
        self._trouble: Exception | None = None
        self._held: dict[str, Tensor] = {}
        self._bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes one tensor; writes what is held before it would be too much."""
        if self._held and self._bytes + tensor.nbytes > FILE_BYTES:
            self.close()
        self._held[name] = tensor.contiguous()
        self._bytes += tensor.nbytes

    def close(self) -> None:
        """Writes what is held."""
        if self._held:
            file = self._target / f"stage-{self._stage:05d}-{self._files:05d}.safetensors"
            try:
                if self._trouble is None:
                    save_file(self._held, file, metadata={"format": "pt"})
            except (OSError, SafetensorError) as error:
                self._trouble = error
            self._files += 1
        self._held, self._bytes = {}, 0

    def check(self) -> None:
        """Raises what went wrong, if anything; called when nobody waits any more."""
        if self._trouble is not None:
            raise self._trouble


def finish(source: Path, target: Path, dtype: str) -> None:
    """Gives files their final names, an index, and everything that is no weight.

    Args:
        source: A folder of the same model: its configuration, tokenizer and processor.
        target: Where every `Writer` is closed.
        dtype: Of the tensors, by torch's name.
    """
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith((".safetensors", ".bin", "index.json")):
            shutil.copyfile(file, target / file.name)
    config = json.loads((target / "config.json").read_text())
    config["dtype"] = dtype
    config.pop("torch_dtype", None)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    parts = sorted(target.glob("stage-*.safetensors"))
    if len(parts) == 1:
        parts[0].rename(target / "model.safetensors")
        share(target)
        return
    placed: dict[str, str] = {}
    size = 0
    for number, part in enumerate(parts, 1):
        file = target / f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        part.rename(file)
        size += file.stat().st_size
        with safe_open(file, framework="pt") as opened:
            placed |= dict.fromkeys(opened.keys(), file.name)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))}
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    share(target)
