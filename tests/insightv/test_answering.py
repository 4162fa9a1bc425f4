import asyncio
import json

import pytest
import runs
from rich.console import Console
from scripted import Scripted

from hpc import shards
from hpc.errors import RecordError, UserError
from insightv.assessment.judge import Judge, JudgeConfig
from insightv.engines.base import Completion
from insightv.evaluation.answering import Answer, CallConfig, EntryConfig, donate
from insightv.evaluation.asking import ask, ask_and_print
from insightv.prompting import load_prompts
from insightv.records import Prediction, Question, Step
from insightv.steps import render_steps

PROMPTS = load_prompts("default")
QUESTION = Question(
    "charts:test:3", "What is the sum of Jan and Feb?", ("pic",), "12", "number", group="t1"
)
STEPS = (
    Step("Read", "Jan 5, Feb 7", "continue"),
    Step("Add", "the answer is 12", "summary"),
)
GREEDY = CallConfig(temperature=0.0)


def entry(mode: str, **settings) -> EntryConfig:
    return EntryConfig(mode, mode, "reasoning", "summary", **settings)


def answer(config, reasoning=None, summary=None, donors=None, **inputs):
    judge = Judge(None, PROMPTS, JudgeConfig())
    mapper = Answer(config, PROMPTS, judge, reasoning, summary, seed=1, donors=donors)
    rows = {"questions": [QUESTION.to_json()], **inputs}
    return [Prediction.from_json(row) for row in asyncio.run(mapper(QUESTION.key, rows))]


def last_user(request) -> str:
    return next(m.text for m in reversed(request.messages) if m.role == "user")


def test_direct_is_one_call_with_the_picture():
    engine = Scripted(lambda request, n: " 12 \n")
    (found,) = answer(entry("direct", answer=GREEDY), engine)
    assert (found.key, found.entry) == ("charts:test:3@direct", "direct")
    assert (found.answer, found.correct, found.rule) == ("12", True, "exact")
    assert (found.reasoning, found.reasoning_correct, found.tokens) == ("", None, 1)
    (request,) = engine.requests
    assert request.pictures == ("pic",) and request.sampling.temperature == 0
    assert last_user(request) == PROMPTS.render("direct", question=QUESTION.text)


def test_reasoning_answers_in_a_further_turn_of_the_same_chat():
    engine = Scripted(lambda request, n: "Sure!\n" + render_steps(STEPS) if n == 1 else "It is 12.")
    (found,) = answer(entry("reasoning"), engine)
    assert found.reasoning == render_steps(STEPS)  # the prose is gone
    assert found.reasoning_answer == "the answer is 12"
    assert (found.correct, found.reasoning_correct) == (True, True)
    first, second = engine.requests
    assert [m.role for m in second.messages] == ["user", "assistant", "user"]
    assert second.messages[0] == first.messages[0]
    assert second.messages[1].text == render_steps(STEPS)
    assert second.messages[2].text == PROMPTS.render("final")
    assert second.pictures == ("pic",)
    assert found.tokens == sum(
        len(text.split()) for text in ("Sure! " + render_steps(STEPS), "It is 12.")
    )


def test_direct_sft_reads_both_from_one_turn():
    engine = Scripted(lambda request, n: render_steps(STEPS) + "\nAnswer: 11")
    (found,) = answer(entry("direct_sft"), engine)
    assert len(engine.requests) == 1
    assert (found.answer, found.correct) == ("11", False)
    assert (found.reasoning, found.reasoning_correct) == (render_steps(STEPS), True)


def test_both_agents_see_the_picture_and_the_summary_agent_the_steps():
    reasoning = Scripted(lambda request, n: render_steps(STEPS))
    summary = Scripted(lambda request, n: "13")
    config = entry(
        "multi_agent", reasoning=CallConfig(max_tokens=99), answer=CallConfig(max_tokens=9)
    )
    (found,) = answer(config, reasoning, summary)
    assert reasoning.requests[0].pictures == summary.requests[0].pictures == ("pic",)
    assert render_steps(STEPS) in last_user(summary.requests[0])
    assert reasoning.requests[0].sampling.max_tokens == 99
    assert summary.requests[0].sampling.max_tokens == 9
    assert (found.correct, found.reasoning_correct) == (False, True)
    assert found.models == ("scripted", "scripted")


def test_summary_only_has_no_reasoning():
    summary = Scripted(lambda request, n: "12")
    (found,) = answer(entry("summary_only"), None, summary)
    assert last_user(summary.requests[0]) == PROMPTS.render("plain_summary", question=QUESTION.text)
    assert found.correct and found.reasoning == ""


def test_reasoning_that_cannot_be_parsed_is_passed_on_as_it_is():
    reasoning = Scripted(lambda request, n: "Jan is five and Feb seven.")
    summary = Scripted(lambda request, n: "12")
    (found,) = answer(entry("multi_agent"), reasoning, summary)
    assert "Jan is five and Feb seven." in last_user(summary.requests[0])
    assert (found.reasoning_answer, found.reasoning_correct) == ("", None)


