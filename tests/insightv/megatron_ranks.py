"""What each rank does in the tests of the megatron backend: real processes, gloo, no GPU."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import distributed

WORLD = 4
FAMILIES = ("llava-next", "llava-onevision", "qwen2.5-vl")
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tensor_parallel": 2},
    "pp2": {"pipeline_parallel": 2},
    "tp2-pp2": {"tensor_parallel": 2, "pipeline_parallel": 2},
    "tp2-sp": {"tensor_parallel": 2, "sequence_parallel": True},
    "tp2-pp2-sp": {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": True},
    "pp2-virtual": {"pipeline_parallel": 2, "virtual_stages": 2},
    "pp2-uneven": {"pipeline_parallel": 2, "layers": [1, 3]},
}
WIDER = {"tp2-pp4-sp": {"tensor_parallel": 2, "pipeline_parallel": 4, "sequence_parallel": True}}
"""Layouts that want more ranks."""
RECOMPUTED = ("tp2-pp2-sp",)
FROZEN = ("pp2-uneven",)
"""Layouts under which layers are computed again, and the vision tower is frozen."""


_HEAVY = (
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.pipeline_parallel",
    "rich.table",
    "torch.nn.attention.flex_attention",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava_next.modeling_llava_next",
    "transformers.models.llava_onevision.modeling_llava_onevision",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.siglip.modeling_siglip",
)


def _processes() -> Any:
    context = multiprocessing.get_context("forkserver")
    # Imported once and forked, not once a rank. Only what is installed can be preloaded: the
    # fork server does not know this process's sys.path.
    context.set_forkserver_preload(list(_HEAVY))
    os.environ["OMP_NUM_THREADS"] = "1"
    return context


def construct(out: Path, *layout: Any) -> None:
    """`benchmarks/layouts.py` for one layout, in a process of its own; JSON into ``out``."""
    process = _processes().Process(target=_construct, args=(out, layout))
    process.start()
    process.join()
    assert process.exitcode == 0


def _construct(out: Path, layout: Any) -> None:
    import json
    import runpy

    script = Path(__file__).parents[2] / "benchmarks" / "layouts.py"
    out.write_text(json.dumps(runpy.run_path(str(script))["construct"](*layout)))


def spawn(work: Any, folder: Path, *arguments: Any, dies: bool = False, world: int = WORLD) -> None:
    """Runs ``work(rank, folder, *arguments)`` on ``world`` ranks; raises what a rank raised.

    ``dies`` says that rank 1 kills itself.
    """
    for left in [folder / "store", *folder.glob("error-*")]:
        left.unlink(missing_ok=True)
    context = _processes()
    ranks = [
        context.Process(target=_rank, args=(work, rank, world, folder, arguments))
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    try:
        while any(rank.is_alive() for rank in ranks):
            for rank in ranks:
                rank.join(0.2)
            if any(rank.exitcode for rank in ranks):
                break  # as torchrun and srun do
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    if dies:
        assert ranks[1].exitcode == -signal.SIGKILL
        return
    errors = [file.read_text() for file in sorted(folder.glob("error-*"))]
    assert not errors, errors[0]
    assert [rank.exitcode for rank in ranks] == [0] * world


def _rank(work: Any, rank: int, world: int, folder: Path, arguments: Any) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), world)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        work(rank, folder, *arguments)
        distributed.barrier()
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)
    distributed.destroy_process_group()


@dataclass(frozen=True)
class Case:
    """Micro-batches of one family, each a padded row or two, as plain tensors in files."""

    folder: Path
    batches: int

    def batch(self, number: int) -> dict[str, torch.Tensor]:
        name = f"{self.folder.name}-batch-{number}.safetensors"
        return load_file(self.folder.with_name(name))


def parity(rank: int, folder: Path, cases: dict[str, Case], runs: list[tuple[str, str]]) -> None:
    """Logits, gradients and an export of each (case, layout)."""
    from megatron.core import parallel_state

    from insightv.training.megatron.layout import Layout
    from insightv.training.megatron.model import initialise

    for name in dict.fromkeys(layout for _, layout in runs):
        layout = Layout(**LAYOUTS[name])
        initialise(layout)
        for case, asked in runs:
            if asked == name:
                _compare(cases[case], layout, name, folder / f"{case}-{name}")
        parallel_state.destroy_model_parallel()


def _compare(case: Case, layout: Any, name: str, out: Path) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
    from transformers import AutoConfig

    from insightv.models import freeze_vision
    from insightv.training.megatron.families import shape_of
    from insightv.training.megatron.model import build, logprobs
    from insightv.training.megatron.schedule import forward_backward, replicate
    from insightv.training.megatron.weights import export, load, stage_tensors

    config = AutoConfig.from_pretrained(case.folder)
    pieces = build(config, layout, recompute=name in RECOMPUTED)
    load(pieces, config, layout, case.folder)
    if name in FROZEN and pieces[0].vision is not None:
        freeze_vision(pieces[0].vision)
    export(pieces, config, layout, case.folder, out / "model")

    copy = parallel_state.get_data_parallel_rank()
    copies = parallel_state.get_data_parallel_world_size()
    numbers = list(range(case.batches))[copy::copies]
    raw = [case.batch(number) for number in numbers]
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    first = parallel_state.get_tensor_model_parallel_rank() == 0

    def whole(logits: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        every = gather_from_tensor_model_parallel_region(logits)
        return every.new_zeros(()), every[..., : shape_of(config).vocabulary]

    found = forward_backward(pieces, [inputs_of(batch) for batch in raw], whole, backward=False)
    if last and first:
        for number, logits in zip(numbers, found, strict=True):
            save_file({"logits": logits.contiguous()}, out / f"logits-{number}.safetensors")

    def nll(logits: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch = raw[number]
        share = -logprobs(logits, batch["targets"]).sum() / batch["total"]
        return share, share.detach().clone()

    models = replicate(pieces)
    shares = forward_backward(
        models, [inputs_of(batch, targets=True) for batch in raw], nll, backward=True
    )
    if last and first:
        save_file({"loss": torch.stack(shares).sum()}, out / f"loss-{copy}.safetensors")
    stage = parallel_state.get_pipeline_model_parallel_rank()
    if copy == 0:
        gradients = dict(
            stage_tensors(
                pieces, shape_of(config), layout, of=lambda one: getattr(one, "main_grad", None)
            )
        )
        if gradients:
            save_file(gradients, out / f"gradients-{stage}.safetensors")


def adam(rank: int, folder: Path, case: Case, plan: list[tuple[str, str, int, int]]) -> None:
    """Runs of Adam: (name, layout, first step, end); a run that starts later resumes.

    Each leaves its losses, a checkpoint and the model as a folder; the checkpoint it resumes
    from is that of the run named before the colon.
    """
    from megatron.core import parallel_state
    from transformers import AutoConfig

    from insightv.training.megatron.families import shape_of
    from insightv.training.megatron.layout import Layout
    from insightv.training.megatron.model import build, initialise, logprobs
    from insightv.training.megatron.optimizer import Adam
    from insightv.training.megatron.schedule import forward_backward, replicate
    from insightv.training.megatron.weights import export, load

    config = AutoConfig.from_pretrained(case.folder)
    shape = shape_of(config)
    for name, laid, start, end in plan:
        layout = Layout(**LAYOUTS[laid])
        initialise(layout)
        dtype = torch.bfloat16 if name.startswith("bf16") else torch.float32
        pieces = build(config, layout, dtype)
        load(pieces, config, layout, case.folder)
        models = replicate(pieces, distributed_optimizer=True)
        optimizer = Adam(models, RATE, clip=CLIP)
        if start:
            optimizer.resume(pieces, shape, layout, folder / name.partition(":")[0] / "state")
        copy = parallel_state.get_data_parallel_rank()
        copies = parallel_state.get_data_parallel_world_size()
        raw = [case.batch(number) for number in range(case.batches)[copy::copies]]

        def nll(
            logits: torch.Tensor, number: int, raw: Any = raw
        ) -> tuple[torch.Tensor, torch.Tensor]:
            batch = raw[number]
            share = -logprobs(logits, batch["targets"]).sum() / batch["total"]
            return share, share.detach().clone()

        losses, norms = [], []
        for _ in range(start, end):
            inputs = [inputs_of(batch, targets=True) for batch in raw]
            shares = forward_backward(models, inputs, nll)
            norm, applied = optimizer.step(RATE)
            assert applied
            norms.append(norm)
            losses.append(torch.stack(shares).sum() if shares else torch.zeros(()))
        assert not optimizer.step(RATE, bound=0.0)[1]
        out = folder / name
        (out / "state").mkdir(parents=True, exist_ok=True)
        optimizer.snapshot(pieces, shape, layout)(out / "state")
        distributed.barrier()
        export(pieces, config, layout, case.folder, out / "model")
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        if last and parallel_state.get_tensor_model_parallel_rank() == 0:
            numbers = {"losses": torch.stack(losses), "norms": torch.tensor(norms)}
            save_file(numbers, out / f"losses-{copy}.safetensors")
        parallel_state.destroy_model_parallel()


@dataclass(frozen=True)
class Run:
    """A training by `insightv.training.trainer`.

    Attributes:
        name: Its folder; where one is there already, that training goes on.
        layout: One of `LAYOUTS`.
        config: Keys of the training.
        pairs: Whether it is DPO.
        stop_at: Asked to stop after so many steps of this run.
        descent: Whether AdamW's step is replaced by plain gradient descent.
        kill: ``before``, ``during`` or ``after`` the save behind step 3: rank 1 kills itself.
    """

    name: str
    layout: str
    config: dict[str, Any]
    pairs: bool = False
    stop_at: int = 0
    descent: bool = False
    kill: str = ""


def trainings(rank: int, folder: Path, base: Path, runs: list[Run]) -> None:
    """Trainings one after the other; rows, pictures and the reference's digest in ``folder``."""
    import json

    from training_case import Here

    from insightv.pictures import Pictures
    from insightv.training.config import DPOConfig, SFTConfig
    from insightv.training.megatron.layout import Layout
    from insightv.training.trainer import train_dpo, train_sft

    made = json.loads((folder / "data.json").read_text())
    pictures = Pictures([folder / "pictures"])
    for run in runs:
        place, layout = folder / run.name, Layout(**(LAYOUTS | WIDER)[run.layout])
        values = {"backend": "megatron", "megatron": layout, **run.config}
        common = (pictures, place / "model", Here(place / "stage", run.stop_at))
        if run.kill and rank == 1:
            _die(run.kill)
        torch.optim.AdamW.step = descend if run.descent else _ADAM  # type: ignore[method-assign]
        if run.pairs:
            train_dpo(DPOConfig(**values), base, made["pairs"], *common, made["reference"])
        else:
            train_sft(SFTConfig(**values), base, made["samples"], *common)


