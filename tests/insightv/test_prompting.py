"""Sets of prompts: what is read, and what is refused before any stage asks with it."""

import shutil

import pytest

from hpc.errors import UserError
from insightv.prompting import FOLDER, ROLES, load_prompts


@pytest.fixture
def own(tmp_path):
    """A set of one's own, as good as the shipped one."""
    return shutil.copytree(FOLDER / "default", tmp_path / "own")


@pytest.mark.parametrize("name", ["default", "tiny"])
def test_every_role_of_the_shipped_sets_takes_its_fields(name):
    prompts = load_prompts(name)
    for role, (required, optional) in ROLES.items():
        given = {field: f"<{field}>" for field in (*required, *optional)}
        text = prompts.render(role, **given)
        assert all(given[field] in text for field in required)


@pytest.mark.parametrize(
    ("role", "text", "told"),
    [
        ("reasoning", "Think.", "lacks the field {question}; it may use {question}"),
        ("direct", "{question} {answer}", "names the field {answer}; it may use {question}"),
        ("direct", "{question} {foo}", "names the field {foo}"),
        ("summary", "{question}", "lacks the field {reasoning}"),
        ("judge", "{truth} or {answer}? {paths}", "may use {truth}, {answer}, {question}"),
        ("table", "{question}", "names the field {question}; it has none"),
        ("final", " \n", "is empty"),
    ],
)
def test_wrong_fields_are_named_with_their_file(role, text, told, own):
    (own / f"{role}.txt").write_text(text)
    with pytest.raises(UserError) as error:
        load_prompts(str(own))
    assert told in str(error.value) and f"{role}.txt" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_text_is_named(own):
    (own / "score.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="score.txt is not UTF-8"):
        load_prompts(str(own))


def test_other_braces_stay_as_they_are(own):
    (own / "direct.txt").write_text('{question} {"answer": 1} \\\\boxed{} {X} { a }')
    shown = load_prompts(str(own)).render("direct", question="{truth}?")
    assert shown == '{truth}? {"answer": 1} \\\\boxed{} {X} { a }'
