import base64
import html
import json
import re
import shutil

import pytest
import runs
from browser import CHROMIUM, Browser
from hypothesis import given
from hypothesis import strategies as st

from hpc.errors import UserError
from hpc.rundir import RunDir, write_json
from insightv.evaluation.benchmark_scores import ALONE, SCORES
from insightv.evaluation.results import write_results
from insightv.report import drawings, write_report
from insightv.report.figures import dots, nice_ticks
from insightv.report.page import current_results, headline

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return runs.make_run(tmp_path_factory.mktemp("report") / "quickstart")


@pytest.fixture(scope="module")
def page(run):
    write_results(run)
    return write_report(run)


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def gallery(text: str) -> dict:
    found = re.search(r'<script type="application/json" id="gallery-data">(.*?)</script>', text)
    return json.loads(found[1])


def test_one_file_that_asks_for_nothing(page):
    text = page.read_text()
    assert page.parent.name == "report" and [p.name for p in page.parent.iterdir()] == [page.name]
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)
    assert "http://" not in text and "https://" not in text
    policy = html.unescape(re.search(r'Content-Security-Policy" content="(.*?)"', text)[1])
    assert policy.startswith("default-src 'none'; img-src data:; ") and "unsafe" not in policy


def test_hostile_texts_stay_text(page):
    text = page.read_text()
    assert "<img src=x" not in text and "<svg onload" not in text
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;" in text
    data = gallery(text)
    assert any(path["answer"] == runs.HOSTILE for path in data["paths"])
    assert any(question["key"] == runs.HOSTILE_KEY for question in data["questions"])
    assert text.count("</script>") == 2


def test_the_sample_is_whole_questions_with_their_pictures(page):
    data = gallery(page.read_text())
    # Five paths too many would be another question: 2 rounds, 4 paths a question.
    assert data["total"] == 336 and 280 <= len(data["paths"]) <= 340
    for place in {path["question"] for path in data["paths"]}:
        assert sum(path["question"] == place for path in data["paths"]) % 4 == 0
    assert data["pictures"].count("") == 1  # the one that is not in the store
    for uri in data["pictures"]:
        assert not uri or base64.b64decode(uri.partition(",")[2]).startswith(b"RIFF")
    assert any("rejected in a pair" in path["used"] for path in data["paths"])
    assert any("reasoning set" in path["used"] for path in data["paths"])


def test_the_same_run_gives_the_same_page(run, page):
    assert write_report(run).read_text() == page.read_text()


def test_an_old_results_file_is_not_believed(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    write_results(copy)
    written = json.loads((copy / "results.json").read_text())
    (copy / "results.json").write_text(json.dumps(written | {"seed": 77}))
    assert current_results(copy)["seed"] == 77
    (copy / "stages" / "eval-base" / "manifest.json").write_text('{"made": "again"}')
    assert current_results(copy)["seed"] == 0
    shutil.rmtree(copy / "stages" / "eval-base")
    assert "base" not in {row["name"] for row in current_results(copy)["ladder"]}


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("eval-", "No entry of the ladder has been evaluated yet."),
        ("eval-direct-sft", "This needs the entries direct_sft and multi_agent"),
        ("eval-judge-card", "The judge's card has not been made yet."),
        ("r", "No round of paths is complete yet."),
        ("r1-judge", "From questions to pairs"),
        ("questions-test", "No entry of the ladder has been evaluated yet."),
        ("questions-train", "No path has been generated yet."),
        ("sft-", "Over optimizer steps"),
    ],
)
def test_what_is_missing_is_said(run, tmp_path, gone, said):
    copy = tmp_path / "half"
    shutil.copytree(run, copy)
    for stage in (copy / "stages").iterdir():
        if stage.name.startswith(gone):
            shutil.rmtree(stage)
    text = write_report(copy).read_text()
    assert said in text


