#!/usr/bin/python3 -IS
"""The program in which one authentication runs: PAM, with a whole conversation, in a process that ends with it.

Modules block, sleep, take over signals and are not thread-safe, so each authentication has a child of its own. Answers
come from the gate through a pipe (the monitor never holds a password), prompts go back the same way, and the outcome
goes to the monitor. `pam_acct_mgmt` (expired, locked, nologin) runs for every mechanism (pam(3), pam_conv(3)).

python-pam provides the handles; its own `authenticate` answers only the first prompt of a message, knows no PAM_RHOST and
no fail delay, so the conversation is made here.
"""

import ctypes
import ctypes.util
import os
import pwd
import signal
import sys
import time
from _socket import socket

if __name__ == "__main__":
    sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))]
    sys.path += sys.argv[1:]

import importlib
from errno import EACCES
from typing import Any

from srpcd import confine, ipc
from srpcd.wire.limits import PASSWORD_MAX, PROMPTS_MAX

PAM_USER, PAM_TTY, PAM_RHOST, PAM_FAIL_DELAY = 2, 3, 4, 10
PAM_CONV_ERR = 19
STYLES = {1: "secret", 2: "text", 3: "error", 4: "info"}
_TEXTS = 3000  # bytes of prompts in one message, which must fit into PIPE_BUF
MONITOR = 3


class Refused(Exception):
    """Authentication failed; the message is for the log."""


class Conversation:
    """PAM's questions to the gate, its answers back. gate, monitor: packet sockets.

    While it talks with the gate, PAM does not work, and the monitor lets PAM work for others (`conversations`).
    answered: CLOCK_MONOTONIC in ns of the last answer, 0 for none.
    """

    def __init__(self, gate: int, monitor: int) -> None:
        self.answered = 0
        self.fault = ""
        self._gate = gate
        self._monitor = monitor

    def hold(self, asked: list[tuple[str, str]]) -> list[bytes | None]:
        """Ask all of it; return what was answered, in order, None where nothing is wanted. Raises Refused, OSError."""
        if not 0 < len(asked) <= PROMPTS_MAX:
            raise Refused("a module asks too much at once")
        room = _TEXTS // len(asked)
        texts = tuple(text.encode()[:room].decode(errors="ignore") for _style, text in asked)
        ipc.write_packet(self._monitor, ipc.Waiting())
        try:
            ipc.write_packet(self._gate, ipc.Prompts(tuple(style for style, _text in asked), texts))
            return [self._answer() if style in ("secret", "text") else None for style, _text in asked]
        finally:  # modules go on after a wrong answer too
            ipc.write_packet(self._monitor, ipc.Answered())
            if not isinstance(ipc.read_packet(self._monitor), ipc.Proceed):
                os._exit(0)  # the authentication is over

    def _answer(self) -> bytes:
        message = ipc.read_packet(self._gate)
        if message is None:
            os._exit(0)  # the connection is over
        if not isinstance(message, ipc.Answer):
            raise Refused("the gate speaks nonsense")
        self.answered = time.monotonic_ns()
        if len(message.answer) > PASSWORD_MAX or b"\0" in message.answer:
            raise Refused("an answer with a NUL, or longer than PAM takes")
        return message.answer


