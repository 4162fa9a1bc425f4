"""Packed and shared sequences give the numbers of plain ones, in every family."""

from dataclasses import replace

import pytest
import torch
from families import FAMILIES, picture, save_family
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode
from training_case import family, loaded, pair_rows, sample_rows, store

from hpc.errors import UserError
from insightv import chats, models
from insightv.records import Message
from insightv.training.attention import SPANS, additive, attention_mask, span_attention
from insightv.training.balance import pack, plan
from insightv.training.batches import Encoder, Example, Reply, encode_all
from insightv.training.objectives import Supervised, Totals
from insightv.training.packing import Batch, Packer, Tree, collate
from insightv.training.policy import token_logps


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return store(tmp_path_factory.mktemp("pictures"))


def examples(name: str, pictures, kind: str, count: int = 6) -> list[Example]:
    store_, ids = pictures
    encoder = Encoder(loaded(name).processor, store_, 4096, 64)
    rows, encode = {
        "pairs": (pair_rows(ids, count), encoder.pair),
        "samples": (sample_rows(ids, count), encoder.sample),
    }[kind]
    found, dropped = encode_all(rows, encode)
    assert not dropped
    return found


def plain(model, reply: Reply) -> torch.Tensor:
    """Log-probabilities of one reply's targets: one sequence, one call of Hugging Face."""
    inputs = chats.collate([reply.encoding], 0, side="right")
    logps = model(**inputs).logits[0].log_softmax(-1)
    return torch.cat(
        [logps[torch.arange(a - 1, b - 1), reply.encoding.ids[a:b]] for a, b in reply.spans]
    )


def weighed(logps: torch.Tensor) -> torch.Tensor:
    """Some scalar of log-probabilities that no order or sign leaves alone."""
    return (logps * torch.linspace(-1, 2, len(logps))).sum() / len(logps)


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def compared(
    model,
    some: list[Example],
    packer: Packer,
    attention: str = "sdpa",
    limit: float = 1e-5,
    batches: list[Batch] | None = None,
) -> None:
    """Log-probabilities of every reply, and every gradient, against plain sequences."""
    got, total = {}, 0.0
    model.set_attn_implementation({"": "sdpa", "text_config": attention})
    for batch in packer.batches(some) if batches is None else batches:
        logps = token_logps(model, batch)
        replies = [logps[batch.owners == number] for number in range(batch.replies)]
        per = batch.replies // len(batch.keys)
        for number, key in enumerate(batch.keys):
            got[key] = replies[number * per : (number + 1) * per]
            total = total + sum(weighed(logps) for logps in got[key])
    ours = gradients(model, total)
    total = 0.0
    model.set_attn_implementation("sdpa")
    for example in some:
        for number, reply in enumerate(example.replies):
            want = plain(model, reply)
            torch.testing.assert_close(got[example.key][number], want, atol=limit, rtol=0)
            total = total + weighed(want)
    theirs = gradients(model, total)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=limit, rtol=1e-4, msg=name)
    assert max(gradient.abs().max() for gradient in theirs.values()) > 1e-2


@pytest.fixture(params=["sdpa", "eager", SPANS])
def attention(request):
    """The forms in which the torch backend computes attention; put back to SDPA behind it."""
    yield request.param
    for name in FAMILIES:
        loaded(name).model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("kind", ["pairs", "samples"])
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_is_plain(name, kind, pictures, attention):
    model, pad = loaded(name).model, loaded(name).tokenizer.pad_token_id
    some = examples(name, pictures, kind)
    ragged = attention == SPANS
    packer = Packer(model, pad, 1500, ragged)
    batches = packer.batches(some)
    assert len(batches) < len(some)  # otherwise nothing shares a row or a batch
    branched = {bool(row[-1].prefix_stop) for batch in batches for row in batch.spans}
    assert branched == {kind == "pairs"}
    compared(model, some, packer, attention)


@pytest.mark.parametrize("name", FAMILIES)
def test_pairs_cost_their_prefix_once(name, pictures):
    some = examples(name, pictures, "pairs")
    for example in some:
        tree = Tree.of([example], chats.positions(loaded(name).model))
        won, lost = (reply.encoding.ids for reply in example.replies)
        prompt = example.replies[0].spans[0][0]
        assert tree.lengths[0] >= prompt and sum(tree.lengths) == len(tree.ids)
        assert len(tree.ids) <= len(won) + len(lost) - prompt
        assert tree.unshared == len(won) + len(lost)
        # Each token has the position it has by itself.
        prefix = tree.lengths[0]
        alone = chats.positions(loaded(name).model)(example.replies[1].encoding)
        torch.testing.assert_close(tree.positions[..., -tree.lengths[2] :], alone[..., prefix:])


