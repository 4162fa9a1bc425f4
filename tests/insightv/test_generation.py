import asyncio

import pytest
from scripted import Scripted

from hpc.errors import RecordError, UserError
from insightv.agents import SummaryAgent
from insightv.engines import SamplingConfig
from insightv.generation import Generate, GenerationConfig
from insightv.prompting import load_prompts
from insightv.records import Question, Step, failed_paths, paths, seed_for
from insightv.steps import render_steps

PROMPTS = load_prompts("default")
QUESTION = Question("charts:train:7", "What is the sum?", ("pic",), "12", "number")
STEPS = (Step("Read", "5 and 7", "continue"), Step("Add", "12", "summary"))
SINGLE = GenerationConfig(mode="single", paths=3, tries=2, chain_tokens=500)


def run(config, engine, answerer=None, **options):
    mapper = Generate(config, engine, PROMPTS, seed=5, round=2, answerer=answerer, **options)
    return asyncio.run(mapper(QUESTION.key, {"questions": [QUESTION.to_json()]}))


def is_final(request) -> bool:
    return request.messages[-1].text == PROMPTS.render("final")


def test_single_paths_have_their_own_seeds_and_answers():
    engine = Scripted(lambda request, n: " 12\n" if is_final(request) else render_steps(STEPS))
    found = paths(run(SINGLE, engine))
    assert [path.key for path in found] == [f"{QUESTION.key}/r2/p{n}" for n in range(3)]
    for number, path in enumerate(found):
        assert (path.steps, path.answer, path.finish) == (STEPS, "12", "summary")
        assert (path.model, path.prompt) == ("scripted", PROMPTS.version)
        assert path.seed == seed_for(5, "generate", 2, QUESTION.key, number, 0, 0)
        assert path.tokens == len(render_steps(STEPS).split()) + 1 and path.attempts == 2
    asked = [request for request in engine.requests if not is_final(request)]
    assert {request.seed for request in asked} == {path.seed for path in found}
    assert {request.sampling.max_tokens for request in asked} == {500}
    last = next(request for request in engine.requests if is_final(request))
    assert last.messages[1].text == render_steps(STEPS) and last.pictures == ("pic",)
    assert last.sampling.temperature == 0


def test_progressive_is_the_papers_loop():
    def reply(request, n):
        if is_final(request):
            return "12"
        done = len(request.messages) == 2
        return render_steps(STEPS[done : done + 1])[:-1]

    engine = Scripted(reply)
    (path,) = paths(run(GenerationConfig(paths=1), engine))
    assert path.steps == STEPS and path.attempts == 3
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.repetition_penalty) == (0.7, 0.95, 1.05)
    assert sampling.max_tokens == 1024
    assert engine.requests[1].seed == seed_for(5, "generate", 2, QUESTION.key, 0, 1, 0)


def test_failed_paths_stand_among_the_rows():
    bad = {seed_for(5, "generate", 2, QUESTION.key, 1, 0, attempt) for attempt in range(2)}

    def reply(request, n):
        if is_final(request):
            return "12"
        return "x" * 9000 if request.seed in bad else render_steps(STEPS)

    rows = run(SINGLE, Scripted(reply))
    assert [path.key[-2:] for path in paths(rows)] == ["p0", "p2"]
    (failed,) = failed_paths(rows)
    assert failed.key == f"{QUESTION.key}/r2/p1" and failed.reason == "no JSON object"
    assert failed.text == "x" * 4096


def test_a_question_without_any_path_is_an_error_with_its_reasons():
    with pytest.raises(RecordError, match="all 3 paths failed: 3 x no JSON object"):
        run(SINGLE, Scripted(lambda request, n: "no"))


def test_an_unserved_request_fails_its_path_only():
    def reply(request, n):
        if n == 1:
            raise RecordError("prompt of 9 tokens, context of 8")
        return "12" if is_final(request) else render_steps(STEPS)

    rows = run(SINGLE, Scripted(reply))
    assert len(paths(rows)) == 2 and failed_paths(rows)[0].reason.startswith("prompt of 9")


def test_the_summary_agent_can_answer():
    engine, other = Scripted(lambda request, n: render_steps(STEPS)), Scripted(lambda *_: "13")
    found = paths(run(SINGLE, engine, SummaryAgent(other, PROMPTS)))
    assert {path.answer for path in found} == {"13"}
    assert all(render_steps(STEPS) in request.messages[0].text for request in other.requests)

    mapper = Generate(SINGLE, engine, PROMPTS, 5, 1, SummaryAgent(other, PROMPTS))
    asyncio.run(mapper.close())
    assert engine.closed and other.closed


def test_the_batch_stays_full():
    engine = Scripted(None)
    engine.concurrency = 65
    assert Generate(GenerationConfig(paths=8), engine, PROMPTS, 0).concurrency == 9


def test_a_missing_question_is_told():
    mapper = Generate(SINGLE, Scripted(None), PROMPTS, 0)
    with pytest.raises(RecordError, match="its question is missing"):
        asyncio.run(mapper("a:b:1", {"questions": []}))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (GenerationConfig(mode="often"), "generation.mode"),
        (GenerationConfig(paths=0), "generation.paths is 0"),
        (GenerationConfig(sampling=SamplingConfig(top_p=0.0)), "generation.sampling.top_p is 0.0"),
        (GenerationConfig(answer=SamplingConfig(temperature=-1)), "generation.answer.temperature"),
    ],
)
def test_impossible_values_are_told(config, told):
    with pytest.raises(UserError, match=told):
        Generate(config, Scripted(None), PROMPTS, 0)
