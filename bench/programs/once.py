"""What a plain program costs without sRPC: `subprocess.run` of it, with the payload on its standard input."""

import subprocess

from bench.programs import driver
from bench.programs.driver import Setup


def caller(setup: Setup) -> None:
    """Run `program` once for each call."""
    command = [setup["program"]]

    def call(payload: bytes) -> bytes:
        return subprocess.run(command, input=payload, capture_output=True, check=True).stdout

    driver.say(ready={})
    for inflight, payload, seconds in driver.commands():
        if inflight == 1:
            driver.one_at_a_time(call, payload, seconds)
        else:
            driver.by_threads(call, inflight, payload, seconds)


def main() -> None:
    """Be the caller."""
    driver.run({"caller": caller})
