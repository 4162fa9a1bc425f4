"""lmms-eval's part of an evaluation, run by the Python that lmms-eval is installed in.

``python lmms_harness.py ask WORK`` writes what its tasks ask; ``… score WORK`` gives it the
answers and writes its scores. WORK holds ``tasks.json`` (what is wanted), then ``asked.jsonl``
and ``pictures/``, then ``answers.jsonl`` and ``scores.json``. Nothing of this package is
imported here: that environment need not have it.

Both times lmms-eval's own evaluator runs its own tasks, with a model that answers nothing but
notes what it is asked, or that says again what was answered. Prompts, filters, metrics and
aggregation are therefore lmms-eval's.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import inspect
import io
import json
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

DRAWS = 1000
"""Resamples behind the interval of a metric that is no mean."""
_TOKENS = 1024
"""What lmms-eval's own clients allow an answer where its task says nothing."""
_KEPT_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
"""Kinds of pictures that PNG holds as they are, transparency included."""


def main() -> None:
    """Runs a command."""
    command, work = sys.argv[1], Path(sys.argv[2])
    wanted = json.loads((work / "tasks.json").read_text(encoding="utf-8"))
    {"ask": ask, "score": score}[command](work, wanted)


class _Asked(Exception):
    """Everything was asked; nothing is to be scored."""


def ask(work: Path, wanted: dict[str, Any]) -> None:
    """Writes every request of the tasks: words and pictures in their order, target, options."""
    (work / "pictures").mkdir(exist_ok=True)
    with (work / "asked.jsonl").open("w", encoding="utf-8") as file:

        def note(requests: list[Any], documents: dict[str, Any]) -> list[str]:
            for request in requests:
                file.write(json.dumps(_row(request, documents, work)) + "\n")
            raise _Asked

        model = _model(note)
        with contextlib.suppress(_Asked):
            _evaluate(model, wanted)
    if left := sorted(model.task_dict.keys() - model.tasks.keys()):
        sys.exit(f"{left[0]} lets nothing be generated (it compares likelihoods); leave it out")
    (work / "made.json").write_text(json.dumps({"version": version("lmms-eval")}), "utf-8")


def score(work: Path, wanted: dict[str, Any]) -> None:
    """Scores one entry's answers, by task and metric; some tasks' sums outlive an evaluation."""
    answers: dict[tuple[str, int], str] = {}
    groups: dict[tuple[str, int], str] = {}
    with (work / "answers.jsonl").open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            answers[row["task"], row["doc"]] = row["text"]
            groups[row["task"], row["doc"]] = row["group"]

    def tell(requests: list[Any], _: Any) -> list[str]:
        return [answers.get((request.task_name, request.doc_id), "") for request in requests]

    model = _model(tell)
    found = _evaluate(model, wanted)
    scores = {name: _scores(name, model.tasks[name], found, groups) for name in found["samples"]}
    (work / "scores.json").write_text(json.dumps(scores), encoding="utf-8")


