"""How the command gets to a server: which one, whether it is trusted, and who logs in."""

import getpass
import math
import os
import sys
from collections.abc import Sequence
from errno import EINVAL, ENOTTY, ETIMEDOUT
from typing import Literal

import click

from srpc_client import address as addresses
from srpc_client import blocking
from srpc_client.address import Address, Local, Remote
from srpc_client.cli.interrupts import TimeOver
from srpc_client.errors import LATE_LOGIN, AuthenticationError, PinMismatch, SrpcError, Unreachable, UntrustedServer
from srpc_client.known_hosts import KnownHosts
from srpc_client.text import plain
from srpcd.wire.limits import PASSWORD_MAX
from srpcd.wire.messages import Prompt

NO_KEY = "sha256:" + "A" * 43 + "="
"""A pin that no key has (or SHA-256 is broken): a server that is asked with it shows its key and is sent nothing."""


class Access:
    """What the command line says about server and user."""

    def __init__(
        self,
        address: str | None,
        user: str | None,
        pins: Sequence[str],
        ca: str | None,
        password_file: str | None,
        timeout: float | None,
    ) -> None:
        self.known_hosts = KnownHosts()
        self.credential_file = password_file
        # `interrupts` bounds the command as a whole then. Without it a server that does not answer is given up.
        self._timeout = None if timeout is None else math.inf
        self._address = address
        self._user = user
        self._pins = pins
        self._ca = ca
        self._where: Address | None = None

    @property
    def where(self) -> Address:
        """The server."""
        if self._where is None:
            self._where = addresses.parse(self._address)
        return self._where

    @property
    def remote(self) -> Remote:
        """The server, where it is one that has a key."""
        if not isinstance(self.where, Remote):
            raise click.UsageError(f"{self.where} is a local socket and has no key: name a host with --address")
        return self.where

    def dial(self) -> blocking.Connection:
        """Connect and log in. Raises SrpcError; AuthenticationError also where the time for it was over."""
        try:
            return self._dial()
        except TimeOver:
            raise AuthenticationError(ETIMEDOUT, LATE_LOGIN) from None

    def _dial(self) -> blocking.Connection:
        user = self._user or addresses.own_name(self.where)  # who says a name needs none of his own: see `_is_own`
        if isinstance(self.where, Local):
            if self._pins or self._ca is not None:
                raise click.UsageError(
                    f"--pin and --ca are for a server on another host: {self.where} is a local socket, whose server has no "
                    "key; that it runs as root or as you is what is checked there"
                )
            if self.credential_file is None and self._is_own(user):
                return blocking.dial(self.where, timeout=self._timeout)
            return self._login(blocking.connect(self.where, timeout=self._timeout), user)
        if self._ca is not None:
            ca: str | Literal[True] = True if self._ca == "system" else self._ca
            connection = blocking.connect(self.where, ca=ca, timeout=self._timeout)
        else:
            connection = self._connect_pinned()
        return self._login(connection, user)

    def _is_own(self, user: str) -> bool:
        try:
            return user == addresses.own_name(self.where)
        except SrpcError:  # a uid without an account, as in many containers: every name is another one's
            return False

    def _login(self, connection: blocking.Connection, user: str) -> blocking.Connection:
        try:
            connection.session = connection.login(user, password=self._password(), prompt=_ask, mechanism="pam")
        except BaseException:
            connection.close()
            raise
        return connection

    def _password(self) -> str | None:
        if self.credential_file is None:
            return None
        try:
            if self.credential_file == "-":
                line = sys.stdin.buffer.readline(PASSWORD_MAX + 2)
            else:
                with open(self.credential_file, "rb") as file:
                    line = file.readline(PASSWORD_MAX + 2)
            return line.rstrip(b"\r\n").decode()
        except OSError as fault:
            raise AuthenticationError(fault.errno or EINVAL, f"{self.credential_file}: {fault.strerror}") from None
        except UnicodeDecodeError:
            raise AuthenticationError(EINVAL, f"{self.credential_file}: the password is not UTF-8 text") from None

    # --- trust ----------------------------------------------------------------------------------------------------

    def _connect_pinned(self) -> blocking.Connection:
        pins = self._pins or self.known_pins() or [self._first_use()]
        try:
            return blocking.connect(self.where, pins=pins, timeout=self._timeout)
        except PinMismatch as fault:
            if self._pins:
                raise
            raise PinMismatch(
                message=f"the key of {self.where} has changed: it is {fault.found} now, and {self.known_hosts.path} knows"
                f" {', '.join(sorted(pins))}. Somebody may be in between. If the server's administrator tells you that this"
                f" key is right: srpc --address {self.where} --pin {fault.found} pin --trust",
                found=fault.found,
            ) from None

    def known_pins(self) -> frozenset[str]:
        """The pins that this user has trusted for the server."""
        return self.known_hosts.pins(self.remote)

    def shown_pin(self) -> str:
        """The pin of the key that the server shows. Nothing is sent to it.

        Raises SrpcError; PinMismatch where the command line names pins, and it is none of these.
        """
        try:
            blocking.connect(self.remote, pins=NO_KEY, timeout=self._timeout).close()
        except PinMismatch as fault:
            if self._pins and fault.found not in self._pins:
                raise
            return fault.found
        except TimeOver:
            raise Unreachable(ETIMEDOUT, f"{self.where} did not answer in time") from None
        raise UntrustedServer(message="the server has an impossible key")

    def _first_use(self) -> str:
        found = self.shown_pin()
        message = (
            f"the key of {self.where} is not known yet: {found}. Ask the server's administrator whether it is that, and"
            f" then: srpc --address {self.where} --pin {found} pin --trust; or give it with --pin alone"
        )
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise UntrustedServer(message=message)
        click.echo(f"The key of {self.where} is not known yet. It is\n  {found}", err=True)
        if not click.confirm("Is that what the server's administrator told you? Trust it from now on?", err=True):
            raise UntrustedServer(message="the server's key is not trusted, so nothing was sent to it")
        self.trust(found)
        return found

    def trust(self, pin: str) -> None:
        """Remember a pin as the server's only one. Raises SrpcError."""
        try:
            self.known_hosts.trust(self.remote, pin)
        except SrpcError:
            raise
        except OSError as fault:
            raise SrpcError(fault.errno or EINVAL, f"{self.known_hosts.path}: {fault.strerror}") from None


def _ask(prompts: Sequence[Prompt]) -> list[str]:
    """Show prompts on the terminal, and read what is typed there, hidden where it is secret."""
    answers = []
    for prompt in prompts:
        text = plain(prompt.text)
        if prompt.style in ("info", "error"):
            click.echo(text, err=True)
            continue
        try:
            terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
        except OSError:
            message = f"the server asks for {text.strip()!r}, and there is no terminal to ask you at: use --password-file"
            raise AuthenticationError(ENOTTY, message) from None
        if prompt.style == "secret":
            os.close(terminal)
            answers.append(getpass.getpass(text))
        else:
            with os.fdopen(terminal, "r+b", buffering=0) as tty:
                tty.write(text.encode())
                answers.append(tty.readline(4096).decode(errors="replace").rstrip("\r\n"))
    return answers
