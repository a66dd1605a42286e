"""Bodies: each is what its type says, or a ProtocolError; paths are clean or refused."""

import json
from errno import EBADMSG, EINVAL, EMSGSIZE, ENAMETOOLONG
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srpcd.wire import errors, frames, limits, messages
from srpcd.wire.errors import ProtocolError, RequestError

VALID = [
    (messages.Auth, b'{"afid":1,"uname":"alice"}', messages.Auth(1, "alice", "/", "pam")),
    (messages.Auth, b'{"afid":0,"uname":"a","mechanism":"peer","aname":"/x"}', messages.Auth(0, "a", "/x", "peer")),
    (messages.Clunk, b'{"fid":18446744073709551615}', messages.Clunk(2**64 - 1)),
    (messages.Clunk, b' {"fid" : 1, "later": [{}]} ', messages.Clunk(1)),
    (messages.Append, b'{"fid":1,"data":"\\ud83d\\ude00\\u0000"}', messages.Append(1, "😀\0")),
    (messages.Stat, b'{"fid":1,"after":"x","limit":1000}', messages.Stat(1, "x", 1000)),
    (messages.Error, b'{"errno":13,"code":"EACCES","message":"no"}', messages.Error(13, "EACCES", "no")),
]

INVALID: list[tuple[type[messages.Message], bytes]] = [
    (messages.Clunk, b""),
    (messages.Clunk, b"{"),
    (messages.Clunk, b"null"),
    (messages.Clunk, b"[1]"),
    (messages.Clunk, b"{}"),
    (messages.Clunk, b'{"fid":1} x'),
    (messages.Clunk, b'{"fid":-1}'),
    (messages.Clunk, b'{"fid":18446744073709551616}'),
    (messages.Clunk, b'{"fid":1' + b"0" * 5000 + b"}"),
    (messages.Clunk, b'{"fid":1.5}'),
    (messages.Clunk, b'{"fid":1e30}'),
    (messages.Clunk, b'{"fid":true}'),
    (messages.Clunk, b'{"fid":"1"}'),
    (messages.Clunk, b'{"fid":null}'),
    (messages.Clunk, b'{"fid":NaN}'),
    (messages.Clunk, b"\xff\xfe"),
    (messages.Clunk, b'{"fid":1,"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    (messages.Clunk, b'{"x":' * 100_000 + b"1" + b"}" * 100_000),
    (messages.Append, b'{"fid":1,"data":"\xed\xa0\x80"}'),
    (messages.Append, b'{"fid":1,"data":"\xff"}'),
    (messages.Append, b'{"fid":1,"data":"\\ud800"}'),
    (messages.Append, b'{"fid":1,"data":"\\ud800\\ud800\\ud800"}'),
    (messages.Append, b'{"fid":1,"data":"\\udc00 and more"}'),
    (messages.Append, b'{"fid":1,"data":"a\nb"}'),
    (messages.Auth, b'{"afid":1,"uname":"a","mechanism":"trust me"}'),
    (messages.Stat, b'{"fid":1,"limit":0}'),
    (messages.Stat, b'{"fid":1,"limit":1001}'),
    (messages.Error, b'{"errno":0,"code":"","message":""}'),
    (messages.Error, b'{"errno":4096,"code":"","message":""}'),
]


@pytest.mark.parametrize(("kind", "body", "wanted"), VALID)
def test_a_good_body_is_decoded(kind: type[messages.Message], body: bytes, wanted: messages.Message) -> None:
    assert messages.decode(kind, body) == wanted
    assert messages.decode(kind, messages.encode(wanted)) == wanted


@pytest.mark.parametrize(("kind", "body"), INVALID)
def test_a_bad_body_is_a_protocol_error_that_says_where(kind: type[messages.Message], body: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        messages.decode(kind, body, 9)
    assert (caught.value.errno, caught.value.seq) == (EBADMSG, 9)
    assert caught.value.message.startswith(kind.__name__.lower())
    assert len(caught.value.message) <= limits.ERROR_MESSAGE_MAX


@given(st.sampled_from(list(messages.REQUEST_TYPES.values())), st.binary(max_size=200))
def test_any_bytes_are_decoded_or_raise_protocol_error_and_nothing_else(kind: type[messages.Message], body: bytes) -> None:
    try:
        assert isinstance(messages.decode(kind, body), kind)
    except ProtocolError:
        pass


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["fid", "afid", "path"]), inner),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from(["fid", "afid", "newfid", "uname", "aname", "path", "data", "after", "limit"]), any_json)
)
def test_any_json_is_decoded_or_raises_protocol_error_and_nothing_else(table: dict[str, object]) -> None:
    for kind in messages.REQUEST_TYPES.values():
        try:
            message = messages.decode(kind, json.dumps(table).encode())
            assert messages.decode(kind, messages.encode(message)) == message
        except ProtocolError:
            pass


