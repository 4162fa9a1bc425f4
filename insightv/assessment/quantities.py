"""Numbers in free text: figures, fractions, percentages, words, units."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Quantity:
    """A number as it stands in a text.

    Attributes:
        value: The number, scale words applied, a percentage undivided (25 for ``25 %``).
        start: Where it begins in the tidied text.
        end: Where it ends, scale and unit included.
        percent: A percent sign or word follows.
        unit: A known unit or currency, canonical; empty otherwise.
        scale: Factor of a scale word (1e6 for ``million``), 1 without one.
        others: Further readings: ``1.234`` may mean 1234, ``12,13`` two numbers.
        negated: ``not 12``.
        bound: A limit or an end of a range (``more than 12``, ``10-12``), no value by itself.
    """

    value: float
    start: int
    end: int
    percent: bool = False
    unit: str = ""
    scale: float = 1.0
    others: tuple[float, ...] = ()
    negated: bool = False
    bound: bool = False


UNITS: dict[str, tuple[str, float]] = {
    **dict.fromkeys(("mg", "milligram", "milligrams"), ("mass", 1e-6)),
    **dict.fromkeys(("oz", "ounce", "ounces"), ("mass", 0.028349523)),
    **dict.fromkeys(("lb", "lbs"), ("mass", 0.45359237)),
    **dict.fromkeys(("g", "gram", "grams"), ("mass", 1e-3)),
    **dict.fromkeys(("kg", "kilo", "kilos", "kilogram", "kilograms"), ("mass", 1.0)),
    **dict.fromkeys(("t", "ton", "tons", "tonne", "tonnes"), ("mass", 1e3)),
    **dict.fromkeys(("mm", "millimeter", "millimeters", "millimetres"), ("length", 1e-3)),
    **dict.fromkeys(("cm", "centimeter", "centimeters", "centimetres"), ("length", 1e-2)),
    **dict.fromkeys(("m", "meter", "meters", "metre", "metres"), ("length", 1.0)),
    **dict.fromkeys(("km", "kilometer", "kilometers", "kilometres"), ("length", 1e3)),
    **dict.fromkeys(("inch", "inches"), ("length", 0.0254)),
    **dict.fromkeys(("ft", "foot", "feet"), ("length", 0.3048)),
    **dict.fromkeys(("mi", "mile", "miles"), ("length", 1609.344)),
    **dict.fromkeys(("mm^2", "square millimeters", "square millimetres"), ("area", 1e-6)),
    **dict.fromkeys(("cm^2", "square centimeters", "square centimetres"), ("area", 1e-4)),
    **dict.fromkeys(("m^2", "square meters", "square metres"), ("area", 1.0)),
    **dict.fromkeys(("km^2", "square kilometers", "square kilometres"), ("area", 1e6)),
    **dict.fromkeys(("ml", "milliliter", "milliliters", "millilitres", "cm^3"), ("volume", 1e-6)),
    **dict.fromkeys(("l", "liter", "liters", "litre", "litres"), ("volume", 1e-3)),
    **dict.fromkeys(("m^3", "cubic meters", "cubic metres"), ("volume", 1.0)),
    **dict.fromkeys(("m/s", "meters per second", "metres per second"), ("speed", 1.0)),
    "km/s": ("speed", 1e3),
    **dict.fromkeys(("km/h", "kph"), ("speed", 1 / 3.6)),
    "mph": ("speed", 0.44704),
    **dict.fromkeys(("°", "deg", "degree", "degrees"), ("angle", 1.0)),
    **dict.fromkeys(("rad", "radian", "radians"), ("angle", 180 / math.pi)),
    **dict.fromkeys(("ms", "millisecond", "milliseconds"), ("time", 1e-3)),
    **dict.fromkeys(("s", "sec", "second", "seconds"), ("time", 1.0)),
    **dict.fromkeys(("min", "mins", "minute", "minutes"), ("time", 60.0)),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), ("time", 3600.0)),
    **dict.fromkeys(("day", "days"), ("time", 86400.0)),
    **dict.fromkeys(("week", "weeks"), ("time", 604800.0)),
    **dict.fromkeys(("°c", "celsius", "degrees celsius"), ("celsius", 1.0)),
    **dict.fromkeys(("°f", "fahrenheit", "degrees fahrenheit"), ("fahrenheit", 1.0)),
    **dict.fromkeys(("cent", "cents"), ("cent", 1.0)),
    **dict.fromkeys(("$", "usd", "dollar", "dollars"), ("dollar", 1.0)),
    **dict.fromkeys(("€", "eur", "euro", "euros"), ("euro", 1.0)),
    **dict.fromkeys(("£", "gbp"), ("pound sterling", 1.0)),
    **dict.fromkeys(("¥", "yen", "jpy"), ("yen", 1.0)),
}
"""Spelling → (dimension, factor to the dimension's base unit)."""

_SCALES = {
    **dict.fromkeys(("k", "K", "thousand", "thousands"), 1e3),
    **dict.fromkeys(("M", "mn", "mio", "million", "millions"), 1e6),
    **dict.fromkeys(("B", "bn", "billion", "billions"), 1e9),
    **dict.fromkeys(("T", "tn", "trillion", "trillions"), 1e12),
    **dict.fromkeys(("hundred",), 1e2),
    **dict.fromkeys(("dozen", "dozens"), 12.0),
}
_ONES = re.findall(
    r"\w+",
    """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen""",
)
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SMALL = {word: float(n) for n, word in enumerate(_ONES)}
_SMALL |= {word: 10.0 * n for n, word in enumerate(_TENS, 2)}
_LARGE = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_PARTS = {
    **dict.fromkeys(("half", "halves"), 2),
    **dict.fromkeys(("third", "thirds"), 3),
    **dict.fromkeys(("quarter", "quarters", "fourths"), 4),
    **dict.fromkeys(("fifth", "fifths"), 5),
    **dict.fromkeys(("sixth", "sixths"), 6),
    **dict.fromkeys(("seventh", "sevenths"), 7),
    **dict.fromkeys(("eighth", "eighths"), 8),
    **dict.fromkeys(("ninth", "ninths"), 9),
    **dict.fromkeys(("tenth", "tenths"), 10),
    **dict.fromkeys(("hundredth", "hundredths"), 100),
}

_NAMED = sorted((unit for unit in UNITS if unit[0].isalpha()), key=len, reverse=True)
_UNIT = "|".join(map(re.escape, _NAMED))
_SPELT = "|".join(unit for unit in _NAMED if unit.isalpha() and len(unit) > 2)
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
"""Raised digits and what they are on the line."""
_CORE = (
    r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])"  # 1,234.5
    r"|\d{1,3}(?:\.\d{3})+,\d+(?!\d)"  # 1.234,5
    r"|\d{1,3}(?:\.\d{3}){2,}(?!\d)"  # 1.234.567
    r"|\d{1,3}(?:[ '_]\d{3})+(?:[.,]\d+)?(?![\d'_,])"  # 1 234
    r"|\d+\.\d+|(?<!,)\d+,\d+(?!,?\d)|\d+|\.\d+)"
)
_FIGURE = re.compile(
    r"(?<![A-Za-z0-9_])(?<![A-Za-z]-)(?<!\d\.)"
    r"(?P<before>[$€£¥]\s?)?(?P<sign>(?<![\w)%])[-+]|\b(?:minus|negative)\s)?(?P<after>[$€£¥])?"
    rf"(?P<core>{_CORE})"
    r"(?:(?P<mixed>\s\d+)?\s?[/:]\s?(?P<den>\d+(?:\.\d+)?)(?![\d/:]))?"
    r"(?:[eE](?P<exp>[-+]?\d+)|\s?[×x*]\s?10(?:\^|\*\*)[{(]?(?P<ten>[-+]?\d+)[})]?"
    r"|(?:\^|\*\*)[{(]?(?P<power>[-+]?\d+)[})]?)?"
    r"(?P<ordinal>(?:st|nd|rd|th|s)\b(?!\.?\d))?"
    r"(?P<scale>\s?[kKMBT]\b|(?:bn|mn|tn)\b"
    r"|[\s-]?(?:thousand|million|billion|trillion)s?\b|\s?(?:mio|bn|mn|hundred|dozens?)\b)?"
    r"(?:\s?(?P<percent>%|(?:percent|per\scent|pct)\b))?"
    rf"(?:[\s-]?(?P<unit>(?:(?i:{_UNIT})(?![A-Za-z/^])|°\s?[CF]\b|[°$€£¥])))?"
)
_WORD = re.compile(r"[a-z]+")
_NEGATED = re.compile(
    r"(?:\bnot|n't|\bnever|\bnor|\brather than|\binstead of)\s+(?:just |only |about )?$"
)
_BOUND = re.compile(
    r"(?:\b(?:more|less|fewer|greater|higher|lower|larger|smaller|bigger) than|\bat (?:least|most)"
    r"|\b(?:over|under|above|below|between|up to)|[<>≥≤]=?|\bbetween [^ ]+ and)\s*$"
)
_RANGE_AFTER = re.compile(r"\s?(?:[-–—]|\bto\b)\s?\d|\s?[<>≥≤]")
_WORD_UNIT = re.compile(rf"[\s-](?:of )?(?:an? )?(?P<unit>{_SPELT})\b", re.I)
_AND_A_HALF = re.compile(rf"\b(?:an?|one) (?P<unit>{_SPELT}) and a half\b", re.I)
_MINUS = re.compile(r"\b(?:minus|negative)\s$")
_BELOW_ZERO = re.compile(r"(?:\s?degrees?|\s?[CF]\b|\s?celsius)*\s?below (?:zero|0|freezing)", re.I)
_PLAIN_FRACTION = r"\\frac\{(-?[\d.]+)\}\s*\{([\d.]+)\}"
_RANGE_BEFORE = re.compile(r"\d\s?(?:[-–—]|\bto\b)\s?$")


