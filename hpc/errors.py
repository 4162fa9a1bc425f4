"""The two kinds of failure the toolkit speaks of, and a library's failure in one line."""


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
