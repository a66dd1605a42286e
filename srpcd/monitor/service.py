"""The daemon's life: it begins to serve, looks after everything, reads its configuration again, and ends."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from srpcd import ipc
from srpcd.config import Config, ConfigError
from srpcd.monitor.faults import StartFault
from srpcd.monitor.front import Front, Terms
from srpcd.monitor.listeners import address_of
from srpcd.monitor.monitor import START_SECONDS, Monitor
from srpcd.monitor.refresh import refresh
from srpcd.monitor.systemd import Manager

_LOOK = 1.0
"""Seconds between two looks at permissions, ages and gates; four times as long as the look took, if that is longer."""


class Renewal(NamedTuple):
    """What was read again. fixed: keys that only a restart can change, and that have changed. terms: by kind of gate."""

    config: Config
    fixed: list[str]
    terms: dict[str, Terms]


class Service:
    """Runs gates before a monitor.

    manager: is told what becomes of us. read: reads the configuration again; raises ConfigError, StartFault, OSError.
    """

    def __init__(
        self, monitor: Monitor, fronts: list[Front], manager: Manager, read: Callable[[], Awaitable[Renewal]]
    ) -> None:
        self._monitor = monitor
        self._fronts = fronts
        self._manager = manager
        self._read = read
        self._stop = asyncio.Event()
        self._again = asyncio.Event()
        self._reloading = False
        self._note = ""
        for front in fronts:
            front.changed = self._changed

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; then let what is in flight finish, and leave nothing behind."""
        loop = asyncio.get_running_loop()
        # On a terminal SIGHUP says that the terminal is gone, and not that there is something new to read.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            reads = number == signal.SIGHUP and not os.isatty(2)
            loop.add_signal_handler(number, (self._again if reads else self._stop).set)
        tasks = [front.run() for front in self._fronts]
        tasks += [self._look_after(), self._revoke(), self._refresh(), self._reload()]
        keepers = [loop.create_task(each) for each in tasks]
        stopped = loop.create_task(self._stop.wait())
        await asyncio.wait({stopped, *keepers}, return_when=asyncio.FIRST_COMPLETED)
        reason = "signal" if stopped.done() else "a fault of the daemon itself"
        seconds = self._monitor.config.limits.drain
        self._manager.stopping(seconds + 2 * START_SECONDS)
        self._monitor.log.event("info", "stop", reason=reason)
        for task in (stopped, *keepers):
            task.cancel()
        await asyncio.gather(*(front.drain(seconds) for front in self._fronts))
        for front in self._fronts:
            front.release()
        await self._monitor.stop()
        self._monitor.log.report_suppressed(last=True)
        for fault in await asyncio.gather(*keepers, return_exceptions=True):
            if isinstance(fault, BaseException) and not isinstance(fault, asyncio.CancelledError):
                raise fault

    # --- what is said --------------------------------------------------------------------------------------------------

    @property
    def _serving(self) -> bool:
        return all(front.gate is not None for front in self._fronts)

    def _changed(self) -> None:
        """A gate serves. If all do, so do we."""
        if not self._serving or self._reloading:
            return
        at = {front.kind: ",".join(map(address_of, front.listeners)) for front in self._fronts}
        pin = "".join(front.terms.pin for front in self._fronts)
        self._monitor.log.event("info", "ready", tcp=at.get("tls"), local=at.get("local"), pin=pin or None)
        self._manager.ready(f"serving {', '.join(at.values())}{pin and f', pin {pin}'}{self._note}")

    # --- what is looked at from time to time ---------------------------------------------------------------------------

    async def _look_after(self) -> None:
        """Also says that we are well, while all gates are: whoever starts us ends us otherwise, and starts us anew."""
        while True:
            await asyncio.sleep(min(_LOOK, self._manager.watchdog / 2 or _LOOK))
            self._monitor.expire()
            self._monitor.log.report_suppressed()
            self._monitor.logins.look()
            for front in self._fronts:
                front.look()
            if self._serving:
                self._manager.alive()

    async def _revoke(self) -> None:
        while True:
            began = time.monotonic()
            self._monitor.endpoints.revoke()
            await asyncio.sleep(max(_LOOK, 4 * (time.monotonic() - began)))

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(self._monitor.config.authentication.refresh)
            await refresh(self._monitor)

    # --- SIGHUP --------------------------------------------------------------------------------------------------------

    async def _reload(self) -> None:
        log = self._monitor.log
        while True:
            await self._again.wait()
            self._again.clear()
            self._manager.reloading()
            self._reloading = True
            try:
                fixed = await self._renew()
                self._note = f"; needs a restart: {', '.join(fixed)}" if fixed else ""
                log.event("warning" if fixed else "info", "reload", outcome="done", restart=", ".join(fixed) or None)
            except (ConfigError, StartFault, OSError) as fault:
                self._note = f"; the configuration is still the old one: {fault}".replace("\n", " ")
                log.event("error", "reload", outcome="refused", reason=str(fault))
            finally:
                self._reloading = False
            self._changed()

    async def _renew(self) -> list[str]:
        """Take over another configuration, all of it or nothing. Returns what needs a restart. Raises as `read` does."""
        renewal = await self._read()
        taken = {front: renewal.terms[front.kind] for front in self._fronts}
        gates = {}
        try:
            for front, terms in taken.items():
                if not front.terms.same(terms) or front.gate is None:
                    gates[front] = front.start(terms)
            for gate in gates.values():
                if not await asyncio.shield(gate.proved):
                    raise StartFault("no gate starts with it: see the lines before")
        except BaseException:
            for gate in gates.values():
                gate.kill("")
            for terms in taken.values():
                ipc.close_all(terms.files)
            raise
        for front, terms in taken.items():
            if front in gates:
                front.adopt(gates[front], terms)
            else:
                front.agree(terms)
        await self._monitor.configure(renewal.config)
        return renewal.fixed
