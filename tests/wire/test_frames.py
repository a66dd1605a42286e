"""Frames: what comes out is what went in, however it is cut, and no length is believed."""

from collections.abc import Callable
from errno import EMSGSIZE, EPROTO
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srpcd.wire import frames, limits, messages
from srpcd.wire.errors import ProtocolError
from srpcd.wire.frames import CALL, FLUSH, HEADER, PING, REQUESTS, STRANGER_REQUESTS, WALK, FrameReader, frame

Frame = tuple[int, int, bytes]
Tell = Callable[[int, bytes], int]

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


# --- large frames ------------------------------------------------------------------------------------------------------

BIG = bytes(range(256)) * 1200
"""A payload of 300 KB that is nowhere like itself a little further on."""


def large_frames(metadata: bytes = b"") -> list[tuple[Frame, bytes]]:
    """Some frames as a reader that tells heads gives them out, the large ones in two: (frame, payload)."""
    head = frames.CALL_HEAD.pack(7, len(metadata)) + metadata
    return [
        ((CALL, 1, head + b"small"), b""),
        ((CALL, 2, head), BIG),
        ((PING, 3, b""), b""),
        ((CALL, 4, head), BIG[::-1]),
        ((CALL, 5, head + bytes(100)), b""),
    ]


def stream_of(wanted: list[tuple[Frame, bytes]]) -> bytes:
    return b"".join(frame(kind, seq, body + payload) for (kind, seq, body), payload in wanted)


def read_apart(reader: FrameReader, pieces: list[bytes], into_room: bool) -> list[tuple[Frame, bytes]]:
    """What a reader gives. into_room: let large frames be filled in place, as far as their room goes."""
    found = []
    for piece in pieces:
        rest = piece
        while True:
            if into_room and reader.large and rest:
                with reader.room() as room:
                    count = min(len(room), len(rest))
                    room[:count] = rest[:count]
                reader.filled(count)
                rest = rest[count:]
                fed = rest if not reader.large else b""
            else:
                fed = rest
            for kind, seq, body in reader.feed(fed):
                found.append(((kind, seq, body), reader.payload))
            if not (into_room and reader.large and rest and fed is not rest):
                break
    return found


@pytest.mark.parametrize("into_room", [False, True])
@pytest.mark.parametrize("metadata", [b"", b'{"a":1}', b"m" * limits.METADATA_MAX])
@pytest.mark.parametrize("step", [1009, 4096, 65536, 65557, 262144, 10**7])
def test_a_large_payload_is_given_out_apart_however_it_is_cut(step: int, metadata: bytes, into_room: bool) -> None:
    wanted = large_frames(metadata)
    stream = stream_of(wanted)
    reader = FrameReader(REQUESTS, frames.call_head)
    found = read_apart(reader, [stream[at : at + step] for at in range(0, len(stream), step)], into_room)
    # Where the head, or more, came before it was seen that the frame is large, it may come whole: then nothing is apart.
    assert [(kind, seq, body + payload) for (kind, seq, body), payload in found] == [
        (kind, seq, body + payload) for (kind, seq, body), payload in wanted
    ]
    for ((_, _, body), payload), ((_, _, head), rest) in zip(found, wanted, strict=True):
        assert (body, payload) in ((head, rest), (head + rest, b""))
    assert not reader.partial


@pytest.mark.parametrize("cut", [1, 19, 20, 21, 31, 32, 33, 39, 40, 1000, 20 + 12 + 7 + len(BIG) - limits.LARGE, 300_000])
@pytest.mark.parametrize("into_room", [False, True])
def test_a_large_frame_may_be_cut_at_any_place(cut: int, into_room: bool) -> None:
    body = frames.CALL_HEAD.pack(7, 7) + b"metadat" + BIG
    stream = frame(CALL, 9, body) + frame(PING, 10)
    for head in (None, frames.call_head):
        reader = FrameReader(REQUESTS, head)
        found = read_apart(reader, [stream[:cut], stream[cut:]], into_room)
        assert [(kind, seq, body + payload) for (kind, seq, body), payload in found] == [(CALL, 9, body), (PING, 10, b"")]
        if head and cut >= 39 and cut <= 20 + 12 + 7 + len(BIG) - limits.LARGE:
            assert found[0] == ((CALL, 9, body[:19]), BIG)


def test_the_head_of_a_reply_is_told_too() -> None:
    body = frames.METADATA_LENGTH.pack(2) + b"{}" + BIG
    reader = FrameReader(frames.REPLIES, frames.reply_head)
    assert list(reader.feed(frame(frames.CALL_REPLY, 1, body)[:100])) == []
    ((kind, seq, head),) = reader.feed(frame(frames.CALL_REPLY, 1, body)[100:])
    assert (kind, seq, head) == (frames.CALL_REPLY, 1, body[:6])
    # The payload is there while the frame is looked at, and not behind it.
    assert reader.payload == b""