def tidy(text: str) -> str:
    """Unifies spellings of the same sign: spaces, minus signs, fractions, light LaTeX."""
    text = re.sub(r"\\[dt]?frac\s*(?:(\d)\s*(\d)(?!\d)|(?=\{))", _braced, text)
    text = re.sub(rf"(?<![\w)}}%])[-−–]\s*{_PLAIN_FRACTION}", r" -\1/\2", text)
    text = re.sub(_PLAIN_FRACTION, r" \1/\2", text)
    text = re.sub(r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"\\(?:times|cdot)\b|(?<=\d)\s?[·⋅]\s?(?=10)", "×", text)
    text = re.sub(r"\^?\s*\{?\\circ\b\}?|º", "°", text)
    text = re.sub(r"\\([%$,;! ])", lambda m: m[1] if m[1] in "%$" else " ", text)
    text = re.sub(r"([⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+)", lambda m: "^" + m[1].translate(SUPERSCRIPTS), text)
    text = re.sub(r"(?<=\d)(?=[½⅓⅔¼¾⅕⅖⅗⅘⅛])", " ", text)
    text = unicodedata.normalize("NFKC", text)
    text = text.replace("⁄", "/").replace("−", "-").replace("’", "'")
    text = re.sub(r"(?<![\w)%])(?<!\d\s)–(?=\.?\d)", "-", text)  # "–7"; in "5–7" it is a range
    return text.replace("×10", "× 10")


