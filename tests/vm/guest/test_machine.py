"""The machine is what the other tests take it for, and the watch over denials sees what it should."""

import contextlib
import subprocess
from pathlib import Path

import pytest

from tests.vm.guest import denials
from tests.vm.guest.denials import Expected

RULE = "unconfined_t ping_t:process transition"


def denied() -> None:
    """Make a denial that fits RULE."""
    done = subprocess.run(["runcon", "-t", "ping_t", "/bin/true"], capture_output=True)
    assert done.returncode != 0


def test_selinux_is_enforcing_and_landlock_is_there() -> None:
    assert Path("/sys/fs/selinux/enforce").read_text() == "1"
    assert {"landlock", "selinux"} <= set(Path("/sys/kernel/security/lsm").read_text().split(","))


def test_no_unit_failed() -> None:
    failed = subprocess.run(["systemctl", "--failed", "--no-legend", "--plain"], capture_output=True, text=True, check=True)
    assert failed.stdout == ""


def test_a_denial_that_was_expected_is_no_failure_and_its_record_is_there(expected_denials: Expected) -> None:
    with expected_denials(RULE) as found:
        denied()
    assert [each.rule for each in found] == [RULE]
    assert found[0].source.startswith("unconfined_u:unconfined_r:unconfined_t:")


def test_a_denial_that_was_expected_and_does_not_come_is_a_failure(expected_denials: Expected) -> None:
    with pytest.raises(pytest.fail.Exception, match="did not come"), expected_denials(RULE):
        pass


def test_a_denial_that_nobody_expected_fails_its_test(expected_denials: Expected) -> None:
    with contextlib.closing(denials.Log()) as own:
        own.read()
        with expected_denials(RULE):
            denied()
        with pytest.raises(pytest.fail.Exception, match="ping_t"):
            own.look("here")
        own.look("again: it was told of once")