def votes(texts, **settings):
    engine = Scripted(lambda request, n: texts[n - 1])
    config = entry("majority", votes=len(texts), answer=CallConfig(temperature=0.8), **settings)
    return engine, config


def test_majority_counts_equal_answers_and_gives_ties_to_the_first():
    engine, config = votes(["7", "12", "12.", "7 ", "12"])
    (found,) = answer(config, engine)
    assert (found.answer, found.tokens, found.correct) == ("12", 5, True)
    assert len({request.seed for request in engine.requests}) == 5
    engine, config = votes(["7", "12", "12", "7"])
    assert answer(config, engine)[0].answer == "7"
    engine, config = votes(["", "", "12"])
    assert answer(config, engine)[0].answer == "12"


@pytest.mark.parametrize(("budget", "counted"), [(1, 1), (2, 1), (3, 3), (4, 4), (99, 5)])
def test_majority_keeps_to_the_tokens_of_the_other_entry(budget, counted):
    engine, config = votes(["7", "12", "12", "7", "7"], reasoning_from="multi_agent")
    other = {"entry": "multi_agent", "tokens": budget, "reasoning": ""}
    if budget == 2:
        engine.reply = lambda request, n: "twelve or so" if n > 1 else "7"
    (found,) = answer(config, engine, predictions=[{"entry": "base", "tokens": 0}, other])
    assert found.tokens == counted <= max(budget, 1)


def test_majority_of_reasoned_answers():
    engine = Scripted(lambda request, n: render_steps(STEPS) + "\nAnswer: 12")
    config = entry("majority", votes=3, voter="direct_sft")
    (found,) = answer(config, engine)
    assert found.answer == "12" and found.reasoning == render_steps(STEPS)


def test_the_judges_card_gives_three_kinds_of_reasoning():
    replies = {"mine": "12", "theirs": "9"}
    summary = Scripted(
        lambda request, n: next(
            (replies[name] for name in replies if name in last_user(request)), "5"
        )
    )
    config = entry("judge_card", reasoning_from="dpo")
    other = {"entry": "dpo", "reasoning": "mine", "tokens": 5}
    found = answer(config, None, summary, donors={QUESTION.key: "theirs"}, predictions=[other])
    assert [(row.entry, row.answer, row.correct) for row in found] == [
        ("judge_card:agent", "12", True),
        ("judge_card:none", "5", False),
        ("judge_card:other", "9", False),
    ]
    assert all(request.pictures == ("pic",) for request in summary.requests)
    with pytest.raises(RecordError, match="no reasoning of dpo"):
        answer(config, None, summary, donors={}, predictions=[other])


def write_predictions(tmp_path, questions):
    asked = [(q.key, [q.to_json()]) for q in questions]
    told = [
        (
            q.key,
            [
                Prediction(
                    f"{q.key}@dpo", q.key, "dpo", f"of {q.key}", "", "1", True, None, "", 1, ()
                ).to_json()
            ],
        )
        for q in questions
    ]
    shards.write_groups(tmp_path / "questions", asked)
    shards.write_groups(tmp_path / "predictions", told)
    return tmp_path / "questions", tmp_path / "predictions"


def test_donors_are_strangers_of_the_same_set_and_seeded(tmp_path):
    questions = [
        Question(f"{name}:test:{n}", "?", (), "1", "number", group=f"{name}{n // 3}")
        for name in ("charts", "shapes")
        for n in range(30)
    ]
    groups = {q.key: q.group for q in questions}
    folders = write_predictions(tmp_path, questions)
    given = donate(*folders, "dpo", seed=1)
    assert given.keys() == groups.keys()
    for key, text in given.items():
        donor = text.removeprefix("of ")
        assert donor.split(":")[0] == key.split(":")[0]
        assert groups[donor] != groups[key]
    assert donate(*folders, "dpo", seed=1) == given != donate(*folders, "dpo", seed=2)
    assert donate(*folders, "another", seed=1) == {}


def test_nobody_gets_their_own_reasoning(tmp_path):
    alone = [Question("charts:test:0", "?", (), "1", "number", group="g")]
    assert donate(*write_predictions(tmp_path / "one", alone), "dpo", 0) == {}
    two = [Question(f"charts:test:{n}", "?", (), "1", "number", group="g") for n in range(2)]
    given = donate(*write_predictions(tmp_path / "two", two), "dpo", 0)
    assert given == {"charts:test:0": "of charts:test:1", "charts:test:1": "of charts:test:0"}