def _braced(match: re.Match[str]) -> str:
    return f"\\frac{{{match[1]}}}{{{match[2]}}}" if match[1] else "\\frac"


def quantities(text: str) -> list[Quantity]:
    """Every number of a tidied text, in order; ordinals and parts of names are none.

    Args:
        text: As ``tidy`` returns it.
    """
    halves = [
        Quantity(1.5, match.start(), match.end(), unit=match["unit"].lower())
        for match in _AND_A_HALF.finditer(text)
    ]
    covered = [range(half.start, half.end) for half in halves]
    single = [q for q in (*_figures(text), *_words(text)) if not any(q.start in c for c in covered)]
    return _compounds(text, sorted(halves + single, key=lambda quantity: quantity.start))


def ratio(unit: str, other: str) -> float | None:
    """What a number in ``other`` is multiplied with to be in ``unit``; None for unlike units."""
    (kind, factor), (other_kind, other_factor) = UNITS[unit], UNITS[other]
    if kind == other_kind:
        return other_factor / factor
    kinds = {kind, other_kind}
    if "cent" in kinds and kinds & {"dollar", "euro"}:
        return 0.01 if other_kind == "cent" else 100.0
    if "angle" in kinds and kinds & {"celsius", "fahrenheit"} and factor == other_factor:
        return 1.0  # "4 degrees"
    return None


