"""Errors as the protocol carries them: an errno of Linux, its name, and a sentence for a person."""

import errno as _errno

SENTENCES = {
    _errno.EACCES: "permission denied by the kernel",
    _errno.ENOENT: "no such endpoint or directory",
    _errno.ENOTDIR: "a part of the path is not a directory",
    _errno.EISDIR: "this is a directory, and only endpoints can be called",
    _errno.EINVAL: "invalid argument",
    _errno.EBADF: "no such fid on this connection",
    _errno.EEXIST: "the fid is in use: clunk it first, or choose another number",
    _errno.ESTALE: "another file is at that path now: walk to it again",
    _errno.ENXIO: "the endpoint may be called, but nobody serves it at the moment",
    _errno.ECONNRESET: "the handler ended before it answered; whether the call took effect is not known",
    _errno.ETIMEDOUT: "the deadline passed before the handler answered",
    _errno.ECANCELED: "the call was cancelled",
    _errno.EAGAIN: "over a limit: try again later",
    _errno.ESHUTDOWN: "the daemon is shutting down and takes no new calls",
    _errno.EKEYEXPIRED: "the session has ended: attach again",
    _errno.EMSGSIZE: "the message is larger than the limit",
    _errno.EBADMSG: "the message is malformed",
    _errno.EPROTO: "the protocol was violated",
    _errno.EILSEQ: "the reply is not UTF-8 text: use call instead of append",
    _errno.EOPNOTSUPP: "not supported on this kind of connection",
    _errno.EPERM: "operation not permitted",
    _errno.EIO: "the handler failed",
    _errno.ENAMETOOLONG: "a name or path is too long",
    _errno.ELOOP: "no such endpoint or directory",
    _errno.EXDEV: "no such endpoint or directory",
}
"""What to tell a person, by errno. Errnos that are not here are named by their code alone."""


def code(errno: int) -> str:
    """The name of an errno: `"EACCES"`; `"E<number>"` for one that this system does not name.

    95 has two names on Linux; the protocol's is EOPNOTSUPP.
    """
    return "EOPNOTSUPP" if errno == _errno.EOPNOTSUPP else _errno.errorcode.get(errno, f"E{errno}")


def sentence(errno: int) -> str:
    """The sentence for an errno; the code's name where there is none."""
    return SENTENCES.get(errno) or code(errno)


class WireError(Exception):
    """Something that is answered with an error message: `errno`, and a sentence.

    errno: a Linux errno (> 0).
    message: what to tell the peer; `sentence(errno)` when empty.
    """

    def __init__(self, errno: int, message: str = "") -> None:
        self.errno = errno
        self.message = message or sentence(errno)
        super().__init__(f"{code(errno)}: {self.message}")


class RequestError(WireError):
    """A well-formed request that can't be granted: answered, and the connection goes on."""


class ProtocolError(WireError):
    """The peer broke the protocol: answered where that is possible, and the connection is closed.

    seq: of the frame that broke it, 0 where none was read.
    """

    def __init__(self, errno: int, message: str = "", seq: int = 0) -> None:
        super().__init__(errno, message)
        self.seq = seq
