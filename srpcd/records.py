"""What is more than one TLS record: many of them in one system call.

TLS cuts data into records of 16 KiB, and OpenSSL, on a socket, makes one write for each of them and two reads: for a
megabyte that is more work than its encryption (measured on loopback: 380 µs to send one, 55 of which are AES). So while
something passes that takes several, records are exchanged with OpenSSL in memory (BIO_s_mem(3)), and with the socket by the
hundred kilobytes. For small messages that would be a detour, and memory for each connection: so OpenSSL is on the socket
again when several small ones were sent in a row, or whoever has the connection sees that it rests.

Gate and client library share this. Whoever calls waits for the descriptor, and calls again.
"""

from typing import Any

from OpenSSL import SSL
from OpenSSL._util import ffi, lib

from srpcd.wire.limits import LARGE, PORTION

_NO_ROOM = memoryview(b"")

RECORD = 16384
"""Bytes of plaintext in one TLS record at most (RFC 8446, section 5.1)."""

_SMALL_MAX = 8
"""How often in a row little is sent before it is taken for the rule again."""

_WAITING_MAX = 2 * PORTION
"""Bytes, encrypted, that may wait for the socket: what is sent at once, and thousands of OpenSSL's own messages. A peer can
ask for new keys, and so for an answer, in every record, and on memory nothing but this keeps OpenSSL from going on."""


class _Scratch:
    """Room for a portion as it is on the wire, and in clear with the record that had been begun before it."""

    __slots__ = ("clear", "clear_view", "wire", "wire_view")

    def __init__(self) -> None:
        self.wire = ffi.new("char[]", PORTION)
        self.wire_view = memoryview(ffi.buffer(self.wire))
        self.clear = ffi.new("char[]", PORTION + 2 * RECORD)
        self.clear_view = memoryview(ffi.buffer(self.clear))


_idle: list[_Scratch] = []
"""Kept for the next portion: one for all connections, and more only while several threads are at it."""


def _scratch() -> _Scratch:
    try:
        return _idle.pop()  # without a look whether there is one: another thread may take it in between
    except IndexError:
        return _Scratch()


def room_for_one() -> Any:
    """What `Records.get` reads into."""
    return ffi.new("char[]", RECORD)