def test_replies_may_be_equal_or_begin_alike(pictures):
    """What replies share beyond the question is shared too; identical ones leave no branch."""
    model = loaded("llava").model
    example = examples("llava", pictures, "pairs", 1)[0]
    twins = Example("twins", (example.replies[0], example.replies[0]))
    tree = Tree.of([twins], chats.positions(model))
    assert tree.lengths == (len(example.replies[0].encoding.ids),)
    compared(model, [twins, example], Packer(model, 0, 2000, ragged=True))


@pytest.mark.parametrize("kind", ["pairs", "samples"])
@pytest.mark.parametrize("name", FAMILIES)
def test_samples_of_a_picture_cost_it_once(name, kind, pictures, attention):
    model, pad = loaded(name).model, loaded(name).tokenizer.pad_token_id
    store_, ids = pictures
    rows = pair_rows(ids[:1]) if kind == "pairs" else sample_rows(ids[:1], 12)[1::3]
    if kind == "pairs":
        asked = "What is the largest of all the values in this chart? "
        rows = [row | {"prompt": [{"role": "user", "text": asked * 3}]} for row in rows]
    # A second pair has the same winner.
    again = {**rows[1], "key": "again"} | ({"rejected": "None."} if kind == "pairs" else {})
    encoder = Encoder(loaded(name).processor, store_, 4096, 64)
    encode = encoder.pair if kind == "pairs" else encoder.sample
    some, dropped = encode_all([*rows, again, *examples_of_others(rows, ids)], encode)
    assert not dropped
    packer = Packer(model, pad, 4000, attention == SPANS)
    trees = packer.trees(some)
    assert [len(tree.samples) for tree in trees] == [len(rows) + 1, 1]
    shared, _ = trees
    opening = some[0].replies[0].encoding.opening
    assert shared.lengths[0] >= opening > 0
    replies = {tuple(reply.encoding.ids) for one in some[:-1] for reply in one.replies}
    assert len(shared.lengths) == 1 + len(replies) < 1 + shared.replies
    assert len(shared.ids) < shared.unshared - opening * (len(replies) - 1)
    compared(model, some, packer, attention, batches=packer.packed(trees))
    # Room for some of them only: none is lost, none is cut.
    tight = Packer(model, pad, len(shared.ids) * 2 // 3).trees(some)
    assert sorted(key for tree in tight for key in tree.keys) == sorted(one.key for one in some)
    assert len(tight) > 2 and all(len(tree.ids) <= len(shared.ids) * 2 // 3 for tree in tight[:-1])


def test_pairs_that_share_more_with_themselves_stay_apart(pictures):
    """One tree would part winner and loser where the questions part."""
    store_, ids = pictures
    encoder = Encoder(loaded("llava").processor, store_, 4096, 64)
    rows = pair_rows(ids[:1])
    asked = "Look at the chart. " * 20
    long = [
        row | {"prompt": [{"role": "user", "text": f"{n}. {asked}"}]} for n, row in enumerate(rows)
    ]
    some, _ = encode_all([*long[:2], long[0] | {"key": "again"}], encoder.pair)
    trees = Packer(loaded("llava").model, 0, 4000).trees(some)
    assert [len(tree.samples) for tree in trees] == [2, 1]


def examples_of_others(rows, ids):
    """The last row once more, of another picture."""
    return [{**rows[-1], "key": "other", "pictures": [ids[1]]}]


def test_a_branch_never_sees_the_other(pictures):
    """Another loser changes no log-probability of the winner, and the mask says so."""
    model = loaded("llava").model
    first, second = examples("llava", pictures, "pairs", 2)[:2]
    packer = Packer(model, 0, 2000, ragged=True)
    batch = packer.batches([first, second])[0]
    broken = batch.inputs["input_ids"].clone()
    losers = batch.segments[0] == 2
    assert losers.sum() > 5
    broken[0, losers] = 7
    with torch.no_grad():
        before = token_logps(model, batch)
        batch.inputs["input_ids"] = broken
        after = token_logps(model, batch)
    others = batch.owners != batch.owners[losers[batch.places]].unique().item()
    assert torch.equal(before[others], after[others]) and not torch.equal(before, after)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_form_of_attention_says_the_same(data):
    """Each against the definition, token by token."""
    lengths = st.lists(st.integers(0, 5), min_size=0, max_size=3)
    trees = st.lists(st.tuples(st.integers(1, 6), lengths), min_size=1, max_size=3)
    rows = [
        [bare(prefix, branches) for prefix, branches in row]
        for row in data.draw(st.lists(trees, min_size=1, max_size=3))
    ]
    batch = collate(rows, 0, data.draw(st.sampled_from([1, 8])))
    dense = attention_mask(batch, "dense")
    for number, row in enumerate(rows):
        who = [
            (at, branch)
            for at, tree in enumerate(row)
            for branch, n in enumerate(tree.lengths)
            for _ in range(n)
        ]
        for query in range(batch.width):
            for key in range(batch.width):
                if query >= len(who) or key >= len(who):
                    want = key <= query and query >= len(who) and key >= len(who)
                else:
                    (tree, branch), (theirs, other) = who[query], who[key]
                    want = key <= query and tree == theirs and other in (0, branch)
                assert dense[number, 0, query, key].item() == want
    shape = (len(rows), None, batch.width, batch.width)
    assert torch.equal(create_mask(attention_mask(batch, "flex").mask_mod, *shape, "cpu"), dense)
    q, (k, v) = (
        torch.randn(len(rows), 4, batch.width, 8),
        torch.randn(2, len(rows), 2, batch.width, 8),
    )
    spans = attention_mask(batch, "spans")
    got = span_attention(torch.nn.Identity(), q, k, v, None, spans=spans)[0].transpose(1, 2)
    k, v = (each.repeat_interleave(2, dim=1) for each in (k, v))
    want = scaled_dot_product_attention(q, k, v, attn_mask=dense)
    added = scaled_dot_product_attention(q, k, v, attn_mask=additive(dense, q.dtype))
    torch.testing.assert_close(added, want)
    real = (batch.segments >= 0)[:, None, :, None]
    torch.testing.assert_close(got, want * real)
    if any(span.prefix_stop for row in spans for span in row):
        with pytest.raises(ValueError, match="branches"):
            attention_mask(batch, "varlen")
    else:
        ragged = attention_mask(batch, "varlen")
        bounds = ragged.bounds.tolist()
        sizes = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
        rectangles = torch.block_diag(*(torch.ones(size, size).tril() for size in sizes))
        assert torch.equal(torch.block_diag(*dense[:, 0].float()), rectangles)
        assert ragged.longest == max(sizes) and bounds[-1] == batch.segments.numel()


def test_flex_attention_takes_the_block_mask():
    """Forward only: FlexAttention has no backward pass on a CPU."""
    rows = [[bare(70, [40, 90]), bare(50, [])], [bare(150, [])]]
    batch = collate(rows, 0, 128)
    assert batch.width == 256
    q, k, v = torch.randn(3, 2, 2, 256, 16).unbind()
    got = flex_attention(q, k, v, block_mask=attention_mask(batch, "flex"))
    want = scaled_dot_product_attention(q, k, v, attn_mask=attention_mask(batch, "dense"))
    torch.testing.assert_close(got, want)


def bare(prefix: int, branches: list[int]) -> Tree:
    """A tree of nothing but lengths."""
    lengths = (prefix, *branches)
    n = sum(lengths)
    return Tree((), [1] * n, {}, (), torch.arange(n), lengths, [], [], [], 1, n)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40),
    budget=st.integers(1, 1200),
    ranks=st.integers(1, 5),
    ragged=st.booleans(),
)
def test_a_plan_holds_every_tree_once(lengths, budget, ranks, ragged):
    costs = [n * n + 50 * n for n in lengths]
    planned = plan(lengths, costs, budget, ranks, ragged)
    assert len(planned) == ranks and len({len(batches) for batches in planned}) == 1
    assert planned == plan(lengths, costs, budget, ranks, ragged)
    seen = [i for batches in planned for rows in batches for row in rows for i in row]
    assert sorted(seen) == list(range(len(lengths)))
    for batches in planned:
        for rows in batches:
            widths = [sum(lengths[i] for i in row) for row in rows]
            size = len(rows) * max(widths, default=0)
            assert size <= budget or sum(map(len, rows)) == 1
            assert len(rows) <= 1 or not ragged
    spent = [sum(costs[i] for rows in b for row in rows for i in row) for b in planned]
    # No rank exceeds the mean by more than the dearest tree, the bound of this greedy rule.
    assert max(spent) <= sum(spent) / ranks + max(costs)


