"""Which key belongs to which server, as this user has found out: `~/.config/srpc/known_hosts`.

Lines `host:port sha256:…`; several for one host are several valid keys (rotation). `#` begins a comment.
"""

import os
import tempfile
from errno import EINVAL

from srpc_client.address import Remote
from srpc_client.errors import UntrustedServer
from srpc_client.tls import checked_pins


def default_path() -> str:
    """$XDG_CONFIG_HOME/srpc/known_hosts, or that below ~/.config."""
    config = os.environ.get("XDG_CONFIG_HOME", "")
    return os.path.join(config if config.startswith("/") else os.path.expanduser("~/.config"), "srpc", "known_hosts")


class KnownHosts:
    """The file. A missing one is an empty one; one that can't be understood is an error, so that no pin is lost silently."""

    def __init__(self, path: str | None = None) -> None:
        self.path = path or default_path()

    def _lines(self) -> list[str]:
        try:
            with open(self.path, encoding="utf-8") as file:
                return file.read().splitlines()
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as fault:
            raise UntrustedServer(EINVAL, f"{self.path} can't be read: {fault}") from None

    def pins(self, where: Remote) -> frozenset[str]:
        """The pins of a server; none where it is unknown. Raises UntrustedServer where the file is broken."""
        pins = set()
        for number, line in enumerate(self._lines(), 1):
            fields = line.partition("#")[0].split()
            if not fields:
                continue
            try:
                host, pin = fields
                checked_pins(pin)
            except ValueError:
                message = f"{self.path}, line {number}: `host:port sha256:…` is expected; mend or remove the line"
                raise UntrustedServer(EINVAL, message) from None
            if host.lower() == str(where).lower():
                pins.add(pin)
        return frozenset(pins)

    def trust(self, where: Remote, pin: str) -> None:
        """Make this the one pin of a server. Raises OSError where the file can't be written."""
        checked_pins(pin)
        # However its name was written: as `pins` looks for it. A key that was given up must not stay a good one.
        kept = [line for line in self._lines() if line.partition("#")[0].lower().split()[:1] != [str(where).lower()]]
        directory = os.path.dirname(self.path)
        os.makedirs(directory, mode=0o700, exist_ok=True)
        # Written beside and renamed: a full disk must not leave half a file, whose missing lines would be asked for anew.
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=directory, delete=False) as file:
            try:
                file.write("".join(f"{line}\n" for line in [*kept, f"{where} {pin}"]))
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, self.path)
            except BaseException:
                os.unlink(file.name)
                raise
