import asyncio
import json
import re
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Scripted

from hpc.errors import UserError
from insightv.assessment.marks import Marks, parse_scores
from insightv.assessment.scoring import Score, ScoreConfig, render_paths, render_scores
from insightv.prompting import load_prompts
from insightv.records import PathScore, Question, ReasoningPath, Step, Verdict

LINE = (
    '{"path": 1, "logic": 80, "grounding": 90, "completeness": 70, "total": 80, "bad_steps": [2]}'
)
MARKS = Marks(80, 90, 70, 80, (2,))
FULL = '"logic": 80, "grounding": 90, "completeness": 70, "total": 80, "bad_steps": [2]'


def test_the_canonical_reply():
    assert render_scores([MARKS]) == LINE
    assert render_paths(["{a}\n{b}", "{c}"]) == "[1] {a}\n{b}\n[2] {c}"


marks = st.builds(
    Marks,
    *[st.integers(1, 100)] * 4,
    st.lists(st.integers(1, 9), unique=True).map(sorted).map(tuple),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(marks, min_size=1, max_size=20))
def test_what_is_rendered_is_read_back(several):
    assert parse_scores(render_scores(several), len(several)) == (dict(enumerate(several, 1)), [])


READABLE = [
    LINE,
    f"Here are the scores:\n{LINE}\nI hope this helps.",
    f"```json\n{LINE}\n```",
    f"[{LINE}]",
    f'{{"scores": [{LINE}]}}',
    LINE.replace('"', "'"),
    LINE.replace("}", ",}"),
    LINE.replace(", ", ",\n  "),
    LINE.replace('"', "“"),
    f"{{{FULL}}}",
    f'{{"path": "1", {FULL}}}',
    f'{{"path": "[1]", {FULL}}}',
    f'{{"path": "Path 1", {FULL}}}',
    f'{{"Path": 1, {FULL}}}',
    f'{{"path": 0, {FULL}}}',
    f'{{"path": 1, {FULL.replace("80", "80.0")}}}',
    f'{{"path": 1, {FULL.replace("80", chr(34) + "80/100" + chr(34))}}}',
    f'{{"path": 1, {FULL.replace("80", "80/100")}}}',
    f'{{"path": 1, {FULL.replace("80", "8/10")}}}',
    f'{{"path": 1, {FULL.replace("80", "80 %")}}}',
    f'{{"path": 1, {FULL.replace("80", "80 points")}}}',
    f'{{"path": 1, {FULL.replace("total", "overall")}}}',
    f'{{"path": 1, {FULL.replace("total", "score")}}}',
    '{"path": 1, "logic": 80, "grounding": 90, "completeness": 70, "bad_steps": ["step 2"]}',
    f'{{"path": 1, {FULL.replace("[2]", chr(34) + "2" + chr(34))}}}',
    f'{{"path": 1, {FULL.replace("[2]", "[2, 17, 0]")}}}',
    f"{LINE}\n{LINE}",
    f"{LINE}\n" + LINE[:40],
    f'{{"path": 1, {FULL}, "comment": "a good path: 5"}}',
    f"Step {{x}} of path [1]: {LINE}",
]


@pytest.mark.parametrize("text", READABLE)
def test_replies_that_are_understood(text):
    assert parse_scores(text, 1, [3])[0] == {1: MARKS}


UNREADABLE = [
    "",
    "I cannot score these.",
    LINE[:-20],
    LINE.replace("80", "0"),
    LINE.replace("80", "101"),
    LINE.replace("90", "-5"),
    LINE.replace("90", '"high"'),
    LINE.replace("90", "true"),
    LINE.replace("80", "1e999"),
    LINE.replace("80", "9" * 400),
    '{"path": 1, "logic": 80, "grounding": 90}',
    f'{{"path": 2, {FULL}}}',
    f'{{"path": 7, {FULL}}}',
    f"{LINE}\n{LINE.replace('90', '10')}",
    f"{{{FULL}}}\n{{{FULL}}}",
    "{}" * 1000,
    "{" * 1000,
]


