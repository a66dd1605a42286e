"""What takes several requests (log in, find a path's fid, call and find out that the file was replaced), without I/O.

A procedure is a generator: it yields a step, gets the step's result back, and returns what it was asked for. An error of
a step is thrown in at the place where it was yielded. The asyncio and the blocking connection run the same procedures.

    Send    one request; its reply             Forget  clunk a fid, nothing to wait for
    Ask     prompts for a person; answers      Pause   seconds to wait
"""

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from errno import E2BIG, EACCES, EAGAIN, EBADF, EINVAL, EKEYEXPIRED, EPROTO, ESTALE
from typing import Any, NamedTuple, TypeAlias, TypeVar, get_args

from srpc_client import requests
from srpc_client.errors import AuthenticationError, CallError
from srpc_client.requests import Send
from srpcd.wire import messages
from srpcd.wire.limits import FIDS_MAX, NAME_MAX, STAT_PAGE
from srpcd.wire.messages import Mechanism, Prompt

CACHED_FIDS_MAX = FIDS_MAX - 1024
"""Paths whose fids a connection keeps. The rest of FIDS_MAX is for sessions, walks under way and your own fids."""

PATIENCE = 30.0
"""Seconds for which a login is tried again while the server says EAGAIN, unless a timeout ends it earlier."""

NAMES_MAX = 100_000
"""Names that are taken of one directory: a hundred pages, and some 30 MB of memory at most. Only a server that makes them up
has more, or a directory that is of no use."""

STEPS_MAX = 64
"""Steps of one login's conversation. PAM modules take one to three; a server that goes on asking collects what a person or a
program answers, and the login would never end."""

RETRIED = (ESTALE, EKEYEXPIRED)
"""Errnos after which a call may be made once more."""


class Ask(NamedTuple):
    """Show prompts to a person; the answers, one for each that wants one."""

    prompts: list[Prompt]


class Pause(NamedTuple):
    """Wait."""

    seconds: float


class Forget(NamedTuple):
    """Clunk a fid."""

    fid: int


Step: TypeAlias = Send | Ask | Pause | Forget
T = TypeVar("T")
Procedure: TypeAlias = Generator[Step, Any, T]


class Place(NamedTuple):
    """What a fid stands for. generation: of the session, when the fid was made."""

    fid: int
    qid: str
    is_dir: bool
    generation: int = 0


class SessionState:
    """One user's session: who, from where on, and by which afid it can be attached again."""

    __slots__ = ("afid", "aname", "closed", "generation", "mechanism", "root", "user")

    def __init__(self, user: str, aname: str, mechanism: Mechanism, afid: int, root: Place) -> None:
        self.user = user
        self.aname = aname
        self.mechanism = mechanism
        self.afid = afid
        self.root = root
        self.generation = 0  # how often it has been attached again
        self.closed = False

    def refuse_if_closed(self) -> None:
        """Raises CallError (EBADF): its fids are gone, and the server would say just that."""
        if self.closed:
            raise CallError(EBADF, "the session was closed on this side: log in again")


class Identified:
    """What a session of either kind says about itself."""

    _state: SessionState

    @property
    def user(self) -> str:
        """The user's name."""
        return self._state.user

    @property
    def mechanism(self) -> Mechanism:
        """How the user was authenticated."""
        return self._state.mechanism

    @property
    def aname(self) -> str:
        """Where the session's paths begin."""
        return self._state.aname


class Book:
    """The fids of one connection: which is next, and the least recently used of those that paths are cached under."""

    __slots__ = ("_capacity", "_next", "places")

    def __init__(self, capacity: int = CACHED_FIDS_MAX) -> None:
        self.places: OrderedDict[tuple[SessionState, str], Place] = OrderedDict()
        self._capacity = capacity
        self._next = 0

    def new(self) -> int:
        """A fid that this connection has never used."""
        self._next += 1
        return self._next

    def get(self, session: SessionState, path: str) -> Place | None:
        """The place of a path, if a fid for it is there."""
        key = (session, path)
        place = self.places.get(key)
        if place is not None:
            self.places.move_to_end(key)
        return place

    def put(self, session: SessionState, path: str, place: Place) -> int:
        """Keep a place. Returns a fid to be clunked, or 0."""
        self.places[session, path] = place
        if len(self.places) > self._capacity:
            return self.places.popitem(last=False)[1].fid
        return 0

    def drop(self, session: SessionState) -> list[int]:
        """Forget all places of a session. Returns their fids, which are to be clunked."""
        keys = [key for key in self.places if key[0] is session]
        return [self.places.pop(key).fid for key in keys]


# --- log in ------------------------------------------------------------------------------------------------------------


class Login(NamedTuple):
    """Who wants a session, where, and how they prove it.

    password: answers the first secret prompt. interactive: whether `Ask` leads to somebody who answers.
    """

    user: str
    aname: str
    mechanism: Mechanism
    password: str | None
    interactive: bool


