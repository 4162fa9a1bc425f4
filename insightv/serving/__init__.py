"""Both agents of a run behind one OpenAI-compatible endpoint.

A model name for each way of answering: ``direct`` and ``base-reasoning`` are the base, asked for
the answer or told to reason first; ``single-agent`` reasons and answers in one turn;
``summary-only`` is the summary agent alone, ``multi-agent`` the pair. The reasoning comes as
``reasoning_content``, as chat clients know it from reasoning models, then the answer as
``content``; streamed, that of the pair step by step.
"""

from insightv.serving.agents import MODELS, Agents
from insightv.serving.asking import LentPictures
from insightv.serving.endpoint import application

__all__ = ["MODELS", "Agents", "LentPictures", "application"]
