import asyncio

import pytest
from scripted import Scripted

from hpc.errors import RecordError
from insightv.assessment.judge import Judge, JudgeConfig, parse_reply
from insightv.prompting import load_prompts
from insightv.records import Question, ReasoningPath, Step, Verdict

QUESTION = Question("q:test:0", "Which animal?", ("p",), "a big dog", "text")


def path(number, answer):
    steps = (Step("Look", "There is an animal.", "summary"),)
    key = f"{QUESTION.key}/r0/p{number}"
    return ReasoningPath(key, QUESTION.key, steps, answer, "summary", 9, 1, "m", "t", 1)


def run(judge, paths):
    rows = [p.to_json() if isinstance(p, ReasoningPath) else p for p in paths]
    inputs = {"questions": [QUESTION.to_json()], "paths": rows}
    return [Verdict.from_json(row) for row in asyncio.run(judge(QUESTION.key, inputs))]


def judge(reply, **config):
    engine = Scripted(reply)
    return Judge(engine, load_prompts("default"), JudgeConfig(**config), seed=7), engine


REPLIES = [
    ("yes", "yes"),
    ("No.", "no"),
    ("**Yes**", "yes"),
    ("unclear", "unclear"),
    ("Yes, they mean the same.", "yes"),
    ("The answer is no.", "no"),
    ("Verdict: unclear", "unclear"),
    ('{"answer": "yes"}', "yes"),
    ("```\nno\n```", "no"),
    ("<think>yes or no?</think>no", "no"),
    ("They mean the same, so yes", "yes"),
    ("There is no difference between them.", None),
    ("No difference between them.", None),
    ("yes or no", None),
    ("Yes. No.", None),
    ("The verdict is yes. The verdict is no.", None),
    ("", None),
    ("maybe", None),
    ("yesterday", None),
    ("???", None),
]


@pytest.mark.parametrize(("reply", "word"), REPLIES)
def test_replies_are_read_tolerantly(reply, word):
    assert parse_reply(reply) == word


def test_rules_come_first_and_the_model_gets_the_rest():
    mapper, engine = judge(
        lambda request, n: "yes" if "large dog" in request.messages[0].text else "no"
    )
    verdicts = run(
        mapper, [path(0, "A big dog."), path(1, "a large dog"), path(2, "a cat"), path(3, "")]
    )
    assert [(v.correct, v.rule, v.model) for v in verdicts] == [
        (True, "exact", ""),
        (True, "llm", "scripted"),
        (False, "llm", "scripted"),
        (False, "empty", ""),
    ]
    assert len(engine.requests) == 2
    first = engine.requests[0]
    assert (first.sampling.temperature, first.sampling.top_p) == (0.2, 0.7)
    assert "a big dog" in first.messages[0].text and first.pictures == ()


def test_equal_answers_are_judged_once():
    mapper, engine = judge(lambda request, n: "yes" if n == 1 else "no")
    verdicts = run(mapper, [path(n, "a  large dog" if n else "a large dog") for n in range(5)])
    assert [v.correct for v in verdicts] == [True] * 5
    assert len(engine.requests) == 1


def test_unreadable_replies_are_retried_with_other_seeds_then_stay_undecided():
    mapper, engine = judge(lambda request, n: "perhaps", tries=3)
    (verdict,) = run(mapper, [path(0, "a wolf")])
    assert verdict.correct is None and verdict.rule == "undecided"
    assert "perhaps" in verdict.detail
    assert len({request.seed for request in engine.requests}) == 3

    mapper, engine = judge(lambda request, n: "perhaps" if n == 1 else "no")
    assert run(mapper, [path(0, "a wolf")])[0].correct is False
    assert len(engine.requests) == 2


def test_unclear_is_an_answer_and_stays_undecided():
    mapper, engine = judge(lambda request, n: "unclear")
    (verdict,) = run(mapper, [path(0, "a wolf")])
    assert (verdict.correct, verdict.rule, len(engine.requests)) == (None, "llm", 1)


def test_an_engine_that_fails_leaves_the_answer_undecided_with_the_reason():
    def reply(request, n):
        raise RecordError("context overflow")

    mapper, _ = judge(reply)
    (verdict,) = run(mapper, [path(0, "a wolf")])
    assert verdict.correct is None and "context overflow" in verdict.detail


def test_without_an_engine_rules_decide_and_the_rest_stays_open():
    mapper = Judge(None, load_prompts("default"), JudgeConfig())
    verdicts = run(mapper, [path(0, "a big dog"), path(1, "a wolf")])
    assert [v.correct for v in verdicts] == [True, None]
    asyncio.run(mapper.close())


def test_failed_paths_get_no_verdict():
    mapper, _ = judge(lambda request, n: "yes")
    failed = {"key": f"{QUESTION.key}/r0/p0", "question": QUESTION.key, "reason": "no step parsed"}
    assert [v.path for v in run(mapper, [failed, path(1, "a wolf")])] == [f"{QUESTION.key}/r0/p1"]


def test_seeds_repeat_between_runs():
    first, second = judge(lambda r, n: "no"), judge(lambda r, n: "no")
    run(first[0], [path(0, "a wolf")]), run(second[0], [path(0, "a wolf")])
    assert [r.seed for r in first[1].requests] == [r.seed for r in second[1].requests]


def test_close_closes_the_engine():
    mapper, engine = judge(lambda request, n: "yes")
    asyncio.run(mapper.close())
    assert engine.closed