def agreeing(rank: int, folder: Path, trouble: str) -> None:
    """What `Ranks` promises: values in order, one rank's trouble ends all, threads apart."""
    from concurrent.futures import ThreadPoolExecutor

    from hpc.errors import UserError
    from insightv.training.config import TrainConfig
    from insightv.training.ranks import joined

    with joined(TrainConfig(backend="megatron", device="cpu")) as ranks:
        assert (ranks.rank, ranks.count, ranks.lead) == (rank, WORLD, rank == 0)
        assert ranks.every(lambda: {"é" * rank: rank / 3}) == [
            {"é" * other: other / 3} for other in range(WORLD)
        ]
        assert ranks.first(lambda: "x" * 100_000) == "x" * 100_000
        assert ranks.any(rank == 2) and not ranks.any(False)
        _writing(ranks, folder / f"saved-{trouble}", trouble)
        other = ranks.aside()
        with ThreadPoolExecutor(1) as thread:
            numbers = thread.submit(
                lambda: [other.every(partial(int.__mul__, n, rank))[3] for n in range(50)]
            )
            here = [ranks.every(partial(int.__mul__, n, rank))[1] for n in range(50)]
            assert here == list(range(50)) and numbers.result() == [3 * n for n in range(50)]

        def work() -> int:
            if rank == 2:
                raise UserError("the disk of rank 2 is full") if trouble == "user" else KeyError(7)
            if rank == 3 and trouble == "user":
                raise UserError("so is that of rank 3")
            return rank

        try:
            ranks.every(lambda: ranks.every(work))  # one within the other, too
        except (Exception, SystemExit) as error:
            (folder / f"said-{trouble}-{rank}").write_text(f"{type(error).__name__} {error}")