@pytest.mark.parametrize(
    ("tell", "kind", "beginning", "size"),
    [
        (frames.call_head, CALL, frames.CALL_HEAD.pack(1, 0), 12),
        (frames.call_head, CALL, frames.CALL_HEAD.pack(1, 3) + b"abc", 15),
        (frames.call_head, CALL, frames.CALL_HEAD.pack(1, 3) + b"ab", 0),
        (frames.call_head, CALL, frames.CALL_HEAD.pack(1, 0)[:-1], 0),
        (frames.call_head, CALL, frames.CALL_HEAD.pack(1, limits.METADATA_MAX + 1) + bytes(10**5), 0),
        (frames.call_head, frames.APPEND, frames.CALL_HEAD.pack(1, 0), 0),
        (frames.reply_head, frames.CALL_REPLY, frames.METADATA_LENGTH.pack(0), 4),
        (frames.reply_head, frames.CALL_REPLY, frames.METADATA_LENGTH.pack(3) + b"abc", 7),
        (frames.reply_head, frames.CALL_REPLY, frames.METADATA_LENGTH.pack(3) + b"ab", 0),
        (frames.reply_head, frames.CALL_REPLY, b"abc", 0),
        (frames.reply_head, frames.CALL_REPLY, frames.METADATA_LENGTH.pack(limits.METADATA_MAX + 1) + bytes(10**5), 0),
        (frames.reply_head, frames.STAT_REPLY, frames.METADATA_LENGTH.pack(0), 0),
    ],
)
def test_a_head_is_told_from_the_beginning_or_not_at_all(tell: Tell, kind: int, beginning: bytes, size: int) -> None:
    assert tell(kind, beginning) == size


def test_a_header_alone_makes_no_room_for_what_it_announces() -> None:
    reader = FrameReader(REQUESTS, frames.call_head)
    list(reader.feed(HEADER.pack(CALL, 1, limits.CALL_MAX)))
    assert reader.large == limits.CALL_MAX
    total = 0
    while reader.large:
        with reader.room() as room:
            assert len(room) <= max(limits.LARGE, 32 * total)
            count = len(room)
        reader.filled(count)
        total += count
    ((_, _, body),) = reader.feed(b"")
    assert len(body) == limits.CALL_MAX


def test_a_large_frame_can_be_had_to_oneself() -> None:
    body = frames.CALL_HEAD.pack(7, 2) + b"{}" + BIG
    reader = FrameReader(REQUESTS, frames.call_head)
    assert reader.divert() is None
    assert list(reader.feed(frame(CALL, 9, body)[:50])) == []
    assert reader.divert() == (9, body[:14], BIG[:16], len(BIG) - 16)
    assert not reader.partial
    # Its rest is read elsewhere; the next frame begins behind it.
    assert list(reader.feed(frame(PING, 10))) == [(PING, 10, b"")]
    # A head that is not there yet can't be told: the frame is collected here.
    assert list(reader.feed(frame(CALL, 11, body)[:25])) == []
    assert reader.divert() is None
    assert list(reader.feed(frame(CALL, 11, body)[25:])) == [(CALL, 11, body)]


def test_what_is_large_is_sent_alone_and_uncopied_and_the_rest_together() -> None:
    big = bytes(limits.LARGE)
    view = memoryview(big)
    out: list[bytes | memoryview] = [b"a", b"b", big, view, b"c", b"d"]
    taken = [frames.take(out) for _ in range(4)]
    assert taken == [b"ab", big, view, b"cd"]
    assert taken[1] is big
    assert taken[2] is view
    assert out == []


def test_a_large_frame_goes_out_in_pieces_that_make_the_whole() -> None:
    head, payload = b"head", BIG
    first, rest = frames.apart(head, payload)
    assert len(first) >= limits.LARGE
    assert isinstance(rest, memoryview)
    assert rest.obj is payload
    assert b"".join((first, rest)) == head + payload
    assert frames.apart(head, bytes(2 * limits.LARGE - 1)) == (head + bytes(2 * limits.LARGE - 1),)


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


def test_a_reader_tells_what_it_keeps_of_a_frame_and_what_is_missing() -> None:
    reader = FrameReader(frames.REQUESTS, frames.call_head)
    assert (reader.partials, reader.missing, reader.held, reader.expected) == (0, 0, 0, 0)
    assert list(reader.feed(frame(frames.PING, 1)[:5])) == []
    assert (reader.partials, reader.missing, reader.held, reader.expected) == (1, 15, 5, 0)
    assert len(list(reader.feed(frame(frames.PING, 1)[5:]))) == 1
    assert (reader.partials, reader.missing, reader.held) == (1, 0, 0)
    size = 10 * limits.LARGE
    body = messages.call_body(3, bytes(size))
    whole = frame(frames.CALL, 2, body)
    assert list(reader.feed(whole[:1000])) == []
    head = len(body) - size
    assert (reader.partials, reader.missing, reader.expected) == (2, len(whole) - 1000, size)
    assert reader.held == 1000 - 20 - head  # no room is made before it is asked for
    reader.room().release()
    assert reader.held >= limits.LARGE
    assert len(list(reader.feed(whole[1000:]))) == 1
    assert (reader.partials, reader.missing, reader.held, reader.expected) == (2, 0, 0, 0)


@pytest.mark.parametrize("come", [5, 1000, 200_000])
def test_a_reader_that_is_cleared_keeps_nothing(come: int) -> None:
    reader = FrameReader(frames.REQUESTS, frames.call_head)
    assert list(reader.feed(frame(frames.CALL, 2, messages.call_body(3, bytes(limits.MIB)))[:come])) == []
    assert (reader.partial, reader.held > 0) == (True, True)
    reader.clear()
    assert (reader.partial, reader.large, reader.missing, reader.held, reader.expected) == (False, 0, 0, 0, 0)