def test_benchmarks_stand_beside_the_papers(run, page, tmp_path):
    assert "Public benchmarks" not in page.read_text()
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    score = {"task": "chartqa", "entry": "base", "metric": "relaxed_overall", "value": 0.615}
    score |= {"ci95": [0.58, 0.64], "n": 2500, "failed": 0}
    hostile = score | {"task": runs.HOSTILE, "ci95": None}
    found = {"scores": [score, hostile], "own": [], "differences": [], "confusion": {}}
    place = RunDir(copy / ALONE)  # where `insightv benchmark` leaves it
    write_json(place.stage_dir(SCORES) / "scores.json", found)
    assert "Public benchmarks" not in write_report(copy).read_text()
    write_json(place.manifest(SCORES), {"rows": 1})
    text = write_report(copy).read_text()
    assert "<td>61.5 [58.0, 64.0]</td>" in text and "<td>1573.7</td>" in text
    assert "<img src=x" not in text


def test_an_empty_run_has_a_page_and_no_run_has_none(tmp_path):
    (tmp_path / "empty" / "stages").mkdir(parents=True)
    assert write_report(tmp_path / "empty").read_text().count('class="missing"') >= 6
    with pytest.raises(UserError, match="no run directory"):
        write_report(tmp_path / "nothing")


def test_lone_surrogates_do_not_break_the_page(tmp_path):
    run = tmp_path / "run"
    folder = run / "stages" / "bad\udcff"
    try:
        folder.mkdir(parents=True)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert "bad?" in write_report(run).read_text()


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.integers(2, 8))
def test_ticks_are_few_and_reach_around(a, b, about):
    low, high = sorted((a, b))
    ticks = nice_ticks(low, high, about)
    assert 2 <= len(ticks) <= about + 3
    if high - low > 1e-3:
        slack = (high - low) * 1e-6
        assert ticks[0] <= low + slack and ticks[-1] >= high - slack


def spread(**counts: list[int]) -> dict:
    """A distribution over bins of five points, as the funnel reports it."""
    found = {"low": 0.0, "high": 100.0}
    for name in ("right", "wrong", "undecided"):
        bins = counts.get(name, [0] * 20)
        found[name] = {"counts": bins, "n": sum(bins), "mean": 50.0 if sum(bins) else None}
    return found


def test_scores_that_are_nearly_all_one_are_folded_with_their_share():
    flat = spread(right=[0] * 19 + [90], wrong=[3] + [0] * 18 + [7])
    mixed = spread(right=[10] + [0] * 18 + [90])  # 90 % are not more than 90 %
    measures = {"tokens": flat, "total": mixed, "logic": flat}
    rounds = [{"name": "Round 0", "distributions": measures}]
    (shown,) = drawings.distributions({"funnel": {"rounds": rounds}})
    assert shown.told == "logic 97.0 % at 95–100"
    assert ["Length, tokens" in panel for panel in shown.panels] == [True, False]
    assert len(shown.flat) == 1 and "Score, logic" in shown.flat[0]


def test_the_headline_names_whose_gain_it_is(page, run):
    told = [label for _, label in headline(current_results(run))]
    for entry, label in zip(("multi_agent", "iterative_dpo"), told[-2:], strict=True):
        assert label.startswith(f"points on charts, {entry} over base [")
        assert label in page.read_text()


def test_labels_of_figures_are_escaped():
    from insightv.report.figures import Whisker

    drawn = dots("<b>", [Whisker('"><script>', 0.5, 0.4, 0.6, "<i>")])
    assert "<script>" not in drawn and "<i>" not in drawn and "&lt;b&gt;" in drawn


