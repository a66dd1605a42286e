"""Which identity a worker gets, for any account and any process. The invariant: never an id that is not in both."""

import hypothesis
import pytest
from hypothesis import strategies as st

from srpcd.config import Authentication
from srpcd.monitor.accounts import Account
from srpcd.monitor.credentials import Credentials, covers, worker_identity
from srpcd.monitor.faults import Denied
from srpcd.monitor.launch import Identity

GIDS = st.integers(0, 6)
"""Few, so that account and process often have the same."""


@st.composite
def identities(draw: st.DrawFn) -> Identity:
    """Ids as accounts and connections have them: sorted groups, the gid among them."""
    gid = draw(GIDS)
    return Identity(draw(st.integers(1000, 1001)), gid, tuple(sorted(draw(st.sets(GIDS)) | {gid})), "")


def account(identity: Identity, *, first: bool = True) -> Account:
    return Account("alice", identity, True, "", first)


@hypothesis.given(identities(), identities())
def test_a_worker_has_no_id_that_account_and_process_do_not_both_have(of_account: Identity, process: Identity) -> None:
    credentials = Credentials("alice", process.uid, process)
    common = set(of_account.groups) & set(process.groups)
    try:
        found = worker_identity(account(of_account), credentials, Authentication())
    except Denied:
        assert of_account.uid != process.uid or not {of_account.gid, process.gid} & common
        return
    assert found.uid == of_account.uid == process.uid
    assert set(found.groups) == common
    assert found.gid in common
    assert found.gid == of_account.gid or of_account.gid not in process.groups
    assert covers(account(of_account), found)


@hypothesis.given(identities(), identities())
def test_the_administrator_can_give_all_groups_but_no_other_uid(of_account: Identity, process: Identity) -> None:
    credentials, settings = Credentials("alice", process.uid, process), Authentication(peer_groups="account")
    if of_account.uid == process.uid:
        assert worker_identity(account(of_account), credentials, settings) == of_account
    else:
        with pytest.raises(Denied, match="by the kernel"):
            worker_identity(account(of_account), credentials, settings)


@hypothesis.given(identities(), st.integers(1000, 1001))
def test_a_password_gives_all_groups_of_the_uid_that_it_has_proved(of_account: Identity, uid: int) -> None:
    credentials = Credentials("alice", uid, None)
    if of_account.uid == uid:
        assert worker_identity(account(of_account, first=False), credentials, Authentication()) == of_account
    else:
        with pytest.raises(Denied, match="its user proved"):
            worker_identity(account(of_account), credentials, Authentication())


def test_a_second_name_of_a_uid_is_for_those_whom_the_configuration_names() -> None:
    identity = Identity(1000, 5, (5,), "")
    credentials, second = Credentials("alice", 1000, identity), account(identity, first=False)
    with pytest.raises(Denied, match="peer_names"):
        worker_identity(second, credentials, Authentication())
    assert worker_identity(second, credentials, Authentication(peer_names=["alice"])) == identity


@hypothesis.given(identities(), identities())
def test_an_account_covers_a_worker_whose_ids_it_all_has(now: Identity, worker: Identity) -> None:
    assert covers(account(now), worker) == (now.uid == worker.uid and set(worker.groups) <= set(now.groups))
    assert not covers(None, worker)
    assert not covers(account(now._replace(context="other")), worker)
