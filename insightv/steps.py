r"""The text of a path: rendering its steps, and reading what real models write instead.

The canonical form is one JSON object a line, joined by ``"\n"``. Reading is tolerant: prose
and fences around objects, several on a line or one over many, single or curly or unescaped
quotes, raw line breaks, trailing commas, other names and cases of keys, a cut-off end. What
was tolerated is told in ``problems``, what could not be read in ``lost``. Every pass over
the text is linear, so a model's endless output costs no more than its length.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, Literal, NamedTuple

from insightv.records import Step

_TITLES = ("title", "heading", "header", "step title", "step name", "name", "step")
_CONTENTS = ("content", "contents", "reasoning", "thought", "explanation", "description", "text")
_ACTIONS = ("next action", "nextaction", "next step", "action", "next")
_NAMES = {
    **dict.fromkeys(_TITLES, "title"),
    **dict.fromkeys(_CONTENTS, "content"),
    **dict.fromkeys(_ACTIONS, "next_action"),
}
_CONTINUE = {"continue", "continue reasoning", "next", "next step", "proceed", "go on"}
_SUMMARY = {
    *("summary", "summarize", "summarise", "final", "final answer", "final summary", "answer"),
    *("end", "done", "finish", "finished", "stop", "conclude", "conclusion", "complete"),
}
_QUOTES = "\"'`“”‘’"
_WORD = r"[A-Za-z][\w\\ -]{0,24}"
_GAP = r"\s{0,40}"  # bounded: an unbounded run would be read again from each of its characters
# An object that may be a step: a brace, then a key. Other braces (sets, LaTeX) are prose.
_OBJECT = re.compile(rf"\{{{_GAP}(?:[{_QUOTES}]\s?{_WORD}[{_QUOTES}]|{_WORD})\s?[:=]")
_QUOTED_KEY = re.compile(rf"[{{,\n{_QUOTES}]{_GAP}[{_QUOTES}]\s?({_WORD})[{_QUOTES}]\s?[:=]")
_BARE_KEY = re.compile(rf"[{{,\n]{_GAP}({_WORD})\s?[:=]")
_ESCAPE = re.compile(r'\\(?:u([0-9a-fA-F]{4})|([nrt"\'/\\_*`]))')
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_FENCE = re.compile(r"```\w*")
_CLOSE = {quote: re.compile(rf"[{quote}]{_GAP},?{_GAP}\}}") for quote in "\"'`”’"}
_MERGES = 4
"""How many objects within an object (quoted examples, wrappers) are tried as one."""
_MOST = 500
"""Objects looked at in one text; no path has as many steps."""


class StepError(ValueError):
    """A text holds no readable step; ``truncated`` if more text could still complete it."""

    def __init__(self, reason: str, truncated: bool = False):
        """Takes the reason, one line."""
        super().__init__(reason)
        self.truncated = truncated


@dataclass(frozen=True)
class ParsedSteps:
    """What was found in a text.

    Attributes:
        steps: The readable steps, in order, repeats included.
        problems: What was tolerated, what was lost and which steps are repeats, in words.
        rest: The text that belongs to no object, without fences.
        lost: Why objects that look like steps are not among ``steps``.
        repeats: 1-based numbers of steps that say what an earlier one said.
        truncated: The last object is cut off.
    """

    steps: tuple[Step, ...]
    problems: tuple[str, ...]
    rest: str
    lost: tuple[str, ...] = ()
    repeats: tuple[int, ...] = ()
    truncated: bool = False


class _Object(NamedTuple):
    """Something between braces: its pairs, how it was read, where it ends."""

    pairs: list[tuple[str, Any]]
    problem: str
    closed: bool
    end: int


def render_steps(steps: Sequence[Step]) -> str:
    r"""The canonical text: one JSON object a line, joined by ``"\n"``, nothing at the end."""
    return "\n".join(
        json.dumps(
            {"title": step.title, "content": step.content, "next_action": step.next_action},
            ensure_ascii=False,
        )
        for step in steps
    )


def parse_step(text: str) -> Step:
    """The first readable step in a text.

    Raises:
        StepError: There is none; the reason says what was found instead.
    """
    found = parse_steps(text)
    if found.steps:
        return found.steps[0]
    if found.lost:
        raise StepError(found.lost[0], found.truncated)
    raise StepError("no JSON object" if text.strip() else "empty text")


def parse_steps(text: str) -> ParsedSteps:
    """Every readable step in a text, whatever stands around them; never raises."""
    problems: list[str] = []
    if "&quot;" in text and '"' not in text:
        text = html.unescape(text)
        problems.append("HTML entities for quotes")
    steps: list[Step] = []
    lost: list[str] = []
    outside: list[str] = []
    position, truncated = 0, False
    for start, found in _objects(text):
        outside.append(text[position:start])
        position = found.end
        truncated = not found.closed
        for pairs in _flattened(found.pairs):
            number = len(steps) + len(lost) + 1
            if found.problem:
                problems.append(f"object {number}: {found.problem}")
            try:
                steps.append(_step(pairs, number, problems))
            except StepError as error:
                reason = f"cut off: {error}" if truncated else str(error)
                lost.append(reason)
                problems.append(f"object {number}: {reason}")
    outside.append(text[position:])
    rest = " ".join(_FENCE.sub(" ", " ".join(outside)).split()).strip(" ,[]{}")
    if rest:
        problems.append("text around the objects")
    repeats = _repeats(steps, problems)
    return ParsedSteps(tuple(steps), tuple(problems), rest, tuple(lost), repeats, truncated)


def repeats(steps: Sequence[Step], step: Step) -> int | None:
    """1-based number of the earlier step whose content ``step`` says again, if there is one."""
    said = _said(step)
    return next((n for n, earlier in enumerate(steps, 1) if _said(earlier) == said), None)


def _said(step: Step) -> str:
    return " ".join(step.content.casefold().split())


def _repeats(steps: list[Step], problems: list[str]) -> tuple[int, ...]:
    first: dict[str, int] = {}
    again = []
    for number, step in enumerate(steps, 1):
        earlier = first.setdefault(_said(step), number)
        if earlier != number:
            again.append(number)
            problems.append(f"step {number} repeats step {earlier}")
    return tuple(again)


def _objects(text: str) -> Iterator[tuple[int, _Object]]:
    """Objects in a text with their starts, in order, none inside another.

    An object reaches at most to where the next one starts, so each character is looked at a
    bounded number of times.
    """
    starts = [match.start() for match in islice(_OBJECT.finditer(text), _MOST)]
    bounds = [*starts, len(text)]
    position = line_end = 0
    for index, start in enumerate(starts):
        if start < position:
            continue
        ends = bounds[index + 1 : index + 1 + _MERGES]
        if start >= line_end:  # the canonical form: an object fills its line
            line_end = text.find("\n", start)
            line_end = len(text) if line_end < 0 else line_end
            ends.insert(0, line_end)
        found = next(filter(None, (_valid(text, start, end) for end in ends)), None)
        found = found or _lenient(text, start, bounds[index + 1])
        position = found.end
        yield start, found


def _pairs(pairs: list[tuple[str, Any]]) -> tuple[tuple[str, Any], ...]:
    return tuple(pairs)


# Pairs instead of dicts show repeated keys; numbers stay text, so that none is too long.
_DECODERS = {
    problem: json.JSONDecoder(
        object_pairs_hook=_pairs, parse_int=str, parse_float=str, parse_constant=str, strict=strict
    )
    for problem, strict in (("", True), ("unescaped line break", False))
}


def _valid(text: str, start: int, end: int) -> _Object | None:
    """Reads JSON, raw line breaks in strings allowed; None if it is not."""
    for problem, decoder in _DECODERS.items():
        try:
            pairs, length = decoder.raw_decode(text[start:end])
        except (ValueError, RecursionError):
            continue
        return _Object(list(pairs), problem, True, start + length)
    return None


def _lenient(text: str, start: int, end: int) -> _Object:
    """Reads what is almost JSON by its keys: a value is all there is up to the next key."""
    segment = text[start:end]
    keys = [m for m in _QUOTED_KEY.finditer(segment) if _name(m[1])]
    keys = keys or [m for m in _BARE_KEY.finditer(segment) if _name(m[1])]
    if not keys:
        close = segment.find("}") + 1
        return _Object([], "", close > 0, start + (close or len(segment)))
    tail = segment[keys[-1].end() :]
    value, length = _last_value(tail)
    pairs: list[tuple[str, Any]] = []
    for key, following in zip(keys, [*keys[1:], None], strict=True):
        raw = value if following is None else segment[key.end() : following.start() + 1]
        pairs.append((key[1], _unquoted(raw)))
    return _Object(
        pairs, "not valid JSON", length > 0, start + keys[-1].end() + (length or len(tail))
    )


def _last_value(tail: str) -> tuple[str, int]:
    """The last value of an object and the length up to its closing brace (0: never closed)."""
    body = tail.lstrip()
    if body[:1] and body[0] in _QUOTES:
        closing = _CLOSE[{"“": "”", "‘": "’"}.get(body[0], body[0])]
        match = closing.search(tail, len(tail) - len(body) + 1)
        return (tail[: match.start() + 1], match.end()) if match else (tail, 0)
    close = tail.find("}")
    return (tail[:close], close + 1) if close >= 0 else (tail, 0)


def _unquoted(raw: str) -> str:
    value = raw.strip().rstrip(",").rstrip()
    if value[:1] and value[0] in _QUOTES:
        value = value[1:]
        if value[-1:] and value[-1] in _QUOTES:
            value = value[:-1]
    return _ESCAPE.sub(_unescaped, value)


def _unescaped(match: re.Match[str]) -> str:
    return chr(int(match[1], 16)) if match[1] else _ESCAPES.get(match[2], match[2])


@lru_cache(maxsize=256)
def _name(key: str) -> str | None:
    """Which of the three keys is meant by ``Next Action``, ``nextAction``, ``next_action``."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", key.replace("\\", ""))
    return _NAMES.get(" ".join(re.split(r"[\s_-]+", words.strip().casefold())))


