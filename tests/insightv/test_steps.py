import random
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from insightv.records import Step
from insightv.steps import ParsedSteps, StepError, parse_step, parse_steps, render_steps, repeats

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
STEPS = st.lists(
    st.builds(
        Step, TEXT, TEXT.filter(lambda text: text.strip()), st.sampled_from(["continue", "summary"])
    ),
    max_size=6,
)
FRAME = '{"title": "a", "content": "b", "next_action": "continue"}'
A = Step("a", "b", "continue")
Z = Step("a", "b", "summary")

# A text, the steps in it, and a word its problems must tell.
NASTY: list[tuple[str, list[Step], str]] = [
    (FRAME, [A], ""),
    (f"Sure! Here is the next step:\n\n{FRAME}\n\nLet me know.", [A], "text around"),
    (f"```json\n{FRAME}\n```", [A], ""),
    (f"```\n{FRAME}\n```\nDone.", [A], "text around"),
    (f"{FRAME} {FRAME.replace('b', 'c')}", [A, Step("a", "c", "continue")], ""),
    (FRAME + FRAME.replace('"b"', '"c"'), [A, Step("a", "c", "continue")], ""),
    (f"[{FRAME},\n {FRAME.replace('continue', 'summary')}]", [A, Z], "step 2 repeats step 1"),
    ('{\n  "title": "a",\n  "content": "b",\n  "next_action": "continue"\n}', [A], ""),
    ('{"title": "a", "content": "b", "next_action": "continue",}', [A], "not valid"),
    ("{'title': 'a', 'content': 'b', 'next_action': 'summary'}", [Z], "not valid"),
    (
        "{'title': 'a', 'content': 'the bar's top', 'next_action': 'summary'}",
        [Step("a", "the bar's top", "summary")],
        "not valid",
    ),
    (
        """{'title': 'a', 'content': "the bar's top", 'next_action': 'summary'}""",
        [Step("a", "the bar's top", "summary")],
        "not valid",
    ),
    ('{"Title": "a", "Reasoning": "b", "nextAction": "continue"}', [A], "'nextAction'"),
    ('{"TITLE": "a", "CONTENT": "b", "NEXT_ACTION": "CONTINUE"}', [A], "'CONTINUE'"),
    ('{"title": "a", "content": "b", "next action": "continue"}', [A], "'next action'"),
    ('{"title": "a", "content": "b", "action": "continue"}', [A], "'action'"),
    ('{"title": "a", "content": "b", "next-action": "Continue."}', [A], "'Continue.'"),
    ('{"step": 1, "title": "a", "content": "b", "next_action": "continue"}', [A], ""),
    ('{"step": "a", "thought": "b", "next_step": "continue"}', [A], "'thought'"),
    ('{"id": "1", "title": "a", "content": "b", "next_action": "continue"}', [A], "'id'"),
    (
        '{"steps": [' + FRAME + ", " + FRAME.replace('"b"', '"c"') + "]}",
        [A, Step("a", "c", "continue")],
        "",
    ),
    ('{"step 1": ' + FRAME + "}", [A], ""),
    (f"{FRAME}\n" + '{"title": "c", "content": "half', [A], "cut off"),
    (f"{FRAME}\n" + '{"ti', [A], "text around"),
    ('{"title": "a", "content": "b", "next_action": "summ', [], "cut off"),
    (
        '{"title": "a", "content": "b", "next_action": "summary"',
        [Z],
        "not valid",
    ),
    (
        '{"title": "a", "content": "one\ntwo", "next_action": "continue"}',
        [Step("a", "one\ntwo", "continue")],
        "line break",
    ),
    (
        '{"title": "a", "content": "the set {1, {2}} and }", "next_action": "continue"}',
        [Step("a", "the set {1, {2}} and }", "continue")],
        "",
    ),
    (
        '{"title": "a", "content": "the "big" bar", "next_action": "continue"}',
        [Step("a", 'the "big" bar', "continue")],
        "not valid",
    ),
    (
        '{"title": "a", "content": "\\(x\\) is \\frac{1}{2} or 5\\%", "next_action": "continue"}',
        [Step("a", "\\(x\\) is \\frac{1}{2} or 5\\%", "continue")],
        "not valid",
    ),
    (
        '{"title": "a", "content": "say \\"hi\\" {\\"title\\": \\"q\\"}",'
        ' "next_action": "continue"}',
        [Step("a", 'say "hi" {"title": "q"}', "continue")],
        "",
    ),
    (
        '<step>{"title": "<b>a</b>", "content": "<script>alert(1)</script>",'
        ' "next_action": "continue"}</step>',
        [Step("<b>a</b>", "<script>alert(1)</script>", "continue")],
        "text around",
    ),
    (
        '{"title": "a", "content": "<|im_end|><image>", "next_action": "continue"}<|im_end|>',
        [Step("a", "<|im_end|><image>", "continue")],
        "text around",
    ),
    (
        "{&quot;title&quot;: &quot;a&quot;, &quot;content&quot;: &quot;b&quot;,"
        " &quot;next_action&quot;: &quot;continue&quot;}",
        [A],
        "HTML entities",
    ),
    ('{"title": "a", "content": "b", "next\\_action": "continue"}', [A], "not valid"),
    ("{“title”: “a”, “content”: “b”, “next_action”: “continue”}", [A], "not valid"),
    ('{title: "a", content: "b", next_action: "continue"}', [A], "not valid"),
    ("{title: a, content: b, next_action: continue}", [A], "not valid"),
    *(
        (FRAME.replace("continue", word), [Z], "next_action")
        for word in ("final", "end", "Done", "final_answer", "FINISH")
    ),
    (FRAME.replace("continue", "dance"), [], "unknown next_action 'dance'"),
    (FRAME.replace("continue", "continue|summary"), [], "unknown next_action"),
    (FRAME.replace('"continue"', "null"), [], "no 'next_action'"),
    ('{"title": "a", "content": "b"}', [], "no 'next_action'"),
    ('{"content": "b", "next_action": "continue"}', [], "no 'title'"),
    ('{"title": "a", "content": "  ", "next_action": "continue"}', [], "empty content"),
    ('{"title": "x", "title": "a", "content": "b", "next_action": "continue"}', [A], "twice"),
    (f"{FRAME}\n{FRAME}", [A, A], "step 2 repeats step 1"),
    (
        '{"title": "a", "content": ["b", "c"], "next_action": "continue"}',
        [Step("a", "b c", "continue")],
        "no text",
    ),
    (
        '{"title": "a", "content": {"left": 3}, "next_action": "continue"}',
        [Step("a", '{"left": "3"}', "continue")],
        "no text",
    ),
    (
        '{"title": 7, "content": "b", "next_action": "continue"}',
        [Step("7", "b", "continue")],
        "",
    ),
    (
        '{"title": "\\ud800", "content": "b", "next_action": "continue"}',
        [Step("\ufffd", "b", "continue")],
        "",
    ),
    ("The answer is 7.", [], "text around"),
    ("", [], ""),
    ("{", [], ""),
    ("}{", [], ""),
    ("null", [], "text around"),
    ('{"answer": 7}', [], ""),
    ("{" * 1000 + FRAME + "}" * 1000, [A], ""),
    ('{"title": ' * 2000, [], "cut off"),
    (f"The set {{1, 2}} matters. {FRAME}", [A], "text around"),
    (f"\ufeff{FRAME}\u2028", [A], ""),
    (f"{FRAME}\r\n{FRAME.replace('b', 'c')}\r\n", [A, Step("a", "c", "continue")], ""),
]