def authenticate(setup: ipc.AuthSetup, conversation: Conversation) -> int:
    """Run the PAM stacks. Returns the uid of the account. Raises Refused for anything but success in all of them."""
    before = _uid(setup.uname)
    ctypes.CDLL("libpam.so.0", ctypes.RTLD_GLOBAL)  # modules that are not linked against libpam look for it there
    # python-pam asks for the libraries' names; find_library would run ldconfig, or a compiler, as root to find them out.
    names = {"pam": "libpam.so.0", "pam_misc": "libpam_misc.so.0"}
    setattr(ctypes.util, "find_library", names.get)  # noqa: B010  mypy would not have it assigned
    pam: Any = importlib.import_module("pam.__internals")
    library = pam.PamAuthenticator()
    libc = ctypes.CDLL(None)
    libc.strdup.restype = ctypes.c_void_p

    @pam.conv_func  # type: ignore[untyped-decorator]
    def converse(number: int, messages: Any, responses: Any, _data: Any) -> int:
        try:
            asked = [(messages[i].contents.msg_style, messages[i].contents.msg or b"") for i in range(number)]
            given = conversation.hold([(STYLES[style], text.decode(errors="replace")) for style, text in asked])
            array = library.calloc(number, ctypes.sizeof(pam.PamResponse))
            filled = ctypes.cast(array, ctypes.POINTER(pam.PamResponse))
            for place, answer in zip(filled, given, strict=False):
                if answer is not None:
                    place.resp = libc.strdup(answer)
            responses[0] = filled
            return 0
        except BaseException as fault:  # nothing may be raised through libpam
            conversation.fault = f"{fault}"
            return PAM_CONV_ERR

    handle = pam.PamHandle()
    talk = pam.PamConv(converse, None)
    no_delay = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)(lambda *_: None)

    def step(name: str, code: int) -> None:
        if code != 0:
            reason = conversation.fault or library.pam_strerror(handle, code).decode(errors="replace")
            raise Refused(f"{name}: {reason}")

    user, rhost = setup.uname.encode(), setup.rhost.encode()
    step("pam_start", library.pam_start(setup.service.encode(), user, ctypes.byref(talk), ctypes.byref(handle)))
    step("rhost", library.pam_set_item(handle, PAM_RHOST, ctypes.cast(ctypes.c_char_p(rhost), ctypes.c_void_p)))
    step("tty", library.pam_set_item(handle, PAM_TTY, ctypes.cast(ctypes.c_char_p(b"srpc"), ctypes.c_void_p)))
    # The daemon has a delay of its own, the same for all refusals, that holds nobody up.
    step("delay", library.pam_set_item(handle, PAM_FAIL_DELAY, ctypes.cast(no_delay, ctypes.c_void_p)))
    if setup.mechanism == "pam":
        step("pam_authenticate", library.pam_authenticate(handle, 0))
    step("pam_acct_mgmt", library.pam_acct_mgmt(handle, 0))
    found = ctypes.c_char_p()
    get_item = ctypes.CDLL("libpam.so.0").pam_get_item
    get_item.argtypes = [pam.PamHandle, ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    step("user", get_item(handle, PAM_USER, ctypes.byref(found)))
    if found.value != user:
        raise Refused("a module has changed the user name")
    library.pam_end(handle, 0)
    # A conversation can be held up between its steps, until the name belongs to another account.
    if before is None or _uid(setup.uname) != before:
        raise Refused("no such account, or it has changed meanwhile")
    return before


def _uid(name: str) -> int | None:
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


def main() -> None:
    """Authenticate once, and end."""
    confine.make_undumpable()
    monitor = socket(fileno=MONITOR)  # a name, because the object closes the descriptor when it is gone
    received = ipc.receive(monitor)
    if received is None:
        return
    setup, (gate,) = received
    if not isinstance(setup, ipc.AuthSetup):
        raise TypeError("the first message is no AuthSetup")
    confine.end_with(setup.monitor, signal.SIGKILL)
    confine.prove_context(setup.context)
    for fd in (gate, MONITOR):
        os.set_blocking(fd, True)
    os.set_inheritable(MONITOR, False)  # not for programs that a PAM module starts
    conversation = Conversation(gate, MONITOR)
    try:
        if not setup.uname or "\0" in setup.uname:
            raise Refused("an empty user name, or one with a NUL")
        uid = authenticate(setup, conversation)
        outcome = ipc.Outcome(0, "", conversation.answered, uid)
    except Refused as refusal:
        outcome = ipc.Outcome(EACCES, str(refusal)[:500], conversation.answered, 0)
    ipc.write_packet(MONITOR, outcome)


if __name__ == "__main__":
    main()
