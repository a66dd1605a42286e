"""Bounds of serving, the same with asyncio and without."""

MODE = 0o620
"""Mode of a pipe that announcing makes: its owner may serve and call, its group may call."""

RETRY_FIRST, RETRY_LAST = 0.1, 5.0
"""Seconds between attempts to come back to the daemon: the first pause, and the longest that it grows to."""

GRACE, QUIET = 5.0, 0.1
"""Seconds for handlers to finish after a withdrawal: at most, and without any call before a line is closed from here."""