def _flattened(pairs: Iterable[Any], depth: int = 0) -> Iterator[list[tuple[str, Any]]]:
    """Objects that are steps: this one, or those in the lists and objects that it wraps."""
    if any(_name(key) and not isinstance(value, tuple) for key, value in pairs):
        yield list(pairs)
    elif depth < 4:
        for _, value in pairs:
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, tuple):
                    yield from _flattened(item, depth + 1)


def _step(pairs: Iterable[tuple[str, Any]], number: int, problems: list[str]) -> Step:
    """A step from the pairs of an object.

    Raises:
        StepError: A key is missing, or the next action is none of the known words.
    """
    values: dict[str, str] = {}
    for key, value in pairs:
        name = _name(key)
        if name is None:
            problems.append(f"object {number}: unknown key {key[:40]!r}")
            continue
        text = _text(value)
        if text is None or (key.casefold() == "step" and text.strip().isdigit()):
            continue
        if not isinstance(value, str):
            problems.append(f"object {number}: {name} is no text")
        if key != name:
            problems.append(f"object {number}: key {key[:40]!r} for {name!r}")
        if name in values:
            problems.append(f"object {number}: {name} given twice")
        values[name] = _SURROGATE.sub("\ufffd", text)
    for name in ("title", "content", "next_action"):
        if name not in values:
            raise StepError(f"no {name!r}")
    if not values["content"].strip():
        raise StepError("empty content")
    action = _action(values["next_action"])
    if action != values["next_action"]:
        problems.append(f"object {number}: next_action {values['next_action'][:40]!r}")
    return Step(values["title"], values["content"], action)


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return " ".join(value)
    return json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any, depth: int = 0) -> Any:
    """Tuples of pairs back to objects; what is nested beyond reason is left out."""
    if depth > 20:
        return "…"
    if isinstance(value, tuple):
        return {key: _plain(item, depth + 1) for key, item in value}
    return [_plain(item, depth + 1) for item in value] if isinstance(value, list) else value


def _action(word: str) -> Literal["continue", "summary"]:
    said = " ".join(re.split(r"[\s_-]+", word.strip(" \t\r\n.!\"'`").casefold()))
    if said in _CONTINUE:
        return "continue"
    if said in _SUMMARY:
        return "summary"
    raise StepError(f"unknown next_action {word[:40]!r}")