def mechanism_for(asked: Mechanism | None, by_kernel: bool) -> Mechanism:
    """The mechanism to log in with. by_kernel: whether it can be "peer". Raises ValueError for one that there is none of."""
    if asked is None:
        return "peer" if by_kernel else "pam"
    if asked not in get_args(Mechanism):
        raise ValueError(f"mechanism={asked!r}: there are {' and '.join(get_args(Mechanism))}")
    return asked


def login(book: Book, who: Login) -> Procedure[SessionState]:
    """Authenticate and attach.

    Raises AuthenticationError, CallError (what attach was refused with; EAGAIN after PATIENCE).
    """
    for pause in _backoff():
        afid = book.new()
        try:
            yield from _authenticate(afid, who)
            root = yield from _attach(book, afid, who.user, who.aname)
            return SessionState(who.user, who.aname, who.mechanism, afid, root)
        except Exception as fault:  # also one of the function that answers prompts
            yield Forget(afid)
            if not (isinstance(fault, CallError) and fault.errno == EAGAIN and pause):
                raise
        yield Pause(pause)
    raise AssertionError("the last pause is 0")


def _backoff() -> Iterator[float]:
    pause, spent = 0.1, 0.0
    while spent + pause < PATIENCE:
        yield pause
        spent += pause
        pause = min(2 * pause, 2.0)
    yield 0.0


def _authenticate(afid: int, who: Login) -> Procedure[None]:
    try:
        reply: messages.AuthReply = yield requests.auth(afid, who.user, who.aname, who.mechanism)
    except CallError as refusal:
        if refusal.errno == EACCES:
            raise AuthenticationError(EACCES, refusal.message if who.mechanism == "pam" else _not_you(who.user)) from None
        raise
    prompts, verdict, password = reply.prompts, "1", who.password
    remarks: list[str] = []
    for _ in range(STEPS_MAX):
        remarks += [prompt.text for prompt in prompts if prompt.style in ("info", "error")]
        if not any(prompt.style in ("secret", "text") for prompt in prompts):
            break
        answers, password = yield from _answers(prompts, password, who.interactive)
        for answer in answers:
            step: messages.AppendReply = yield requests.append(afid, answer)
            verdict, prompts = step.data, step.prompts or []
            if verdict:  # nothing more is wanted, whatever the prompts say
                prompts = [Prompt("info", prompt.text) for prompt in prompts]
                break
    else:
        raise AuthenticationError(EPROTO, f"the server has asked {STEPS_MAX} times, and still accepts or refuses nothing")
    if verdict == "1":
        return
    said = f"; it said: {' '.join(remarks)[:500]}" if remarks else ""
    raise AuthenticationError(EACCES, f"the server did not accept {who.user!r} with what was answered{said}")


def _not_you(user: str) -> str:
    # No password was given, so the server's one sentence for all refusals is about something else.
    return (
        f"the kernel does not say that you are {user!r}, or that account makes no calls (root and the daemon's own do not);"
        " to log in as another user, give a password or answer prompts"
    )


def _answers(
    prompts: Sequence[Prompt], password: str | None, interactive: bool
) -> Generator[Step, Any, tuple[list[str], str | None]]:
    """(an answer for each prompt that wants one, the password if it is still unused)."""
    prompts = list(prompts)
    place = next((at for at, prompt in enumerate(prompts) if prompt.style == "secret"), None)
    used: str | None = None
    if password is not None and place is not None:
        used, password = password, None
        before = sum(prompt.style in ("secret", "text") for prompt in prompts[:place])
        del prompts[place]
    answers: list[str] = []
    asked = [prompt for prompt in prompts if prompt.style in ("secret", "text")]
    if prompts and (asked or interactive):  # a person is also shown what wants no answer
        if not interactive:
            raise AuthenticationError(
                EACCES, f"the server asks for {asked[0].text.strip()!r}: give prompt=, a function that answers it"
            )
        answers = list((yield Ask(prompts)))
        if len(answers) != len(asked):
            raise AuthenticationError(EINVAL, f"{len(asked)} prompts want an answer, and prompt= gave {len(answers)}")
    if used is not None:
        answers.insert(before, used)
    return answers, password


def _attach(book: Book, afid: int, user: str, aname: str) -> Procedure[Place]:
    fid = book.new()
    reply: messages.Qid = yield requests.attach(afid, fid, user, aname)
    return Place(fid, reply.qid, reply.is_dir)


# --- paths -------------------------------------------------------------------------------------------------------------


def place_of(book: Book, session: SessionState, path: str) -> Procedure[Place]:
    """The place of a path below the session's root, from the cache or by walking. Raises CallError."""
    place = book.get(session, path)
    if place is not None:
        return place
    session.refuse_if_closed()
    generation = session.generation
    fid = book.new()
    reply: messages.Qid = yield requests.walk(session.root.fid, fid, path.removeprefix("/"))
    if session.closed:  # meanwhile
        yield Forget(fid)
        session.refuse_if_closed()
    other = book.places.get((session, path))
    if other is not None:  # somebody else walked there at the same time
        yield Forget(fid)
        return other
    place = Place(fid, reply.qid, reply.is_dir, generation)
    if generation == session.generation:
        surplus = book.put(session, path, place)
        if surplus:
            yield Forget(surplus)
    return place


