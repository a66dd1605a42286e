"""Frames: what comes out is what went in, however it is cut, and no length is believed."""

from errno import EMSGSIZE, EPROTO
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srpcd.wire import frames, limits, messages
from srpcd.wire.errors import ProtocolError
from srpcd.wire.frames import CALL, FLUSH, HEADER, PING, REQUESTS, STRANGER_REQUESTS, WALK, FrameReader, frame

Frame = tuple[int, int, bytes]

VALID: list[list[Frame]] = [
    [],
    [(PING, 0, b"")],
    [(PING, 2**64 - 1, b"")],
    [(WALK, 1, b"{}"), (PING, 2, b""), (CALL, 3, bytes(5000))],
    [(FLUSH, 1, bytes(8))] * 3,
    [(CALL, 1, bytes(limits.CALL_MAX))],
]

INVALID = [
    (HEADER.pack(WALK, 7, 2**63), EMSGSIZE),
    (HEADER.pack(WALK, 7, 2**64 - 1), EMSGSIZE),
    (HEADER.pack(CALL, 7, limits.CALL_MAX + 1), EMSGSIZE),
    (HEADER.pack(FLUSH, 7, 9), EMSGSIZE),
    (HEADER.pack(PING, 7, 1), EMSGSIZE),
    (HEADER.pack(0, 7, 0), EPROTO),
    (HEADER.pack(frames.ERROR, 7, 0), EPROTO),
    (HEADER.pack(frames.CALLER, 7, 0), EPROTO),
    (HEADER.pack(frames.LISTEN_REPLY, 7, 0), EPROTO),
    (HEADER.pack(99, 7, 0), EPROTO),
    (HEADER.pack(-(2**31), 7, 0), EPROTO),
    (HEADER.pack(2**31 - 1, 7, 2**64 - 1), EPROTO),
]


def read(data: bytes, cuts: list[int], reader: FrameReader | None = None) -> list[Frame]:
    reader = reader or FrameReader(REQUESTS)
    found = []
    edges = [0, *sorted(cuts), len(data)]
    for start, stop in pairwise(edges):
        found += list(reader.feed(data[start:stop]))
    return found


@pytest.mark.parametrize("wanted", VALID)
def test_frames_that_come_at_once_are_all_found(wanted: list[Frame]) -> None:
    assert read(b"".join(frame(*each) for each in wanted), []) == wanted


def test_frames_that_drip_in_are_found_when_their_last_byte_comes() -> None:
    reader = FrameReader(REQUESTS)
    data = frame(WALK, 5, b'{"fid":1}')
    for at in range(len(data) - 1):
        assert list(reader.feed(data[at : at + 1])) == []
        assert reader.partial
    assert list(reader.feed(data[-1:])) == [(WALK, 5, b'{"fid":1}')]
    assert not reader.partial


def test_an_empty_read_changes_nothing() -> None:
    assert list(FrameReader(REQUESTS).feed(b"")) == []


@pytest.mark.parametrize(("data", "errno"), INVALID)
@pytest.mark.parametrize("before", [b"", frame(PING, 1), frame(CALL, 1, bytes(100))])
def test_bad_headers_are_refused_before_a_byte_of_the_body_is_kept(data: bytes, errno: int, before: bytes) -> None:
    reader = FrameReader(REQUESTS)
    feed = reader.feed(before + data)
    if before:
        next(feed)
    with pytest.raises(ProtocolError) as caught:
        next(feed)
    assert (caught.value.errno, caught.value.seq) == (errno, 7)


def test_a_bad_header_that_drips_in_is_refused_at_its_last_byte() -> None:
    reader = FrameReader(REQUESTS)
    data = HEADER.pack(WALK, 7, 2**63)
    for at in range(19):
        assert list(reader.feed(data[at : at + 1])) == []
    with pytest.raises(ProtocolError):
        list(reader.feed(data[19:]))


def test_strangers_have_less_room_and_no_type_more() -> None:
    assert STRANGER_REQUESTS.keys() == REQUESTS.keys()
    assert all(STRANGER_REQUESTS[kind] <= REQUESTS[kind] for kind in REQUESTS)
    assert max(STRANGER_REQUESTS.values()) == limits.STRANGER_MAX
    assert list(FrameReader(REQUESTS).feed(HEADER.pack(CALL, 1, limits.CALL_MAX))) == []
    with pytest.raises(ProtocolError):
        list(FrameReader(STRANGER_REQUESTS).feed(HEADER.pack(CALL, 1, limits.CALL_MAX)))


def test_limits_may_be_raised_between_two_reads() -> None:
    reader = FrameReader(STRANGER_REQUESTS)
    assert list(reader.feed(frame(PING, 1))) == [(PING, 1, b"")]
    reader.limits = REQUESTS
    assert list(reader.feed(HEADER.pack(CALL, 1, limits.CALL_MAX))) == []


def test_every_request_has_a_name_and_a_reply() -> None:
    assert frames.NAMES.keys() == REQUESTS.keys()
    assert {kind + 1 for kind in REQUESTS} | {frames.ERROR} == frames.REPLIES.keys()


@given(
    st.lists(st.tuples(st.sampled_from([WALK, CALL, FLUSH]), st.integers(0, 2**64 - 1), st.binary(max_size=8)), max_size=6),
    st.data(),
)
def test_frames_are_the_same_however_they_are_cut(wanted: list[Frame], data: st.DataObject) -> None:
    stream = b"".join(frame(*each) for each in wanted)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))
    assert read(stream, cuts) == wanted


@given(st.lists(st.binary(max_size=64), max_size=8))
def test_any_bytes_are_parsed_or_raise_protocol_error_and_nothing_else(pieces: list[bytes]) -> None:
    reader = FrameReader(REQUESTS)
    try:
        for piece in pieces:
            for kind, seq, body in reader.feed(piece):
                assert len(body) <= REQUESTS[kind]
                assert 0 <= seq < 2**64
    except ProtocolError:
        pass


CALLERS = [
    (1000, 1000, (4, 20), "alice", "", "calc/add"),
    (1, 2, (), 'a"\\\n', "u:r:t:s0", "ä/😀"),
    (1, 2, (), "\udcff", "", ""),
    (2**32 - 2, 0, tuple(range(60000, 60900)), "many", "", "x"),
]


@pytest.mark.parametrize(("uid", "gid", "groups", "user", "context", "endpoint"), CALLERS)
def test_the_first_frame_of_a_line_is_json_that_fits_into_one_write(
    uid: int, gid: int, groups: tuple[int, ...], user: str, context: str, endpoint: str
) -> None:
    data = frames.caller_frame(uid, gid, groups, user, context, endpoint)
    assert len(data) <= frames.PIPE_BUF
    ((kind, seq, body),) = FrameReader(frames.LINE_REQUESTS).feed(data)
    assert (kind, seq) == (frames.CALLER, 0)
    if "\udcff" in user:
        return  # no account is called that, and JSON could not say it
    caller = messages.decode(messages.Caller, body)
    assert caller == messages.Caller(uid, gid, list(groups) if len(groups) < 500 else None, user, context or None, endpoint)
