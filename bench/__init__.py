"""Measures sRPC beside its peers, in the same run: `make bench`, or `python -m bench --help`.

    plan       what is measured: contenders, workloads, how much of it, and the goals that medians are held against
    stage      daemons, services, servers and callers, each a process of its own, as the users that they would be
    running    one such process, and what is said to it
    programs/  what runs in them: the same loops around the calls of each contender; native/: those in C and C++
    compiled   how these are compiled, and where they are kept
    rounds     all contenders and workloads in turn, again and again
    sections/  the parts of the bench, each of which can be run alone
    results    samples to medians, spreads, ratios and verdicts; JSON
    report     tables, for people and for the document
    plots      pictures for the document
    document   docs/performance.md
    machine    where it was

A further peer is a module in `programs` and rows in `plan`; a further workload is a row in `plan`; a further section is a
function in `sections` and a row in its table. Nothing here asserts a time: the exit status is 0 unless something broke.
"""
