"""Program endpoints: what this worker, which is the caller, executes.

Plain ones run once per call (`Run`): the payload is standard input, standard output is the reply. Resident ones (sticky
bit) are started at the first call and kept (`Resident`): a line whose ends are their standard input and output.
"""

import os
from errno import EAGAIN, ECONNRESET, EIO, EMSGSIZE, ESTALE
from select import EPOLLIN

from srpcd.ipc import PROGRAM, RESIDENT, WorkerSetup
from srpcd.wire.errors import RequestError, sentence
from srpcd.wire.frames import METADATA_LENGTH, caller_frame
from srpcd.wire.limits import PAYLOAD_MAX, READ_SIZE
from srpcd.worker.calls import Call
from srpcd.worker.lines import Line
from srpcd.worker.loop import HANDLERS, INFINITY, Loop, Writer
from srpcd.worker.resolve import Tree, fail, kind_of
from srpcd.worker.spawn import Process, status_sentence
from srpcd.worker.trust import open_trusted

STDERR_KEPT = 4000
"""Bytes of the end of standard error that go into an error: with what is said about it they fit ERROR_MESSAGE_MAX."""

GRACE = 2.0
"""Seconds that a resident program has to end by itself once its input is closed."""

_NO_METADATA = METADATA_LENGTH.pack(0)


class Started:
    """A program that runs, of either sort: its process, and the end of its standard error."""

    def __init__(self, programs: "Programs", process: Process) -> None:
        self._programs = programs
        self._loop = programs.loop
        self._process = process
        self._errors = bytearray()
        self._loop.watch(process.stderr, EPOLLIN, self._stderr, HANDLERS)
        self._loop.watch(process.pidfd, EPOLLIN, self._ended)
        programs.running[self] = None

    def kill(self) -> None:
        """Kill its whole process group; what it leaves is collected when it has ended."""
        self._process.kill()

    def _stderr(self, mask: int) -> None:
        if not self._read_errors():
            self._close_errors()

    def _read_errors(self) -> bool:
        try:
            data = os.read(self._process.stderr, READ_SIZE)
        except BlockingIOError:
            return True
        self._errors += data
        del self._errors[:-STDERR_KEPT]
        return bool(data)

    def _close_errors(self) -> None:
        if self._process.stderr >= 0:
            self._loop.close(self._process.stderr)
            self._process.stderr = -1

    def _ended(self, mask: int) -> None:
        status = self._process.reap()
        if self._process.stderr >= 0:
            self._read_errors()
        self._close_errors()
        self._loop.close(self._process.pidfd)
        del self._programs.running[self]
        self._over(status)

    def _over(self, status: int) -> None:
        raise NotImplementedError

    def _sentence(self, status: int) -> str:
        said = bytes(self._errors).decode(errors="replace").strip()
        return f"{status_sentence(status)}{': ' if said else ''}{said}"


class Run(Started):
    """One call of a plain program."""

    def __init__(self, programs: "Programs", process: Process, call: Call) -> None:
        super().__init__(programs, process)
        self._call: Call | None = call
        self._output: list[bytes] = [_NO_METADATA]
        self._size = 0
        self._stdin: Writer | None = None
        if process.stdin >= 0:
            self._stdin = Writer(self._loop, process.stdin, lambda: None)  # a program need not read what it is sent
            if call.parcel is None:
                self._stdin.add(process.rest)
            else:
                self._stdin.send(call.parcel)
                call.parcel = None
            self._stdin.end()
            process.rest = b""
        self._loop.watch(process.stdout, EPOLLIN, self._stdout, HANDLERS)
        call.body = b""
        call.custodian = self

    def abandon(self, call: Call) -> None:
        """The call is over: kill the program."""
        self._call = None
        self.kill()
        self._output.clear()

    def _stdout(self, mask: int) -> None:
        if self._read_output() == b"":
            self._close_output()

    def _read_output(self) -> "bytes | None":
        """What was read; b"" where nothing more is wanted; None where nothing is there yet."""
        try:
            data = os.read(self._process.stdout, READ_SIZE)
        except BlockingIOError:
            return None
        call = self._call
        if call is None:
            return b""
        self._size += len(data)
        if self._size > PAYLOAD_MAX:
            self.abandon(call)
            call.fail(EMSGSIZE, f"the program's output is larger than {PAYLOAD_MAX} bytes")
            return b""
        self._output.append(data)
        return data

    def _close_output(self) -> None:
        if self._process.stdout >= 0:
            self._loop.close(self._process.stdout)
            self._process.stdout = -1

    def _over(self, status: int) -> None:
        if self._stdin is not None:
            self._stdin.close()
        if self._process.stdout >= 0:
            while self._read_output():  # what is in the pipe; others may still hold its other end, and are not waited for
                pass
        self._close_output()
        call = self._call
        if call is None:
            return
        if status == 0:
            call.finish(b"".join(self._output))
        elif status > 0:
            call.fail(EIO, self._sentence(status))
        else:
            call.fail(ECONNRESET, f"{self._sentence(status)}; whether the call took effect is not known")


