"""Starting a program: what the new process inherits, and what it does not."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

START = """
import os, sys, _signal
sys.path.insert(0, {root!r})
from srpcd.worker.spawn import Process

for number in (_signal.SIGHUP, _signal.SIGQUIT, _signal.SIGUSR1):
    _signal.signal(number, _signal.SIG_IGN)
_signal.pthread_sigmask(_signal.SIG_BLOCK, (_signal.SIGUSR2,))
left = os.open("/", os.O_RDONLY)
os.set_inheritable(left, True)
program = os.open({program!r}, os.O_PATH | os.O_CLOEXEC)
process = Process(program, [{program!r}], {{"ONLY": "this"}}, b"")
os.waitid(os.P_PIDFD, process.pidfd, os.WEXITED | os.WNOWAIT)
os.write(1, os.read(process.stdout, 65536))
sys.exit(process.reap())
"""


def started(path: Path, script: str) -> list[str]:
    """The lines that a program writes when a process with open descriptors and ignored signals has started it."""
    path.write_text(script)
    path.chmod(0o755)
    code = START.format(root=str(ROOT), program=str(path))
    python = getattr(sys, "_base_executable", sys.executable)
    return subprocess.run([python, "-I", "-S", "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()


def test_a_descriptor_that_somebody_left_inheritable_is_not_inherited(tmp_path: Path) -> None:
    script = "#!/usr/bin/python3 -I\nimport os\nfor fd in os.listdir('/proc/self/fd'):\n"
    script += "    if os.path.exists(f'/proc/self/fd/{fd}'): print(os.readlink(f'/proc/self/fd/{fd}').partition(':')[0])\n"
    assert set(started(tmp_path / "look", script)) == {"pipe", str(tmp_path / "look")}


def test_no_signal_is_ignored_or_blocked_whatever_the_parent_does(tmp_path: Path) -> None:
    lines = started(tmp_path / "look", "#!/bin/sh\nexec grep -E 'Sig(Ign|Blk)' /proc/self/status\n")
    of_libc = 1 << 31 | 1 << 32  # as in test_worker_programs
    assert [int(line.split()[1], 16) & ~of_libc for line in lines] == [0, 0]


def test_the_environment_is_what_was_given(tmp_path: Path) -> None:
    assert started(tmp_path / "env", "#!/bin/sh\ntr '\\0' '\\n' </proc/$$/environ\n") == ["ONLY=this"]


def test_it_leads_a_process_group_of_its_own_in_the_same_session(tmp_path: Path) -> None:
    (line,) = started(tmp_path / "ps", "#!/bin/sh\nread line </proc/$$/stat\necho $$ ${line##*)}\n")
    pid, _state, _parent, group, session = line.split()[:5]
    assert (group, session) == (pid, str(os.getsid(0)))