def on_path(
    book: Book,
    session: SessionState,
    path: str,
    request: Callable[[int], Send],
    *,
    place: Place | None = None,
    refusal: CallError | None = None,
) -> Procedure[Any]:
    """Make a request on a path's fid; where that fid, or the session, has died meanwhile, once more on a new one.

    request: makes it, given a fid. place, refusal: of an attempt that was made already and refused with one of RETRIED.
    Returns the reply. Raises CallError.

    A handler may answer ESTALE or EKEYEXPIRED too, and its call must not be made twice. So the call is made again only
    if the walk finds another file than before, or the session's root is refused as well: then the first one can't have
    reached a handler (docs/protocol.md: both are found out before delivery).
    """
    renewed = walked = False
    while True:
        generation = session.generation
        if refusal is None:
            place = None
            try:
                place = yield from place_of(book, session, path)
                return (yield request(place.fid))
            except CallError as fault:
                refusal = fault
        if place is not None:
            generation = place.generation  # the attempt may be older than a renewal by somebody else
        if refusal.errno == EKEYEXPIRED and not renewed:
            renewed = True
            yield from _renew(book, session, generation, refusal, certain=False)
        elif refusal.errno == ESTALE and place is None and not renewed:
            renewed = True  # the directory that the session is attached to was replaced
            yield from _renew(book, session, generation, refusal, certain=True)
        elif refusal.errno == ESTALE and place is not None and not walked:
            walked = True
            if book.places.get((session, path)) == place:
                del book.places[session, path]
                yield Forget(place.fid)
            if (yield from place_of(book, session, path)).qid == place.qid:
                raise refusal
        else:
            raise refusal
        refusal = None


def _renew(book: Book, session: SessionState, generation: int, refusal: CallError, certain: bool) -> Procedure[None]:
    """Attach again with the same afid. certain: whether the session's root is known to be gone."""
    if generation != session.generation:
        return  # somebody else has just done it
    if not certain:
        fid = book.new()
        try:
            yield requests.walk(session.root.fid, fid, "")
        except CallError:
            pass
        else:
            yield Forget(fid)
            raise refusal  # the session is alive: the handler said this
    try:
        root = yield from _attach(book, session.afid, session.user, session.aname)
    except CallError as again:
        if again.errno == EACCES:  # the afid's own time is over too
            raise CallError(EKEYEXPIRED, "the session has ended and may not be attached again: log in again") from None
        raise
    if generation != session.generation:
        yield Forget(root.fid)
        return
    session.generation += 1
    gone, session.root = session.root.fid, root
    for fid in [gone, *book.drop(session)]:
        yield Forget(fid)


def stat(
    book: Book, session: SessionState, path: str, after: str = "", limit: int = STAT_PAGE
) -> Procedure[messages.StatReply]:
    """Describe a path. Raises CallError (EPROTO where the names are not what the protocol says)."""

    def request(fid: int) -> Send:
        return requests.stat(fid, after, limit)

    reply: messages.StatReply = yield from on_path(book, session, path, request)
    _check_page(reply, after, limit)
    return reply


def _check_page(page: messages.StatReply, after: str, limit: int) -> None:
    """Raise CallError (EPROTO) unless the names ascend strictly, are names, and come after `after` (docs/protocol.md)."""
    names = page.children or []
    if len(names) > limit:
        raise CallError(EPROTO, f"the server broke the protocol: {len(names)} names, where {limit} were asked for")
    if page.more and not names:
        raise CallError(EPROTO, "the server broke the protocol: it has more names and gives none")
    last = after.encode()
    for name in names:
        text = name.encode()
        if not text or text[0] == 0x2E or b"/" in text or b"\0" in text or len(text) > NAME_MAX:
            raise CallError(EPROTO, f"the server broke the protocol: {name!r} is no name in a directory")
        if text <= last:
            raise CallError(EPROTO, f"the server broke the protocol: {name!r} is no name that can come after the one before")
        last = text


def listing(book: Book, session: SessionState, path: str) -> Procedure[list[str]]:
    """All names in a directory, page by page.

    Raises CallError: EACCES where the caller may not read the directory, E2BIG for over NAMES_MAX names, as `stat`.
    """
    names: list[str] = []
    more = True
    while more:
        page = yield from stat(book, session, path, names[-1] if names else "")
        if page.children is None:
            raise CallError(EACCES, "the directory may be walked through, but its names may not be read")
        names += page.children
        more = page.more
        if len(names) + more > NAMES_MAX:
            raise CallError(E2BIG, f"the directory has over {NAMES_MAX} names, and no more are listed")
    return names


def append(book: Book, session: SessionState, path: str, text: str) -> Procedure[str]:
    """Call with text, for a text. Raises CallError (EILSEQ where the reply is not UTF-8)."""

    def request(fid: int) -> Send:
        return requests.append(fid, text)

    reply: messages.AppendReply = yield from on_path(book, session, path, request)
    return reply.data


def logout(book: Book, session: SessionState) -> Procedure[None]:
    """End a session: clunk all that it has."""
    session.closed = True
    for fid in [*book.drop(session), session.root.fid, session.afid]:
        yield Forget(fid)