CALLS_INVALID = [
    (b"", EBADMSG),
    (bytes(11), EBADMSG),
    (frames.CALL_HEAD.pack(1, 1), EBADMSG),
    (frames.CALL_HEAD.pack(1, 5) + b"1234", EBADMSG),
    (frames.CALL_HEAD.pack(1, limits.METADATA_MAX + 1) + bytes(limits.METADATA_MAX + 1), EMSGSIZE),
    (frames.CALL_HEAD.pack(1, 2**32 - 1), EMSGSIZE),
    (frames.CALL_HEAD.pack(1, 2) + b"{}" + bytes(limits.PAYLOAD_MAX + 1), EMSGSIZE),
]


def test_a_call_is_split_after_its_fid() -> None:
    body = messages.call_body(2**64 - 1, b"payload", b"{}")
    fid, rest = messages.split_call(body)
    assert fid == 2**64 - 1
    assert messages.split_call_reply(rest) == (b"payload", b"{}")
    assert messages.split_call_reply(messages.call_reply_body(b"payload")) == (b"payload", b"")
    assert messages.split_call(messages.call_body(1, b"")) == (1, bytes(4))


@pytest.mark.parametrize(("body", "errno"), CALLS_INVALID)
def test_a_call_whose_lengths_do_not_fit_is_a_protocol_error(body: bytes, errno: int) -> None:
    with pytest.raises(ProtocolError) as caught:
        messages.split_call(body, 3)
    assert (caught.value.errno, caught.value.seq) == (errno, 3)


@pytest.mark.parametrize(
    "body", [b"", b"123", pack("!I", 1), pack("!I", 2**32 - 1) + b"x", pack("!I", 70000) + bytes(70000)]
)
def test_a_call_reply_whose_lengths_do_not_fit_is_a_protocol_error(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        messages.split_call_reply(body)


PATHS = [
    ("", []),
    ("a", ["a"]),
    ("calc/add", ["calc", "add"]),
    ("ä/😀/...".replace("...", "x.y"), ["ä", "😀", "x.y"]),
    ("x" * 255, ["x" * 255]),
    ("/".join(["y" * 255] * 8), ["y" * 255] * 8),
]

BAD_PATHS = [
    ("/", EINVAL),
    ("/a", EINVAL),
    ("a/", EINVAL),
    ("a//b", EINVAL),
    (".", EINVAL),
    ("..", EINVAL),
    ("a/../b", EINVAL),
    ("a/./b", EINVAL),
    (".hidden", EINVAL),
    ("a/.hidden", EINVAL),
    ("a\0b", EINVAL),
    ("\0", EINVAL),
    ("x" * 256, ENAMETOOLONG),
    ("ä" * 128, ENAMETOOLONG),
    ("/".join(["y" * 255] * 9), ENAMETOOLONG),
]


@pytest.mark.parametrize(("path", "elements"), PATHS)
def test_a_clean_path_is_split(path: str, elements: list[str]) -> None:
    assert messages.split_path(path) == elements
    assert messages.split_aname(path) == elements
    assert messages.split_aname("/" + path) == elements


@pytest.mark.parametrize(("path", "errno"), BAD_PATHS)
def test_an_unclean_path_is_refused_and_the_connection_goes_on(path: str, errno: int) -> None:
    with pytest.raises(RequestError) as caught:
        messages.split_path(path)
    assert caught.value.errno == errno


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=50))
def test_no_split_path_leaves_the_tree(path: str) -> None:
    try:
        elements = messages.split_path(path)
    except RequestError:
        return
    assert "/".join(elements) == path
    assert all(each and each[0] != "." and "\0" not in each and "/" not in each for each in elements)


def test_errors_have_a_number_a_name_and_a_sentence() -> None:
    error = messages.decode(messages.Error, messages.error_body(13))
    assert (error.errno, error.code, error.message) == (13, "EACCES", errors.SENTENCES[13])
    assert errors.sentence(2000) == errors.code(2000) == "E2000"
    assert errors.sentence(7) == "E2BIG"
    kind, seq, body = next(frames.FrameReader(frames.REPLIES).feed(messages.error_frame(5, 22, "x" * 10_000)))
    assert (kind, seq, len(messages.decode(messages.Error, body).message)) == (frames.ERROR, 5, limits.ERROR_MESSAGE_MAX)


def test_wire_errors_read_as_sentences() -> None:
    assert str(RequestError(13)) == "EACCES: permission denied by the kernel"
    assert str(ProtocolError(71, "why", 3)) == "EPROTO: why"
