"""What ends the command early: Ctrl-C, and the time of --timeout.

Both are signals, so they end whatever the command does: it may be connecting, asking for a password, reading its input or
writing to a terminal that takes nothing. What they raise is no Exception, so that nothing on the way takes it for its own.
"""

import signal
from types import FrameType

from srpc_client.address import LONGEST_WAIT

LAST_WORDS_SECONDS = 1.0
"""For the sentence about it, and for putting the terminal in order. Then the signal kills."""


class TimeOver(BaseException):
    """The time of --timeout is over."""


def catch() -> None:
    """Turn Ctrl-C into one KeyboardInterrupt. A second one kills: nothing that hangs then can hold the command up."""
    signal.signal(signal.SIGINT, _interrupted)


def bound(seconds: float) -> None:
    """Raise TimeOver after so many seconds, wherever the command is then."""
    if seconds < LONGEST_WAIT:
        signal.signal(signal.SIGALRM, _over)
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))


def let_end() -> None:
    """From here on both signals kill: a command that says its last words has nothing to clean up."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def unbound() -> None:
    """The command is done, in time."""
    signal.setitimer(signal.ITIMER_REAL, 0)


def _interrupted(_signal: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


def _over(_signal: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, LAST_WORDS_SECONDS)
    raise TimeOver
