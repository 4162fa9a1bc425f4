"""Training sets and preference pairs: what may be in them, and that every drop is counted."""

import json
import random
import tracemalloc
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.errors import UserError
from insightv.agents import direct_messages, reasoning_messages, summary_messages
from insightv.curation import (
    PairConfig,
    ReasoningSetConfig,
    SummarySetConfig,
    direct_set,
    multi_turn_set,
    parse_direct,
    plain_samples,
    preference_pairs,
    reasoning_set,
    render_direct,
    summary_set,
    union_set,
)
from insightv.curation.groups import cut
from insightv.prompting import load_prompts
from insightv.records import PathScore, Question, ReasoningPath, Step, Verdict
from insightv.steps import parse_steps, render_steps

PROMPTS = load_prompts("default")
WORDS = ["bar", "value", "north", "south", "label", "axis", "height", "read", "add", "line"]


def question(number, answer="7"):
    return Question(f"q:train:{number}", f"How many in {1900 + number}?", ("p",), answer, "number")


def path(asked, number, answer="7", last=None, body="I read the chart.", finish="summary", round=0):
    steps = (
        Step("Read", body, "continue"),
        Step("Answer", last if last is not None else f"So it is {answer}.", "summary"),
    )
    key = f"{asked.key}/r{round}/p{number}"
    return ReasoningPath(key, asked.key, steps, answer, finish, 9, 1, "m", "t", 1)


def group(asked, entries):
    """A joined group from (path, correct, total); total "none": no score row at all."""
    return asked.key, {
        "questions": [asked.to_json()],
        "paths": [p.to_json() for p, _, _ in entries],
        "verdicts": [Verdict(p.key, asked.key, c, "number").to_json() for p, c, _ in entries],
        "scores": [
            PathScore(p.key, asked.key, t, t, t, t, reason="" if t else "x").to_json()
            for p, _, t in entries
            if t != "none"
        ],
    }


def plain(count=50):
    return lambda: (replace(question(n, "4"), key=f"plain:train:{n}") for n in range(count))


def reasoning(groups, count=50, seed=1, make=reasoning_set, **config):
    counts = Counter()
    made = make(ReasoningSetConfig(**config), lambda: groups, plain(count), PROMPTS, seed, counts)
    return list(made), counts


def pairs(groups, seed=1, **config):
    counts = Counter()
    config = PairConfig(**{"scale": "score", "winner_from": 50} | config)
    return list(preference_pairs(config, lambda: groups, PROMPTS, seed, counts)), counts


def dropped(counts):
    return sum(count for name, count in counts.items() if name.startswith("dropped"))


ASKED = question(0)


def test_the_best_right_paths_are_learned_and_the_others_counted():
    failed = {"key": f"{ASKED.key}/r0/p9", "question": ASKED.key, "reason": "no step parsed"}
    entries = [
        (path(ASKED, 0, body="one two three four"), True, 90),
        (path(ASKED, 1, body="five six seven eight"), True, 95),
        (path(ASKED, 2, body="nine ten eleven twelve"), True, 85),
        (path(ASKED, 3, body="a b c d"), True, 30),
        (path(ASKED, 4, answer="8"), False, None),
        (path(ASKED, 5), None, 90),
        (path(ASKED, 6, finish="step_cap"), True, 90),
        (path(ASKED, 7), True, None),
        (path(ASKED, 8, last="So it is 12."), True, 90),
    ]
    key, rows = group(ASKED, entries)
    rows["paths"].append(failed)
    samples, counts = reasoning([(key, rows)], scale="score", threshold=50, replay=0)
    assert [sample.key for sample in samples] == [f"{ASKED.key}/r0/p{n}/reasoning" for n in (1, 0)]
    assert counts == {
        "questions": 1, "paths": 10, "paths failed": 1, "paths right": 7, "paths wrong": 1,
        "paths undecided": 1, "least total": 50, "kept": 2,
        "dropped: over the cap of its question": 1, "dropped: low score": 1,
        "dropped: wrong answer": 1, "dropped: undecided": 1, "dropped: unfinished": 1,
        "dropped: unscored": 1, "dropped: steps state another answer": 1,
    }  # fmt: skip
    asked, turn = samples[0].messages
    assert (asked,) == tuple(reasoning_messages(PROMPTS, ASKED)) and not asked.train
    assert turn.text == render_steps(entries[1][0].steps) and turn.train
    assert parse_steps(turn.text).steps == entries[1][0].steps


