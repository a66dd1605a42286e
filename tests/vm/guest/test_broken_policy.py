"""The functional suite notices a policy that lacks a rule, also where the daemon gets along without.

This machine is of no use afterwards, so it is the last thing that is done there.
"""

import bz2
import re
import subprocess
import sys
from pathlib import Path

from tests.vm.guest.conftest import run
from tests.vm.guest.denials import Expected

CHECKOUT = Path(__file__).resolve().parents[3]
STORED = Path("/var/lib/selinux/default/active/modules/400/srpc/cil")
"""The module as `semodule -i` has stored it: the language of the store, compressed."""

BROKEN = {
    # Workers get other soft limits then, which only the log tells.
    "(allow srpcd_t srpc_worker_domain (process (transition rlimitinh)))": (
        "(allow srpcd_t srpc_worker_domain (process (transition)))"
    ),
    # Programs can't be called then.
    "(allow srpc_worker_domain srpc_program_exec_t (file (read getattr execute open)))": "",
}

SUITE = "tests/integration/test_kernel_decides.py"
CALLS_A_PROGRAM = "test_a_member_of_the_group_calls_a_service_and_a_program"
CALLS_NONE = "test_chmod_on_the_endpoint_binds_from_the_next_call[calc/echo]"


def test_the_suite_fails_under_a_policy_that_lacks_rules(expected_denials: Expected) -> None:
    text = bz2.decompress(STORED.read_bytes()).decode()
    module = CHECKOUT / "srpc.cil"  # where semodule, in its own domain, may read it
    for rule, other in BROKEN.items():
        assert text.count(rule) == 1, f"the policy is another one now: {rule}"
        text = text.replace(rule, other)
    module.write_text(text)
    run("semodule", "-X", "500", "-i", str(module))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "tests.vm.guest.denials", "-rA"]
    which = [f"{SUITE}::{name}" for name in (CALLS_NONE, CALLS_A_PROGRAM)]  # the first one starts the worker
    with expected_denials("srpcd_t srpc_*_worker_t:process rlimitinh", "srpc_*_worker_t srpc_program_exec_t:file *"):
        done = subprocess.run([*command, *which], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    assert re.search(rf"^FAILED .*{CALLS_A_PROGRAM}", done.stdout, re.MULTILINE), done.stdout
    # It passes, and is an error none the less.
    assert f"PASSED {SUITE}::{CALLS_NONE}" in done.stdout
    assert re.search(rf"^ERROR .*{re.escape(CALLS_NONE)}.*SELinux denied", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"denied +\{ rlimitinh \}", done.stdout)