def _writing(ranks: Any, folder: Path, trouble: str) -> None:
    """A checkpoint that rank 1 cannot write: all hear of it, and the one before stays."""
    from hpc.errors import UserError
    from insightv.training.checkpoint import Checkpoints, Position

    checkpoints = Checkpoints(folder, 2, ranks)

    def write(place: Path, fails: bool = False) -> None:
        if fails and ranks.rank == 1:
            raise OSError(28, "No space left on device")
        (place / f"part-of-{ranks.rank}").write_text(trouble)

    checkpoints.save(Position("me", step=1), lambda: write)
    checkpoints.save(Position("me", step=2), lambda: partial(write, fails=True))
    try:
        checkpoints.wait()
        raise AssertionError("nobody said anything")
    except UserError as error:
        assert ranks.rank == 1 and "No space left" in str(error)
    except SystemExit:
        assert ranks.rank != 1
    found = checkpoints.resume("me", lambda place: None)
    assert found is not None and found.step == 1
    checkpoints.close()


def refused(rank: int, folder: Path, base: Path) -> None:
    """A training on rows one of which is none; what each rank ends with."""
    import json

    from training_case import Here

    from insightv.pictures import Pictures
    from insightv.training.config import SFTConfig
    from insightv.training.trainer import train_sft

    rows = json.loads((folder / "data.json").read_text())["samples"]
    rows[7]["messages"] = rows[7]["messages"][1:]
    config = SFTConfig(backend="megatron", device="cpu", batch_size=4, precision="fp32")
    place, pictures = folder / "refused", Pictures([folder / "pictures"])
    try:
        train_sft(config, base, rows, pictures, place / "model", Here(place / "stage"))
    except (Exception, SystemExit) as error:
        (folder / f"refused-{rank}").write_text(f"{type(error).__name__} {error}")


