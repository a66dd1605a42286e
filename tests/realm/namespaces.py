"""Namespaces of a run's own: it sees and signals its own processes only, and all of them end with it.

`enter` lets the program go on in a grandchild of the process that was started:

    outside    the process that was started; it has no namespace of its own
      init     process 1 of the new PID namespace; it reaps orphans
        tests  the program, from the call of `enter` on

Outside passes signals on to init, init to the tests, and outside ends as the tests do: with their exit status, or by the
signal that ended them. All three are in the process group that was started. So a terminal signals the tests itself (Ctrl-C,
Ctrl-Z), and signals from a terminal are not passed on a second time.

The kernel kills all processes of the namespace when init ends, and init when outside ends, whatever the cause
(pid_namespaces(7)).
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import resource
import select
import signal
import socket
import struct
from pathlib import Path
from typing import NoReturn

from tests.realm import mounts, network

CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x20000000, 0x40000000
PR_SET_PDEATHSIG = 1
SIOCSIFFLAGS, IFF_UP = 0x8914, 1

_PASSED_ON = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}

_AS_REALTIME = {number: signal.SIGRTMIN + number for number in _PASSED_ON}
"""How outside tells init of a signal: the signal itself also comes to init where it is sent to the process group."""


def enter() -> bool:
    """Go on as a process of new PID, mount, IPC and network namespaces, the last with loopback only.

    Returns False, in the process that called, where the rights for it are missing. Raises RuntimeError where the process has
    several threads (only one would go on), OSError for other failures.
    """
    mounts.check_single_thread()
    own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _enter(own)
    finally:
        os.close(own)


def _enter(own: int) -> bool:
    try:
        mounts.call("unshare", CLONE_NEWPID)  # it is the next child that is in there
    except PermissionError:
        return False
    # Until there is a process to pass them on to, and for good in outside and init, which wait for them.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*_PASSED_ON, *_AS_REALTIME.values(), signal.SIGCHLD})
    outside = os.pidfd_open(os.getpid())
    read, write = os.pipe()
    init = os.fork()
    if not init:
        os.close(read)
        _separate(outside, write)
        tests = os.fork()
        if tests:
            _be_init(tests, write)
    else:
        os.close(write)
        fault = (os.read(read, 1) or bytes([errno.EIO]))[0]
        if not fault:
            _be_outside(init, read)
        os.waitpid(init, 0)
        mounts.call("setns", own, CLONE_NEWPID)
    for fd in (outside, write if not init else read):
        os.close(fd)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if init and fault not in (errno.EPERM, errno.EACCES):
        raise OSError(fault, f"no namespaces for the tests: {os.strerror(fault)}")
    return not init


def _separate(outside: int, report: int) -> None:
    """As init: make the other namespaces. Reports 0, or the errno that this fails with; then it ends."""
    fault = 0
    try:
        mounts.call("prctl", ctypes.c_int(PR_SET_PDEATHSIG), ctypes.c_ulong(signal.SIGKILL))
        if select.select([outside], [], [], 0)[0]:
            os._exit(1)  # it ended before it was said that we end with it
        mounts.own_namespace(CLONE_NEWIPC | CLONE_NEWNET)
        mounts.mount("proc", Path("/proc"), "proc", mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC)
        _start_loopback()
    except OSError as error:
        fault = error.errno or errno.EIO
    os.write(report, bytes([fault]))
    if fault:
        os._exit(1)


def _start_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
    network.make_addresses_local()


def _be_init(tests: int, report: int) -> NoReturn:
    """Reap orphans, pass signals on, and end with the tests, whose wait status is reported."""
    meant = {told: number for number, told in _AS_REALTIME.items()}
    try:
        while True:
            heard = signal.sigwaitinfo({*meant, signal.SIGCHLD})
            if heard.si_signo == signal.SIGCHLD:
                with contextlib.suppress(ChildProcessError):
                    while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                        if ended[0] == tests:
                            os.write(report, struct.pack("=i", ended[1]))
                            os._exit(0)
            elif heard.si_pid == 0:  # a process outside of the namespace has sent it
                os.kill(tests, meant[heard.si_signo])
    finally:
        os._exit(1)


def _be_outside(init: int, report: int) -> NoReturn:
    """Pass signals on until all is over, then end as the tests did."""
    try:
        ended, status = 0, 0
        while not ended:
            heard = signal.sigwaitinfo({*_PASSED_ON, signal.SIGCHLD})
            if heard.si_signo == signal.SIGCHLD:
                ended, status = os.waitpid(init, os.WNOHANG)
            elif heard.si_code <= 0:  # SI_USER and below: a process has sent it, and not the kernel for a terminal
                os.kill(init, _AS_REALTIME[signal.Signals(heard.si_signo)])
        reported = os.read(report, 4)
        if reported:
            (status,) = struct.unpack("=i", reported)
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            if number != signal.SIGKILL:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
            os.kill(os.getpid(), number)
        os._exit(os.waitstatus_to_exitcode(status))
    finally:
        os._exit(1)
