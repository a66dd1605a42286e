"""What goes wrong, as one small tree. Each error has an errno of Linux, its name, and a sentence that says what to do.

    OSError
    └── SrpcError             .errno, .code ("EACCES"), .message, .filename (the path of a call, walk or stat; else None)
        ├── CallError         the server, the kernel there or the handler refused or failed this request
        ├── CallTimeout       the time given to a call was over (also a TimeoutError); the handler has been told
        ├── AuthenticationError   the server did not accept who you say you are
        ├── ConnectionLost    each call that was outstanding when the connection ended gets exactly this one
        ├── Unreachable       no connection could be made; nothing was sent
        └── UntrustedServer   the server is not who it has to be; nothing was sent
            └── PinMismatch   its key is none of those that were pinned

A handler raises `CallError(errno, "a sentence")` to answer its caller with just that.
"""

from errno import EACCES, ECONNRESET, EPERM, ETIMEDOUT

from srpc_client.text import plain
from srpcd.wire import errors as wire_errors


class SrpcError(OSError):
    """Base of all errors of this package.

    errno: a Linux errno (> 0). message: a sentence for a person; the protocol's own for this errno when empty.
    filename: the path, as it was given, where what failed was asked for by path (CallError, CallTimeout); else None.
    """

    def __init__(self, errno: int, message: str = "") -> None:
        super().__init__(errno, message or wire_errors.sentence(errno))

    @property
    def code(self) -> str:
        """The errno's name: `"EACCES"`."""
        return wire_errors.code(self.errno or 0)

    @property
    def message(self) -> str:
        """The sentence."""
        return self.strerror or ""

    def __str__(self) -> str:
        # A traceback or a log shows this at a terminal, and the sentence may come from a server: only its lines are kept.
        text = plain(f"{self.code}: {self.message}", "\n\t")
        return text if self.filename is None else f"{text}: {self.filename!r}"

    def __reduce__(self) -> tuple[object, ...]:  # OSError's own would give `filename` to __init__
        return type(self), (self.errno, self.message), self.__dict__ | {"filename": self.filename}


class CallError(SrpcError):
    """The request was answered with an error. Raised by a handler, it is the answer."""


class CallTimeout(SrpcError, TimeoutError):
    """The time given to a call was over. Whether the call took effect is not known."""

    def __init__(self, errno: int = ETIMEDOUT, message: str = "") -> None:
        super().__init__(errno, message or "the time given to the call was over before its answer came")


LATE_LOGIN = "the time given to connecting and logging in was over before it was done"
"""What a CallTimeout says that is not one of a call."""


class AuthenticationError(SrpcError):
    """The server did not accept the user: unknown, wrong password, expired, locked; it does not tell which."""

    def __init__(self, errno: int = EACCES, message: str = "") -> None:
        super().__init__(errno, message or "the server did not accept user and password")


class ConnectionLost(SrpcError):
    """The connection ended. Whether the calls that were outstanding took effect is not known."""

    def __init__(self, errno: int = ECONNRESET, message: str = "") -> None:
        super().__init__(errno, message or "the connection ended before the answer came")


class Unreachable(SrpcError):
    """No connection could be made."""


class UntrustedServer(SrpcError):
    """The server did not prove to be who it has to be. Nothing was sent to it."""

    def __init__(self, errno: int = EPERM, message: str = "") -> None:
        super().__init__(errno, message or "the server is not who it has to be")


class PinMismatch(UntrustedServer):
    """The server's key is none of the pinned ones. found: the pin of the key that it has."""

    found: str

    def __init__(self, errno: int = EPERM, message: str = "", found: str = "") -> None:
        super().__init__(errno, message)
        self.found = found