def _compounds(text: str, found: list[Quantity]) -> list[Quantity]:
    """Joins ``1 h 30 min`` and ``twelve dollars and fifty cents`` into one quantity each."""
    joined: list[Quantity] = []
    for quantity in found:
        first = joined[-1] if joined else None
        if first and first.unit and quantity.unit:
            factor = ratio(first.unit, quantity.unit)
            between = text[first.end : quantity.start]
            if (
                factor is not None
                and factor < 1
                and 0 <= quantity.value * factor < 1
                and re.fullmatch(r"[\s,]*(?:and\s)?", between)
            ):
                value = first.value + math.copysign(quantity.value * factor, first.value)
                joined[-1] = replace(first, value=value, end=quantity.end)
                continue
        joined.append(quantity)
    return joined


def _figures(text: str) -> Iterator[Quantity]:
    for match in _FIGURE.finditer(text):
        core = match["core"]
        if match["ordinal"]:
            continue
        value, others = _core(core)
        value *= _SCALES.get((match["scale"] or "").strip(" -"), 1.0)
        if match["den"]:
            marks = match["den"] in ("10", "100") and not match["mixed"]  # 72 points of 100
            others = (value,) if marks else ()
            value = _fraction(value, match["mixed"], float(match["den"]))
        value *= _power(match["exp"] or match["ten"])
        if match["power"]:
            value = _raise(value, int(match["power"][:6]))
        if not math.isfinite(value):
            continue
        sign = -1 if (match["sign"] or "").strip() in ("-", "minus", "negative") else 1
        unit, end = _unit(match)
        sign = -1 if _BELOW_ZERO.match(text, end) else sign
        negated, bound = _context(text, match.start(), end)
        yield Quantity(
            sign * value,
            match.start(),
            end,
            percent=match["percent"] is not None,
            unit=unit,
            scale=_SCALES.get((match["scale"] or "").strip(" -"), 1.0),
            others=tuple(sign * other for other in others),
            negated=negated,
            bound=bound,
        )


def _core(core: str) -> tuple[float, tuple[float, ...]]:
    """The most usual reading of the digits, and the others one must reckon with."""
    if re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d+)?", core):
        return float(core.replace(",", "")), ()
    if re.fullmatch(r"\d{1,3}(\.\d{3})+,\d+", core):
        return float(core.replace(".", "").replace(",", ".")), ()
    if re.fullmatch(r"\d{1,3}(\.\d{3}){2,}", core):
        return float(core.replace(".", "")), ()
    if re.search(r"[ '_]", core):
        parts = re.split(r"[ '_]", core.replace(",", "."))
        return float("".join(parts)), tuple(float(part) for part in parts)
    if "," in core:
        whole, decimals = core.split(",")
        return float(f"{whole}.{decimals}"), (float(whole), float(decimals))
    if re.fullmatch(r"[1-9]\d{0,2}\.\d{3}", core):
        return float(core), (float(core.replace(".", "")),)
    return float(core), ()


def _fraction(value: float, mixed: str | None, denominator: float) -> float:
    if denominator == 0:
        return math.inf
    if mixed:
        return value + float(mixed) / denominator
    return value / denominator


def _power(exponent: str | None) -> float:
    if not exponent:
        return 1.0
    return _raise(10.0, int(exponent[:6]))


def _raise(base: float, exponent: int) -> float:
    try:
        return base**exponent
    except (OverflowError, ZeroDivisionError):
        return math.inf


def _unit(match: re.Match[str]) -> tuple[str, int]:
    """The canonical unit and where the quantity ends; unknown words are not part of it."""
    currency = match["before"] or match["after"]
    if currency:
        return currency.strip(), match.end("percent") if match["percent"] else _number_end(match)
    word = (match["unit"] or "").lower().replace("° ", "°")
    if word in UNITS:
        return word, match.end()
    return "", _number_end(match)