def test_packing_wastes_little():
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.rand(400, generator=generator) ** 2 * 900 + 100).int().tolist()
    for ragged, least in ((True, 0.97), (False, 0.9)):
        cut = pack(lengths, 8192, ragged)
        places = sum(max(sum(lengths[i] for i in row) for row in rows) * len(rows) for rows in cut)
        assert sum(lengths) / places > least


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_are_one(ranks, pictures):
    """Shares of the loss and gradients of all ranks add up to those of one; some rank idles."""
    model = loaded("llava-next").model
    some = examples("llava-next", pictures, "pairs", 4)
    whole = Packer(model, 0, 4000)
    one = sum(weighed_by_owner(model, batch) for batch in whole.batches(some))
    want = gradients(model, one)
    parts = [whole.batches(some[: ranks + 1], rank, ranks) for rank in range(ranks)]
    parts[0] += whole.batches(some[ranks + 1 :]) if some[ranks + 1 :] else []
    total = sum(weighed_by_owner(model, batch) for part in parts for batch in part)
    for name, gradient in gradients(model, total).items():
        torch.testing.assert_close(gradient, want[name], atol=1e-5, rtol=1e-4)
    idle = whole.batches(some[:1], 1, 2)
    assert [batch.keys for batch in idle] == [()] and idle[0].replies == 0
    nothing = gradients(model, token_logps(model, idle[0]).sum())
    assert nothing and all(not gradient.any() for gradient in nothing.values())