def test_undecided_goes_to_the_judge_and_engines_are_closed_once():
    judge_engine = Scripted(lambda request, n: "yes")
    question = Question("charts:test:3", "Why?", ("pic",), "it rains", "text")
    engine = Scripted(lambda request, n: "because water falls")
    judge = Judge(judge_engine, PROMPTS, JudgeConfig())
    mapper = Answer(entry("direct"), PROMPTS, judge, engine)
    (row,) = asyncio.run(mapper(question.key, {"questions": [question.to_json()]}))
    assert (row["correct"], row["rule"]) == (True, "llm")
    shared = Answer(
        entry("multi_agent"), PROMPTS, Judge(engine, PROMPTS, JudgeConfig()), engine, engine
    )
    closed = []
    engine.close = lambda: closed.append(1) or asyncio.sleep(0)
    asyncio.run(shared.close())
    assert closed == [1]


def test_a_missing_question_and_a_failing_engine_are_record_errors():
    engine = Scripted(lambda request, n: "12")
    with pytest.raises(RecordError, match="missing"):
        answer(entry("direct"), engine, questions=[])

    async def broken(request):
        raise RecordError("picture pic is not in the store")

    engine.complete = broken
    with pytest.raises(RecordError, match="not in the store"):
        answer(entry("multi_agent"), engine, engine)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "both"}, "mode is 'both'; use direct"),
        ({"name": "../x"}, "letters, digits"),
        ({"mode": "multi_agent", "summary_model": ""}, "needs a summary_model"),
        ({"mode": "judge_card"}, "reasoning_from"),
        ({"mode": "majority", "answer": GREEDY}, "all the same"),
        ({"mode": "majority", "voter": "summary_only"}, "voter"),
        ({"mode": "majority", "votes": 0}, "at least 1"),
    ],
)
def test_what_cannot_work_is_one_line(settings, message):
    config = EntryConfig(**{"reasoning_model": "a", "summary_model": "b", **settings})
    with pytest.raises(UserError, match=message) as caught:
        config.validate()
    assert "\n" not in str(caught.value)


class Writer:
    """Writes a fixed turn on from wherever the open turn stands, up to a stop."""

    def __init__(self, turn):
        self.turn, self.requests = turn, []

    async def complete(self, request):
        self.requests.append(request)
        done = request.messages[-1].text if request.messages[-1].role == "assistant" else ""
        assert self.turn.startswith(done.rstrip("\n"))
        rest = self.turn[len(done) :]
        text = rest.split("\n", 1)[0]
        return Completion(text, len(text.split()), "stop")


def heard(reasoning, summary):
    async def collect():
        config = entry("multi_agent")
        return [h async for h in ask(reasoning, summary, PROMPTS, QUESTION, config)]

    return asyncio.run(collect())


def test_asking_hears_each_step_then_both_answers():
    writer = Writer(render_steps(STEPS))
    summary = Scripted(lambda request, n: "12" if n == 1 else "10")
    found = heard(writer, summary)
    assert [h.kind for h in found] == ["step", "step", "answer", "unaided"]
    assert [h.step for h in found[:2]] == list(STEPS)
    assert [h.text for h in found[2:]] == ["12", "10"]
    assert len(writer.requests) == 2 and writer.requests[1].stop == ("\n",)
    assert render_steps(STEPS) in last_user(summary.requests[0])
    assert "Jan 5" not in last_user(summary.requests[1])
    assert all(r.pictures == ("pic",) for r in (*writer.requests, *summary.requests))


def test_asking_reads_steps_over_several_lines_and_stops_at_noise():
    pretty = json.dumps({"title": "Read", "content": "Jan 5", "next_action": "continue"}, indent=1)
    found = heard(Writer(pretty + "\nI am lost"), Scripted(lambda request, n: "?"))
    assert [h.kind for h in found] == ["step", "noise", "answer", "unaided"]
    assert found[0].step == Step("Read", "Jan 5", "continue")
    assert found[1].text == "I am lost"


def test_asking_ends_when_the_agent_never_does():
    endless = render_steps([Step("Read", f"bar {n}", "continue") for n in range(500)])
    found = heard(Writer(endless), Scripted(lambda request, n: "?"))
    assert 10 < sum(h.kind == "step" for h in found) <= 512


def test_printing_cannot_steer_the_terminal():
    evil = "\x1b[2J\u202e[bold red]x[/]"
    steps = render_steps([Step(evil, evil, "summary")])
    console = Console(width=100, record=True, force_terminal=True, color_system=None)
    with console.capture() as capture:
        asyncio.run(
            ask_and_print(
                Writer(steps),
                Scripted(lambda request, n: evil),
                PROMPTS,
                QUESTION,
                entry("multi_agent"),
                console,
            )
        )
    text = capture.get()
    assert "\x1b[2J" not in text and "\u202e" not in text
    assert "[bold red]x[/]" in text and "Without the reasoning" in text


def test_predictions_of_the_fixture_are_records(tmp_path):
    run = runs.make_run(tmp_path / "run", tables=3)
    for row in shards.read_rows(run / "stages" / "eval-judge-card" / "shards"):
        Prediction.from_json(row)
