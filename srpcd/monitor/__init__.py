"""The root process: the whole privileged surface of the daemon.

    requests      who may ask for what, in which state: one table; anything else ends its sender
    monitor       what is done about each request; sessions, workers, gates
    connections   listening sockets, numbering, limits, hang-up
    authenticate  the child in which PAM runs (a program of its own)
    accounts      who a user is, found out in a child
    launch        fork, drop, exec
    probe         a child that tries, as a user, whether the kernel lets him
    lines         the register of endpoints, and the pipes between a worker and a service

It reads nothing from the network, parses no JSON and no TLS, calls no PAM and no NSS, waits for nobody without a bound,
and takes no descriptor in (but from its own probes). docs/privsep.md tells the whole story.
"""
