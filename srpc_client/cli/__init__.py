"""The `srpc` command: look at a server's tree, and call what is in it.

Exit status: 0 it worked; 1 the call was refused or failed; 2 the command line is wrong; 3 no connection, no trust or no
login. What went wrong is one sentence on standard error.
"""

import sys


def main() -> None:
    """Entry point of `srpc`."""
    try:
        from srpc_client.cli.commands import run  # noqa: PLC0415  here a Ctrl-C is nobody's but ours
    except KeyboardInterrupt:
        sys.exit(130)
    run()
