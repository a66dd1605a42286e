"""PAM sessions: a worker is in one where the administrator's PAM service file asks for it with `session` lines.

Session modules act on the process that calls them (limits, loginuid, control group), so the fork that becomes the worker
calls them itself, as root, before it drops anything and executes the worker's program: what they set stays with it. What
only root can close is then closed by somebody else, the *keeper*: a fork of that fork, which holds PAM's handle and nothing
else, waits for the worker's end, and outlives the monitor if need be.

What a session can't do here: ask anybody anything (there is no conversation), raise a limit above the worker's own ones, add
groups, or give the worker an environment (it would be one more way to tell a program something). A worker is shared by all
sessions of its user: for PAM_RHOST, it is where the first of them came from.

Where there are no session lines, a start costs the look into the file and no more.
"""

import asyncio
import ctypes
import os
import select
import signal
import syslog
from contextlib import suppress
from typing import NamedTuple

from srpcd import confine

DIRECTORIES = ("/etc/pam.d", "/usr/lib/pam.d")
"""Where libpam looks for a service's file, in this order."""

REFUSED = 77
"""Exit status (EX_NOPERM of sysexits.h) of a child that got no session."""

CLOSE_SECONDS = 30
"""How long modules may take to close a session."""

_TTY = b"srpc"
_ITEM_TTY, _ITEM_RHOST = 3, 4
_ESTABLISH_CRED, _DELETE_CRED, _SILENT = 0x2, 0x4, 0x8000
_DEPTH_MAX = 32  # of files that include others, as libpam has it
_STANDARD = 4  # descriptors that a child has when it comes here: 0 to 3, see `launch.spawn`


class Wanted(NamedTuple):
    """The session that a worker is to be in. service: PAM's. host: where its user is, empty on this one.

    lease: a descriptor for the keeper to hold while it lives (`Keepers`).
    """

    service: str
    user: str
    host: str
    lease: int


class SessionFault(Exception):
    """There is no session; the message says which step failed, and what the modules said."""


def asked_for(service: str) -> bool:
    """Whether the service's file, with what it includes, has session lines; a missing one has none.

    Raises OSError where a file can't be read, or an included one is missing: then nobody knows.
    """
    try:
        text = _content(service.lower())  # as libpam does
    except FileNotFoundError:
        return False
    return _has_session(text, 0)


def _content(name: str) -> str:
    places = [os.path.join(directory, name) for directory in DIRECTORIES]  # of an absolute one: itself, twice
    for place in places[:-1]:
        with suppress(FileNotFoundError), open(place, encoding="utf-8", errors="replace") as file:
            return file.read()
    with open(places[-1], encoding="utf-8", errors="replace") as file:
        return file.read()


def _has_session(text: str, depth: int) -> bool:
    if depth >= _DEPTH_MAX:
        raise OSError("PAM's files include each other without an end")
    for line in text.replace("\\\n", " ").splitlines():
        words = line.partition("#")[0].split()
        kind = words[0].lower().removeprefix("-") if words else ""
        if kind == "session" and len(words) > 2 and words[1].lower() in ("include", "substack"):
            included = words[2:3]
        elif kind == "session":
            return True
        else:
            included = words[1:2] if kind == "@include" else []  # Debian's, for lines of all kinds
        if included and _has_session(_content(included[0]), depth + 1):
            return True
    return False


def enter(wanted: Wanted) -> None:
    """Open a session for this process, where one is asked for; a keeper will close it. For the child alone, as root.

    May leave descriptors of modules open. A child that gets no session ends here, with REFUSED and a line of log.
    """
    try:
        if asked_for(wanted.service):
            _keep_open(_Session(wanted), wanted.lease)
    except (SessionFault, OSError) as fault:
        os.write(2, f"no PAM session: {fault}\n".encode(errors="replace"))
        os._exit(REFUSED)


class _Conversation(ctypes.Structure):
    _fields_ = [("function", ctypes.c_void_p), ("data", ctypes.c_void_p)]


