"""Insight-V: visual reasoning paths, their assessment, and the two agents trained on them."""

__version__ = "0.1.0"