def weighed_by_owner(model, batch) -> torch.Tensor:
    logps = token_logps(model, batch)
    return sum(weighed(logps[batch.owners == number]) for number in range(batch.replies))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_cost_counts_what_torch_counts(name, frozen, pictures):
    """Against the operations torch itself counts in a step, forward and backward."""
    model = models.load(family(name), device="cpu", dtype="float32").model
    # Attention written out as products, which the counter sees on every device.
    model.set_attn_implementation("eager")
    if frozen:
        models.freeze_vision(model)
    packer = Packer(model, 0, 4000)
    tree = packer.tree(examples(name, pictures, "pairs", 6)[5])
    batch = packer.alone(tree)
    with FlopCounterMode(display=False) as counter:
        share, _ = Supervised().share(token_logps(model, batch), batch, Totals.of([batch]))
        share.backward()
    cost, width = packer.cost, batch.width
    # It takes a mask for nothing and multiplies all pairs of tokens.
    want = cost(tree) + cost.pair * (width**2 - tree.pairs)
    # Left over: rotary angles, the class embedding's place; and what no gradient goes through:
    # the tower's first patches, the projector's first inputs, the last of two layers in LLaVA's.
    limit = 0.01 if frozen else 0.05
    assert want == pytest.approx(counter.get_total_flops(), rel=limit)


def test_cost_of_a_picture_that_windows_cut():
    """Qwen's layers see windows of 8 × 8 patches; those at the edge are smaller."""
    cost = replace(Packer(loaded("qwen2.5-vl").model, 0, 10).cost, patch=0.0, look=1.0, window=8)
    shown = {"pixel_values": torch.zeros(0), "image_grid_thw": torch.tensor([[1, 20, 12]])}
    windows = [rows * columns for rows in (8, 8, 4) for columns in (8, 4)]
    whole, cut = (20 * 12) ** 2, sum(patches**2 for patches in windows)
    assert replace(cost, whole=1, windowed=3)._seen(shown) == whole + 3 * cut


def test_cost_is_the_same_without_weights(pictures):
    """What tensor parallel ranks count on the outline is what a loaded model's count is."""
    for name in FAMILIES:
        outline = models.outline(family(name))
        models.freeze_vision(outline)
        whole = models.load(family(name), device="cpu", dtype="float32").model
        models.freeze_vision(whole)
        assert Packer(outline, 0, 10).cost == Packer(whole, 0, 10).cost


def test_families_with_other_attention_are_refused():
    model = loaded("llava").model
    text = model.config.text_config
    text.sliding_window = 64
    try:
        with pytest.raises(UserError, match="window of 64"):
            models.check_packable(model)
    finally:
        del text.sliding_window
    kind, model.config.model_type = model.config.model_type, "gemma3"
    try:
        with pytest.raises(UserError, match="gemma3.*llava_next"):
            models.check_packable(model)
    finally:
        model.config.model_type = kind


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("tokens", [4096, 12288])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llava"])
def test_long_sequences_with_many_tiles(name, tokens, tmp_path):
    """Pictures of several tiles and answers that fill 4k to 12k tokens."""
    folder = save_family(name, tmp_path / "model")
    model = models.load(folder, "cpu", "float32")
    images = [picture(n, 300 + 90 * n, 340 - 60 * n) for n in range(3)]
    shown = [chats.encode_picture(model.processor, image) for image in images]
    prompt = chats.encode(model.processor, (Message("user", "Read A. " * 40),), shown)
    room = tokens - len(prompt.ids)
    generator = torch.Generator().manual_seed(tokens)

    def reply(length: int) -> Reply:
        ids = torch.randint(100, 400, (length,), generator=generator).tolist()
        marks = {k: [*v, *[0] * length] for k, v in prompt.marks.items()}
        whole = chats.Encoding(prompt.ids + ids, marks, prompt.pictures)
        return Reply(whole, ((len(prompt.ids), len(whole.ids)),))

    pair = Example("long", (reply(room), reply(room // 3)))
    small = Example("small", (reply(50), reply(90)))
    # A dense mask of 16k × 16k is what `spans` is there to avoid.
    for attention in ("sdpa", SPANS) if tokens < 8192 else (SPANS,):
        compared(model.model, [pair, small], Packer(model.model, 0, 2 * tokens, True), attention)
