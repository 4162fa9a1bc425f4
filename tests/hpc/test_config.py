from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.config import (
    digest,
    dump,
    later,
    later_factory,
    load,
    shaping,
    unhashed,
    unhashed_factory,
)
from hpc.errors import UserError


class Mode(Enum):
    single = 1
    progressive = 2


@dataclass
class Training:
    rate: float = 0.1
    steps: int = 3
    tags: list[str] = field(default_factory=lambda: ["x"])
    terms: dict[str, float] = field(default_factory=lambda: {"sigmoid": 1.0})
    workers: int = unhashed(2)


@dataclass
class Entry:
    name: str = "???"
    n: int = 1


@dataclass
class Config:
    seed: int = 0
    training: Training = field(default_factory=Training)
    second: Optional[Training] = None  # noqa: UP045 - what OmegaConf's users write
    entries: list[Entry] = field(default_factory=list)
    named: dict[str, Entry] = field(default_factory=dict)
    mode: Mode = Mode.single
    flag: bool = False
    notes: list[str] = unhashed_factory(list)


def refused(tmp_path: Path, text: str | None = None, *overrides: str) -> str:
    source = None
    if text is not None:
        source = tmp_path / "chain.yaml"
        source.write_text(text)
    with pytest.raises(UserError) as caught:
        load(Config, source, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_layers_and_types(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text("seed: 1\ntraining: {rate: 1e-4, steps: 9}\n")
    source = tmp_path / "sub" / "above.yaml"
    source.parent.mkdir()
    source.write_text("extends: ../below.yaml\ntraining: {steps: 8}\nmode: progressive\n")
    config = load(
        Config,
        source,
        ["training.tags=[a, b]", "second.steps=4", "entries=[{name: q}]", "entries.0.n=7"],
        base={"seed": 5, "flag": True},
    )
    assert config.seed == 1 and config.flag is True and config.mode is Mode.progressive
    assert config.training == Training(rate=1e-4, steps=8, tags=["a", "b"])
    assert config.second == Training(steps=4)
    assert config.entries == [Entry("q", 7)]


def test_of_several_files_the_later_prevails_and_what_they_share_comes_first(
    tmp_path: Path,
) -> None:
    (tmp_path / "below.yaml").write_text("seed: 1\ntraining: {rate: 1e-4, steps: 9}\n")
    (tmp_path / "one.yaml").write_text("extends: below.yaml\nseed: 2\ntraining: {steps: 8}\n")
    (tmp_path / "other.yaml").write_text("extends: ./below.yaml\ntraining: {rate: 1e-3}\n")
    source = tmp_path / "chain.yaml"
    source.write_text("extends: [one.yaml, other.yaml]\n")
    config = load(Config, source)
    # Had the other's own base come again, seed and steps would be those of below.yaml.
    assert config.seed == 2 and config.training == Training(rate=1e-3, steps=8)
    source.write_text("extends: [other.yaml, one.yaml]\ntraining: {steps: 7}\n")
    assert load(Config, source).training == Training(rate=1e-3, steps=7)
    (tmp_path / "other.yaml").write_text("extends: [one.yaml, chain.yaml]\n")
    assert "extends itself through" in refused(tmp_path, "extends: [other.yaml]")


def test_free_dictionaries_and_lists_are_replaced_but_one_entry_can_be_set(tmp_path: Path) -> None:
    source = tmp_path / "chain.yaml"
    source.write_text("training: {terms: {sft: 1}}")
    assert load(Config, source).training.terms == {"sft": 1.0}
    assert load(Config, None, ["training.terms.sft=2"]).training.terms == {
        "sigmoid": 1.0,
        "sft": 2.0,
    }
    assert load(Config, None, ["named.a.name=q", "named.a.n=2"]).named == {"a": Entry("q", 2)}


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("training:\n  rates: 3\n", [], ["chain.yaml", "training.rates", "training.rate?"]),
        ("entries: [{name: a, nn: 2}]", [], ["chain.yaml", "entries[0].nn", "entries[0].n?"]),
        ("named: {a: {nmae: b}}", [], ["named.a.nmae", "named.a.name?"]),
        (None, ["training.stpes=3"], ["training.stpes=3", "training.steps?"]),
        (None, ["workers=3"], ["training.workers?"]),
        (None, ["second.step=1"], ["second.steps?"]),
        ("training: {steps: 1.5}", [], ["training.steps", "1.5", "int"]),
        (None, ["seed=abc"], ["seed", "'abc'", "int"]),
        (None, ["mode=both"], ["mode", "both", "single, progressive"]),
        (None, ["training=3"], ["training is 3", "section"]),
        (None, ["seed"], ["key=value"]),
        (None, ["seed=[1"], ["YAML"]),
        (None, ["seed.x=1"], ["seed is a value"]),
        (None, ["entries.3.n=1"], ["0 items"]),
        (None, ["entries=[{}]"], ["entries[0].name has no value"]),
        (None, ["seed=${nope}"], ["nope"]),
        ("a: [1,\nb: }", [], ["chain.yaml: line 2"]),
        ("seed: 1\nseed: 2\n", [], ["line 2", "duplicate key seed"]),
        ("- a\n", [], ["key: value"]),
        ("seed: \x00", [], ["chain.yaml"]),
        ("null: 2", [], ["chain.yaml", "key type"]),
        ("extends: gone.yaml", [], ["gone.yaml"]),
        ("extends: chain.yaml", [], ["extends itself"]),
        ("extends: {a: b}", [], ["extends is {'a': 'b'}", "or a list"]),
        ("extends: [3]", [], ["extends is [3]"]),
        ("seed: 1\ntraining:\n  steps: 8:00:00 # hours\n", [], ["line 3", "8:00:00", "28,800"]),
        ("training: {rate: 1:30.5}", [], ["line 1", "1:30.5", "90.5"]),
        ("training: {tags: [a, '1:30', +12:30]}", [], ["+12:30", "quote"]),
        ("named:\n  12:30: {name: a}", [], ["line 2", "12:30"]),
        (None, ["training.steps=1:30:00"], ["override `training.steps=1:30:00`", "5,400"]),
        (None, ["training.tags=[a, 12:30]"], ["12:30", "750"]),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, text: str | None, overrides: list[str], said: list[str]
) -> None:
    message = refused(tmp_path, text, *overrides)
    for words in said:
        assert words in message


def test_text_with_colons_stays_text(tmp_path: Path) -> None:
    tags = ["8:00:00", "a:12:30", "0:30", "10.0.0.1:8000", "12:75"]
    source = tmp_path / "chain.yaml"
    source.write_text("training: {tags: ['8:00:00', a:12:30, 0:30, 10.0.0.1:8000, 12:75]}")
    config = load(Config, source)
    assert config.training.tags == tags
    # What is written resolved is read again.
    source.write_text(dump(config))
    assert load(Config, source) == config
    assert load(Config, None, ['training.tags=["8:00:00"]']).training.tags == tags[:1]


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        load(Config, tmp_path / "nowhere.yaml")


def test_unhashed_fields_shape_nothing() -> None:
    plain = load(Config)
    busy = load(Config, None, ["training.workers=64", "notes=[hello]"])
    assert busy.training.workers == 64
    assert shaping(plain) == shaping(busy) and digest(plain) == digest(busy)
    assert "workers" not in shaping(plain)["training"]
    assert digest(load(Config, None, ["training.rate=0.2"])) != digest(plain)
    assert len(digest(plain)) == 16


@dataclass
class Older:
    """What `Newer` was when runs were made with it."""

    rate: float = 0.1
    inner: Entry = field(default_factory=Entry)
    entries: list[Entry] = field(default_factory=list)


@dataclass
class NewerEntry(Entry):
    margin: float = later(0)
    mode: Mode = later(Mode.single)
    workers: int = unhashed(1)


@dataclass
class Newer:
    rate: float = 0.1
    inner: NewerEntry = field(default_factory=NewerEntry)
    entries: list[NewerEntry] = field(default_factory=list)
    section: NewerEntry = later_factory(NewerEntry)
    maybe: Optional[NewerEntry] = later(None)  # noqa: UP045
    terms: dict[str, float] = later_factory(lambda: {"sigmoid": 1.0})


@settings(deadline=None, max_examples=25)
@given(
    rate=st.floats(0, 1),
    n=st.integers(0, 9),
    entries=st.lists(st.builds(Entry, st.text(max_size=3), st.integers(0, 9)), max_size=3),
)
def test_a_later_field_at_its_default_leaves_older_digests(
    rate: float, n: int, entries: list[Entry]
) -> None:
    before = Older(rate, Entry("a", n), entries)
    after = Newer(rate, NewerEntry("a", n), [NewerEntry(one.name, one.n) for one in entries])
    assert shaping(after) == shaping(before) and digest(after) == digest(before)
    for change in (
        {"inner": NewerEntry("a", n, margin=0.5)},
        {"inner": NewerEntry("a", n, mode=Mode.progressive)},
        {"entries": [*after.entries, NewerEntry("z", margin=1.0)]},
        {"section": NewerEntry(n=2)},
        {"section": NewerEntry(margin=0.5)},
        {"maybe": NewerEntry()},
        {"terms": {"sft": 1.0}},
    ):
        assert digest(replace(after, **change)) != digest(before), change
    # A workers count never shapes anything, in a later section as elsewhere.
    assert digest(replace(after, section=NewerEntry(workers=8))) == digest(before)


def test_a_later_field_is_read_written_and_compared_like_any_other(tmp_path: Path) -> None:
    source = tmp_path / "chain.yaml"
    source.write_text("inner: {margin: 0.5}\nterms: {sft: 1}\n")
    config = load(Newer, source, ["inner.name=a", "section.name=b"])
    assert shaping(config)["inner"] == {"name": "a", "n": 1, "margin": 0.5}
    assert shaping(config)["terms"] == {"sft": 1.0} and "maybe" not in shaping(config)
    whole = shaping(config, defaults=True)
    assert whole["inner"] == {"name": "a", "n": 1, "margin": 0.5, "mode": "single"}
    assert whole["maybe"] is None
    source.write_text(dump(config))
    assert load(Newer, source) == config


def test_digest_is_that_of_canonical_json() -> None:
    # printf '{"a":[1,2.5],"b":"é"}' | sha256sum
    assert digest({"b": "é", "a": (1, 2.5)}) == digest({"a": [1, 2.5], "b": "é"})
    import hashlib

    expected = hashlib.sha256('{"a":[1,2.5],"b":"é"}'.encode()).hexdigest()[:16]
    assert digest({"b": "é", "a": [1, 2.5]}) == expected
    with pytest.raises(TypeError):
        digest({"a": object()})


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(-(2**40), 2**40),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    tags=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="$"), max_size=9)),
    terms=st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), st.floats(0, 1)),
)
def test_dump_reads_back(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    rate: float,
    tags: list[str],
    terms: dict[str, float],
) -> None:
    config = Config(
        seed=seed,
        training=Training(rate=rate, tags=tags, terms=terms),
        second=Training(steps=1),
        entries=[Entry("a", 2)],
        mode=Mode.progressive,
    )
    path = tmp_path_factory.mktemp("dump") / "chain.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load(Config, path) == config