def _evaluate(model: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """Runs lmms-eval; what it prints goes to the standard error, which is logged."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    with contextlib.redirect_stdout(sys.stderr):
        manager = TaskManager("WARNING", include_path=wanted["include"] or None)
        unknown = [name for name in wanted["tasks"] if name not in manager.all_tasks]
        if unknown:
            sys.exit(f"lmms-eval has no task {unknown[0]!r}; `lmms-eval tasks list` names them")
        return simple_evaluate(  # one thread: tasks that draw at random draw the same again
            model=model,
            tasks=wanted["tasks"],
            task_manager=manager,
            limit=wanted["limit"] or None,
            bootstrap_iters=0,
            process_docs_parallel=1,
            batch_size=1,
            cli_args=_arguments(wanted),
        )


def _arguments(wanted: dict[str, Any]) -> Any:
    """What metrics that write submissions look for."""
    from argparse import Namespace

    return Namespace(output_path=wanted["output"], process_with_media=True, reasoning_tags=None)


def _model(answer: Callable[[list[Any], dict[str, Any]], list[str]]) -> Any:
    """A model to lmms-eval, which answers requests so."""
    from lmms_eval.api.model import lmms

    class Told(lmms):
        is_simple = False  # tasks then say what they show, and where in the text

        def __init__(self) -> None:
            super().__init__()
            self.tasks: dict[str, Any] = {}

        def generate_until(self, requests: list[Any]) -> list[str]:
            # A request holds its task's method that words it.
            self.tasks = {request.task_name: request.args[1].__self__ for request in requests}
            return answer(requests, self.task_dict)

        def loglikelihood(self, requests: list[Any]) -> Any:
            sys.exit(f"{requests[0].task_name} compares likelihoods; leave it out")

        def generate_until_multi_round(self, requests: list[Any]) -> Any:
            sys.exit(f"{requests[0].task_name} asks in several rounds; leave it out")

    return Told()


def _row(request: Any, documents: dict[str, Any], work: Path) -> dict[str, Any]:
    """A request as JSON; its pictures are stored by the digest of what they show."""
    _, messages_of, sampling, doc_id, task, split = request.args
    document = documents[task][split][doc_id]
    turns = messages_of(document)
    if [turn["role"] for turn in turns] != ["user"]:
        sys.exit(f"{task}: its requests have several turns; give a task without examples")
    content = []
    for part in turns[0]["content"]:
        if part["type"] == "text":
            content.append({"text": part["text"]})
        elif part["type"] == "image":
            content.append({"picture": _stored(part["url"], work / "pictures")})
        else:
            sys.exit(f"{task} shows {part['type']}; only pictures are understood here")
    return {
        "task": task,
        "doc": doc_id,
        "split": split,
        "content": content,
        "target": _target(messages_of.__self__, document),
        "options": _options(document),
        "tokens": sampling.get("max_new_tokens") or _TOKENS,
        "temperature": sampling.get("temperature") or 0,
        "top_p": sampling.get("top_p") or 1,
    }


def _stored(picture: Any, folder: Path) -> str:
    from PIL import Image, ImageOps

    if isinstance(picture, str):
        picture = ImageOps.exif_transpose(Image.open(picture))
    if picture.mode not in _KEPT_MODES:
        picture = picture.convert("RGB")
    packed = io.BytesIO()
    picture.save(packed, "PNG", compress_level=3)
    data = packed.getvalue()
    name = hashlib.sha256(data).hexdigest()
    if not (path := folder / name).exists():
        path.write_bytes(data)
    return name


def _target(task: Any, document: Any) -> list[str]:
    """The true answers; none where the set keeps them back."""
    target = task.doc_to_target(document)
    given = target if isinstance(target, (list, tuple)) else [target]
    return [str(one) for one in given if one is not None and str(one).strip()]


def _options(document: Any) -> list[str]:
    """Options that stand in a column of their own."""
    value = document.get("options", document.get("choices"))
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return []
    return [str(one) for one in value] if isinstance(value, (list, tuple)) else []


# ---- scores


def _scores(
    name: str, task: Any, found: dict[str, Any], groups: dict[tuple[str, int], str]
) -> dict[str, Any]:
    """A task's metrics: value, what each document counts, an interval where it is no mean."""
    from loguru import logger

    logger.remove()  # metrics tell their parts at each call
    made = {}
    for metric, aggregate in task.aggregation().items():
        given = [(row["doc_id"], row[metric]) for row in found["samples"][name] if metric in row]
        value = _value(found["results"][name], metric)
        if not given or value is None:
            continue
        files = "args" in inspect.signature(aggregate).parameters  # writes one at each call
        with contextlib.redirect_stdout(io.StringIO()):
            single = {doc: _single(one, None if files else aggregate) for doc, one in given}
            parts = [one for one in single.values() if one is not None]
            scale = _scale(parts, value) if len(parts) == len(given) else None
            ends = None
            if scale is None and not files:
                marks = [groups.get((name, doc), str(doc)) for doc, _ in given]
                ends = _interval([one for _, one in given], marks, aggregate)
        made[metric] = {
            "value": value,
            "n": len(given),
            "scale": scale,
            "ci95": ends,
            "documents": {str(doc): one for doc, one in single.items()},
        }
    return made


def _value(results: dict[str, Any], metric: str) -> float | None:
    """A metric's value; of several filters' the first."""
    for key, value in results.items():
        if key.split(",")[0] == metric and isinstance(value, (int, float)):
            return float(value)
    return None


def _scale(parts: list[float], value: float) -> float | None:
    """What a mean over documents is to be multiplied by; None where it is no mean."""
    mean = sum(parts) / len(parts)
    return next((scale for scale in (1.0, 100.0) if abs(scale * mean - value) < 1e-4 * scale), None)


def _single(value: Any, aggregate: Callable[[list[Any]], Any] | None) -> float | None:
    """What one document counts, where that can be said of one alone."""
    if isinstance(value, dict) and aggregate is None:
        value = value.get("score", value.get("true_false"))
    if isinstance(value, (bool, int, float)):
        return float(value)
    if aggregate is None:
        return None
    try:
        return float(aggregate([value]))
    except Exception:  # metrics raise what they like
        return None


def _interval(values: list[Any], groups: list[str], aggregate: Any) -> list[float] | None:
    """The metric over resampled groups of documents (percentiles of a cluster bootstrap)."""
    members: dict[str, list[Any]] = defaultdict(list)
    for value, group in zip(values, groups, strict=True):
        members[group].append(value)
    draws = sorted(_resampled(list(members.values()), aggregate))
    if len(draws) < DRAWS:
        return None
    return [draws[int(0.025 * DRAWS)], draws[int(0.975 * DRAWS) - 1]]


def _resampled(members: list[list[Any]], aggregate: Any) -> Iterator[float]:
    rng = random.Random(0)
    for _ in range(DRAWS):
        chosen = rng.choices(members, k=len(members))
        drawn = [_copy(value, place) for place, group in enumerate(chosen) for value in group]
        try:
            yield float(aggregate(drawn))
        except Exception:  # no interval, then
            return


def _copy(value: Any, place: int) -> Any:
    """A value that is not taken for the same question drawn twice."""
    if isinstance(value, dict) and "question_id" in value:
        return {**value, "question_id": f"{value['question_id']} {place}"}
    return value


if __name__ == "__main__":
    main()
