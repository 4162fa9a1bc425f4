"""Rows of caches are put together, replaced and left out without a change to any of them."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from insightv.engines import states

LAYERS, HEADS, SIZE = 2, 3, 4
LENGTHS = st.lists(st.integers(1, 70), min_size=1, max_size=6)


def cache_of(lengths, first=0):
    """Rows of numbers of their own, with junk in their padding on the left."""
    width = max(lengths)
    cache, mask = DynamicCache(), torch.zeros(len(lengths), width, dtype=torch.long)
    held = torch.full((len(lengths), HEADS, width, SIZE), 99.0)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
        held[row, :, width - length :] = content(first + row, length)
    for layer in range(LAYERS):
        cache.update(held + layer, -held - layer, layer)
    return cache, mask


def content(name, length):
    line = 1000 * name + torch.arange(length, dtype=torch.float)
    return line[:, None].expand(HEADS, length, SIZE)


def check(part, names, lengths):
    cache, mask = part
    assert [int(line.sum()) for line in mask] == lengths
    for number, layer in enumerate(cache.layers):
        assert layer.keys.shape[-2] == mask.shape[1] and torch.isfinite(layer.keys).all()
        for row, (name, length) in enumerate(zip(names, lengths, strict=True)):
            own = mask[row].bool()
            assert torch.equal(layer.keys[row][:, own], content(name, length) + number)
            assert torch.equal(layer.values[row][:, own], -content(name, length) - number)


def stepped(part):
    """One token more for each row, as a model would add it."""
    cache, mask = part
    for number in range(LAYERS):
        new = torch.ones(len(mask), HEADS, 1, SIZE)
        keys, _ = cache.update(new, -new, number)
        assert keys.shape[-2] == mask.shape[1] + 1 and torch.equal(keys[..., -1:, :], new)


@given(LENGTHS, LENGTHS, st.data())
@settings(max_examples=80, deadline=None)
def test_rows_stay_what_they_are(one, other, data):
    kept = data.draw(st.lists(st.integers(0, len(one) - 1), min_size=1, max_size=8))
    chosen = states.with_rows(cache_of(one), torch.tensor(kept))
    check(chosen, kept, [one[row] for row in kept])
    assert chosen[1].shape[1] == max(one[row] for row in kept)  # no wider than it must be
    both = states.packed([chosen, cache_of(other, 50)], [None, None])
    names = [*kept, *range(50, 50 + len(other))]
    check(both, names, [one[row] for row in kept] + other)

    first = cache_of(one)
    states.with_room(first[0])
    count = data.draw(st.integers(1, min(len(one), len(other))))
    places = data.draw(st.permutations(range(len(one))))[:count]
    new = states.with_rows(cache_of(other, 50), torch.arange(count))
    if states.fits(first, new):
        states.replace(first, torch.tensor(places), new)
        names, lengths = list(range(len(one))), list(one)
        for place, row in zip(places, range(count), strict=True):
            names[place], lengths[place] = 50 + row, other[row]
        check(first, names, lengths)
        stepped(first)
    else:
        assert max(other[:count]) > max(one)
    stepped(both)


def test_columns_of_those_who_left_are_given_up():
    cache, mask = cache_of([40, 30, 7])
    states.with_room(cache)
    small = cache_of([5], 9)
    assert states.fits((cache, mask), small)
    mask[0] = 0  # the longest row is gone, a quarter of the columns with it
    assert not states.fits((cache, mask), small)
    check(
        states.packed([(cache, mask), small], [torch.tensor([1, 2]), None]), [1, 2, 9], [30, 7, 5]
    )


def test_layers_that_forget_are_no_ground_to_join_on():
    cache = DynamicCache()
    assert not states.keeps_all(cache)
    cache.layers = [DynamicSlidingWindowLayer(sliding_window=4)]
    cache.update(torch.arange(8.0).view(2, 1, 4, 1), torch.zeros(2, 1, 4, 1), 0)
    assert not states.keeps_all(cache)
    found, mask = states.with_rows((cache, torch.ones(2, 4)), torch.tensor([1]))
    assert found.layers[0].keys.flatten().tolist() == [5, 6, 7] and mask.shape == (1, 4)
