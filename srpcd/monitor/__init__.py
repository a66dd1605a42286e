"""The root process: the whole privileged surface of the daemon.

    service         the daemon's life: gates, listening sockets, looking after, the end
    requests        who may ask for what, in which state: one table; anything else ends its sender
    monitor         children, connections, sessions and workers, and what is done about their requests
    logins          what is done about authentications
    endpoints       what is done about announcements and lines, and the watch on what was granted
    connections     listening sockets, numbering, hang-up
    admission       which connections may stay when there is no room for all (no I/O)
    origins         where a connection comes from, as limits count it (no I/O)
    authentication  who may try to authenticate, how often and how long; what became of it
    pamchild        the child in which PAM runs (a program of its own)
    children        a started program: its messages, its standard error, its end
    launch          fork, drop, exec
    pamsession      the PAM session of a worker, opened by the fork that becomes it, closed by one that outlives it
    forked          our own code in a fork, for a moment
    accounts        who a user is, found out in such a fork
    contexts        the SELinux context of a user's worker, by libselinux, in that fork
    probe           a fork that tries, as a user, whether the kernel lets him
    lines           the register of endpoints, and the pipes between a worker and a service

It reads nothing from the network, parses no JSON and no TLS, calls no PAM and no NSS, waits for nobody without a bound,
and takes no descriptor in (but from its own probes). docs/privsep.md tells the whole story.
"""
