"""Why the daemon can't start."""


class StartFault(Exception):
    """The daemon can't start, or not with this configuration; the message says why and what to do."""
