"""The commands of `srpc`, and what becomes of their errors."""

import math
import os
import sys
from errno import EBADF, ETIMEDOUT

import click

from srpc_client.cli import interrupts, show
from srpc_client.cli.access import Access
from srpc_client.cli.interrupts import TimeOver
from srpc_client.errors import AuthenticationError, CallTimeout, ConnectionLost, SrpcError, Unreachable, UntrustedServer
from srpc_client.text import plain

FAILED, USAGE, NO_ACCESS, INTERRUPTED = 1, 2, 3, 130


def _seconds(_context: click.Context, _parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and math.isnan(value):
        raise click.BadParameter("nan is no number of seconds")
    return value


pass_access = click.make_pass_decorator(Access)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-a", "--address", help="host, host:port, or unix:/path; this host's own daemon if not given.")
@click.option("-u", "--user", help="Who to log in as; your own account's name if not given.")
@click.option("--pin", "pins", multiple=True, help="The server's key, sha256:…; several are allowed.")
@click.option("--ca", help="Trust the server's certificate by this authority: a PEM file, or `system`.")
@click.option("--password-file", type=click.Path(), help="File whose first line is the password; - is standard input.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    callback=_seconds,
    help="Seconds that the command may take, from its start to its end.",
)
@click.version_option(package_name="srpc", prog_name="srpc")
@click.pass_context
def cli(
    context: click.Context,
    address: str | None,
    user: str | None,
    pins: tuple[str, ...],
    ca: str | None,
    password_file: str | None,
    timeout: float | None,
) -> None:
    """Call endpoints of this host or of another one.

    A server that is not on this host has to prove who it is: by a key that you give (--pin) or have trusted before
    (srpc pin --trust), or by an authority (--ca).
    """
    if pins and ca:
        raise click.UsageError("--pin and --ca are two ways to trust a server: give one")
    if timeout is not None:
        interrupts.bound(timeout)
    context.obj = Access(address, user, pins, ca, password_file, timeout)


@cli.command()
@click.argument("path")
@click.argument("data", required=False)
@click.option("--metadata", default="", help="Metadata for the handler, JSON by convention.")
@click.option("--raw", is_flag=True, help="Give the reply to a terminal as it is, escape sequences and all.")
@pass_access
def call(access: Access, path: str, data: str | None, metadata: str, raw: bool) -> None:
    """Call the endpoint at PATH with DATA; its reply goes to standard output as it is.

    A terminal gets it with everything escaped that it would obey, unless --raw is given.

    Without DATA, or with -, the payload is standard input (nothing, if that is a terminal).
    """
    if data is None or data == "-":
        if access.credential_file == "-":
            raise click.UsageError("standard input is either the password or the payload: give one of them otherwise")
        if sys.stdin is None:  # Python's word for a descriptor that was closed before it started
            raise SrpcError(EBADF, "standard input is closed: give the payload as DATA, or </dev/null for none")
        payload = b"" if data is None and sys.stdin.isatty() else sys.stdin.buffer.read()
    else:
        payload = os.fsencode(data)
    if sys.stdout is None:
        raise SrpcError(EBADF, "standard output is closed, and the reply would be lost: the call was not made")
    with access.dial() as connection:
        reply = connection.call(path, payload, os.fsencode(metadata))
    show.reply(reply, raw)


@cli.command()
@click.argument("path", default="/")
@click.option("-l", "--long", is_flag=True, help="Kind, mode, user, group and time of each.")
@as_json
@pass_access
def ls(access: Access, path: str, long: bool, as_json: bool) -> None:
    """List the names in the directory at PATH."""
    with access.dial() as connection:
        show.listing(connection.session, path, long, as_json)


@cli.command()
@click.argument("path", default="/")
@click.option("--depth", type=click.IntRange(min=1, max=show.DEPTH_MAX), default=16, show_default=True, help="How far down.")
@as_json
@pass_access
def tree(access: Access, path: str, depth: int, as_json: bool) -> None:
    """Draw the tree below PATH, as you may see it."""
    with access.dial() as connection:
        show.tree(connection.session, path, depth, as_json)


@cli.command()
@click.argument("path", default="/")
@as_json
@pass_access
def stat(access: Access, path: str, as_json: bool) -> None:
    """Describe the file or directory at PATH."""
    with access.dial() as connection:
        show.stat(connection.session.stat(path), as_json)


@cli.command()
@as_json
@pass_access
def whoami(access: Access, as_json: bool) -> None:
    """Log in, and say as whom, where, and how that was proved."""
    with access.dial() as connection:
        facts = {
            "user": connection.session.user,
            "server": str(connection.address),
            "pin": connection.pin or None,
            "mechanism": connection.session.mechanism,
        }
    show.facts(facts, as_json)


@cli.command()
@click.option("--trust", is_flag=True, help="Remember it as this server's key, in the place of any other.")
@as_json
@pass_access
def pin(access: Access, trust: bool, as_json: bool) -> None:
    """Print the pin of the server's key. Compare it with what the server's administrator tells you."""
    found, known = access.shown_pin(), access.known_pins()
    if trust and known != {found}:  # others that are known too are what it takes the place of
        access.trust(found)
    show.facts({"pin": found, "trusted": trust or found in known}, as_json, only="pin")
    if trust:
        click.echo(f"trusted from now on for {access.remote} ({access.known_hosts.path})", err=True)


def run() -> None:
    """Do what the command line says, and exit."""
    interrupts.catch()
    for stream in (sys.stdout, sys.stderr):  # what it can't write in its encoding it escapes
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        status = cli.main(standalone_mode=False) or 0
        if sys.stdout is not None:
            sys.stdout.flush()  # not at exit, where what goes wrong has no sentence
        interrupts.let_end()
    except BaseException as fault:
        interrupts.let_end()
        status = _explain(fault)
    interrupts.unbound()
    sys.exit(status)


def _explain(fault: BaseException) -> int:
    """Say what went wrong, in one sentence. Returns the exit status. Raises what is a fault of the command itself."""
    if isinstance(fault, click.Abort | KeyboardInterrupt):
        click.echo("srpc: given up", err=True)
        return INTERRUPTED
    if isinstance(fault, click.ClickException):
        fault.show()
        return fault.exit_code
    if isinstance(fault, TimeOver):
        return _complain(
            CallTimeout(ETIMEDOUT, "the time that --timeout gives was over before the command was done"), FAILED
        )
    if isinstance(fault, UntrustedServer | Unreachable | ConnectionLost | AuthenticationError):
        return _complain(fault, NO_ACCESS)
    if isinstance(fault, SrpcError):
        return _complain(fault, FAILED)
    if isinstance(fault, OSError):  # of our own streams: all others are SrpcErrors
        if not isinstance(fault, BrokenPipeError):  # else the reader of our output has gone, and wants to hear no more
            click.echo(f"srpc: standard input or output: {fault.strerror}", err=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the last flush must not fail again
        return FAILED
    if isinstance(fault, ValueError):
        click.echo(f"srpc: {plain(str(fault))}", err=True)
        return USAGE
    raise fault


def _complain(fault: SrpcError, status: int) -> int:
    click.echo(f"srpc: {plain(fault.message)} ({fault.code})", err=True)
    return status
