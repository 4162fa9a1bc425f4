"""Answers as models really give them, against what a careful person would say."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from insightv.assessment import numeric
from insightv.assessment.rules import RuleConfig, decide, stated
from insightv.records import Question

R, W, U = True, False, None


def question(kind, answer, text="What is it?", options=(), task=""):
    return Question("q:test:0", text, (), answer, kind, tuple(options), task)


NUMBERS = [
    # truth, answer, expected
    ("-\\frac{3}{4}", "-3/4", R),
    ("-\\frac{3}{4}", "−¾", R),
    ("-\\frac{3}{4}", "3/4", W),
    ("\\frac34", "0.75", R),
    ("-7", "–7", R),
    ("7", "5–7", U),
    ("2009", "FY2009", U),
    ("2009", "FY2008", W),
    ("0", "There are none left.", U),
    ("4", "There are none left.", W),
    ("-0.4", "It fell by 0.4", U),
    ("-0.4", "It rose by 0.4", W),
    ("-2.5", "(2.5)", U),
    ("0.7", "7 out of 10", U),
    ("0.6", "7 out of 10", W),
    ("72.4", "72.4/100", U),
    ("1 hour 30 minutes", "1:30", U),
    ("98.6 °F", "37 °C", U),
    ("12", "12", R),
    ("12", " 12. ", R),
    ("12", "12.0", R),
    ("12", "12,0", R),
    ("12", "twelve", R),
    ("12", "Twelve.", R),
    ("12", "a dozen", R),
    ("12", "**12**", R),
    ("12", "`12`", R),
    ("12", "about 12", R),
    ("12", "~12", R),
    ("12", "≈ 12", R),
    ("12", "The bar is 12.", R),
    ("12", "The answer is 12", R),
    ("12", "The answer is twelve.", R),
    ("12", "Final answer: 12", R),
    ("12", "**Answer:** 12", R),
    ("12", "Answer:\n12", R),
    ("12", "12 apples", R),
    ("12", "$12", R),
    ("12", "12 USD", R),
    ("12", "\\boxed{12}", R),
    ("12", "$\\boxed{12}$", R),
    ("12", '{"answer": 12}', R),
    ("12", '{"answer": "12"}', R),
    ("12", "```\n12\n```", R),
    ("12", "<think>5 + 8 = 13</think>12", R),
    ("12", "5 + 7 = 12", R),
    ("12", "5 + 7 equals 12", R),
    ("12", "Five plus seven, so twelve", R),
    ("12", "It is not 13 but 12", R),
    ("12", "13. Wait, actually 12", R),
    ("12", "The answer is 12 because 5 + 7 is 12.", R),
    ("12", "Norway has 5 and Sweden 7, therefore 12.", R),
    ("12", "The 3rd bar is 12", R),
    ("12", "Q3 is 12", R),
    ("12", "12 (twelve)", R),
    ("12", "13", W),
    ("12", "-12", W),
    ("12", "1.2", W),
    ("12", "120", W),
    ("12", "11.9", W),
    ("12", "5 + 8 = 13", W),
    ("12", "The answer is 13.", W),
    ("12", "Norway", W),
    ("12", "12\n\nExplanation: 5 plus 7.", R),
    ("12", "12, the bar is 5 high", U),
    ("12", "12 = 5 + 7", U),
    ("12", "The sum of 5 and 7 is 12.", R),
    ("12", "8. No, 12.", U),
    ("12", "12 or 13", U),
    ("12", "12, 13", U),
    ("12", "12 and 13", U),
    ("12", "12/13", W),
    ("12", "The answer is 12 or 13", U),
    ("12", "between 10 and 14", U),
    ("12", "10-12", U),
    ("12", "more than 12", U),
    ("12", "at least 10", U),
    ("12", "not 12", U),
    ("12", "12%", U),
    ("12", "13 or 14", W),
    ("12", "The answer is 12. The answer is 13.", U),
    ("0", "none", R),
    ("0", "There are 0 bars.", R),
    ("3", "none", W),
    ("1", "one", R),
    ("1", "There is only one", R),
    ("1", "the red one", W),
    ("2", "the red one is 2", R),
    ("21", "twenty-one", R),
    ("105", "one hundred and five", R),
    ("1234", "1,234", R),
    ("1234", "1 234", R),
    ("1234", "1'234", R),
    ("1234", "1.234", U),
    ("1234", "1,234.00", R),
    ("1234.5", "1.234,5", R),
    ("1200", "1.2k", R),
    ("1200", "1.2e3", R),
    ("1200", "1.2 × 10^3", R),
    ("1200", "1.2×10³", R),
    ("1200000", "1.2 million", R),
    ("1200000", "1.2M", R),
    ("5 million", "5,000,000", R),
    ("0.25", "25%", R),
    ("0.25", "25 percent", R),
    ("0.25", "1/4", R),
    ("0.25", "¼", R),
    ("0.25", "a quarter", R),
    ("0.25", "\\frac{1}{4}", R),
    ("0.25", "25", W),
    ("25%", "25", R),
    ("25%", "0.25", R),
    ("25%", "25.0 %", R),
    ("25%", "twenty-five percent", R),
    ("25%", "2.5", W),
    ("25%", "26%", W),
    ("1/2", "0.5", R),
    ("1/2", "half", R),
    ("0.5", "½", R),
    ("1.5", "1 1/2", R),
    ("2.5", "two and a half", R),
    ("1.5", "3:2", R),
    ("3.333", "3.33", R),
    ("3.333", "3.3", R),
    ("3.333", "3.4", W),
    ("0.667", "2/3", R),
    ("5 kg", "5", R),
    ("5 kg", "5000 g", R),
    ("5 kg", "5 g", W),
    ("5 kg", "5 m", U),
    ("5", "5 kg", R),
    ("-5", "minus 5", R),
    ("-5", "−5", R),
    ("-5", "5", W),
    ("$5", "€5", U),
    ("$5", "$5.00", R),
    ("12", "", W),
    ("12", "   ", W),
    ("12", "...", W),
    ("12", "I don't know", W),
    ("12", "I cannot determine the value from the picture.", W),
    ("12", "I'm sorry, but as an AI I can't see pictures", W),
    ("12", "I cannot be sure, but 12", R),
    ("12", "Not sure, probably 12", R),
    ("12", "Not enough information", W),
    ("12", "unknown", W),
    ("12", "1" * 5000, U),
    ("12", "12" + " " * 3000 + "12", R),
    ("12", "1e999999999", W),
    ("12", "\x00\ud83d", W),
]


@pytest.mark.parametrize(("truth", "answer", "expected"), NUMBERS)
def test_numbers(truth, answer, expected):
    assert decide(question("number", truth), answer).correct is expected


IN_CONTEXT = [
    ("How many in 2010?", "12", "In 2010 there were 12.", R),
    ("How many in 2010?", "12", "In 2010 there were 13.", W),
    ("Which year?", "2010", "2010", R),
    ("Sales in 2010?", "2010", "In 2010 it is 2010", R),
    ("How many above 10?", "3", "3 bars are above 10.", R),
    ("What percentage?", "25", "25%", R),
    ("What percentage?", "25", "0.25", R),
    ("What percentage?", "25", "a quarter", R),
    ("How much, in millions?", "5", "5 million", R),
    ("How much, in millions?", "5", "5,000,000", U),
    ("What percentage?", "25", "2500", W),
    ("What percentage?", "0.25", "25", R),
    ("What is the sum of 5 and 7?", "12", "5 and 7 make 12", R),
]


@pytest.mark.parametrize(("text", "truth", "answer", "expected"), IN_CONTEXT)
def test_numbers_repeated_from_the_question(text, truth, answer, expected):
    assert decide(question("number", truth, text), answer).correct is expected


LABELS = [
    ("Norway", "Norway", R),
    ("Norway", "norway.", R),
    ("Norway", '"Norway"', R),
    ("Norway", "**Norway**", R),
    ("Norway", "NORWAY", R),
    ("Norway", "The answer is Norway.", R),
    ("Norway", "It is Norway", R),
    ("Norway", "Norway has the highest value.", R),
    ("Norway", "The country with the highest value is Norway", R),
    ("Norway", "Sweden", W),
    ("Norway", "The answer is Sweden.", W),
    ("Norway", "Norway or Sweden", U),
    ("Norway", "Norway, Sweden", U),
    ("Norway", "not Norway", U),
    ("Norway", "Sweden is higher than Norway", U),
    ("Norway", "Norwey", U),
    ("Norway", "the second", U),
    ("increase", "increasing", U),
    ("increase", "decrease", W),
    ("groupa", "groupb", W),
    ("Norway", "", W),
    ("Norway", "I cannot tell", W),
    ("Norway", "12", W),
    ("São Paulo", "Sao Paulo", R),
    ("New York", "new-york", R),
    ("New York", "York", U),
    ("R&D", "R and D", R),
    ("United States", "US", U),
    ("United States", "USA", U),
    ("apple", "apples", U),
    ("Group A", "Group B", W),
    ("male", "female", W),
    ("red", "dark red", U),
    ("2010", "2010", R),
    ("2010", "In 2010", R),
    ("2010", "2011", W),
    ("Jan", "January", U),
    ("C++", "C", W),
    ("-5", "5", W),
    ("unknown", "unknown", R),
    ("the", "the", R),
    ("東京", "東京", R),
    ("東京", "大阪", W),
    ("☃", "☃", R),
]


@pytest.mark.parametrize(("truth", "answer", "expected"), LABELS)
def test_labels(truth, answer, expected):
    asked = "Which country has the highest value, Norway or Sweden?"
    assert decide(question("label", truth, asked), answer).correct is expected


COLOURS = ("red", "dark red", "blue", "cannot be determined")
CHOICES = [
    ("red", "A", R),
    ("red", "(A)", R),
    ("red", "A.", R),
    ("red", "a", R),
    ("red", "a)", R),
    ("red", "A. red", R),
    ("red", "(A) red", R),
    ("red", "Answer: A", R),
    ("red", "The answer is (A).", R),
    ("red", "The answer is A", R),
    ("red", "Option A", R),
    ("red", "red", R),
    ("red", "It is red.", R),
    ("A", "red", R),
    ("(A)", "A", R),
    ("dark red", "dark red", R),
    ("dark red", "B", R),
    ("red", "dark red", W),
    ("red", "B", W),
    ("red", "(C) blue", W),
    ("red", "C, not A", U),
    ("red", "A or B", U),
    ("red", "Both A and B", U),
    ("red", "I choose A", R),
    ("red", "I'd go with C.", W),
    ("red", "A is correct", R),
    ("red", "C or D", W),
    ("red", "(B) red", U),
    ("red", "blue (A)", U),
    ("red", "green", U),
    ("red", "A bar", U),
    ("cannot be determined", "It cannot be determined", R),
    ("red", "It cannot be determined", W),
    ("red", "I don't know", W),
    ("red", "", W),
    ("red", "not red", U),
    ("purple", "A", U),
]


@pytest.mark.parametrize(("truth", "answer", "expected"), CHOICES)
def test_choices(truth, answer, expected):
    assert decide(question("choice", truth, options=COLOURS), answer).correct is expected


@pytest.mark.parametrize(
    ("answer", "expected"), [("12", R), ("twelve", R), ("12.0", R), ("13", W), ("B", W), ("A", R)]
)
def test_choices_that_are_numbers(answer, expected):
    asked = question("choice", "12", options=("12", "13", "14"))
    assert decide(asked, answer).correct is expected


YES_NO = [
    ("yes", "Yes", R),
    ("yes", "yes.", R),
    ("yes", "Yes, Norway is higher.", R),
    ("yes", "The answer is yes", R),
    ("yes", "true", R),
    ("no", "No, there is no red bar.", R),
    ("no", "Nope", R),
    ("yes", "No", W),
    ("yes", "The answer is no.", W),
    ("yes", "False", W),
    ("yes", "Yes it is", R),
    ("yes", "Yes, there are no red bars", R),
    ("yes", "That is correct", R),
    ("yes", "That is not correct", U),
    ("yes", "Yes, but no", U),
    ("no", "No, yes it is", U),
    ("no", "no red bar", U),
    ("no", "No there is not", R),
    ("yes", "yes and no", U),
    ("yes", "yes or no", U),
    ("yes", "Yes. No.", U),
    ("yes", "It depends", U),
    ("yes", "", W),
    ("yes", "I can't tell", W),
    ("maybe", "yes", U),
]


@pytest.mark.parametrize(("truth", "answer", "expected"), YES_NO)
def test_yes_no(truth, answer, expected):
    assert decide(question("yes_no", truth), answer).correct is expected


LISTS = [
    # truth, answer, expected as a set, expected in order
    ("a1, b2, c3", "a1, b2, c3", R, R),
    ("a1, b2, c3", "a1, b2 and c3", R, R),
    ("a1, b2, c3", "a1, b2, and c3.", R, R),
    ("a1, b2, c3", "a1; b2; c3", R, R),
    ("a1, b2, c3", "a1/b2/c3", R, R),
    ("a1, b2, c3", "all", U, U),
    ("a1, b2, c3", "a1\nb2\nc3", R, R),
    ("a1, b2, c3", "1. a1\n2. b2\n3. c3", R, R),
    ("a1, b2, c3", "- a1\n- b2\n- c3", R, R),
    ("a1, b2, c3", '["a1", "b2", "c3"]', R, R),
    ("a1, b2, c3", "a1 > b2 > c3", R, R),
    ("a1, b2, c3", "The order is: a1, b2, c3", R, R),
    ("a1, b2, c3", "The answer is a1, b2, c3.", R, R),
    ("a1, b2, c3", "The order is a1, b2 and then c3.", R, R),
    ("a1, b2, c3", "c3, b2, a1", R, W),
    ("a1, b2, c3", "c3 < b2 < a1", R, U),
    ("a1, b2, c3", "a1, b2", W, W),
    ("a1, b2, c3", "a1, b2, c3, d4", W, W),
    ("a1, b2, c3", "a1, b2, b2, c3", R, W),
    ("a1, b2, c3", "x, y, z", W, W),
    ("a1, b2, c3", "", W, W),
    ("a1, b2, c3", "I cannot tell", W, W),
    ("3, 3, 5", "3, 3, 5", R, R),
    ("3, 3, 5", "3, 5", W, W),
    ("Bosnia and Herzegovina, Chad", "Bosnia and Herzegovina and Chad", R, R),
    ("Bosnia and Herzegovina, Chad", "Chad, Bosnia and Herzegovina", R, W),
    ("Norway, Sweden", "Norwey, Sweden", U, U),
    ("Norway, Sweden", "Norway, not Sweden", W, W),
]


@pytest.mark.parametrize(("truth", "answer", "as_set", "in_order"), LISTS)
def test_lists(truth, answer, as_set, in_order):
    assert decide(question("list", truth, task="labels"), answer).correct is as_set
    assert decide(question("list", truth, task="order"), answer).correct is in_order
    assert decide(question("list", truth, task="order-down"), answer).correct is in_order


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("A big dog.", R), ("a BIG dog", R), ("a large dog", U), ("", W), ("I don't know", W)],
)
def test_free_text_that_differs_is_left_to_the_judge(answer, expected):
    assert decide(question("text", "a big dog"), answer).correct is expected


def test_tolerances_are_configurable():
    asked, decimal = question("number", "100"), question("number", "3.5")
    assert decide(asked, "104").correct is False
    assert decide(asked, "104", RuleConfig(integer_tolerance=0.05)).correct is True
    assert decide(decimal, "3.4", RuleConfig(decimal_tolerance=0.05)).correct is True
    assert decide(question("list", "a, b", task="rank"), "b, a").correct is False
    assert decide(
        question("list", "a, b", task="rank"), "b, a", RuleConfig(ordered_tasks=[])
    ).correct


def test_a_formula_that_takes_too_long_is_left_open(monkeypatch):
    pytest.importorskip("math_verify")
    monkeypatch.setattr(numeric, "LATEX_SECONDS", 1)
    decision = decide(question("number", "1"), "10^{10^{9}}-10^{10^{9}}+1")
    assert decision.correct is None and "TimeoutException" in decision.detail


def test_a_latex_answer_is_decided_or_plainly_left_open():
    decision = decide(question("text", "\\frac{\\sqrt{2}}{2}"), "\\frac{1}{\\sqrt{2}}")
    assert decision.rule == "math-verify" or decision.correct is None
    assert decision.correct is not False


CONCLUSIONS = [
    ("number", "7", "The difference is 12 - 5 = 7.", R),
    ("number", "7", "The difference is 12 - 5 = 8.", W),
    ("number", "7", "Norway is 12 and Sweden is 5.", U),
    ("number", "7", "I compare both bars.", U),
    ("label", "Norway", "So it is Norway.", R),
    ("label", "Norway", "5 is more than 3.", U),
    ("yes_no", "yes", "So the answer is no.", W),
]


@pytest.mark.parametrize(("kind", "truth", "text", "expected"), CONCLUSIONS)
def test_what_a_step_concludes(kind, truth, text, expected):
    assert stated(question(kind, truth), text) is expected


KINDS = st.sampled_from(["number", "label", "choice", "yes_no", "list", "text"])


@settings(max_examples=150, deadline=None)
@given(KINDS, st.text(max_size=40), st.text(max_size=200))
def test_no_text_breaks_a_rule(kind, truth, answer):
    asked = question(kind, truth, options=("red", truth, "12") if kind == "choice" else ())
    assert decide(asked, answer).correct in (True, False, None)
    stated(asked, answer)


@settings(max_examples=100, deadline=None)
@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_whole_numbers_are_right_only_when_equal(truth, answer):
    asked = question("number", str(truth), "What is it?")
    for form in (f"{answer}", f"{answer:,}", f"It is {answer}.", f"The answer is {answer}.0"):
        assert decide(asked, form).correct is (truth == answer), form


def test_hostile_lengths_take_no_time():
    asked = question("number", "12", options=("red", "blue"))
    for unit in (
        "1 ",
        "1,",
        "one ",
        "a ",
        "1",
        "1/",
        "\\boxed{",
        "answer is ",
        "{",
        "wait ",
        "- ",
        "_",
    ):
        for kind in ("number", "label", "choice", "yes_no", "list", "text"):
            shaped = question(kind, "12", options=asked.options)
            began = time.process_time()
            decide(shaped, unit * (3900 // len(unit)))
            decide(shaped, unit * 20000)
            assert time.process_time() - began < 2, (unit, kind)


@pytest.mark.parametrize(
    ("text", "truth", "answer", "expected"),
    [
        ("How warm is it?", "-4", "minus four degrees", R),
        ("How warm is it?", "-4", "4 °C below zero", R),
        ("How warm is it?", "-4", "4 degrees", W),
        ("How long is it?", "90 minutes", "1 h 30 min", R),
        ("How long is it?", "90 minutes", "an hour and a half", R),
        ("How long is it?", "1.5 hours", "1 hour, 40 minutes", W),
        ("What does it cost?", "$12.50", "twelve dollars and fifty cents", R),
        ("What does it cost?", "€0.50", "50 cents", R),
        ("What does it cost?", "$12.50", "12.50 cents", W),
        ("How heavy is it?", "500 g", "half a kilogram", R),
        ("How heavy is it?", "500 g", "500 ml", U),
        ("How large is the angle?", "60°", "60 degrees", R),
        ("How large is the angle?", "60°", "60 radians", W),
        ("How fast is it?", "36 km/h", "10 m/s", R),
        ("How fast is it?", "3 m/s", "3 km/h", W),
        ("How large is it?", "2 m²", "20000 cm^2", R),
        ("What part is it?", "3/8", "three eighths", R),
        ("How many are there?", "0", "None of them", R),
        ("How many are there?", "4", "All of them", U),
        ("How many are there?", "2", "a couple", U),
        ("By how many percentage points did it rise?", "5", "0.05", W),
        ("How fast?", r"3 \times 10^8", "3·10⁸", R),
    ],
)
def test_quantities_as_they_are_spoken(text, truth, answer, expected):
    assert decide(question("number", truth, text), answer).correct is expected


@pytest.mark.parametrize(
    ("truth", "answer", "expected"),
    [
        ("(2, 5]", "(2,5]", R),
        ("x ≤ 5", "x≤5", R),
        ("a, b", "(a) b", R),
    ],
)
def test_signs_of_formulas_are_compared(truth, answer, expected):
    assert decide(question("text", truth), answer).correct is expected


@pytest.mark.parametrize(("truth", "answer"), [("(2, 5]", "[2, 5)"), ("x ≤ 5", "x ≥ 5")])
def test_formulas_that_differ_by_a_sign_are_not_the_same(truth, answer):
    assert decide(question("text", truth), answer).correct is not True


@pytest.mark.parametrize(
    ("truth", "answer", "expected"),
    [
        (r"6\sqrt{2}", "6√2", R),
        (r"6\sqrt{2}", r"\sqrt{72}", R),
        (r"6\sqrt{2}", r"2\sqrt{6}", W),
        ("x^2 + 2x + 1", "x² + 2x + 1", R),
        ("x^2 + 2x + 1", "$(x+1)^2$", R),
        ("x^2 + 2x + 1", "$(x-1)^2$", W),
        ("x^2 + 2x + 1", "it is the square of x plus one", U),
        ("(2, 5]", "$2 < x \\le 5$", U),
        ("(2, 5]", "[2, 5)", W),
        (r"\sqrt{12}", "3.46", R),
        (r"\sqrt{12}", "3.5", W),
        (r"\sqrt{12}", "12", W),
        (r"\sqrt{16}", "4.01", W),
        (r"3\sqrt{2}\pi", "13.3 cm²", R),
        (r"3\sqrt{2}\pi", "3", W),
        (r"5\sqrt{\pi^2}", "5 pi", R),
        (r"-\sqrt{3}/2", "0.866", W),
        (r"-\sqrt{3}/2", "more than -0.866", U),
    ],
)
def test_formulas_by_math_verify(truth, answer, expected):
    pytest.importorskip("math_verify")
    kind = "number" if "sqrt" in truth else "text"
    assert decide(question(kind, truth), answer).correct is expected


@pytest.mark.parametrize(
    ("kind", "truth", "answer", "expected"),
    [
        ("text", "(555) 013-4477", "555 013 4477", R),
        ("text", "(555) 013-4477", "555-013-4747", W),
        ("text", "KA 512 B", "ka512b", R),
        ("text", "-450", "450", U),
        ("text", "1/200", "1200", U),
        ("text", "STOP", "The sign says STOP", U),
        ("text", "STOP", "It is STOP.", R),
        ("list", "2, -3", "x = 2 or x = -3", R),
        ("list", "2, -3", "-3 and 2", R),
        ("list", "2, -3", "two and minus four", W),
        ("list", "France and Spain", "Spain, France", R),
        ("label", "Dr. J. Smith", "J. Smith", U),
        ("label", "Dr. J. Smith", "Dr. K. Jones", W),
    ],
)
def test_codes_lists_of_numbers_and_parts_of_names(kind, truth, answer, expected):
    assert decide(question(kind, truth), answer).correct is expected
