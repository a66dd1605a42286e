#!/usr/bin/python3
"""A service: announces /calc/add and adds the numbers that it is sent.

    $ python3 add.py &                                 # as an account that may write in /srv/rpc/calc
    $ srpc call /calc/add '1 2 3'
    6

Who may call it is what the kernel says about the named pipe that it announces: `ls -l /srv/rpc/calc/add`. Here members
of the directory's group may; `chmod`, `chgrp` and `setfacl` change that from the next call on.
"""

import asyncio
import logging
from errno import EINVAL

from srpc_client import CallError, Request, serve


def add(request: Request) -> bytes:
    """The sum of the numbers in the payload. The caller is who the kernel says, whatever the payload says."""
    try:
        numbers = [int(word) for word in request.payload.split()]
    except ValueError:
        raise CallError(EINVAL, "send whole numbers with spaces between them") from None
    logging.info("%s (uid %d) adds %d numbers", request.caller.user, request.caller.uid, len(numbers))
    return str(sum(numbers)).encode()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        asyncio.run(serve({"/calc/add": add}))
    except KeyboardInterrupt:
        pass