def _number_end(match: re.Match[str]) -> int:
    names = ("percent", "scale", "power", "ten", "exp", "den", "core")
    return max(match.end(name) for name in names)


def _context(text: str, start: int, end: int) -> tuple[bool, bool]:
    before = text[max(0, start - 40) : start].lower()
    bound = bool(
        _BOUND.search(before) or _RANGE_BEFORE.search(before) or _RANGE_AFTER.match(text, end)
    )
    return bool(_NEGATED.search(before)), bound


def _words(text: str) -> Iterator[Quantity]:
    """Numbers in words: ``twenty-one``, ``a hundred and five``, ``two and a half``."""
    tokens = list(_WORD.finditer(text.lower()))
    index = 0
    while index < len(tokens):
        used, value = _read_words(text, tokens, index)
        if not used:
            index += 1
            continue
        first, last = tokens[index], tokens[index + used - 1]
        index += used
        if used == 1 and first[0] == "one" and not _stands_alone(text, first):
            continue
        percent = re.compile(r"\s?(%|percent\b|per cent\b)").match(text, last.end())
        end = percent.end() if percent else last.end()
        unit = None if percent else _WORD_UNIT.match(text, last.end())
        end = unit.end() if unit else end
        if _MINUS.search(text[: first.start()].lower()) or _BELOW_ZERO.match(text, end):
            value = -value
        negated, bound = _context(text, first.start(), end)
        yield Quantity(
            value,
            first.start(),
            end,
            percent=percent is not None,
            unit=unit["unit"].lower() if unit else "",
            negated=negated,
            bound=bound,
        )


def _stands_alone(text: str, word: re.Match[str]) -> bool:
    """Whether ``one`` is a number here, not a pronoun (``the red one``)."""
    before = text[max(0, word.start() - 20) : word.start()].lower().rstrip()
    leads = r"(?:^|[:=(]|\b(?:is|are|only|exactly|just|equals|answer|about))$"
    return re.search(leads, before) is not None


def _read_words(text: str, tokens: list[re.Match[str]], index: int) -> tuple[int, float]:
    """How many tokens from ``index`` form a number, and its value; (0, 0) if none do."""
    total, current, used, last = 0.0, 0.0, 0, ""
    position = index
    while position < len(tokens):
        word = tokens[position][0]
        if position > index and not _adjacent(text, tokens[position - 1], tokens[position]):
            break
        if word in _SMALL:
            small = _SMALL[word]
            fits = last in ("", "large", "a") or (last == "tens" and 0 < small < 10)
            if not fits:
                break
            current, last = current + small, "tens" if small >= 20 else "ones"
        elif word in _LARGE or word == "dozen":
            if last == "":
                break
            factor = 12.0 if word == "dozen" else _LARGE[word]
            current = max(current, 1.0) * factor
            if factor >= 1e3:
                total, current = total + current, 0.0
            last = "large"
        elif word in _PARTS and (last in ("ones", "a") or word in ("half", "halves")):
            numerator = current if last == "ones" else 1.0
            if last in ("", "a", "ones"):
                return position - index + 1, numerator / _PARTS[word]
            break
        elif word in ("a", "an") and last == "":
            last = "a"
            position += 1
            continue
        elif word == "and" and last in ("large", "ones", "tens") and position + 1 < len(tokens):
            half = [token[0] for token in tokens[position + 1 : position + 3]] == ["a", "half"]
            if half:
                return position - index + 3, total + current + 0.5
            if last != "large" or tokens[position + 1][0] not in _SMALL:
                break
        elif word == "point" and last in ("ones", "tens"):
            digits = ""
            for token in tokens[position + 1 :]:
                if _SMALL.get(token[0], 10) > 9:
                    break
                digits += str(int(_SMALL[token[0]]))
            if not digits:
                break
            value = float(f"{int(total + current)}.{digits}")
            return position - index + 1 + len(digits), value
        else:
            break
        position += 1
        if word != "and":
            used = position - index
    return (used, total + current) if used else (0, 0.0)


def _adjacent(text: str, left: re.Match[str], right: re.Match[str]) -> bool:
    return re.fullmatch(r"\s+|\s?-\s?", text[left.end() : right.start()]) is not None