@pytest.mark.parametrize("text", UNREADABLE)
def test_replies_that_are_not_scores_say_why(text):
    found, problems = parse_scores(text, 1)
    assert found == {} and problems


def test_half_a_reply_gives_half_the_scores():
    found, problems = parse_scores(LINE, 2)
    assert found == {1: MARKS} and problems == ["no scores for path 2"]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300), st.integers(1, 5))
def test_no_reply_breaks_the_parser(text, count):
    found, problems = parse_scores(text, count)
    assert all(1 <= number <= count for number in found) and (problems or len(found) == count)


QUESTION = Question("q:test:0", "How many?", ("p",), "7", "number")


def path(number, size=10):
    steps = (Step("Look", f"path{number} " + "x" * size, "continue"), Step("End", "7", "summary"))
    key = f"{QUESTION.key}/r0/p{number}"
    return ReasoningPath(key, QUESTION.key, steps, "7", "summary", 9, 1, "m", "t", 1)


def inputs(paths, correct=True):
    verdicts = [Verdict(p.key, QUESTION.key, correct, "number") for p in paths]
    return {
        "questions": [QUESTION.to_json()],
        "paths": [p.to_json() for p in paths],
        "verdicts": [v.to_json() for v in verdicts],
    }


def quality(number):
    return 20 + 5 * number


def shown(request):
    """Numbers of the paths in the order a request shows them."""
    return [int(n) for n in re.findall(r"path(\d+) ", request.messages[0].text)]


def scorer(offset=lambda request, n: 0):
    def reply(request, n):
        totals = [quality(number) + offset(request, n) for number in shown(request)]
        return render_scores([Marks(t, t, t, t, (1,)) for t in totals])

    return reply


def run(reply, given, context=10**6, seed=3, **config):
    engine = Scripted(reply, context)
    mapper = Score(engine, load_prompts("default"), ScoreConfig(**{"retest": 0.0} | config), seed)
    rows = asyncio.run(mapper(QUESTION.key, given))
    return [PathScore.from_json(row) for row in rows], engine


def test_all_paths_are_scored_in_one_pass_in_a_seeded_order():
    paths = [path(n) for n in range(8)]
    rows, engine = run(scorer(), inputs(paths))
    assert len(engine.requests) == 1 and engine.requests[0].pictures == ("p",)
    assert [row.total for row in rows] == [quality(n) for n in range(8)]
    order = shown(engine.requests[0])
    assert sorted(order) == list(range(8)) != order
    assert [row.position for row in rows] == [order.index(n) + 1 for n in range(8)]
    assert shown(run(scorer(), inputs(paths))[1].requests[0]) == order
    assert shown(run(scorer(), inputs(paths), seed=4)[1].requests[0]) != order
    assert all(row.model == "scripted" and row.prompt.startswith("default-") for row in rows)


def test_only_right_paths_are_scored_unless_all_are_wanted():
    paths = [path(n) for n in range(4)]
    given = inputs(paths)
    given["verdicts"][1]["correct"] = False
    given["verdicts"][2]["correct"] = None
    given["paths"].append({"key": f"{QUESTION.key}/r0/p4", "question": QUESTION.key, "reason": "x"})
    assert [row.path[-1] for row in run(scorer(), given)[0]] == ["0", "3"]
    assert len(run(scorer(), given, which="all")[0]) == 4
    assert run(scorer(), inputs(paths, correct=False))[0] == []


def test_passes_with_other_orders_are_averaged():
    rows, engine = run(scorer(lambda r, n: 10 * (n - 1)), inputs([path(0), path(1)]), samples=3)
    assert len(engine.requests) == 3
    assert [row.total for row in rows] == [quality(0) + 10, quality(1) + 10]
    assert all(row.bad_steps == (1,) for row in rows)


