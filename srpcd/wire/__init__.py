"""The protocol's bytes, without I/O: limits, errors, frames, messages.

Nothing in this package touches a socket, a file or a clock, so that all of it can be tested and fuzzed as functions.
`limits`, `errors` and `frames` are the *light* part: workers import them, and they import next to nothing.
"""