@pytest.mark.parametrize(("text", "steps", "problem"), NASTY, ids=range(len(NASTY)))
def test_what_models_write_is_read(text: str, steps: list[Step], problem: str) -> None:
    found = parse_steps(text)
    assert list(found.steps) == steps
    assert problem in "; ".join(found.problems)
    if not problem and text.count("{"):
        assert not any("not valid" in told for told in found.problems)
    if steps:
        assert parse_step(text) == steps[0]
    else:
        with pytest.raises(StepError):
            parse_step(text)


@given(STEPS)
@example([Step("t", '{"title": "x", {title: {title: {title: {title: {title: ', "continue")])
@example([Step('", "content": "', '\n```\u2028\x00"}\\', "summary")])
def test_rendering_is_undone_by_parsing(steps: list[Step]) -> None:
    text = render_steps(steps)
    found = parse_steps(text)
    assert found.steps == tuple(steps)
    assert (found.rest, found.lost, found.truncated) == ("", (), False)
    assert len(text.split("\n")) == max(1, len(steps))


def test_the_canonical_text_is_exact() -> None:
    text = render_steps([Step('é "q"', "1\n2", "continue"), Step("t", "c", "summary")])
    assert text == (
        '{"title": "é \\"q\\"", "content": "1\\n2", "next_action": "continue"}\n'
        '{"title": "t", "content": "c", "next_action": "summary"}'
    )


