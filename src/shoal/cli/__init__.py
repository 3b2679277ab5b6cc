"""The command `shoal`. What a command needs is imported when it runs, so that `shoal --help` is immediate."""

from __future__ import annotations

import os
import re
import sys

USAGE, FAILURE, INTERRUPTED = 2, 1, 130


def main(arguments: list[str] | None = None) -> int:
    """Run the command line (`sys.argv` if None) and return the exit status.

    0 is success, 1 a failure, 2 a command line that makes no sense, 130 an interruption. What a user can put right is
    said in one line on standard error; only a defect of shoal itself shows a traceback.
    """
    import typer

    from shoal.cli.app import app

    # Typer names only leaves of its errors; every mistake on the command line derives from this one's parent.
    usage_error: type[Exception] = typer.BadParameter.__mro__[1]
    try:
        status = typer.main.get_command(app).main(args=arguments, prog_name="shoal", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except usage_error as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "shoal"
        _say(f"{error.format_message().replace(': Value error, ', ': ')} (see `{command} --help`)")  # type: ignore[attr-defined]
        return USAGE
    except typer.Exit as ending:
        return ending.exit_code
    except (typer.Abort, KeyboardInterrupt):
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away, as in `shoal models | head -1`. Nothing may be written at interpreter exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except Exception as error:
        message = _for_user(error)
        if message is None:
            raise
        _say(message)
        return USAGE if _is_usage(error) else FAILURE


def _for_user(error: Exception) -> str | None:
    """What to say of an error that the user can do something about; None of a defect."""
    from shoal.checkpoint.builtin import PullError
    from shoal.checkpoint.errors import CheckpointError, ModelNotFound
    from shoal.cli.errors import CommandError
    from shoal.config import ConfigError
    from shoal.engine.launch import LaunchError
    from shoal.plan.hardware_file import CatalogueError
    from shoal.serve.engine_client import EngineLost, EngineStartError
    from shoal.serve.journal_store import StoreError
    from shoal.serve.server import ListenError
    from shoal.serve.tenants import KeyFileError

    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, EngineStartError | LaunchError):
        return _with_flags(str(error))
    told = (CommandError, ConfigError, CheckpointError, ModelNotFound, PullError, EngineLost, ListenError, StoreError)
    return str(error) if isinstance(error, (*told, KeyFileError, CatalogueError)) else None


def _is_usage(error: Exception) -> bool:
    from shoal.cli.errors import UsageError
    from shoal.plan.hardware_file import CatalogueError

    return isinstance(error, UsageError | CatalogueError)


def _with_flags(message: str) -> str:
    """The engine speaks of its settings by their keys; on the command line they have the field's names."""
    from shoal.cli.app import ENGINE_FLAGS

    for flag, key in ENGINE_FLAGS.items():
        if "_" in key:  # others are words of the language too
            message = re.sub(rf"\b{key}\b", f"--{flag.replace('_', '-')}", message)
    return message


def _say(message: str) -> None:
    import typer

    typer.secho("error: ", fg=typer.colors.RED, bold=True, err=True, nl=False)
    typer.echo(message, err=True)