def test_too_many_paths_are_split_with_shared_anchors_and_aligned():
    paths = [path(n, size=400) for n in range(12)]
    # Each part is judged on another level: 15 points between two calls.
    rows, engine = run(scorer(lambda r, n: 15 * (n - 1)), inputs(paths), context=4000)
    parts = [set(shown(request)) for request in engine.requests]
    assert len(parts) > 2 and set.union(*parts) == set(range(12))
    assert len(set.intersection(*parts)) == 2
    assert [row.total for row in rows] == [quality(n) for n in range(12)]
    for request in engine.requests:
        assert engine.count(request) + request.sampling.max_tokens <= 4000


def test_max_paths_splits_as_well():
    rows, engine = run(scorer(lambda r, n: n), inputs([path(n) for n in range(9)]), max_paths=4)
    assert max(len(shown(request)) for request in engine.requests) == 4
    assert len({row.total - quality(int(row.path[-1])) for row in rows}) == 1


def test_what_cannot_fit_or_be_compared_is_unscored_with_a_reason():
    huge = [path(0), path(1, size=5000)]
    rows, _ = run(scorer(), inputs(huge), context=3000)
    assert rows[0].total and rows[1].total is None and "context of 3000" in rows[1].reason
    rows, engine = run(scorer(), inputs([path(n, size=1200) for n in range(3)]), context=2900)
    assert len(engine.requests) == 1
    assert sorted(row.total is None for row in rows) == [False, True, True]
    assert all("anchor" in row.reason for row in rows if row.total is None)
    rows, engine = run(scorer(), inputs([path(0, size=9000)]), context=2900)
    assert rows[0].total is None and not engine.requests


def test_unreadable_replies_are_retried_then_unscored_with_the_reason():
    good = scorer()
    rows, engine = run(lambda r, n: "hm" if n < 3 else good(r, n), inputs([path(0)]))
    assert rows[0].total == quality(0) and len({r.seed for r in engine.requests}) == 3
    assert rows[0].seed == engine.requests[2].seed
    rows, engine = run(lambda r, n: "hm", inputs([path(0), path(1)]), tries=2)
    assert len(engine.requests) == 2
    assert [(row.total, row.reason) for row in rows] == [(None, "no JSON object with scores")] * 2


def test_the_fullest_reply_counts():
    def reply(request, n):
        return "\n".join(scorer()(request, n).splitlines()[: (1, 3, 2)[n - 1]])

    rows, _ = run(reply, inputs([path(n) for n in range(4)]))
    assert sum(row.total is not None for row in rows) == 3
    assert [row.reason for row in rows if row.total is None] == ["no scores for path 4"]


def test_a_second_scoring_is_kept_apart():
    rows, engine = run(scorer(lambda r, n: n), inputs([path(0), path(1)]), retest=1.0)
    assert [row.reason for row in rows] == ["", "", "retest", "retest"]
    assert [row.total for row in rows[2:]] == [row.total + 1 for row in rows[:2]]
    assert len({request.seed for request in engine.requests}) == 2


def test_about_the_stated_share_is_scored_twice():
    engine = Scripted(scorer())
    mapper = Score(engine, load_prompts("default"), ScoreConfig(retest=0.2), 1)

    async def total():
        given = inputs([path(0)])
        counts = []
        for n in range(500):
            given["questions"][0]["key"] = f"q:test:{n}"
            counts.append(len(await mapper(f"q:test:{n}", given)))
        return fmean(counts)

    assert 1.14 < asyncio.run(total()) < 1.26


@pytest.mark.parametrize(
    "config", [{"which": "best"}, {"retest": 2.0}, {"samples": 0}, {"anchors": 16}]
)
def test_impossible_settings_are_refused(config):
    with pytest.raises(UserError):
        Score(Scripted(scorer()), load_prompts("default"), ScoreConfig(**config))


def test_the_tiny_prompt_holds_the_rendered_paths():
    engine = Scripted(scorer())
    mapper = Score(engine, load_prompts("tiny"), ScoreConfig(retest=0.0), 1)
    asyncio.run(mapper(QUESTION.key, inputs([path(0)])))
    line = json.dumps({"title": "Look", "content": "path0 " + "x" * 10, "next_action": "continue"})
    assert engine.requests[0].messages[0].text.startswith(f"How many? Score. [1] {line}\n")
