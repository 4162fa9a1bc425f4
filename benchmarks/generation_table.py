"""The readable form of ``results/generation.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from origin import told

_NAMES = {
    "one by one": "`generate` for each call",
    "static": "batches of `generate`",
    "continuous": "transformers' continuous batching",
    "insightv": "insightv, in process",
}


def write(path: Path) -> str:
    """Writes the tables beside the results and returns them."""
    found = json.loads(path.read_text())
    lines = ["# Generation", ""]
    if "engine" in found:
        lines += [*_engine(found["engine"]), ""]
    if "server" in found:
        lines += [*_server(found["server"]), ""]
    text = "\n".join(lines).rstrip() + "\n"
    path.with_suffix(".md").write_text(text)
    return text


def _engine(found: dict[str, Any]) -> Iterator[str]:
    yield "## In process"
    yield ""
    yield _origin(found)
    yield f"{found['questions']} questions, {found['paths']} paths each; a record is a path."
    for name, work in found["workloads"].items():
        tokens = work["tokens_a_call"]
        peers = [way for way in work["best"] if way != "insightv"]
        yield ""
        yield (
            f"**{name}**: {work['records']} records, {work['calls']} calls of "
            f"{tokens['min']:g} to {tokens['max']:g} tokens (quartiles {tokens['q1']:g}, "
            f"{tokens['median']:g}, {tokens['q3']:g}). Records a second:"
        )
        yield ""
        yield "| | batch size | by the clock | by the processor | texts that differ |"
        yield "|---|---:|---:|---:|---:|"
        alone = work["one by one"]
        yield (
            f"| {_NAMES['one by one']} ({alone['records']} records) | 1 | "
            f"{_rates([alone])} | {alone['differ']} of {alone['texts']} |"
        )
        for way in [*peers, "insightv"]:
            rows = [turn[way] for turn in work["rounds"]]
            every = [*work["sizes"][way].values(), *rows]
            differ = f"{sum(row['differ'] for row in every)} of {sum(r['texts'] for r in every)}"
            yield f"| {_NAMES[way]} | {work['best'][way]} | {_rates(rows)} | {differ} |"
        clock, processor = (
            work["ratios"][unit] for unit in ("records_a_second", "records_a_processor_second")
        )
        yield ""
        yield (
            f"Ours over the best of the others, median of {len(work['rounds'])} rounds: "
            f"**{processor['median']:.2f}** by the processor ({processor['min']:.2f}–"
            f"{processor['max']:.2f}), {clock['median']:.2f} by the clock "
            f"({clock['min']:.2f}–{clock['max']:.2f})."
        )
    yield ""
    yield "Every size that was tried, once, in records a processor second:"
    yield ""
    sizes = list(
        dict.fromkeys(s for w in found["workloads"].values() for s in w["sizes"]["static"])
    )
    yield f"| | {' | '.join(sizes)} |"
    yield "|---|" + "---:|" * len(sizes)
    for name, work in found["workloads"].items():
        for way, rows in work["sizes"].items():
            rates = {size: f"{row['records_a_processor_second']:.1f}" for size, row in rows.items()}
            cells = [rates.get(size, "") for size in sizes]
            yield f"| {name}: {_NAMES[way]} | {' | '.join(cells)} |"


def _server(found: dict[str, Any]) -> Iterator[str]:
    yield "## Behind `transformers serve`"
    yield ""
    yield _origin(found)
    yield f"{found['calls']} calls, calls a second."
    yield ""
    yield "| | in flight | calls a second | texts that differ |"
    yield "|---|---:|---:|---:|"
    for flying, row in found["flying"].items():
        rate = f"{row['calls_a_second']:.2f}"
        yield f"| load generator | {flying} | {rate} | {row['differ']} of {found['calls']} |"
    for number, turn in enumerate(found["rounds"], 1):
        for name, flying in (("load generator", found["best"]), ("insightv", found["ours"])):
            row = turn[name]
            rate = f"{row['calls_a_second']:.2f}"
            differ = f"{row['differ']} of {found['calls']}"
            yield f"| {name}, round {number} | {flying} | {rate} | {differ} |"
    ratio = found["ratio"]
    yield ""
    yield (
        f"The engine over the load generator at its best, median of {len(found['rounds'])} rounds: "
        f"**{ratio['median']:.2f}** ({ratio['min']:.2f}–{ratio['max']:.2f})."
    )


def _rates(rows: list[dict[str, Any]]) -> str:
    """The rows' two rates: their medians."""

    def middle(unit: str) -> str:
        values = sorted(row[unit] for row in rows)
        return f"{values[len(values) // 2]:.1f}"

    return f"{middle('records_a_second')} | {middle('records_a_processor_second')}"


def _origin(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    load = f"load {found['load_before']} before and {found['load_after']} after"
    return f"{told(found)} {versions}; {load}."