class Resident(Started):
    """A resident program. content: modification time and size of the file that it was started from."""

    def __init__(self, programs: "Programs", process: Process, content: "tuple[int, int]", caller: bytes) -> None:
        super().__init__(programs, process)
        self.content = content
        self.retired = INFINITY
        self.line = Line(self._loop, process.stdin, process.stdout, programs.timeout, self._lost)
        self.line.writer.add(caller)

    def retire(self) -> None:
        """No new calls: finish what it has, then end."""
        if self.retired == INFINITY:
            self.retired = self._loop.now
            self.line.retire(end=False)
            self._loop.wake(self._loop.now + GRACE)

    def _lost(self, line: Line) -> None:
        self._programs.forget(self)
        self.kill()  # and its calls are told once it is known how it ended

    def _over(self, status: int) -> None:
        self._programs.forget(self)
        self.line.end()
        if self.line.fault:
            self.line.fail(ECONNRESET, f"the program broke the protocol: {self.line.fault}")
        elif self.line.answered:
            self.line.fail(ECONNRESET, f"{sentence(ECONNRESET)} ({status_sentence(status)})")
        else:
            self.line.fail(ECONNRESET, f"{self._sentence(status)}; it had not answered any call")


class Programs:
    """All programs of this worker. timeout: seconds for one call."""

    def __init__(self, loop: Loop, tree: Tree, setup: WorkerSetup) -> None:
        self.loop = loop
        self.running: dict[Started, None] = {}
        self.timeout = setup.call_timeout / 1000
        self._tree = tree
        self._setup = setup
        self._owner = setup.uid if setup.personal else 0
        self._idle = setup.resident_idle / 1000
        self._residents: dict[tuple[str, int, int], Resident] = {}
        loop.duties.append(self._idleness)

    def call(self, call: Call, peer: str) -> "Line | None":
        """Check everything anew, then run the program, or hand the call to the resident one.

        peer: the caller's address. Returns the resident program's line, None for a plain one. Raises OSError, RequestError.
        """
        program, found = open_trusted(self._tree, call.path, self._owner)
        try:
            if found.st_ino != call.ino or found.st_dev != call.dev or kind_of(found.st_mode) not in (PROGRAM, RESIDENT):
                fail(ESTALE)
            self._tree.check_execute(program)
            if found.st_mode & 0o1000:
                line = self._resident(call, program, found).line
                if not line.send(call):
                    raise RequestError(EAGAIN, "too many calls wait for this program: try again later")
                return line
            self._run(call, program, peer)
            return None
        finally:
            os.close(program)

    def kill(self) -> None:
        """Kill everything."""
        for each in self.running:
            each.kill()

    def forget(self, resident: Resident) -> None:
        """No new calls for it."""
        for key, each in list(self._residents.items()):
            if each is resident:
                del self._residents[key]

    def _run(self, call: Call, program: int, peer: str) -> None:
        (metadata,) = METADATA_LENGTH.unpack_from(call.body)  # not for plain programs
        payload = call.body[METADATA_LENGTH.size + metadata :] if call.parcel is None else None  # None: it follows
        Run(self, self._start(call, program, {"SRPC_PEER": peer}, payload), call)

    def _resident(self, call: Call, program: int, found: os.stat_result) -> Resident:
        key, content = (call.path, call.dev, call.ino), (found.st_mtime_ns, found.st_size)
        resident = self._residents.get(key)
        if resident is not None and resident.content != content:
            del self._residents[key]
            resident.retire()
            resident = None
        if resident is None:
            setup = self._setup
            caller = caller_frame(setup.uid, setup.gid, setup.groups, setup.user, setup.context, "/" + call.path)
            resident = Resident(self, self._start(call, program, {}, None), content, caller)
            self._residents[key] = resident
            self.loop.wake(self.loop.now + self._idle)
        return resident

    def _start(self, call: Call, program: int, more: "dict[str, str]", data: "bytes | None") -> Process:
        if len(self.running) >= self._setup.children:
            self._make_room()
            raise RequestError(EAGAIN, f"{self._setup.children} programs run for this user already: try again later")
        environment = {
            "SRPC_ENDPOINT": "/" + call.path,
            "SRPC_USER": self._setup.user,
            "PATH": self._setup.path,
            "LANG": "C.UTF-8",
            "HOME": "/",
            **more,
        }
        return Process(program, [call.path.rpartition("/")[2]], environment, data)

    def _make_room(self) -> None:
        # Residents that nobody uses must not keep others out until their idle time is over.
        idle = [each for each in self._residents.values() if not each.line.busy]
        if idle:
            resident = min(idle, key=lambda each: each.line.used)
            self.forget(resident)
            resident.retire()

    def _idleness(self) -> float:
        now, due = self.loop.now, INFINITY
        for each in list(self.running):
            if not isinstance(each, Resident):
                continue
            if each.line.busy:
                due = min(due, now + GRACE)
            elif each.retired < INFINITY:
                end = max(each.retired, each.line.used) + GRACE
                if now >= end:
                    each.kill()
                else:
                    due = min(due, end)
            elif now >= each.line.used + self._idle:
                self.forget(each)
                each.retire()
            else:
                due = min(due, each.line.used + self._idle)
        return due
