"""Public benchmarks by lmms-eval: its tasks ask, entries of the ladder answer, it scores.

lmms-eval pins packages that others do not bear, so it stays in an environment of its own and is
needed by two short jobs alone: one writes down what its tasks ask (`ask`), one gives it the
answers (`score`). Between them questions and answers are shards like any others, answered by
map stages on engines of any kind. Beside lmms-eval's score stands this package's own verdict on
the same answers.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc import shards
from hpc.config import unhashed
from hpc.disk import expanded, make_folder
from hpc.errors import UserError
from hpc.logs import last_line
from hpc.rundir import read_json, write_json
from hpc.stages import Context, Counts, Row
from insightv.assessment.decision import RuleConfig, normal
from insightv.engines.server.guard import end
from insightv.engines.server.programs import inherited
from insightv.evaluation.answering import Answer, EntryConfig
from insightv.pictures import PictureWriter
from insightv.questions.texts import LETTERS, kind_of, options_of, said_with_pictures
from insightv.records import Question

if TYPE_CHECKING:
    from insightv.assessment.judge import Judge
    from insightv.engines.base import Engine
    from insightv.prompting import Prompts

QUESTIONS = "questions-lmms"
_MADE = "tasks.json"
"""Beside the questions: how each task wants its answers drawn, and lmms-eval's version."""
_HARNESS = Path(__file__).with_name("lmms_harness.py")
_TICK = 0.2
_GRACE = 10.0


@dataclass
class BenchmarksConfig:
    """Benchmarks that lmms-eval asks and scores, beside the evaluation on the run's own sets.

    Attributes:
        tasks: Tasks or groups of lmms-eval (``chartqa``, ``mmmu_val``). Empty: none.
        entries: Entries of the ladder that answer. Paper, tables 1 and 4: these.
        limit: First so many questions of each task; 0: all of them.
        include: A folder of further task files, as lmms-eval's ``--include_path``.
        python: The interpreter of the environment that lmms-eval is installed in.
        folder: Where lmms-eval runs. A data set that it loads as ``OWNER/NAME`` is read from the
            folder ``OWNER/NAME`` there, if there is one, else from the cache of ``datasets``.
        network: What is in neither may be fetched from the hub.
        rules: Tolerances of this package's own verdicts beside lmms-eval's, for tasks whose names
            begin so; those of others are ``judge.rules``. ChartQA's relaxed accuracy: within 5 %.
        per_shard: Questions in a shard, which is what a worker claims.
    """

    tasks: list[str] = field(default_factory=list)
    entries: list[str] = field(default_factory=lambda: ["base", "multi_agent", "iterative_dpo"])
    limit: int = 0
    include: str = ""
    python: str = unhashed("")
    folder: str = unhashed("")
    network: bool = unhashed(False)
    rules: dict[str, RuleConfig] = field(
        default_factory=lambda: {"chartqa": RuleConfig(0.05, 0.05)}
    )
    per_shard: int = 64

    def validate(self) -> None:
        """Checks the values.

        Raises:
            UserError: One of them is not possible, or there is no lmms-eval to be run.
        """
        if not self.tasks:
            return
        if not self.python:
            raise UserError(
                "benchmarks.python: name the interpreter that lmms-eval is installed for "
                "(docs/benchmarks.md says how)"
            )
        if not self.entries:
            raise UserError("benchmarks.entries: name who answers (base, multi_agent, …)")
        if self.limit < 0 or self.per_shard < 1:
            raise UserError("benchmarks: limit is 0 or more, per_shard 1 or more")
        for name in self.tasks:
            if not name or not all(sign.isalnum() or sign in "_-." for sign in name):
                raise UserError(f"benchmarks.tasks: {name!r} is no name of a task")

    def resolve(self) -> None:
        """Makes paths absolute: jobs start elsewhere."""
        for name in ("python", "folder", "include"):
            if given := getattr(self, name):
                # A link is kept: the interpreter of an environment is one.
                setattr(self, name, str(expanded(given).absolute()))

    def judged(self, task: str, rules: RuleConfig) -> RuleConfig:
        """The tolerances for a task, ``rules`` where it has none of its own."""
        fitting = [name for name in self.rules if task.startswith(name)]
        return self.rules[max(fitting, key=len)] if fitting else rules


# ---- what is asked


def ask(config: BenchmarksConfig, context: Context) -> Counts | None:
    """Writes the tasks' questions as shards, their pictures as packs beside them.

    Returns:
        Questions by task; None if the stage was asked to leave.

    Raises:
        UserError: lmms-eval cannot be run, or cannot load a task.
    """
    work = fresh(context)
    if not run_harness(config, "ask", work, context):
        return None
    counts: Counter[str] = Counter()
    sampling: dict[str, dict[str, Any]] = {}

    def groups(writer: PictureWriter) -> Iterator[tuple[str, list[Row]]]:
        with (work / "asked.jsonl").open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                counts[row["task"]] += 1
                names = ("tokens", "temperature", "top_p")
                sampling.setdefault(row["task"], {name: row[name] for name in names})
                question = question_of(row)
                for picture in question.pictures:
                    writer.add((work / "pictures" / picture).read_bytes())
                yield question.key, [question.to_json()]

    with PictureWriter(context.directory / "pictures") as writer:
        shards.write_groups(context.directory / "shards", groups(writer), config.per_shard)
    if not counts:
        raise UserError(f"benchmarks: {', '.join(config.tasks)} ask nothing; name other tasks")
    made = json.loads((work / "made.json").read_text(encoding="utf-8"))
    write_json(context.directory / _MADE, made | {"sampling": sampling})
    shutil.rmtree(work)
    return dict(counts)