def test_near_duplicates_give_way_to_other_ways():
    entries = [
        (path(ASKED, 0, body="The bar of North is 3, that of South is 4."), True, 90),
        (path(ASKED, 1, body="the BAR of North is 3; that of South is 4"), True, 90),
        (path(ASKED, 2, body="Adding from the axis upward gives the total height"), True, 80),
    ]
    samples, counts = reasoning([group(ASKED, entries)], scale="score", replay=0)
    assert len(samples) == 2 and samples[1].parents == (entries[2][0].key,)
    assert counts["dropped: near duplicate"] == 1
    assert len(reasoning([group(ASKED, entries)], max_overlap=1.0, replay=0, scale="score")[0]) == 2


def test_scores_of_the_retest_are_ignored():
    key, rows = group(ASKED, [(path(ASKED, 0), True, 90)])
    rows["scores"].append(rows["scores"][0] | {"total": 10, "reason": "retest"})
    assert len(reasoning([(key, rows)], scale="score", threshold=50, replay=0)[0]) == 1


def test_thresholds_in_percentiles():
    totals = [0] * 101
    for total in (10, 20, 30, 40):
        totals[total] = 25
    assert [cut("percentile", p, totals) for p in (0, 24, 25, 50, 100)] == [10, 10, 20, 30, 100]
    assert cut("score", 50, totals) == 50
    totals = [0] * 80 + [9] + [0] * 20
    assert cut("percentile", 50, totals) == 80
    assert cut("percentile", 50, [0] * 101) == 100


def test_easy_questions_can_be_left_out():
    easy = group(ASKED, [(path(ASKED, 0), True, 90)])
    other = question(1)
    hard = group(other, [(path(other, 0), True, 90), (path(other, 1, "9"), False, None)])
    samples, counts = reasoning([easy, hard], max_pass_rate=0.5, replay=0)
    assert [sample.question for sample in samples] == [other.key]
    assert counts["dropped: too easy a question"] == 1


def many(count=40, seed=0):
    """Groups of all kinds of paths."""
    rng = random.Random(seed)
    groups = []
    for number in range(count):
        asked = question(number, str(rng.randint(1, 9)))
        entries = []
        for k in range(rng.randint(0, 8)):
            answer = rng.choice([asked.answer, asked.answer, str(rng.randint(1, 9))])
            correct = rng.choice([answer == asked.answer, answer == asked.answer, None])
            total = rng.choice([rng.randint(1, 100), None, "none"]) if correct else "none"
            body = " ".join(rng.choices(WORDS, k=rng.randint(3, 12)))
            last = rng.choice([None, None, "Done.", f"It is {asked.answer}", f"{body} {answer}"])
            finish = rng.choice(["summary"] * 5 + ["step_cap"])
            entries.append((path(asked, k, answer, last, body, finish), correct, total))
        groups.append(group(asked, entries))
    return groups


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["score", "percentile"]), st.integers(1, 4))
def test_every_path_is_kept_or_counted(seed, scale, cap):
    groups = many(12, seed)
    config = {"scale": scale, "per_question": cap, "use_unscored": seed % 2 == 0}
    samples, counts = reasoning(groups, size=[None, 5][seed % 2], replay=0, **config)
    assert counts["paths"] == counts["kept"] + dropped(counts) and counts["kept"] == len(samples)
    assert max(Counter(s.question for s in samples).values(), default=0) <= cap
    summary, counts = summaries(groups, scale=scale)
    reasoned = [s for s in summary if s.kind != "summary:plain"]
    assert counts["paths"] == len(reasoned) + dropped(counts)


def test_a_smaller_set_is_a_subset_and_seeds_choose():
    groups = many(80)
    everything, _ = reasoning(groups, replay=0)
    five, counts = reasoning(groups, size=5, replay=0)
    ten, _ = reasoning(groups, size=10, replay=0)
    assert len(five) == 5 and len(ten) == 10 < len(everything)
    assert counts["dropped: over the size"] == len(everything) - 5
    keys = [{sample.key for sample in part} for part in (five, ten, everything)]
    assert keys[0] < keys[1] < keys[2]
    assert {s.key for s in reasoning(groups, size=5, replay=0, seed=2)[0]} != keys[0]
    assert reasoning(groups, size=5)[0] == reasoning(groups, size=5)[0]
    assert reasoning(groups, size=0)[0] == []


