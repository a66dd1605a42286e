"""A virtual machine: started from a state that was saved after the boot, reached by ssh, its image never changed."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.vm import image

MEMORY = 2048
"""MiB."""
EMULATED = "max,-erms,-la57,-smap,-pku"
"""All that can be emulated, but for what costs much: `rep stosb`, with which the kernel clears pages where the processor
says that it is quick (it goes byte by byte), a fifth level of page tables, and a switch at each access to users' memory."""
PROCESSORS = 1
"""With more, an emulated machine takes a quarter more of the host's time for the same; there are several machines."""
BOOT_TIMEOUT = 240.0
START_TIMEOUT = 60.0
"""Seconds; emulated, on a machine that does other things too."""

KERNEL = (
    "root=/dev/vda rw console=ttyS0 panic=-1 quiet systemd.show_status=0 audit=1 audit_backlog_limit=8192 mitigations=off"
    # The emulator translates code by its address: where each process has others (ASLR), it does so for each anew, and to
    # start a program takes six times as long. Nor does it help to have pages cleared twice.
    " norandmaps init_on_alloc=0"
)


class MachineFault(Exception):
    """The machine did not do as it should; the message says what is known."""


class Start(NamedTuple):
    """What a machine starts from. image: its directory. parameters: for the kernel. state: directory of a saved machine's
    memory and disk (`Machine.save`); None: it boots.
    """

    image: Path
    parameters: str
    state: Path | None = None


