"""What the tasks here take from lmms-eval as it is, and how they ask instead."""

import re

from lmms_eval.tasks.chartqa.utils import (  # noqa: F401
    chartqa_doc_to_visual,
    chartqa_process_results,
)
from lmms_eval.tasks.mmmu.utils import (  # noqa: F401
    mmmu_aggregate_results,
    mmmu_doc_to_visual,
    mmmu_process_results,
)


def plain_question(doc, lmms_eval_specific_kwargs=None):
    """The question alone: the embedded model knows its options in it, and no further demands."""
    return re.sub(r"\s*<image \d>\s*", "", doc["question"])
