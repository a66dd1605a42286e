"""One connection's protocol, without I/O: bytes and results in, replies and effects out.

`rules` says which request is allowed when, `fids` keeps what the numbers of a connection stand for, `effects` are what
a session wants done, and `session` ties them together. The gate pumps it (`srpcd.gate.connection`); nothing in here
touches a socket or a clock.
"""