class Machine:
    """A machine by its name; what belongs to it lies in one directory under the cache."""

    def __init__(self, name: str) -> None:
        if not re.fullmatch(r"[a-z0-9-]{1,40}", name):
            raise MachineFault(f"{name!r}: small letters, digits and -, please")
        self.name = name
        self.directory = image.CACHE / "machines" / name
        self.serial = self.directory / "serial.log"

    @property
    def running(self) -> bool:
        """Whether its emulator runs."""
        pid = self._pid()
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes() if pid else b""
        except FileNotFoundError:
            return False
        return f"srpc-{self.name},".encode() in command

    def up(self, start: Start) -> None:
        """Start it, new: what it had is gone. Raises MachineFault, image.ImageFault."""
        if self.running:
            raise MachineFault(f"{self.name} runs already")
        made, state = start.image, start.state
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        below, kind = (state / "disk.qcow2", "qcow2") if state else (made / "disk.img", "raw")
        disk = self.directory / "disk.qcow2"  # a whole path: -daemonize leaves the directory
        image.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", kind, disk])
        shutil.copy(made / "key", self.directory / "key")
        (self.directory / "key").chmod(0o600)
        command = [
            *("qemu-system-x86_64", "-nodefaults", "-display", "none", "-name", f"srpc-{self.name},process=srpc-vm"),
            *(*accelerator(made), "-smp", str(PROCESSORS), "-m", str(MEMORY)),
            *(
                "-kernel",
                str(made / "vmlinuz"),
                "-initrd",
                str(made / "initrd.img"),
                "-append",
                f"{KERNEL} {start.parameters}",
            ),
            *("-drive", f"file={disk},if=virtio,format=qcow2,cache=unsafe", "-serial", "file:serial.log"),
            # restrict: nothing but what is forwarded; the tests have no network.
            *("-netdev", "user,id=n,restrict=on,hostfwd=tcp:127.0.0.1:0-:22", "-device", "virtio-net-pci,netdev=n,romfile="),
            *("-device", "virtio-rng-pci", "-qmp", "unix:qmp,server=on,wait=off", "-pidfile", "pid", "-daemonize"),
        ]
        with contextlib.ExitStack() as opened:
            if state:
                memory = opened.enter_context(open(state / "memory", "rb")).fileno()
                command += ["-incoming", f"fd:{memory}"]
            passed = (memory,) if state else ()
            done = subprocess.run(command, cwd=self.directory, capture_output=True, text=True, pass_fds=passed)
        if done.returncode:
            raise MachineFault(f"{' '.join(command)}: status {done.returncode}\n{done.stderr}")
        deadline = time.monotonic() + (START_TIMEOUT if state else BOOT_TIMEOUT)
        try:
            while state and self._control("query-status")["status"] == "inmigrate":
                self._wait_before(deadline, "its state is not loaded")
            self._control("cont")
            network = self._control("human-monitor-command", {"command-line": "info usernet"})
            found = re.search(r"HOST_FORWARD.*?127\.0\.0\.1\s+(\d+)", network)
            if not found:
                raise MachineFault(f"no forwarded port:\n{network}")
            (self.directory / "port").write_text(found[1])
            # A saved machine's clock stands at the time when it was saved.
            while self.ssh(["date", "-s", f"@{time.time():.3f}"], quiet=True).returncode:
                self._wait_before(deadline, "it can't be reached by ssh")
        except BaseException:
            self.down()
            raise

    def _wait_before(self, deadline: float, what: str) -> None:
        if time.monotonic() > deadline or not self.running:
            log = self.serial.read_text(errors="replace") if self.serial.exists() else ""
            raise MachineFault(f"{self.name}: {what}; its console ends with:\n{log[-3000:]}")
        time.sleep(0.2)

    def save(self, target: Path) -> None:
        """End it, and keep its memory and disk in the directory `target`, for others to start from."""
        target.mkdir(parents=True)
        self._leave_ssh()
        self.ssh(["sync"], shared=False)
        self._control("stop")
        self._control("migrate-set-parameters", {"max-bandwidth": 1 << 33})
        memory = os.open(target / "memory", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._control("getfd", {"fdname": "memory"}, memory)
        os.close(memory)
        self._control("migrate", {"uri": "fd:memory"})
        deadline = time.monotonic() + START_TIMEOUT
        while (status := (answer := self._control("query-migrate")).get("status")) != "completed":
            if status in ("failed", "cancelled"):
                raise MachineFault(f"its state can't be saved: {answer}")
            self._wait_before(deadline, "its state is not saved")
        self._quit()
        (self.directory / "disk.qcow2").rename(target / "disk.qcow2")

    def ssh(self, command: Sequence[str], *, quiet: bool = False, shared: bool = True, **options: Any) -> Any:
        """Run a command inside as root (unconfined_t) by ssh; subprocess.run's result. options: for it.

        The words are quoted, except of a single one, which is a shell's. shared: over one connection for all commands.
        """
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL} if quiet else {}
        return subprocess.run(self._ssh_command(shared, command), cwd=self.directory, **(silent | options))

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """As `ssh`, and don't wait for its end."""
        return subprocess.Popen(self._ssh_command(True, command), cwd=self.directory, **options)

    def _ssh_command(self, shared: bool, command: Sequence[str], *more: str) -> list[str]:
        words = [command[0] if len(command) == 1 else " ".join(map(quoted, command))] if command else []
        port = (self.directory / "port").read_text()
        options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "ConnectTimeout=20"]
        options += ["Ciphers=aes128-gcm@openssh.com", "BatchMode=yes", "IdentitiesOnly=yes"]
        if shared:
            options += ["ControlMaster=auto", "ControlPath=ssh", "ControlPersist=yes"]
        return [
            "ssh",
            "-F",
            "none",
            "-p",
            port,
            "-i",
            "key",
            *(f"-o{each}" for each in options),
            *more,
            "root@127.0.0.1",
            *words,
        ]

    def put(self, source: Path, target: str, exclude: Sequence[str] = ()) -> None:
        """Copy a file or directory in; `target` is what it is called inside. Raises MachineFault.

        Files are as old as the copy is: the two clocks need not be the same.
        """
        if source.is_dir():
            command = f"mkdir -p {quoted(target)} && tar -x -m --no-same-owner -C {quoted(target)}"
            pack = ["tar", "-c", *(f"--exclude={each}" for each in exclude), "-C", str(source), "."]
            with subprocess.Popen(pack, stdout=subprocess.PIPE) as packer:
                done = self.ssh([command], stdin=packer.stdout)
            failed = done.returncode or packer.returncode
        else:
            command = f"mkdir -p $(dirname {quoted(target)}) && cat > {quoted(target)}"
            with open(source, "rb") as file:
                failed = self.ssh([command], stdin=file).returncode
            if not failed and os.access(source, os.X_OK):
                failed = self.ssh(["chmod", "+x", target]).returncode
        if failed:
            raise MachineFault(f"{source} can't be copied to {target}")

    def get(self, source: str, target: Path) -> None:
        """Copy a file or directory out; `target` is what it is called here. Raises MachineFault."""
        if self.ssh(["test", "-d", source]).returncode == 0:
            target.mkdir(parents=True, exist_ok=True)
            done = self.ssh(["tar", "-c", "-C", source, "."], stdout=subprocess.PIPE)
            failed = done.returncode or subprocess.run(["tar", "-x", "-C", str(target)], input=done.stdout).returncode
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "wb") as file:
                failed = self.ssh(["cat", source], stdout=file).returncode
        if failed:
            raise MachineFault(f"{source} can't be copied to {target}")

    def down(self) -> None:
        """End it. Its directory stays, with the console's log."""
        self._leave_ssh()
        self._quit()

    def _leave_ssh(self) -> None:
        if (self.directory / "ssh").exists():
            stop = self._ssh_command(True, (), "-O", "exit")
            subprocess.run(stop, cwd=self.directory, stderr=subprocess.DEVNULL)

    def _quit(self) -> None:
        if not self.running:
            return
        pid = self._pid()
        with contextlib.suppress(OSError, MachineFault):
            self._control("quit")
        deadline = time.monotonic() + 10
        while self.running:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def _pid(self) -> int:
        try:
            return int((self.directory / "pid").read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def _control(self, command: str, arguments: dict[str, Any] | None = None, descriptor: int = -1) -> Any:
        """A command of QEMU's machine protocol, with a descriptor where one is given; its answer. Raises MachineFault."""
        with _connection(self.directory) as connected, connected.makefile("rb") as stream:
            for name, values in (("qmp_capabilities", {}), (command, arguments or {})):
                message = json.dumps({"execute": name, "arguments": values}).encode() + b"\n"
                socket.send_fds(connected, [message], [descriptor] if descriptor >= 0 and name == command else [])
                answer: dict[str, Any] = {}
                while not answer.keys() & {"return", "error"}:  # the greeting and events come in between
                    line = stream.readline()
                    if not line:
                        if command == "quit":
                            return None
                        raise MachineFault(f"{self.name}: the emulator ended at {command}")
                    answer = json.loads(line)
                if "error" in answer:
                    raise MachineFault(f"{self.name}: {command}: {answer['error']}")
            return answer["return"]


@contextlib.contextmanager
def _connection(directory: Path) -> Iterator[socket.socket]:
    """The control socket. By a descriptor of its directory: the path may be longer than an address can be."""
    number = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX) as connected:
            connected.settimeout(20)
            connected.connect(f"/proc/self/fd/{number}/qmp")
            yield connected
    finally:
        os.close(number)


def quoted(word: object) -> str:
    """For a shell."""
    return "'" + str(word).replace("'", "'\\''") + "'"


def accelerator(made: Path) -> list[str]:
    """KVM where a kernel gets to its end with it (on some virtual machines it hangs), else emulation. Tried once."""
    known = made / "accelerator"
    if not known.exists():
        known.write_text("kvm" if os.access("/dev/kvm", os.W_OK) and _kvm_works(made) else "tcg")
    if known.read_text() == "kvm":
        return ["-accel", "kvm", "-cpu", "host"]
    return ["-accel", "tcg,thread=multi", "-cpu", EMULATED]


def _kvm_works(made: Path) -> bool:
    """A kernel without a disk panics, and reboots at once: seconds, natively."""
    command = ["qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-m", "256", "-nodefaults", "-display", "none"]
    command += ["-no-reboot", "-serial", "stdio", "-kernel", str(made / "vmlinuz"), "-append", "console=ttyS0 panic=-1"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=10)
    except subprocess.TimeoutExpired:
        return False
    return b"Kernel panic" in done.stdout
