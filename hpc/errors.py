"""The two kinds of failure the toolkit speaks of, and how they are told."""

from __future__ import annotations

import re

_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """Something the user can mend; shown as one line, exit status 2, no traceback.

    The message says what is wrong, where, and what to do about it.
    """


class RecordError(Exception):
    """One input could not be processed; its reason is stored beside the shard's rows.

    The stage goes on. Whether it succeeds is decided by its limit on errors.
    """


def one_line(error: BaseException) -> str:
    """What an exception says, for the end of a message: on one line, cut after 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control and bidirectional marks become U+FFFD.

    Lines and tabs stay. Whatever comes from data, models or logs goes through this.
    """
    return _STEERING.sub("\ufffd", text)
