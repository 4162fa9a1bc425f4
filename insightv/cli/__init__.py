"""The command ``insightv``: see ``insightv --help``.

Whatever a user can cause ends in one line on stderr and exit status 2. Heavy modules are
imported by the commands that need them, so that the others answer at once.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Any

import typer
from typer.core import TyperGroup

from hpc.disk import told
from hpc.errors import UserError, printable
from insightv.cli import (
    benchmarks,
    check,
    cluster,
    images,
    looking,
    models,
    payloads,
    questions,
    runs,
    serving,
    shards,
    training,
)

# Base of all usage errors; typer carries its own copy of click, whose name is private.
_UsageProblem: Any = typer.BadParameter.__mro__[2]
_INTERRUPTED = 130


class _InOrder(TyperGroup):
    """Lists commands in the order a run needs them."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return list(self.commands)


app = typer.Typer(
    name="insightv",
    cls=_InOrder,
    help="Train a vision-language model to reason: generate, assess, train, iterate.",
    epilog="Start with: insightv run configs/chain/quickstart.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    show_version: bool = typer.Option(False, "--version", help="Print the version and leave."),
) -> None:
    if show_version:
        print(f"insightv {version('insightv-hpc')}")
        raise typer.Exit


runs.add_to(app)
looking.add_to(app)
payloads.add_to(app)
cluster.add_to(app)
models.add_to(app)
benchmarks.add_to(app)
questions.add_to(app)
serving.add_to(app)
app.add_typer(shards.app, name="shards", rich_help_panel="Look")
app.add_typer(check.app, name="cluster", rich_help_panel="Look")
app.add_typer(images.app, name="image", rich_help_panel="Look")
app.add_typer(training.app, name="train", rich_help_panel="Single steps")
app.command("convert", rich_help_panel="Single steps")(training.convert)


def main() -> None:
    """Entry point; exits with the command's status."""
    sys.exit(_status())


def _status() -> int:
    try:
        status = app(prog_name="insightv", standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        return _say(str(error))
    except _UsageProblem as error:
        message = error.format_message()
        if key := _key_for(error):
            message = f"No such option: {error.option_name}; did you mean {key}?"
        # Without a message it was a group without a command, whose help has been shown.
        return _say(f"{message} (insightv --help lists commands)") if message else 2
    except typer.Abort:
        status = _INTERRUPTED
    except BrokenPipeError:
        _forget_output()  # the reader has left (`… | head`)
        return 0
    except OSError as error:
        problem = told(error, error.filename or "the disk", "cannot be read or written")
        if problem is None:
            raise
        if error.filename is None:  # it may have been the standard output
            _forget_output()
        return _say(str(problem))
    if status == _INTERRUPTED:  # typer turns Ctrl-C into this status
        print("insightv: interrupted; the same command goes on from here", file=sys.stderr)
    return status if isinstance(status, int) else 0


def _key_for(error: Any) -> str:
    """The ``key=value`` that an unknown option was meant for; empty where it is no key."""
    option = getattr(error, "option_name", "")
    command = error.ctx.command if error.ctx else None
    if not option or not command or "overrides" not in {item.name for item in command.params}:
        return ""
    from insightv.chainfile import leaves
    from insightv.config import ChainConfig
    from insightv.training.config import DPOConfig, SFTConfig

    kind = {"sft": SFTConfig, "dpo": DPOConfig}.get(command.name, ChainConfig)
    key = option.lstrip("-").replace("-", "_")
    if key not in dict(leaves(kind())):
        return ""
    words = dict(zip(sys.argv, [*sys.argv[1:], ""], strict=True))
    behind = [word.partition("=")[2] for word in sys.argv if word.startswith(f"{option}=")]
    value = behind[0] if behind else words.get(option, "")
    return f"{key}={value if value and value[0] != '-' else '…'}"


def _forget_output() -> None:
    """Keeps Python from complaining when it flushes the standard output at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(message: str) -> int:
    if _heard():
        print("insightv:", printable(" ".join(message.split())), file=sys.stderr)
    return 2


def _heard() -> bool:
    """Whether this process speaks: of those on a node that have not found each other, the first.

    Ranks that have found each other have agreed on who tells what went wrong.
    """
    distributed: Any = sys.modules.get("torch.distributed")
    joined = getattr(distributed, "is_initialized", bool)()
    return joined or os.environ.get("LOCAL_RANK", "0") == "0"
