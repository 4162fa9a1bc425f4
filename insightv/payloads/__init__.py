"""What each stage of the chain does when it runs; `insightv.chain` says when.

Every function takes its configuration and returns the payload: ``load`` of a map stage, ``run``
of a job. Models and their libraries are imported inside, by the process that needs them.
"""

from insightv.payloads.evaluation import (
    answer,
    benchmark,
    benchmark_questions,
    benchmark_scores,
    choose,
    decide,
    direct,
    report,
    results,
    validate,
)
from insightv.payloads.source import Source
from insightv.payloads.thinking import generate, judge, questions, score
from insightv.payloads.training import ROLES, MakeSet, dpo, pairs, reference, sample_set, sft

__all__ = [
    "MakeSet",
    "ROLES",
    "Source",
    "answer",
    "benchmark",
    "benchmark_questions",
    "benchmark_scores",
    "choose",
    "decide",
    "direct",
    "dpo",
    "generate",
    "judge",
    "pairs",
    "questions",
    "reference",
    "report",
    "results",
    "sample_set",
    "score",
    "sft",
    "validate",
]
