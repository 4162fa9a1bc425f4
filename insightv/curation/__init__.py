"""From questions, paths, verdicts and scores to training sets and preference pairs.

Everything streams: a source is a function that begins a fresh pass over the joined groups,
and each set is a generator. Where a set is capped or drawn from, a first pass keeps 8 bytes
per candidate (a draw by seed and key), a second yields those whose draw is small enough. So
the smaller of two sizes with one seed is a subset of the larger, and memory does not depend
on the length of the texts. Samples come in the order of their questions; training shuffles.

Every generator fills the ``Counter`` it is given: what came in, what was dropped and why,
what was kept.
"""

from insightv.curation.controls import (
    direct_set,
    multi_turn_set,
    parse_direct,
    render_direct,
    union_set,
)
from insightv.curation.groups import Group, Groups, PlainQuestions
from insightv.curation.pairs import PairConfig, preference_pairs
from insightv.curation.reasoning import ReasoningSetConfig, plain_samples, reasoning_set
from insightv.curation.summary import SummarySetConfig, summary_set

__all__ = [
    "Group",
    "Groups",
    "PairConfig",
    "PlainQuestions",
    "ReasoningSetConfig",
    "SummarySetConfig",
    "direct_set",
    "multi_turn_set",
    "parse_direct",
    "plain_samples",
    "preference_pairs",
    "reasoning_set",
    "render_direct",
    "summary_set",
    "union_set",
]
