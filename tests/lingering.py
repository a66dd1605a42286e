"""A descriptor that is slow to release: a TCP socket with SO_LINGER and data that its peer does not take."""

import socket
import struct


def send_lingering(sender: socket.socket, data: bytes, seconds: int) -> socket.socket:
    """Send `data`, and with it the last descriptor of such a socket, whose release waits for `seconds`.

    Returns its peer, which has to stay open, unread.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as tcp:
        peer = listener.accept()[0]
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
        tcp.setblocking(False)
        try:
            while True:
                tcp.send(bytes(65536))
        except BlockingIOError:
            pass
        socket.send_fds(sender, [data], [tcp.fileno()])
        tcp.setblocking(True)
    return peer
