"""Question sets of one's own: public or private data, mapped to questions by YAML."""

from insightv.questions.duplicates import HeldOut
from insightv.questions.mapping import SetConfig, SplitConfig, TurnsConfig, load_set
from insightv.questions.reading import Asked, Dropped, Place, count_questions, read_questions

__all__ = [
    "Asked",
    "Dropped",
    "HeldOut",
    "Place",
    "SetConfig",
    "SplitConfig",
    "TurnsConfig",
    "count_questions",
    "load_set",
    "read_questions",
]