def test_plain_tasks_are_mixed_in_at_their_share():
    samples, counts = reasoning(many(), replay=0.25)
    replay = [sample for sample in samples if sample.kind == "plain"]
    assert len(replay) == counts["plain kept"] == round((len(samples) - len(replay)) / 3)
    asked = replace(question(int(replay[0].question.split(":")[2]), "4"), key=replay[0].question)
    assert replay[0].messages[:-1] == tuple(direct_messages(PROMPTS, asked))
    assert replay[0].messages[-1].text == "4" and replay[0].messages[-1].train
    samples, counts = reasoning(many(), count=3, replay=0.5)
    assert counts["plain kept"] == 3 and counts["plain short"] == counts["kept"] - 3


def summaries(groups, count=50, **config):
    counts = Counter()
    made = summary_set(SummarySetConfig(**config), lambda: groups, plain(count), PROMPTS, 1, counts)
    return list(made), counts


def test_the_summary_set_shows_all_qualities_and_always_wants_the_truth():
    groups = many(400)
    truths = {key: rows["questions"][0]["answer"] for key, rows in groups}
    samples, counts = summaries(groups, size=100)
    kinds = Counter(sample.kind.split(":")[1] for sample in samples)
    assert kinds == {"good": 35, "middling": 15, "low": 10, "wrong": 20, "plain": 20}
    assert all(counts[f"kept {kind}"] == n for kind, n in kinds.items())
    for sample in samples:
        truth = truths.get(sample.question, "4")
        assert sample.messages[-1].text == truth and sample.messages[-1].train
        assert [message.train for message in sample.messages[:-1]] == [False]
    paths = {row["key"]: row for _, rows in groups for row in rows["paths"]}
    wrong = next(sample for sample in samples if sample.kind == "summary:wrong")
    row = paths[wrong.parents[0]]
    assert row["answer"] != truths[wrong.question]
    assert render_steps(ReasoningPath.from_json(row).steps) in wrong.messages[0].text
    asked = Question.from_json(dict(groups)[wrong.question]["questions"][0])
    text = render_steps(ReasoningPath.from_json(row).steps)
    assert wrong.messages[:-1] == tuple(summary_messages(PROMPTS, asked, text))


def test_without_a_size_the_good_ones_set_it_and_shortages_are_counted():
    samples, counts = summaries(many(100), count=2)
    kinds = Counter(sample.kind.split(":")[1] for sample in samples)
    assert kinds["plain"] == 2 and counts["short of plain"] == round(kinds["good"] / 0.35 * 0.2) - 2
    entries = [(path(question(n), 0, "9"), False, "none") for n in range(10)]
    groups = [group(question(n), [entry]) for n, entry in enumerate(entries)]
    samples, counts = summaries(groups)
    assert Counter(sample.kind for sample in samples) == {"summary:wrong": 10, "summary:plain": 10}
    assert counts["short of good"] == 18


def test_controls_use_the_same_paths_in_other_forms():
    groups = many()
    forms = [
        reasoning(groups, size=10, make=m)[0] for m in (reasoning_set, direct_set, multi_turn_set)
    ]
    for best, direct, turns in zip(*forms, strict=True):
        assert best.parents == direct.parents == turns.parents
        if best.kind == "plain":
            assert best == direct == turns
            continue
        asked = Question.from_json(dict(groups)[best.question]["questions"][0])
        steps = best.messages[-1].text
        assert direct.messages[-1].text == f"{steps}\nAnswer: {asked.answer}"
        assert parse_direct(direct.messages[-1].text) == (steps, asked.answer)
        assert [m.text for m in turns.messages if m.train] == [steps, asked.answer]
        assert [m.role for m in turns.messages] == ["user", "assistant", "user", "assistant"]
        assert turns.messages[0] == best.messages[0]


def test_the_union_holds_both_agents_sets_under_their_own_keys():
    groups, counts = many(80), Counter()
    first, second = ReasoningSetConfig(size=10), SummarySetConfig(size=20)
    union = list(union_set(first, second, lambda: groups, plain(), PROMPTS, 1, counts))
    one, _ = reasoning(groups, size=10)
    two, _ = summaries(groups, size=20)
    assert len({sample.key for sample in union}) == len(union) == len(one) + len(two)
    assert [sample.messages for sample in union] == [s.messages for s in (*one, *two)]
    assert counts["reasoning: kept"] == 10 and counts["summary: kept good"] == 7


