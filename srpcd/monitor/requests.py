"""Who may ask the monitor for what, and in which state: one table (the habit of OpenSSH's monitor.c).

A request that is not in the table for its sender's role and state is fatal for the sender. The handlers, methods of
`Monitor` and of its parts, check every argument again; an argument that no honest sender could have sent raises `Violation`.
"""

import os
from enum import Enum
from typing import NamedTuple

from srpcd import ipc
from srpcd.wire.limits import PATH_MAX


class Violation(Exception):
    """The sender is broken or hostile: it is ended."""


class State(Enum):
    """Of a child process. NEW: it has not yet proved that it is confined. SERVING: it has. DONE: nothing more is due."""

    NEW = "new"
    SERVING = "serving"
    DONE = "done"


class Rule(NamedTuple):
    """role: of the sender, "gate", "worker" or "authenticate". state: of the sender. handler: method of `Monitor`, or of
    a part of it.

    local: only for the gate of the local socket, whose peers the kernel vouches for.
    """

    role: str
    state: State
    handler: str
    local: bool = False


REQUESTS: dict[type[ipc.Message], Rule] = {
    ipc.Ready: Rule("gate", State.NEW, "ready"),
    ipc.Taken: Rule("gate", State.SERVING, "taken"),
    ipc.Authenticate: Rule("gate", State.SERVING, "logins.authenticate"),
    ipc.ForgetAfid: Rule("gate", State.SERVING, "logins.forget_afid"),
    ipc.Attach: Rule("gate", State.SERVING, "attach"),
    ipc.Resume: Rule("gate", State.SERVING, "resume"),
    ipc.Detach: Rule("gate", State.SERVING, "detach"),
    ipc.Drained: Rule("gate", State.SERVING, "drained"),
    ipc.Pong: Rule("gate", State.SERVING, "pong"),
    ipc.Refusal: Rule("gate", State.SERVING, "refusal"),
    ipc.DescriptorsSent: Rule("gate", State.SERVING, "descriptors_sent", local=True),
    ipc.Announce: Rule("gate", State.SERVING, "endpoints.announce", local=True),
    ipc.Withdraw: Rule("gate", State.SERVING, "endpoints.withdraw", local=True),
    ipc.Proved: Rule("worker", State.NEW, "proved"),
    ipc.LinesWanted: Rule("worker", State.SERVING, "endpoints.lines_wanted"),
    ipc.LineGone: Rule("worker", State.SERVING, "endpoints.line_gone"),
    ipc.IsLive: Rule("worker", State.SERVING, "endpoints.is_live"),
    ipc.Waiting: Rule("authenticate", State.NEW, "logins.waiting"),
    ipc.Answered: Rule("authenticate", State.NEW, "logins.answered"),
    ipc.Outcome: Rule("authenticate", State.NEW, "logins.outcome"),
}


def permitted(message: ipc.Message, role: str, state: State, local: bool) -> str:
    """The handler's name. Raises Violation for what the table does not allow."""
    rule = REQUESTS.get(type(message))
    if rule is None or rule.role != role or rule.state is not state or (rule.local and not local):
        raise Violation(f"{type(message).__name__} from a {role} that is {state.value}")
    return rule.handler


def plain_path(path: str) -> str:
    """`path`, if it is one that a gate or worker makes from what a client said. Raises Violation."""
    elements = path.split("/") if path else []
    if any(not each or each[0] == "." or "\0" in each for each in elements) or len(os.fsencode(path)) > PATH_MAX:
        raise Violation("a path that no client can have named")
    return path
