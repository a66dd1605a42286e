"""What the unit takes from the daemon, seen from the inside of what it starts; and how that compares with others."""

import json
import re
import subprocess
from collections.abc import Iterator
from errno import EACCES, EAFNOSUPPORT, EPERM
from pathlib import Path
from typing import Any

import pytest

from tests.vm.guest.test_contexts import TREE, dial, main_pid, running, worker

KEPT = 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 29
"""CAP_KILL, SETGID, SETUID, SETPCAP, AUDIT_WRITE."""

WRITABLE = {
    *("/tmp", "/var/tmp", "/run/srpc", "/var/lib/srpc"),  # the first two are its own
    "/run",  # only root may there, and only PAM's modules do
    *("/dev", "/dev/shm", "/dev/mqueue", "/dev/hugepages", "/dev/pts", "/proc", "/sys/fs/cgroup", "/sys/fs/selinux"),
}

PROBE = """#!/usr/bin/python3 -I
import ctypes, errno, json, mmap, os, socket, stat

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

def call(number, *arguments):
    if libc.syscall(ctypes.c_long(number), *(ctypes.c_long(each) for each in arguments)) < 0:
        raise OSError(ctypes.get_errno(), "")

def attempt(work):
    try:
        work()
        return 0
    except OSError as fault:
        return fault.errno

found = {
    "status": dict(line.rstrip().split(":", 1) for line in open("/proc/self/status")),
    "mounts": [line.split()[4:6] for line in open("/proc/self/mountinfo")],
    "proc": sorted(each for each in os.listdir("/proc") if not each.isdigit()),
    "pids": [os.stat(f"/proc/{each}").st_uid for each in os.listdir("/proc") if each.isdigit()],
    "devices": sorted(os.listdir("/dev")),
    "limits": open("/proc/self/limits").read(),
    "inet": attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)),
    "inet6": attempt(lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)),
    "packet": attempt(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)),
    "vsock": attempt(lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)),
    "writable code": attempt(lambda: mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)),
    "user namespace": attempt(lambda: call(272, 0x10000000)),
    "mount namespace": attempt(lambda: call(272, 0x20000)),
    "real time": attempt(lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))),
    "priority": attempt(lambda: os.setpriority(os.PRIO_PROCESS, 0, -5)),
    "io_uring": attempt(lambda: call(425, 1, 0)),
    "personality": attempt(lambda: call(135, 0x0400000)),
    "ptrace": attempt(lambda: call(101, 0, 0, 0, 0)),
    "keys of the kernel": attempt(lambda: call(246, 0, 0, 0, 0)),
    "the clock": attempt(lambda: call(227, 0, 0)),
    "mount": attempt(lambda: call(165, 0, 0, 0, 0, 0)),
    "root": attempt(lambda: os.setresuid(0, 0, 0)),
}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> Iterator[dict[str, Any]]:
    """What a program finds that a worker has started."""
    directory = TREE / "hardening"
    directory.mkdir(mode=0o755)
    program = directory / "probe"
    program.write_text(PROBE)
    program.chmod(0o755)
    with dial("carol") as carol:
        yield json.loads(carol.call("/hardening/probe", b"", timeout=60))
        found = Path(f"/proc/{worker('carol')}/status").read_text()
        assert "Seccomp:\t2" in found
    subprocess.run(["rm", "-r", str(directory)], check=True)


def capabilities(pid: int) -> dict[str, int]:
    """Of a process, by set."""
    return {
        name: int(mask, 16)
        for name, mask in re.findall(r"^Cap(\w+):\t(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
    }


def test_capabilities_are_exactly_those_that_are_needed() -> None:
    held = capabilities(main_pid())
    assert (held["Prm"], held["Eff"], held["Bnd"], held["Inh"], held["Amb"]) == (KEPT, KEPT, KEPT, 0, 0)
    with dial("carol"):
        for pid in (worker("carol"), *running("srpcd/gate/__main__.py")):
            assert set(capabilities(pid).values()) == {0}


def test_what_a_program_inherits(found: dict[str, Any]) -> None:
    status = found["status"]
    assert {name: status[name].strip() for name in ("NoNewPrivs", "Seccomp")} == {"NoNewPrivs": "1", "Seccomp": "2"}
    assert {status[f"Cap{each}"].strip("\t 0") for each in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {""}
    assert "Max core file size        0                    0" in found["limits"]


def test_files_are_read_only_and_homes_are_hidden(found: dict[str, Any]) -> None:
    mounts = {place: options.split(",") for place, options in found["mounts"]}
    assert "ro" in mounts["/"]
    for place in ("/home", "/root", "/run/user", "/sys", "/proc/sys"):
        assert place not in mounts or "ro" in mounts[place], place
    assert "/home" in mounts
    writable = {place for place, options in mounts.items() if "rw" in options}
    assert writable <= WRITABLE, writable


def test_other_processes_and_the_kernel_are_out_of_sight(found: dict[str, Any]) -> None:
    assert set(found["proc"]) <= {"self", "thread-self"}
    own = int(found["status"]["Uid"].split()[0])
    assert set(found["pids"]) == {own}
    assert not {"kmsg", "mem", "sda", "vda"} & set(found["devices"])


@pytest.mark.parametrize("family", ["inet", "inet6", "packet", "vsock"])
def test_there_are_no_sockets_but_local_ones(found: dict[str, Any], family: str) -> None:
    assert found[family] == EAFNOSUPPORT


@pytest.mark.parametrize(
    "what",
    ["writable code", "user namespace", "mount namespace", "real time", "io_uring", "personality", "ptrace",
     "keys of the kernel", "the clock", "mount", "root"],
)  # fmt: skip
def test_system_calls_that_no_call_needs_fail(found: dict[str, Any], what: str) -> None:
    assert found[what] == EPERM


def test_nobody_gets_a_better_priority(found: dict[str, Any]) -> None:
    assert found["priority"] in (EACCES, EPERM)


def exposure(unit: str) -> float:
    """What `systemd-analyze security` makes of a unit: 0 is best, 10 is worst."""
    command = ["systemd-analyze", "security", "--no-pager", unit]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    number = re.search(r"Overall exposure level for \S+: ([\d.]+)", said)
    assert number
    return float(number[1])


def test_the_unit_is_less_exposed_than_its_neighbours() -> None:
    own = exposure("srpcd.service")
    others = {unit: exposure(unit) for unit in ("ssh.service", "dbus.service", "cron.service")}
    print(own, others)
    assert own <= 2.5
    assert own < min(others.values()) - 5
