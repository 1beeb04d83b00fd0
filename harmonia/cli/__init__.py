"""Command line: the only package that prints and exits. Each command is a module.

A command parses its arguments, calls the implementation elsewhere, and prints the result.
"""

import difflib
import errno
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from typing import BinaryIO

import click
from click.shell_completion import CompletionItem, FishComplete, add_completion_class

from harmonia import __version__
from harmonia.config.settings import Settings
from harmonia.errors import ConfigError, HarmoniaError, StoreUnavailableError
from harmonia.process import log_setup

EXIT_CONFIG = 2
"""Exit status of an invalid setting or argument. Any other failure is 1."""
EXIT_FOUND = 3
"""Exit status of a check that ran and found errors."""

EXIT_INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT, as shells report it."""

PATH = click.Path(readable=False)
"""Argument type of a path: shells complete it. The command itself checks that the path exists and what it is."""

bind_option = click.option(
    "--bind",
    metavar="ADDRESS",
    help='Address to listen on, like ":8080" or "127.0.0.1:8080". Default: the setting `bind` (port 5000).',
)
"""The option of `serve`, of `demo`, and of `harmonia` without a command."""

# Names of this option in other servers.
_LIKE_BIND = re.compile("-[abHlp]|--(bind-)?addr(ess)?|--host(name)?|--http|--interface|--listen(-addr(ess)?)?|--port")

_CHUNK_BYTES = 1 << 18
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

_SECTIONS = {
    "Serve": ("serve", "check-config", "keygen", "token", "demo"),
    "Fill other caches": ("push", "watch"),
    "Maintain a cache": ("doctor", "why", "verify", "warm", "cache", "mirror", "top", "roots"),
    "Inspect store paths and NARs": ("ls", "cat", "nar"),
}
_HIDDEN = ("man",)

_EPILOG = """\
\b
Exit status:
  0  success; `doctor` found at most warnings
  1  failure, with one line on stderr
  2  invalid setting or argument
  3  `doctor` found errors, `verify` found bad paths, `mirror verify` found wrong objects,
     `token check` got a token that is not valid,
     or `why` found no source of the path
  130  interrupted by Ctrl-C

\b
Environment:
  CONFIG_FILE  settings file, if --config is not given
  NETRC        file with tokens for `doctor`, `why`, `push`, `watch` and `top` (default: /etc/nix/netrc, then ~/.netrc)
  NO_COLOR     if set, no colours

