"""`orchestrate`: the command line, its exit codes, and what a person sees when something is wrong.

Imports neither torch nor ray nor mlflow nor numpy: `--help` and `presets` answer at once.
"""

from __future__ import annotations

import errno
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from orchestrator.console import err, open_streams, silence
from orchestrator.verbs import adapters, cluster, finders, records, report, sweeps, text, training
from orchestrator.verbs.options import sentence
from trainers.errors import Superseded, TrainingFailed, UserError

DONE, INTERNAL, BAD_INPUT, FAILED, STOPPED = 0, 1, 2, 3, 75
INTERRUPTED = 130  # Ctrl-C where nothing needs to be continued

# The disk, the permissions and the limits of this machine: the person's to mend, so no traceback.
SURROUNDINGS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE,
    errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.EIO, errno.ENOMEM,
}  # fmt: skip
EXTRAS = ("ray", "mlflow", "torch", "numpy", "safetensors", "matplotlib", "psutil")

app = typer.Typer(
    name="orchestrate",
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
VERBS: tuple[Callable[..., int], ...] = (
    training.train,
    training.plan,
    training.show,
    training.presets,
    sweeps.tune,
    report.report,
    finders.find_lr,
    finders.find_batch,
    finders.bench,
    text.generate,
    text.evaluate,
    adapters.merge,
    records.runs,
    records.status,
    cluster.submit,
)
for verb in VERBS:
    app.command()(verb)


def _version(wanted: bool) -> None:
    if wanted:
        from orchestrator.version import version

        sys.stdout.write(f"orchestrate {version()}\n")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def orchestrate(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Train small language models on your own text, and never lose a step.

    [bold]Begin[/bold]

      orchestrate train fundamentallm/small --name first-run
      orchestrate generate first-run --prompt "The "

    Every verb has its own --help with examples.
    """
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code. Nothing a person types gives a traceback."""
    open_streams()
    typed = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _invoke(typed)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has what it wanted
        silence(1)
        return DONE
    except KeyboardInterrupt as stop:
        _say("stopped", "by Ctrl-C." if str(stop) in ("", "SIGINT") else f"by {stop}.")
        return STOPPED if typed[:1] in (["train"], ["tune"]) and "--dry-run" not in typed else INTERRUPTED
    except UserError as error:
        _say("error", str(error))
        return BAD_INPUT
    except TrainingFailed as error:
        _say("training failed", str(error))
        return FAILED
    except Superseded as error:
        _say("stopped", f"a newer command has taken this run over. {error}")
        return STOPPED
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in EXTRAS:
            return _internal(error, typed)
        _say("error", f"this needs the package {error.name}, which is not installed: pip install {error.name}")
        return BAD_INPUT
    except OSError as error:
        if error.errno not in SURROUNDINGS:
            return _internal(error, typed)
        where = f"{error.filename}: " if error.filename else ""
        _say("error", f"{where}{error.strerror}.")
        return BAD_INPUT
    except Exception as error:
        return _internal(error, typed)


def _invoke(typed: list[str]) -> int:
    _refuse_undecodable(typed)
    command = typer.main.get_command(app)
    try:
        with command.make_context("orchestrate", list(typed)) as context:
            code = command.invoke(context)
    except typer.Exit as left:
        return left.exit_code
    except typer.TyperException as error:
        raise UserError(f"{sentence(error)}{_usage(typed)}") from None
    return code if isinstance(code, int) else DONE


def _refuse_undecodable(typed: list[str]) -> None:
    """Nothing that is written later (a configuration, a record, a text) could hold bytes that are no UTF-8."""
    for word in typed:
        try:
            word.encode()
        except UnicodeEncodeError:
            shown = word if len(word) <= 60 else word[:57] + "..."
            raise UserError(f"arguments must be UTF-8 text, got {shown!r}. Give a file of that name another.") from None


def _usage(typed: list[str]) -> str:
    verbs = [verb.__name__.replace("_", "-") for verb in VERBS]
    if typed and typed[0] in verbs:
        return f" `orchestrate {typed[0]} --help` shows how it is used."
    return f" The verbs: {', '.join(verbs)}."


def _say(kind: str, message: str) -> None:
    """One message on standard error; its own line breaks stay, whatever could drive a terminal does not."""
    from orchestrator.display import plain

    lines = "\n".join(plain(line) for line in message.splitlines())
    style = "bold red" if kind in ("error", "training failed", "internal error") else "bold yellow"
    try:
        err().print(Text.assemble((f"{kind}: ", style), lines), soft_wrap=True)
    except OSError:  # nobody reads, or the disk behind it is full: the exit code says it all
        silence(2)


def _internal(error: Exception, typed: list[str]) -> int:
    """A bug of ours: the traceback goes to a file, its name to the person."""
    log = _write_log("".join(traceback.format_exception(error)), typed)
    what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    _say("internal error", f"{what} (the details are in {log}; please report them).")
    return INTERNAL


def _write_log(details: str, typed: list[str]) -> Path:
    name = f"orchestrate-{time.strftime('%Y%m%d-%H%M%S')}-"
    with tempfile.NamedTemporaryFile("w", prefix=name, suffix=".log", delete=False, encoding="utf-8") as log:
        log.write(f"arguments: {typed!r}\npython: {sys.version}\n\n{details}")
    return Path(log.name)