PIECES = [*"{}\"'[]:,\\`“” \n", "title", "content", "next_action", "continue", "summary", "```json"]


@settings(max_examples=300)
@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3))).map("".join))
def test_nothing_but_step_errors(text: str) -> None:
    assert isinstance(parse_steps(text), ParsedSteps)
    try:
        parse_step(text)
    except StepError as error:
        assert "\n" not in str(error)


@settings(max_examples=60)
@given(STEPS.filter(bool), st.data())
def test_a_cut_text_keeps_its_whole_steps(steps: list[Step], data: st.DataObject) -> None:
    text = render_steps(steps)
    cut = data.draw(st.integers(0, len(text)))
    whole = text[:cut].count("\n")
    assert parse_steps(text[:cut]).steps[:whole] == tuple(steps[:whole])


def _endless() -> list[str]:
    rng = random.Random(0)
    return [
        "{" * 100_000,
        '{"title":' * 12_000,
        '{"title": "' * 10_000,
        '{"title":[' * 10_000,
        '{"title": "x", "content": "' * 4_000,
        "{title:" * 15_000,
        '{"title": "a", "content": "' + '",' * 45_000,
        '{"title": "a", "next_action": "' + '"' + " " * 100_000,
        '{"title": "a", "next_action": "' + '" \n' * 30_000,
        '{"title": "a"' + "\n" * 100_000,
        '{"title": "a"' + '\n "' * 30_000,
        "{" + " " * 100_000,
        ("{" + " " * 1_000) * 100,
        '{"title": "a", "content": 1' + "0" * 100_000,
        '{"title": "a",' + ' "title": "b",' * 7_000 + "}",
        '{"title": "a",' + " \"title\": 'b'," * 7_000 + "}",
        ('{"a":' * 500 + "1" + "}" * 500) * 30,
        "\\" * 100_000,
        "".join(rng.choice(PIECES) for _ in range(40_000)),
        render_steps([Step("t", f"word {n} " * 40, "continue") for n in range(300)]),
    ]


@pytest.mark.parametrize("text", _endless(), ids=range(20))
def test_endless_output_costs_its_length(text: str) -> None:
    def seconds() -> float:
        start = time.thread_time()
        parse_steps(text)
        return time.thread_time() - start

    assert min(seconds() for _ in range(3)) < 0.1 * max(1, len(text) / 100_000)


def test_reasons_say_what_is_missing() -> None:
    for text, reason, truncated in [
        ("", "empty text", False),
        ("no json here", "no JSON object", False),
        ('{"title": "a", "content": "b"}', "no 'next_action'", False),
        ('{"title": "a", "content": "b', "cut off: no 'next_action'", True),
        (FRAME.replace("continue", "dance"), "unknown next_action 'dance'", False),
    ]:
        with pytest.raises(StepError, match=f"^{reason}$") as caught:
            parse_step(text)
        assert caught.value.truncated is truncated


def test_repeats_ignore_case_and_space() -> None:
    assert repeats([A, Step("x", "One  two", "continue")], Step("y", " one TWO", "summary")) == 2
    assert repeats([A], Step("a", "c", "continue")) is None
