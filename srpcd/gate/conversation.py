"""What passwords travel on: from a connection to the children that authenticate it, past the monitor."""

import os
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import get_args

from srpcd import ipc
from srpcd.gate.loop import Loop
from srpcd.wire.messages import Prompt, Style

STYLES = get_args(Style)


class Conversation:
    """One authentication. fd: a packet socket to its child. prompted: takes what the child says."""

    __slots__ = ("_answers", "_fd", "_loop", "_prompted")

    def __init__(self, loop: Loop, fd: int, prompted: Callable[[list[Prompt]], None]) -> None:
        self._loop = loop
        self._fd = fd
        self._prompted = prompted
        self._answers: deque[bytes] = deque()  # at most one for each prompt
        loop.add_reader(fd, self.poll)

    def answer(self, answer: bytes) -> None:
        """Give the answer to the next prompt. To a child that is gone it is lost: its verdict is on the way."""
        if self._fd < 0:
            return
        self._answers.append(answer)
        if len(self._answers) == 1:
            self._flush()

    def poll(self) -> None:
        """Take what the child has said."""
        if self._fd < 0:
            return
        try:
            while True:
                message = ipc.read_packet(self._fd)
                if not isinstance(message, ipc.Prompts):
                    break
                self._prompted([prompt(*each) for each in zip(message.styles, message.texts, strict=False)])
                if self._fd < 0:
                    return
        except BlockingIOError:
            return
        except (OSError, ipc.MessageError):
            pass
        self._loop.remove_reader(self._fd)  # it ended: the rest comes from the monitor

    def close(self) -> None:
        """End it."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._fd)
            os.close(self._fd)
            self._fd = -1
            self._answers.clear()

    def _flush(self) -> None:
        try:
            while self._answers:
                ipc.write_packet(self._fd, ipc.Answer(self._answers[0]))
                self._answers.popleft()
        except BlockingIOError:
            self._loop.add_writer(self._fd, self._flush)
            return
        except OSError:
            self._answers.clear()
        self._loop.remove_writer(self._fd)


class Conversations:
    """Those of one connection, by afid. prompted: takes an afid, and what its child says."""

    __slots__ = ("_conversations", "_loop", "_prompted")

    def __init__(self, loop: Loop, prompted: Callable[[int, list[Prompt]], None]) -> None:
        self._loop = loop
        self._prompted = prompted
        self._conversations: dict[int, Conversation | None] = {}

    def expect(self, afid: int) -> None:
        """An authentication has begun: its child will want to talk, unless the verdict comes first."""
        self._conversations[afid] = None

    def open(self, afid: int, fds: list[int]) -> None:
        """A child is ready. fds: the socket to it."""
        if len(fds) == 1 and afid in self._conversations and self._conversations[afid] is None:
            self._conversations[afid] = Conversation(self._loop, fds[0], partial(self._prompted, afid))
        else:
            ipc.close_all(fds)

    def answer(self, afid: int, answer: bytes) -> None:
        """Give the answer to the next prompt."""
        conversation = self._conversations.get(afid)
        if conversation is not None:
            conversation.answer(answer)

    def poll(self, afid: int) -> None:
        """Take a child's last words, before its verdict, which came on another way."""
        conversation = self._conversations.get(afid)
        if conversation is not None:
            conversation.poll()

    def close(self, afid: int) -> None:
        """One is over."""
        conversation = self._conversations.pop(afid, None)
        if conversation is not None:
            conversation.close()

    def clear(self) -> None:
        """All are over."""
        for afid in list(self._conversations):
            self.close(afid)


def prompt(style: str, text: str) -> Prompt:
    """What PAM says, as the protocol has it: whatever the module, it is a known style and UTF-8."""
    return Prompt(style if style in STYLES else "info", text.encode("utf-8", "replace").decode())  # type: ignore[arg-type]