def test_the_plain_set():
    counts = Counter()
    assert len(list(plain_samples(plain(), PROMPTS, 20, 1, counts))) == counts["plain kept"] == 20
    assert len(list(plain_samples(plain(), PROMPTS, None, 1, Counter()))) == 50


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{s}\nAnswer: 7", ("{s}", "7")),
        ("{s}\n**Answer:** 7", ("{s}", "7")),
        ("{s}\nFinal answer: **7**", ("{s}", "7")),
        ("{s}\nThe answer is 7", ("{s}", "7")),
        ("{s}\nAnswer:\n7\nBecause.", ("{s}", "7")),
        ("{s}\nAnswer: 6\n{t}\nAnswer: 7", ("{s}\nAnswer: 6\n{t}", "7")),
        ("Answer: 7", ("", "7")),
        ("{s}\nAnswer:", ("{s}", "")),
        ("{s}", ("{s}", "")),
        ('{"title": "Answer: 6"}', ('{"title": "Answer: 6"}', "")),
        ("", ("", "")),
    ],
)
def test_a_direct_turn_is_split_tolerantly(text, expected):
    assert parse_direct(text) == expected


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=30), st.integers(-99, 99))
def test_a_direct_turn_is_read_back(content, answer):
    steps = [Step("t", content, "summary")]
    assert parse_direct(render_direct(steps, str(answer))) == (render_steps(steps), str(answer))


def test_pairs_prefer_right_and_high_over_wrong_and_low():
    entries = [
        (path(ASKED, 0, body="one two three"), True, 90),
        (path(ASKED, 1, body="four five six"), True, 40),
        (path(ASKED, 2, "8", body="seven eight nine"), False, None),
        (path(ASKED, 3, "9", body="ten eleven"), None, 90),
        (path(ASKED, 4, body="unscored one"), True, None),
    ]
    made, counts = pairs([group(ASKED, entries)])
    keys = {pair.key: pair for pair in made}
    root = f"{ASKED.key}/r0/p"
    assert set(keys) == {f"{root}0|{root}2", f"{root}0|{root}1"}
    wrong, score = keys[f"{root}0|{root}2"], keys[f"{root}0|{root}1"]
    assert (wrong.kind, wrong.gap, score.kind, score.gap) == ("right>wrong", None, "score", 50)
    assert wrong.chosen == render_steps(entries[0][0].steps)
    assert wrong.rejected == render_steps(entries[2][0].steps)
    assert wrong.prompt == tuple(reasoning_messages(PROMPTS, ASKED))
    assert counts["kept"] == counts["combinations"] == 2
    assert counts["no winner: unscored"] == counts["no winner: low score"] == 1


BAD_LOSERS = [
    (path(ASKED, 1, "8", "So it is 7.", "Another body."), "loser concludes with the true answer"),
    (path(ASKED, 1, "8", last="3 + 4 = 7"), "loser concludes with the true answer"),
    (path(ASKED, 1, "8", last="Either 8 or 7"), "loser concludes with the true answer"),
    (path(ASKED, 1, "7", body="Another body."), "same answer"),
    (path(ASKED, 1, "8", body="word " * 100), "lengths too different"),
    (path(ASKED, 1, "8", round=1), "of different rounds"),
]


@pytest.mark.parametrize(("loser", "reason"), BAD_LOSERS)
def test_losers_that_would_teach_the_wrong_thing(loser, reason):
    made, counts = pairs([group(ASKED, [(path(ASKED, 0), True, 90), (loser, False, None)])])
    assert made == [] and counts[f"dropped: {reason}"] == 1


def test_a_loser_may_mention_the_true_answer_on_its_way():
    loser = path(ASKED, 1, "8", body="I read 7 first.", last="7 + 1 = 8")
    made, _ = pairs([group(ASKED, [(path(ASKED, 0), True, 90), (loser, False, None)])])
    assert len(made) == 1


