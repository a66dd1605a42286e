"""A gate: the unprivileged process that speaks with clients, and routes their calls to workers.

`gate` is the process, `connection` pumps one session, `routes` leads to the workers, `tls` to the clients and `channel`
to the monitor. All of it runs on one event loop with nothing but readers and writers: no task and no queue per call.
"""