_ADAM = torch.optim.AdamW.step


@torch.no_grad()
def descend(self: torch.optim.AdamW, closure: Any = None) -> None:
    """A step of gradient descent, for both backends: what Adam's division hides, it shows."""
    for group in self.param_groups:
        for weight in group["params"]:
            if weight.grad is not None:
                weight -= group["lr"] * weight.grad


def _die(when: str) -> None:
    """Ends this process, as kill -9 does, around its second save."""
    from insightv.training.checkpoint import Checkpoints
    from insightv.training.folder import Writer

    saves, begin, write, close = 0, Checkpoints.save, Checkpoints._write, Writer.close

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def save(self: Any, *arguments: Any) -> None:
        nonlocal saves
        self.wait()
        saves += 1
        if saves == 2 and when == "before":
            die()
        begin(self, *arguments)
        if saves == 2 and when == "after":
            self.wait()
            die()

    def written(self: Any, *arguments: Any) -> None:
        if saves == 2 and when == "during":
            time.sleep(1.0)  # meanwhile training goes on
        write(self, *arguments)

    def closed(self: Any) -> None:
        if saves == 2 and when == "during":
            die()
        close(self)

    Checkpoints.save, Checkpoints._write = save, written  # type: ignore[method-assign]
    Writer.close = closed  # type: ignore[method-assign]


CLIP = 1.0
RATE = 1e-3


def inputs_of(batch: dict[str, torch.Tensor], targets: bool = False) -> Any:
    from insightv.training.megatron.model import Inputs

    pictures = {k[8:]: v for k, v in batch.items() if k.startswith("picture.")}
    return Inputs(
        batch["input_ids"],
        batch["position_ids"],
        batch.get("mask"),
        pictures,
        batch["places"] if targets else None,
    )
