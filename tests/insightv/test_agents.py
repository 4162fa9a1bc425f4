import asyncio

import pytest
from scripted import Scripted

from hpc.errors import UserError
from insightv.agents import (
    DirectAgent,
    FinalAgent,
    MultiAgent,
    ReasoningAgent,
    SummaryAgent,
    direct_messages,
    final_messages,
    reasoning_messages,
    summary_messages,
)
from insightv.engines import Completion, Sampling
from insightv.prompting import load_prompts
from insightv.records import Question, Step
from insightv.steps import render_steps

PROMPTS = load_prompts("default")
QUESTION = Question("charts:test:1", "How much is {truth}?", ("pic",), "5", "number")
READ = Step("Read", "Jan is {1, 2}.", "continue")
ADD = Step("Add", "5 in all", "summary")


class Stopping(Scripted):
    """Like an engine: ends the text before the first stop string."""

    async def complete(self, request):
        done = await super().complete(request)
        cuts = [done.text.find(stop) for stop in request.stop if stop in done.text]
        return Completion(done.text[: min(cuts)] if cuts else done.text, done.tokens, "stop")


def line(step: Step) -> str:
    return render_steps([step])


def agent(reply, mode="single", **options):
    engine = Stopping(reply)
    return engine, ReasoningAgent(engine, PROMPTS, mode=mode, **options)


def test_chats_are_append_only():
    steps = render_steps([READ, ADD])
    asked = reasoning_messages(PROMPTS, QUESTION)
    assert [m.role for m in asked] == ["user"] and QUESTION.text in asked[0].text
    assert reasoning_messages(PROMPTS, QUESTION, line(READ))[:1] == asked
    assert final_messages(PROMPTS, QUESTION, steps)[:2] == reasoning_messages(
        PROMPTS, QUESTION, steps
    )
    assert [m.role for m in final_messages(PROMPTS, QUESTION, steps)] == [
        *("user", "assistant", "user")
    ]
    (told,) = summary_messages(PROMPTS, QUESTION, steps)
    assert steps in told.text and QUESTION.text in told.text
    for none in (None, ""):
        (plain,) = summary_messages(PROMPTS, QUESTION, none)
        assert plain.text == PROMPTS.render("plain_summary", question=QUESTION.text)
    assert direct_messages(PROMPTS, QUESTION)[0].text.endswith(QUESTION.text)


def test_both_agents_are_given_the_pictures_and_their_own_sampling():
    first = Scripted(lambda request, n: render_steps([READ, ADD]))
    second = Scripted(lambda request, n: " 5.\n")
    pair = MultiAgent(
        ReasoningAgent(first, PROMPTS, Sampling(max_tokens=77)),
        SummaryAgent(second, PROMPTS, Sampling(0.5, max_tokens=7)),
    )
    thought, answer = asyncio.run(pair.answer(QUESTION, seed=9))
    assert thought.steps == (READ, ADD) and answer.text == "5."
    (asked,), (told,) = first.requests, second.requests
    assert asked.pictures == told.pictures == QUESTION.pictures
    assert (asked.sampling.max_tokens, told.sampling.max_tokens) == (77, 7)
    assert thought.text in told.messages[0].text


def test_reasoning_that_went_wrong_is_still_judged():
    first = Scripted(lambda request, n: "I think it is 5.")
    second = Scripted(lambda request, n: "5")
    pair = MultiAgent(ReasoningAgent(first, PROMPTS), SummaryAgent(second, PROMPTS))
    thought, _ = asyncio.run(pair.answer(QUESTION))
    assert (thought.problem, thought.steps) == ("no JSON object", ())
    assert "I think it is 5." in second.requests[0].messages[0].text


@pytest.mark.parametrize(
    ("kind", "roles"), [(DirectAgent, ["user"]), (FinalAgent, ["user", "assistant", "user"])]
)
def test_answers_come_with_the_picture(kind, roles):
    engine = Scripted(lambda request, n: " yes \n")
    answer = asyncio.run(kind(engine, PROMPTS).answer(QUESTION, line(ADD)))
    assert answer.text == "yes"
    assert [m.role for m in engine.requests[0].messages] == roles
    assert engine.requests[0].pictures == ("pic",)


def test_single_keeps_what_stands_before_the_summary():
    engine, thinker = agent(lambda request, n: f"{line(READ)}\n{line(ADD)}\nThe answer is 5")
    thought = asyncio.run(thinker.reason(QUESTION))
    assert (thought.steps, thought.finish, thought.problem) == ((READ, ADD), "summary", "")
    assert thought.text == render_steps([READ, ADD])
    assert engine.requests[0].stop == ()