@needs_browser
@pytest.mark.parametrize(
    ("width", "dark"), [(1280, False), (390, False), (1280, True), (390, True)]
)
def test_page_in_chromium(page, tab, tmp_path, width, dark):
    tab.open(page, width, dark=dark)
    assert tab.run("document.title") == "quickstart · Insight-V HPC"
    assert tab.run("document.documentElement.scrollWidth") == width
    # No drawing is wider than its column, and no letters are too small to read.
    assert tab.run(
        "[...document.querySelectorAll('svg, img, section, p')]"
        ".every(e => e.getBoundingClientRect().right <= innerWidth)"
    )
    assert tab.run(
        "Math.min(...[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect()"
        ".height)) > 9"
    )
    ink, paper = tab.run(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (brightness[0] > brightness[1]) == dark and abs(brightness[0] - brightness[1]) > 400
    assert tab.screenshot(tmp_path / "page.png").stat().st_size > 50_000
    assert tab.complaints() == []
    assert tab.requests() == [page.resolve().as_uri()]


@needs_browser
def test_nothing_from_the_data_runs(page, tab):
    tab.open(page)
    assert tab.run("document.querySelectorAll('img[src=x], svg[onload], main script').length") == 1
    assert tab.run("document.querySelectorAll('main script')[0].type") == "application/json"
    # Even where markup gets in, the page's policy stops it.
    tab.run(
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.ran = 1\">')"
    )
    tab.run("fetch('https://example.invalid/').catch(() => 0)")
    tab.wait(lambda: len(tab.complaints()) >= 2)
    assert tab.run("window.ran") is None
    assert all("Content Security Policy" in text for text in tab.complaints())
    assert all(url.startswith("file:") for url in tab.requests() if url[-1] != "x")


@needs_browser
def test_filters_and_pages(page, tab):
    data = gallery(page.read_text())
    paths, questions = data["paths"], data["questions"]
    tab.open(page)

    def cards() -> list[str]:
        return tab.run("[...document.querySelectorAll('#cards .card-key')].map(e => e.textContent)")

    def expect(found: list) -> None:
        """The count and the first page of cards are those of ``found``, soon."""
        count = f"{len(found)} of {len(paths)} paths"
        tab.wait(lambda: tab.run("document.getElementById('shown').textContent") == count)
        assert cards() == [path["key"] for path in found[:12]]

    def choose(name: str, value: str) -> None:
        tab.run(
            f"(e => {{ e.value = {value!r};"
            f" e.dispatchEvent(new Event('input', {{bubbles: true}})) }})"
            f"(document.getElementById({name!r}))"
        )

    expect(paths)
    tab.click("#next")
    tab.wait(lambda: cards() == [path["key"] for path in paths[12:24]])
    assert "page 2 of" in tab.run("document.getElementById('turn').textContent")
    tab.click("#back")
    tab.wait(lambda: tab.run("document.getElementById('back').disabled"))

    wrong = [path for path in paths if path["outcome"] == "wrong"]
    assert len(wrong) > 12
    tab.click("input[value=wrong]")
    expect(wrong)
    assert tab.run("document.querySelectorAll('#cards .verdict.wrong').length") == 12
    tab.press("ArrowRight")
    expect([path for path in paths if path["outcome"] == "undecided"])

    tab.click("button[type=reset]")
    expect(paths)
    choose("round", "Round 1")
    later = [path for path in paths if path["round"] == "Round 1"]
    expect(later)
    choose("task", "=max")
    expect([path for path in later if questions[path["question"]]["task"] == "max"])

    tab.click("button[type=reset]")
    expect(paths)
    tab.click("input[name=low]")
    tab.type("80")
    tab.press("Tab")
    tab.type("90")
    expect([path for path in paths if path["total"] is not None and 80 <= path["total"] <= 90])

    tab.click("button[type=reset]")
    expect(paths)
    tab.click("#text")
    tab.type("ONERROR=alert")
    texts = "[...document.querySelectorAll('#cards article')].map(e => e.textContent)"
    tab.wait(lambda: all("<img" in text for text in tab.run(texts)))
    assert tab.run(texts)
    tab.type("nothing has this")
    expect([])
    assert "No path in the sample matches." in tab.run(
        "document.getElementById('cards').textContent"
    )
    assert tab.complaints() == []


@needs_browser
def test_keyboard_reaches_everything(page, tab):
    tab.open(page)
    tab.press("Tab")
    assert tab.run("document.activeElement.className") == "skip"
    reached = set()
    for _ in range(60):
        tab.press("Tab")
        reached.add(tab.run("document.activeElement.id || document.activeElement.tagName"))
    assert {"text", "task", "round", "next"} <= reached
    unnamed = tab.run(
        "[...document.querySelectorAll('svg, img, input, select, button')].filter(e =>"
        " !(e.getAttribute('aria-label') || e.alt || (e.labels && e.labels.length)"
        " || e.textContent.trim())).length"
    )
    assert unnamed == 0


@needs_browser
def test_half_a_run_in_chromium(run, tab, tmp_path):
    copy = tmp_path / "half"
    shutil.copytree(run, copy)
    for stage in ("eval-", "r1-", "sft-"):
        for folder in (copy / "stages").glob(f"{stage}*"):
            shutil.rmtree(folder)
    tab.open(write_report(copy), 390)
    assert tab.run("document.querySelectorAll('.missing').length") >= 4
    assert tab.complaints() == []
