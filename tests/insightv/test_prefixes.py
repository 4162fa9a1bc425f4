"""Keys and values of rows are given back as they were, and take no more room than allowed."""

from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicCache

from insightv.engines.prefixes import Prefixes, resumed

LAYERS, HEADS, SIZE = 2, 2, 4
TEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=40)


def model(config=None):
    return SimpleNamespace(config=config or LlamaConfig(num_hidden_layers=LAYERS))


def states(ids, shown):
    """What a model might make of a row: it depends on all tokens so far, and the picture."""
    told = torch.tensor(ids, dtype=torch.float).add(1 + len(shown[0])).cumsum(0)
    return told[:, None] * torch.arange(1, SIZE + 1)


def cache_of(rows, shown):
    """Rows padded on the left, as a model leaves them, and their mask."""
    width = max(map(len, rows))
    cache, mask = DynamicCache(), torch.zeros(len(rows), width, dtype=torch.long)
    held = torch.full((len(rows), HEADS, width, SIZE), float("nan"))
    for row, ids in enumerate(rows):
        held[row, :, width - len(ids) :] = states(ids, shown)
        mask[row, width - len(ids) :] = 1
    for layer in range(LAYERS):
        cache.update(held + layer, -held - layer, layer)
    return cache, mask


def check(begun, prompts, shown):
    cache, mask = resumed(begun, 3)
    for row, (ids, (_, length)) in enumerate(zip(prompts, begun, strict=True)):
        assert int(mask[row].sum()) == length
        for number, layer in enumerate(cache.layers):
            own = states(ids, shown)[:length].expand(HEADS, -1, -1) + number
            gap = layer.keys.shape[-2] - length
            assert torch.equal(layer.keys[row, :, gap:], own)
            assert torch.equal(layer.values[row, :, gap:], -own)
            assert not layer.keys[row, :, :gap].any()


@given(
    st.lists(st.tuples(st.sampled_from("ab"), TEXTS, TEXTS), min_size=1, max_size=20),
    st.integers(0, 120),
)
@settings(max_examples=60, deadline=None)
def test_rows_come_back(paths, room):
    prefixes = Prefixes(model())
    prefixes.limit(room)
    for name, prompt, reply in paths:
        shown = (name * (1 + (name == "b")),)
        begun = prefixes.find(shown, prompt, 0)
        if begun is None:
            cache, mask = cache_of([prompt, [1] * 9], shown)
            place = len(prompt)
            begun = prefixes.add(shown, prompt, place, cache, 0, mask[0].nonzero()[:, 0])
        else:
            assert len(prompt) / 2 <= begun[1] < len(prompt)
        check([begun], [prompt], shown)
        whole = prompt + reply
        cache, mask = cache_of([[1] * 50, whole], shown)
        columns = mask[1].nonzero()[:, 0]
        after = prefixes.add(shown, whole, len(whole), cache, 1, columns, begun)
        check([begun, after], [whole, whole], shown)
        assert after[1] == len(whole) and after[0].place_at(len(whole)) == len(whole)
        assert begun[0].place_at(begun[1]) == begun[1]
        assert prefixes.tokens == sum(len(s.ids) - s.start for s in prefixes._spans) <= room
        assert set(prefixes._index.values()) <= set(prefixes._spans)
        assert all(s.parent is None or s.parent in prefixes._spans for s in prefixes._spans)
    prefixes.clear()
    assert not (prefixes.tokens or prefixes._spans or prefixes._index)


def test_other_pictures_and_their_inside_are_not_gone_on_from():
    prefixes = Prefixes(model())
    prefixes.limit(100)
    ids = list(range(30))
    cache, mask = cache_of([ids], ("a",))
    prefixes.add(("a",), ids, 30, cache, 0, mask[0].nonzero()[:, 0])
    assert prefixes.find(("b",), ids, 0) is None
    assert prefixes.find(("a",), [*ids[:20], 99], 21) is None  # its picture ends behind that
    assert prefixes.find(("a",), [*ids[:20], 99], 20)[1] == 20
    assert prefixes.find(("a",), [*ids[:20], *range(50, 80)], 0) is None  # too little of it


def test_layers_that_forget_are_left_alone():
    sliding = MistralConfig(num_hidden_layers=2, sliding_window=4)
    prefixes = Prefixes(model(sliding))
    prefixes.limit(100)
    assert not prefixes.possible
    assert prefixes.add(("a",), [1] * 20, 20, None, 0, torch.arange(20)) is None
    assert prefixes.find(("a",), [1] * 21, 0) is None