def test_single_tries_again_with_another_seed():
    texts = ["no idea", f"{line(READ)}\n{line(READ)}", line(READ), line(ADD)]
    engine, thinker = agent(lambda request, n: texts[n - 1], tries=4)
    thought = asyncio.run(thinker.reason(QUESTION, lambda step, attempt: 100 + attempt))
    assert (thought.steps, thought.attempts, thought.problem) == ((ADD,), 4, "")
    assert [request.seed for request in engine.requests] == [100, 101, 102, 103]
    assert thought.tokens == sum(len(text.split()) for text in texts)


@pytest.mark.parametrize(
    ("text", "problem", "finish"),
    [
        ("nothing", "no JSON object", "truncated"),
        (f"{line(READ)}\n{line(READ)}", "step 2 repeats an earlier one", "truncated"),
        ('{"title": "a"}\n' + line(READ), "no 'content'", "truncated"),
        (line(READ), "", "truncated"),
        (line(READ) + '\n{"title": "half', "", "truncated"),
        (f"{line(READ)}\n{line(READ).replace('Jan', 'Feb')}\n{line(ADD)}", "", "step_cap"),
    ],
)
def test_single_says_how_a_chain_ended(text, problem, finish):
    _, thinker = agent(lambda request, n: text, max_steps=2, tries=2)
    thought = asyncio.run(thinker.reason(QUESTION))
    assert (thought.problem, thought.finish) == (problem, finish)
    assert len(thought.steps) <= 2 and thought.text


def test_progressive_goes_on_with_one_turn():
    pretty = '{\n  "title": "Add",\n  "content": "5 in all",\n  "next_action": "summary"\n}'
    other = Step("Look", "at the axis", "continue")

    def reply(request, n):
        if n == 1:
            return f"Sure:\n{line(other)} and more"
        return (
            line(READ)[len('{"title": "Read", "content": "Jan is {1, 2}') :]
            if n == 3
            else (line(READ) if n == 2 else pretty)
        )

    engine, thinker = agent(reply, mode="progressive")
    thought = asyncio.run(thinker.reason(QUESTION, lambda step, attempt: 1000 * step + attempt))
    assert thought.steps == (other, READ, ADD) and thought.finish == "summary"
    turns = [request.messages[1].text for request in engine.requests[1:]]
    # The brace in step 2's content ended its first call; the second went on from there.
    assert turns[0] == line(other) + "\n"
    assert turns[1] == turns[0] + '{"title": "Read", "content": "Jan is {1, 2}'
    assert turns[2] == render_steps([other, READ]) + "\n"
    assert all(request.pictures == ("pic",) for request in engine.requests)
    assert [request.seed for request in engine.requests] == [0, 1000, 1001, 2000]
    assert thought.attempts == 4


def test_progressive_refuses_repeats_and_stops_at_the_cap():
    engine, thinker = agent(
        lambda request, n: line(Step("x", "same" if n < 3 else f"step {n}", "continue")),
        mode="progressive",
        tries=2,
        max_steps=3,
    )
    thought = asyncio.run(thinker.reason(QUESTION))
    assert [step.content for step in thought.steps] == ["same", "step 3", "step 4"]
    assert (thought.finish, thought.attempts, thought.problem) == ("step_cap", 4, "")


def test_progressive_gives_up_with_its_reason():
    engine, thinker = agent(lambda request, n: "hm", mode="progressive", tries=3)
    thought = asyncio.run(thinker.reason(QUESTION))
    assert thought.problem == "step 1: no JSON object" and len(engine.requests) == 3
    assert "hm" in thought.text


def test_a_step_has_one_token_limit_over_all_its_calls():
    engine, thinker = agent(
        lambda request, n: '{"title": "a", "content": "set {1' if n == 1 else " {2",
        mode="progressive",
    )
    thinker.sampling = Sampling(max_tokens=12)
    thought = asyncio.run(thinker.reason(QUESTION))
    limits = [request.sampling.max_tokens for request in engine.requests]
    assert limits == [12, 7, 6, 5, 4, 3, 2, 1] and "cut off" in thought.problem


def test_an_unknown_mode_is_refused():
    with pytest.raises(UserError, match="progressive or single"):
        ReasoningAgent(Scripted(None), PROMPTS, mode="twice")