class Records:
    """What goes through one TLS connection, after its handshake: small as it comes, large in large pieces.

    active: OpenSSL works on memory, so both directions have to go through here. It does so from the first large transfer on,
    because the memory (a portion) is not worth making for each, until little is sent several times, or `rest` is called.
    moved: how many encrypted bytes the socket has taken since it is so.
    held: bytes of memory that OpenSSL uses for what was encrypted, about. It gives none back before `rest`.
    waits: encrypted bytes are left that the socket did not take.
    owes: so it is, and they are OpenSSL's own and not of what was to be sent: `receive` sends them.
    """

    __slots__ = ("_ahead", "_outgoing", "_pointer", "_small", "_socket", "_ssl", "_tls", "active", "held", "moved", "waits")

    def __init__(self, tls: SSL.Connection, socket: Any) -> None:
        self.active = False
        self.held = 0
        self.moved = 0
        self.waits = False
        self._tls = tls
        self._ssl: Any = tls._ssl
        self._socket = socket
        self._outgoing: Any = None
        self._pointer = ffi.new("char **")
        self._small = 0  # how often in a row little was sent
        self._ahead = 0  # bytes of plaintext that are encrypted, and not yet sent to their end
        self._on_socket()

    @property
    def owes(self) -> bool:
        return self.waits and not self._ahead

    def send(self, data: bytes | memoryview) -> int:
        """Send as much as goes without waiting. Returns how many bytes are gone to the end of their last record.

        If that is not all, the next call has to begin with the first that is not (as with OpenSSL itself).
        Raises SSL.Error, OSError.
        """
        view, done = memoryview(data), 0
        self._begin()
        self._small = 0 if len(view) > RECORD else self._small + 1
        while self._push():
            done += self._ahead
            self._ahead = 0
            portion = view[done : done + PORTION] if len(view) - done >= PORTION + LARGE else view[done:]
            if not portion:
                break
            size = lib.SSL_write(self._ssl, ffi.from_buffer(portion), len(portion))
            if size <= 0:
                self._raise(size)
            self._ahead = size
            self.held = max(self.held, size)
        if self._small > _SMALL_MAX:
            self.rest()
        return done

    def receive(self, room: memoryview) -> tuple[int, bytes | None]:
        """Take what has come, into `room` first. Returns how many bytes are there, and what came after them (which is all,
        where there is no room); None instead of that: nothing at the moment; 0 and empty: end of file.

        Raises SSL.Error, OSError.
        """
        self._begin()
        ssl, got, more = self._ssl, 0, 0
        scratch = _scratch()
        try:
            # What the records need besides is asked for too. If that was too much, it comes after what was wanted.
            wanted = max(len(room), LARGE) + len(room) // 512 + RECORD
            count = self._socket.recv_into(scratch.wire_view, min(wanted, PORTION))
            if not count:
                return 0, b""
            incoming = lib.BIO_new_mem_buf(scratch.wire, count)
            lib.BIO_set_mem_eof_return(incoming, -1)  # its end is none: more will come
            lib.SSL_set_bio(ssl, incoming, self._outgoing)  # it is OpenSSL's from here on
            # Until OpenSSL wants more, so that it has taken all of this memory: it keeps what is not a whole record yet.
            with ffi.from_buffer(room) as place:
                size = len(room)
                while got < size and (read := lib.SSL_read(ssl, place + got, size - got)) > 0:
                    got += read
            if got == size:
                while (read := lib.SSL_read(ssl, scratch.clear + more, len(scratch.clear) - more)) > 0:
                    more += read
            if lib.SSL_get_error(ssl, read) != lib.SSL_ERROR_WANT_READ:
                self._raise(read)
            return got, bytes(scratch.clear_view[:more]) if more or got else None
        except BlockingIOError:
            return 0, None
        except SSL.ZeroReturnError:
            return got, bytes(scratch.clear_view[:more])
        finally:
            if not _idle:
                _idle.append(scratch)
            self._say(got + more)

    def write(self, data: bytes | memoryview) -> int:
        """As `send`, for data of any size: what is small goes to the socket directly while `active` is not set.

        A KeyUpdate of the peer can come while a record of ours is half sent, and has to be answered (RFC 8446, section
        4.6.3). OpenSSL can't do that on a socket: it ends the connection ("bad length"). In memory each record goes to its
        end, so the rest of the half goes there.
        """
        if len(data) > RECORD or self.active:
            return self.send(data)
        try:
            return self.put(data)
        except (SSL.WantWriteError, SSL.WantReadError):
            return self.send(data)

    def read(self, buffer: Any) -> bytes | None:
        """Take what has come, without room for a large part of it. buffer: `room_for_one`.

        Returns None where that is nothing at the moment, and empty at the end of file. Raises SSL.Error, OSError.
        """
        if self.active:
            return self.receive(_NO_ROOM)[1]
        try:
            return self.get(buffer)
        except SSL.WantReadError:
            return None
        except SSL.ZeroReturnError:
            return b""
        except SSL.WantWriteError:
            # An answer to a KeyUpdate is half sent. In memory it goes to its end; `owes` says that it is there.
            self._begin()
            size = lib.SSL_read(self._ssl, buffer, RECORD)
            if size <= 0 and lib.SSL_get_error(self._ssl, size) != lib.SSL_ERROR_WANT_READ:
                self._raise(size)
            self._push()
            return bytes(ffi.buffer(buffer, size)) if size > 0 else None

    def put(self, data: bytes | memoryview) -> int:
        """SSL_write(3), on the socket, while `active` is not set. Returns how many bytes. Raises SSL.Error.

        It and `get` spare what pyOpenSSL does around them (memory for each read, a look for errors also where there was
        none), which takes longer than they do. What went wrong is still pyOpenSSL's to say.
        """
        size: int = lib.SSL_write(self._ssl, data if isinstance(data, bytes) else ffi.from_buffer(data), len(data))
        if size <= 0:
            self._tls._raise_ssl_error(self._ssl, size)
        return size

    def get(self, buffer: Any) -> bytes:
        """SSL_read(3) in the same way: at most one record. buffer: room for one. Raises SSL.Error."""
        size = lib.SSL_read(self._ssl, buffer, RECORD)
        if size <= 0:
            self._tls._raise_ssl_error(self._ssl, size)
        data: bytes = ffi.buffer(buffer, size)[:]
        return data

    def flush(self) -> None:
        """Send what OpenSSL has left in memory, as far as that needs no waiting. Raises SSL.Error, OSError."""
        if self.active:
            self._push()

    def rest(self) -> None:
        """Have OpenSSL work on the socket again, if nothing is left in memory. What came in never is.

        Nor if `receive` has sent the last of it: only `send` can say so, to whom would otherwise send that once more.
        """
        if self.active and not self.waits and not self._ahead:
            lib.SSL_set_fd(self._ssl, self._socket.fileno())  # frees what was set before
            self._on_socket()
            self.active = False
            self.held = 0
            self._outgoing = None

    def _begin(self) -> None:
        if not self.active:
            self.active = True
            self._outgoing = lib.BIO_new(lib.BIO_s_mem())
            lib.SSL_set_bio(self._ssl, lib.BIO_new(lib.BIO_s_mem()), self._outgoing)  # they are OpenSSL's from here on
            lib.SSL_clear_mode(self._ssl, lib.SSL_MODE_ENABLE_PARTIAL_WRITE)  # else each write ends with one record
            lib.SSL_set_mode(self._ssl, lib.SSL_MODE_AUTO_RETRY)  # else not all of the memory is taken

    def _on_socket(self) -> None:
        """Set the modes for OpenSSL on the socket.

        Without SSL_MODE_AUTO_RETRY each SSL_read ends after one record that holds no data. With it a peer that sends
        KeyUpdates or session tickets without end keeps SSL_read from ever returning: no timer and no signal is served.
        """
        lib.SSL_set_mode(self._ssl, lib.SSL_MODE_ENABLE_PARTIAL_WRITE)
        lib.SSL_clear_mode(self._ssl, lib.SSL_MODE_AUTO_RETRY)

    def _say(self, got: int) -> None:
        """Send what OpenSSL had to say to what it read. Raises as `_push`, but for an end where something was got: that
        counts, and who reads or sends next learns of the end."""
        try:
            self._push()
        except OSError:
            if not got:
                raise

    def _raise(self, result: int) -> None:
        self._tls._raise_ssl_error(self._ssl, result)
        raise SSL.Error([("records", "", "OpenSSL took or gave nothing")])

    def _push(self) -> bool:
        """Send what is encrypted. Returns whether that was all. Raises SSL.Error where too much is left."""
        while size := lib.BIO_get_mem_data(self._outgoing, self._pointer):
            try:
                sent = self._socket.send(ffi.buffer(self._pointer[0], size))
            except BlockingIOError:
                self.waits = True
                self.held = max(self.held, size)
                if size > _WAITING_MAX:
                    raise SSL.Error([("records", "", "the other end asks again and again, and takes no answer")]) from None
                return False
            self.moved += sent
            scratch = _scratch()
            while sent:  # there is no other way to say that it is not needed any more
                sent -= lib.BIO_read(self._outgoing, scratch.wire, min(sent, PORTION))
            if not _idle:
                _idle.append(scratch)
        self.waits = False
        return True