\b
Shell completion (add the line to your shell's start-up file):
  bash  eval "$(_HARMONIA_COMPLETE=bash_source harmonia)"
  zsh   eval "$(_HARMONIA_COMPLETE=zsh_source harmonia)"
  fish  _HARMONIA_COMPLETE=fish_source harmonia | source

\b
More:
  harmonia COMMAND --help
  harmonia man >harmonia.1  writes the manual page
"""


@add_completion_class
class _Fish(FishComplete):
    """Completion for fish: each candidate is a line `TYPE,VALUE`, a tab and its description.

    This class replaces both Click's script and Click's lines, because they differ between versions of Click. In 8.4.0
    and 8.4.1 the two do not match, so fish completes nothing. In other versions a description ends at its first comma.
    """

    source_template = """\
function %(complete_func)s
    for line in (env %(complete_var)s=fish_complete COMP_WORDS=(commandline -cp) \
COMP_CWORD=(commandline -t) %(prog_name)s)
        set -l candidate (string split --max 1 "," $line)
        switch $candidate[1]
            case dir
                __fish_complete_directories $candidate[2]
            case file
                __fish_complete_path $candidate[2]
            case plain
                echo $candidate[2]
        end
    end
end

complete --no-files --command %(prog_name)s --arguments "(%(complete_func)s)"
"""

    def format_completion(self, item: CompletionItem) -> str:
        description = " ".join((item.help or "").split())
        return f"{item.type},{item.value}\t{description}" if description else f"{item.type},{item.value}"


class _Commands(click.Group):
    """Command group that imports a command's module on first use, because most commands do not need the web server."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        return [*(name for names in _SECTIONS.values() for name in names), *_HIDDEN]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return _command(cmd_name) if cmd_name in self.list_commands(ctx) else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        near = difflib.get_close_matches(args[0], self.list_commands(ctx), 1)
        if near and near[0] != args[0] and not ctx.resilient_parsing:
            raise click.UsageError(f"No such command {args[0]!r}. Did you mean {near[0]!r}?", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in _SECTIONS.items():
            commands = [(name, self.get_command(ctx, name)) for name in names]
            with formatter.section(title):
                formatter.write_dl([(name, command.get_short_help_str(90)) for name, command in commands if command])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with _exit_on_error():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        with _exit_on_error():
            return super().invoke(ctx)


@cache
def _command(name: str) -> click.Command:
    command: click.Command = import_module(f"harmonia.cli.{name.replace('-', '_')}").command
    command.params.append(_CONFIG_BEHIND)
    return command


def _reject_empty(context: click.Context, parameter: click.Parameter, file: str | None) -> str | None:
    if file == "":  # perhaps an unset shell variable: do not fall back to the defaults silently
        raise click.BadParameter("the file name is empty; give one, or omit --config", context, parameter)
    return file


def _take_config(context: click.Context, parameter: click.Parameter, file: str | None) -> None:
    context.obj = _reject_empty(context, parameter, file) or context.obj


_CONFIG_BEHIND = click.Option(["--config"], type=PATH, hidden=True, expose_value=False, callback=_take_config)
"""--config after the command name. Hidden, because the help of `harmonia` shows the option."""


@contextmanager
def _exit_on_error() -> Iterator[None]:
    """Print an error as one line on stderr, and exit with its status."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        _fail(_explain_usage(error), EXIT_CONFIG)
    except ConfigError as error:
        _fail(str(error), EXIT_CONFIG)
    except StoreUnavailableError as error:
        _fail(f"{error}; use --config if the store is elsewhere", 1)
    except HarmoniaError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted", EXIT_INTERRUPTED)
    except OSError as error:
        if error.filename is not None:
            _fail(f"{os.fsdecode(error.filename)}: {error.strerror}", 1)
        if error.errno not in _UNWRITABLE:
            raise
        with suppress(OSError):
            sys.stdout.close()  # otherwise Python writes the rest again at exit
        _fail(f"cannot write: {error.strerror}", 1)


@contextmanager
def exit_at_once() -> Iterator[None]:
    """Run a command that uploads, and end this process without the usual clean-up of the interpreter.

    That would wait for threads that still compress a large NAR. Also, a thread of obstore may still release the last
    results. It aborts the process if the interpreter is ending then (PyO3/pyo3-async-runtimes#40), so 1 of 120 commands
    that had succeeded ended with SIGABRT.
    """
    status: object = 0
    try:
        with _exit_on_error():
            yield
    except SystemExit as end:
        status = end.code
    os._exit(status if isinstance(status, int) else 0)  # click.echo has flushed all output


def _explain_usage(error: click.UsageError) -> str:
    """Return the error and its remedy. Suggests the right option for an unknown one."""
    path = error.ctx.command_path if error.ctx else "harmonia"
    what = error.format_message().rstrip(".")
    if isinstance(error, click.NoSuchOption):
        name = error.option_name
        key = name.lstrip("-").replace("-", "_")
        near = " or ".join(error.possibilities or ())
        what = f"No such option {name!r}"
        if _LIKE_BIND.fullmatch(name) and path in ("harmonia", "harmonia serve"):
            return f"{what}; use --bind ADDRESS, for example --bind :8080"
        if key in Settings.__struct_fields__:
            return f"{what}; {key} is a setting: put it into the --config file (docs/reference/configuration.md)"
        what += f"; did you mean {near}?" if near else ""
    return f"{what} See {path} --help" if what.endswith("?") else f"{what}; see {path} --help"


def _fail(what: str, status: int) -> None:
    click.echo(f"harmonia: {' '.join(what.split())}", err=True)
    sys.exit(status)


def chunks(file: BinaryIO) -> Iterator[bytes]:
    """Yield the file's content in pieces. Raises OSError with the file's name if it cannot be read."""
    while True:
        try:
            chunk = file.read(_CHUNK_BYTES)
        except OSError as error:
            error.filename = file.name
            raise
        if not chunk:
            return
        yield chunk


def end_on_sigpipe() -> None:
    """Let SIGPIPE end this process silently when the reader of the pipe exits, like other Unix programs."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


@click.command(
    cls=_Commands,
    invoke_without_command=True,
    subcommand_metavar="[COMMAND] [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_EPILOG,
)
@click.version_option(__version__, prog_name="harmonia", message="%(prog)s %(version)s")
@click.option(
    "--config",
    "config_file",
    type=PATH,
    metavar="FILE",
    callback=_reject_empty,
    help="Settings file (TOML). Default: $CONFIG_FILE, then /etc/harmonia/harmonia.toml, then built-in defaults.",
)
@bind_option
@click.pass_context
def main(context: click.Context, config_file: str | None, bind: str | None) -> None:
    """Serve this machine's Nix store over HTTP as a binary cache. Without a command, runs `serve`."""
    log_setup.to_stderr()
    context.obj = config_file
    if context.invoked_subcommand is None:
        serve = main.get_command(context, "serve")
        assert serve is not None  # noqa: S101 (_SECTIONS has it)
        context.invoke(serve, bind=bind)
    elif context.invoked_subcommand in ("serve", "demo"):
        context.default_map = {context.invoked_subcommand: {"bind": bind}}
    elif bind is not None:
        raise click.UsageError(f"--bind applies to serve and demo, not to {context.invoked_subcommand}; omit it")
