"""Why the daemon can't start, and why a request is not granted."""


class StartFault(Exception):
    """The daemon can't start, or not with this configuration; the message says why and what to do."""


class Denied(Exception):
    """A request is not granted: errno and a sentence (empty: the usual one)."""

    def __init__(self, errno: int, message: str = "") -> None:
        super().__init__(errno, message)
        self.errno = errno
        self.message = message
