"""A real Slurm for the tests; ``python -m tests.cluster.testbed --help`` for people."""

from .cluster import Testbed, obstacle
from .layout import ACCOUNT, USER, VARIANTS, Settings, TestbedError
from .site import Site, answers

__all__ = [
    "ACCOUNT",
    "USER",
    "VARIANTS",
    "Settings",
    "Site",
    "Testbed",
    "TestbedError",
    "answers",
    "obstacle",
]