def question_of(row: Mapping[str, Any]) -> Question:
    """A request of lmms-eval as a question; its words are left as they are.

    The answer's type is told by its looks: lmms-eval knows none.
    """
    content = row["content"]
    pictures = tuple(part["picture"] for part in content if "picture" in part)
    text = said_with_pictures([part.get("text") for part in content])
    options = tuple(row["options"]) or options_of(text)[1]
    said = Counter(map(normal, row["target"]))
    answer = max(row["target"], key=lambda one: said[normal(one)], default="")
    letters = LETTERS[: len(options)]
    same = [
        mark for mark, one in zip(letters, options, strict=False) if normal(one) == normal(answer)
    ]
    kind = "choice" if options and (answer in tuple(letters) or len(same) == 1) else ""
    if kind and answer not in tuple(letters):
        answer = same[0]
    return Question(
        key=f"{row['task']}:{re.sub(r'[^A-Za-z0-9_-]', '_', row['split'])}:{row['doc']}",
        text=text,
        pictures=pictures,
        answer=answer,
        answer_type=kind or kind_of(answer, "label"),  # type: ignore[arg-type]
        options=options if kind else (),
        group=f"{row['task']}/{pictures[0][:16] if pictures else row['doc']}",
    )


# ---- who answers


class ByTask:
    """The mapper questions → predictions, each task's answers drawn as lmms-eval wants them.

    As of a client of ``insightv serve``: temperature and, if the task gives one, top-p hold for
    both agents, the most tokens for the answer; the reasoning keeps the run's own limit.
    """

    def __init__(
        self,
        entry: EntryConfig,
        prompts: Prompts,
        judges: Mapping[str, Judge],
        reasoning: Engine | None,
        summary: Engine | None,
        seed: int,
        sampling: Mapping[str, Mapping[str, Any]],
    ):
        """Takes what `Answer` takes, a judge and a sampling for each task."""
        self._answers = {
            task: Answer(drawn_as(entry, wanted), prompts, judges[task], reasoning, summary, seed)
            for task, wanted in sampling.items()
        }
        self.concurrency = max(answer.concurrency for answer in self._answers.values())

    async def __call__(self, key: str, inputs: Mapping[str, list[Row]]) -> list[Row]:
        """One prediction.

        Raises:
            RecordError: An engine cannot serve it.
        """
        return await self._answers[key.split(":", 1)[0]](key, inputs)

    async def close(self) -> None:
        """Closes the engines, which all tasks share."""
        await next(iter(self._answers.values())).close()


def drawn_as(entry: EntryConfig, wanted: Mapping[str, Any]) -> EntryConfig:
    """The entry with a task's sampling."""
    warm: dict[str, Any] = {"temperature": float(wanted["temperature"])}
    if wanted["top_p"]:
        warm["top_p"] = float(wanted["top_p"])
    return replace(
        entry,
        reasoning=replace(entry.reasoning, **warm),
        answer=replace(entry.answer, **warm, max_tokens=int(wanted["tokens"])),
    )


def made_with(questions: Path) -> dict[str, Any]:
    """Each task's ``sampling`` and lmms-eval's ``version``, from beside the questions' shards."""
    return dict(read_json(questions.parent / _MADE) or {})


# ---- lmms-eval's process


def fresh(context: Context) -> Path:
    """A folder to exchange files in, of this process alone.

    One that was left by a killed process is removed: what that has started may still write there.
    """
    make_folder(context.directory)
    for left in context.directory.glob("work-*"):
        shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix="work-", dir=context.directory))


def run_harness(config: BenchmarksConfig, command: str, work: Path, context: Context) -> bool:
    """Runs lmms-eval's part; returns False if the stage was asked to leave meanwhile.

    Raises:
        UserError: It failed; the line says where its log is.
    """
    folder = Path(config.folder) if config.folder else work
    if not folder.is_dir():
        raise UserError(f"benchmarks.folder: {folder} is no folder")
    if config.include and not Path(config.include).is_dir():
        raise UserError(f"benchmarks.include: {config.include} is no folder of task files")
    wanted = {"tasks": config.tasks, "include": config.include, "limit": config.limit}
    write_json(work / "tasks.json", wanted | {"output": str(work)})
    log = make_folder(context.directory / "logs") / "lmms-eval.log"
    words = [config.python, "-I", str(_HARNESS), command, str(work)]
    with log.open("ab") as out:
        out.write(f"$ {' '.join(words)}\n".encode())
        out.flush()
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=_environment(config),
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(
                f"benchmarks.python: {config.python} cannot be run ({error.strerror}); name the "
                "interpreter that lmms-eval is installed for"
            ) from None
        try:
            while process.poll() is None:
                if context.stopping():
                    return False
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_TICK)
        finally:
            if process.poll() is None:
                end(process, _GRACE)
    if process.returncode:
        raise UserError(f"lmms-eval failed: {last_line(log) or 'it said nothing'}; see {log}")
    return True


def _environment(config: BenchmarksConfig) -> dict[str, str]:
    env = inherited(other_python=True)
    env |= {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not config.network:
        env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return env