class _Session:
    """An open session. Raises SessionFault."""

    def __init__(self, wanted: Wanted) -> None:
        self._pam = ctypes.CDLL("libpam.so.0", ctypes.RTLD_GLOBAL)  # modules that are not linked against it look there
        self._pam.pam_strerror.restype = ctypes.c_char_p
        # A function of C's: one of Python's takes memory that can be written and executed. It reads /dev/null.
        talk = ctypes.cast(ctypes.CDLL("libpam_misc.so.0").misc_conv, ctypes.c_void_p)
        self._handle = ctypes.c_void_p()
        said, told = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        standard_error = os.dup(2)
        os.dup2(told, 2)
        syslog.openlog("srpcd", syslog.LOG_PERROR, syslog.LOG_AUTH)  # modules say there what is wrong, with their names
        try:
            names = (wanted.service.encode(), wanted.user.encode(), ctypes.byref(_Conversation(talk, None)))
            self._step("pam_start", self._pam.pam_start(*names, ctypes.byref(self._handle)))
            self._call("pam_set_item", _ITEM_TTY, _TTY)
            if wanted.host:
                self._call("pam_set_item", _ITEM_RHOST, wanted.host.encode())
            self._call("pam_setcred", _ESTABLISH_CRED | _SILENT)
            try:
                self._call("pam_open_session", _SILENT)
            except SessionFault:
                self._end()
                raise
        except SessionFault as fault:
            with suppress(BlockingIOError):
                lines = os.read(said, 65536).decode(errors="replace").splitlines()
                raise SessionFault("; ".join([str(fault), *lines[-3:]])) from None
            raise
        finally:
            syslog.openlog("srpcd", 0, syslog.LOG_AUTH)
            os.dup2(standard_error, 2)
            for fd in (standard_error, said, told):
                os.close(fd)

    def close(self) -> None:
        """Close it, whatever the modules say about that."""
        self._pam.pam_close_session(self._handle, _SILENT)
        self._end()

    def _end(self) -> None:
        self._pam.pam_setcred(self._handle, _DELETE_CRED | _SILENT)
        self._pam.pam_end(self._handle, 0)

    def _call(self, name: str, *arguments: object) -> None:
        self._step(name, getattr(self._pam, name)(self._handle, *arguments))

    def _step(self, name: str, code: int) -> None:
        if code != 0:
            raise SessionFault(f"{name}: {self._pam.pam_strerror(self._handle, code).decode(errors='replace')}")


def _keep_open(session: _Session, lease: int) -> None:
    """Fork the keeper. Raises OSError."""
    try:
        worker = os.pidfd_open(os.getpid())  # the exec does not change who that is
        pid = os.fork()
    except OSError:
        session.close()
        raise
    if pid == 0:
        try:
            _keeper(session, worker, lease)
        finally:
            os._exit(0)
    os.close(worker)


def _keeper(session: _Session, worker: int, lease: int) -> None:
    os.setsid()  # not of the worker's session, which is swept, nor of the monitor's
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the end of the service is not the worker's yet
        signal.signal(number, signal.SIG_IGN)
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for fd in range(_STANDARD):  # ours; what modules have opened may be what their session hangs by
        os.dup2(null, fd, inheritable=False)
    for fd in (0, 1, 2):
        os.set_inheritable(fd, True)  # for what modules start
    confine.make_undumpable()
    poll = select.poll()
    poll.register(worker, select.POLLIN)
    poll.poll()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(CLOSE_SECONDS)
    session.close()


class Keepers:
    """Lets the monitor wait for all keepers at its end, without knowing them: each holds the end of one pipe."""

    def __init__(self) -> None:
        self._read, self.lease = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    async def over(self, seconds: float) -> None:
        """Wait until the last has closed its session, but no longer than that."""
        os.close(self.lease)
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._read, ended.set)
        with suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), seconds)
        asyncio.get_running_loop().remove_reader(self._read)
        os.close(self._read)