def test_a_text_judged_right_and_wrong_is_in_no_pair():
    entries = [
        (path(ASKED, 0, last="Done."), True, 90),
        (path(ASKED, 1, "8", last="Done."), False, None),
        (path(ASKED, 2, "9"), False, None),
        (path(ASKED, 3), True, 70),
        (path(ASKED, 4), True, 80),
    ]
    made, counts = pairs([group(ASKED, entries)])
    assert [pair.key[-1] + pair.key.split("|")[0][-1] for pair in made] == ["24"]
    assert counts["paths with one text, right and wrong"] == 2
    assert counts["paths with a text seen before"] == 1


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 60),
    st.sampled_from([None, 0, 7]),
)
def test_no_pair_breaks_a_rule(seed, per_question, per_path, min_gap, max_pairs):
    groups = many(15, seed)
    made, counts = pairs(
        groups,
        scale=["score", "percentile"][seed % 2],
        per_question=per_question,
        per_path=per_path,
        min_gap=min_gap,
        max_pairs=max_pairs,
    )
    assert (
        counts["combinations"] == counts["kept"] + dropped(counts) and len(made) == counts["kept"]
    )
    assert max_pairs is None or len(made) <= max_pairs
    verdicts = {v["path"]: v["correct"] for _, rows in groups for v in rows["verdicts"]}
    totals = {s["path"]: s["total"] for _, rows in groups for s in rows["scores"]}
    rows = {row["key"]: row for _, group in groups for row in group["paths"]}
    assert len({pair.key for pair in made}) == len(made)
    assert len({(pair.question, pair.chosen, pair.rejected) for pair in made}) == len(made)
    assert max(Counter(pair.question for pair in made).values(), default=0) <= per_question
    uses = Counter(key for pair in made for key in pair.key.split("|"))
    assert max(uses.values(), default=0) <= per_path
    for pair in made:
        winner, loser = pair.key.split("|")
        assert verdicts[winner] is True and totals[winner] >= counts["least total"]
        assert rows[winner]["question"] == rows[loser]["question"] == pair.question
        assert pair.chosen != pair.rejected
        short, long = sorted((len(pair.chosen), len(pair.rejected)))
        assert long <= 1.5 * short
        if pair.kind == "score":
            assert verdicts[loser] is True and totals[winner] - totals[loser] == pair.gap >= min_gap
        else:
            assert verdicts[loser] is False
            assert rows[loser]["answer"] != rows[winner]["answer"]
            last = rows[loser]["steps"][-1]["content"]
            truth = rows[winner]["answer"]
            assert not last.endswith((f" {truth}", f" {truth}."))


def test_pairs_do_not_depend_on_the_order_of_groups():
    groups = many(60)
    forward, _ = pairs(groups, max_pairs=10)
    backward, _ = pairs(groups[::-1], max_pairs=10)
    assert len(forward) == 10 and {p.key for p in forward} == {p.key for p in backward}
    assert pairs(groups, max_pairs=10)[0] == forward


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ReasoningSetConfig(scale="rank"), "percentile or score"),
        (ReasoningSetConfig(replay=1.0), "replay"),
        (ReasoningSetConfig(per_question=0), "per_question"),
        (SummarySetConfig(good=0.9), "add up to"),
        (SummarySetConfig(low_below=80), "low_below"),
        (PairConfig(min_gap=0), "min_gap"),
        (PairConfig(wrong_losers=False, score_losers=False), "no pairs"),
        (PairConfig(max_length_ratio=0.5), "max_length_ratio"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(config, message):
    with pytest.raises(UserError, match=message) as error:
        config.validate()
    assert "\n" not in str(error.value)


def test_a_group_without_its_question_is_refused():
    with pytest.raises(UserError, match="remake"):
        reasoning([("q:train:0", {"paths": []})])


TEXT = " ".join(random.Random(0).choices(WORDS, k=4000))


def stream(count):
    """Groups at the paper's shape, 8 paths of 1-8 KB, made as they are read."""

    def groups():
        for number in range(count):
            rng = random.Random(number)
            asked = question(number)
            entries = []
            for k in range(8):
                right = rng.random() < 0.5
                start = rng.randrange(10_000)
                body = TEXT[start : start + rng.randint(900, 7900)]
                answer = "7" if right else "8"
                entries.append((path(asked, k, answer, body=body), right, rng.randint(1, 100)))
            yield group(asked, entries)

    return groups


def test_memory_does_not_grow_with_the_number_of_questions():
    def peak(make):
        tracemalloc.start()
        produced = sum(1 for _ in make)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return produced, highest

    for count in (10, 100):
        groups = stream(count)
        assert len(json.dumps(next(iter(groups()))[1]["paths"])) > 8_000
        results = [
            peak(
                reasoning_set(ReasoningSetConfig(size=50), groups, plain(), PROMPTS, 1, Counter())
            ),
            peak(summary_set(SummarySetConfig(size=50), groups, plain(), PROMPTS, 1, Counter())),
            peak(preference_pairs(PairConfig(max_pairs=50), groups, PROMPTS, 1, Counter())),
        ]
        assert all(produced for produced, _ in results)
        # 100 groups hold 4 MB of text; one group with its word triples takes under 2 MB.
        assert max(highest for _, highest in results) < 2 * 2**20
