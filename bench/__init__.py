"""Measures sRPC beside its peers, in the same run: `make bench`, or `python -m bench --help`.

    plan       what is measured: contenders, workloads, the goals that medians are held against
    stage      a daemon, services, servers and callers, each a process of its own, as the users that they would be
    running    one such process, and what is said to it
    programs/  what runs in them: the same loops around the calls of each contender
    rounds     all contenders and workloads in turn, again and again
    workers    what a worker costs: processes, milliseconds, memory
    results    samples to medians, spreads and ratios; JSON
    report     tables for people
    machine    where it was

A further peer is a module in `programs` and rows in `plan`; a further workload is a row in `plan`. Nothing here asserts a
time: the exit status is 0 unless something broke.
"""
