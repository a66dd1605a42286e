"""Every bound of the protocol, with its reason.

Bounds that an administrator may change are in `srpcd.config`; what stands here is part of the protocol or of the way the
processes talk to each other.
"""

KIB = 1024
MIB = 1024 * KIB

# --- paths and names ---------------------------------------------------------------------------------------------------

NAME_MAX = 255
"""Bytes of one path element: what Linux file systems allow."""

PATH_MAX = 2048
"""Bytes of a whole path in the tree. A message to the monitor goes through a pipe in packet mode and must fit into
PIPE_BUF (4096 bytes) with two paths' worth of room; Linux itself would allow 4095."""

UNAME_MAX = 256
"""Bytes of a user name: what `useradd` allows (32) and what directory services use (an e-mail address), with room."""

# --- messages ----------------------------------------------------------------------------------------------------------

PAYLOAD_MAX = 16 * MIB
"""Bytes of a call's payload or of its reply. More is a stream's work."""

METADATA_MAX = 64 * KIB
"""Bytes of a call's metadata (JSON that gate and worker do not look into)."""

CALL_MAX = PAYLOAD_MAX + METADATA_MAX + 12
"""Bytes of the body of a call: fid, metadata length, metadata, payload."""

APPEND_MAX = PAYLOAD_MAX + 64 * KIB
"""Bytes of the JSON body of an append. Escapes may make text six times as long; whoever sends much uses call."""

APPEND_REPLY_MAX = APPEND_MAX
"""Bytes of the JSON body of an append's reply. A text that escapes make longer than this is answered with an error: else a
handler could have a gate hold six times 16 MiB for one answer."""

JSON_MAX = 64 * KIB
"""Bytes of any other JSON request: two paths of PATH_MAX in the longest JSON escapes (6 bytes for each) fit."""

STRANGER_MAX = MIB + 64 * KIB
"""Bytes of any message before somebody has authenticated on the connection: memory that strangers can pin down. Large
enough that a password of 1 MiB is answered as the wrong password that it is."""

ERROR_MESSAGE_MAX = 4 * KIB
"""Bytes of the sentence in an error, the end of a program's standard error included."""

STAT_PAGE = 1000
"""Names in one stat reply at most, and what is given when the request does not say."""

STAT_REPLY_MAX = 4 * MIB
"""Bytes of a stat reply's body: STAT_PAGE names of NAME_MAX bytes in JSON escapes, with room."""

QID_MAX = 64
"""Characters of a qid: two numbers of 64 bits and a colon take 41."""

LABEL_MAX = 4 * KIB
"""Characters of an SELinux context in a reply: thousands of categories fit. Libraries keep replies, so they need a bound."""

# --- authentication ----------------------------------------------------------------------------------------------------

PASSWORD_MAX = 512
"""Bytes of one answer to a PAM prompt (PAM_MAX_RESP_SIZE). Longer ones, and those with a NUL, are refused before PAM."""

PROMPTS_MAX = 32
"""Messages in one PAM conversation step (PAM_MAX_NUM_MSG)."""

PROMPT_TEXT_MAX = 512
"""Bytes of one prompt's text (PAM_MAX_MSG_SIZE)."""

HELD_MAX = PROMPTS_MAX * PROMPT_TEXT_MAX // 4
"""Characters of prompts that are kept for the next reply. PAM's texts are shorter; more would not fit into JSON_MAX
when each is escaped. The oldest are dropped."""

FAILURES_MAX = 6
"""Failed authentications that end a connection: as many as OpenSSH allows (MaxAuthTries)."""

LOOK_UPS_MAX = 32
"""Accounts that are looked up at once, shared by `srpcd.monitor.limiter`: each is a process of root's, for as long as a
directory service takes. More wait in line."""

PAM_WORKING_MAX = 8
"""Authentications of one mechanism in which PAM is at work, shared by `srpcd.monitor.limiter`: each takes a processor, or
waits for a directory service. More wait in line. A conversation that waits for its client is none of them."""

CONVERSATIONS_MAX = 128
"""Authentications of one mechanism that have begun: each is a process of root's, with 7 MB of memory of its own. More wait
in line. One address gets a quarter of them at most, and one prefix half."""

SILENCE_SECONDS = 10.0
"""Seconds that a client may take for an answer before its conversation gives way to that of an origin that has as many: a
person types a password in less. Those of an origin that has more give way at once, and while nothing waits none does."""

SUSPECT_SECONDS = 600.0
"""Seconds for which an address, and its prefix, is served after others because an authentication from there has failed."""

# --- one connection ----------------------------------------------------------------------------------------------------

FIDS_MAX = 4096
"""Fids of one connection: a client library caches one for each path that it calls."""

AFIDS_MAX = 64
"""Afids of one connection: one for each user on it, with room."""

OUTSTANDING_MAX = 1024
"""Requests of one connection that are not yet answered. One more is answered EAGAIN."""

FIDS_TIGHT, OUTSTANDING_TIGHT = 256, 64
"""The same two of a connection whose user holds more of the gate's memory than is left for others."""

LISTENERS_MAX = 256
"""Announcements of one connection."""

LINES_MAX = 4096
"""New lines that are kept for an announcement on which nobody listens. The oldest are dropped."""

DECIDING_MAX = 16
"""Attaches and announcements of one connection that the monitor is deciding: each may cost it a process."""

SESSIONS_MAX = 1024
"""Sessions of one connection, which end with their last fid: what the monitor remembers of one connection."""

WORKERS_PER_UID_MAX = 8
"""Workers of one uid at a time. A process can choose among 2^n sets of its groups, and each set gets a worker of its own;
honest processes of one user have two or three. Each worker may have a line to each service."""

# --- one worker --------------------------------------------------------------------------------------------------------

PROBING_MAX = 64
"""Endpoints to which one worker waits for a line."""

PROBES_MAX = 32
"""Probes at once, an eighth of them for one uid, shared by `srpcd.monitor.limiter`: each is a process for a moment."""

DEPTH_MAX = 24
"""Elements of a service endpoint's path: the monitor holds a descriptor for each."""

SERVERS_MAX = 16
"""Processes that serve one endpoint: each has a line to each of its callers."""

LINE_CONNECT_SECONDS = 60.0
"""Seconds that a service has to connect a line that it was told of: as long as a call waits by default. The monitor holds a
socket for each line that waits. The next call brings another line."""

LINE_OUTSTANDING_MAX = 1024
"""Calls on one line that its handler has not answered, cancelled ones included: a handler that never answers does not
collect memory. One more is answered EAGAIN."""

READ_SIZE = 64 * KIB
"""Bytes asked for in one read: a pipe's capacity. Larger buffers are mapped and unmapped at every read (measured: 25 %
of all calls/s)."""

LARGE = 64 * KIB
"""Bytes of a frame that are still to come, from which on they are collected in one place, asked for with larger reads, and
not copied from one end of a hop to the other: below, joining and cutting is cheaper than the care."""

PORTION = 256 * KIB
"""Bytes that are read, encrypted or decrypted at once of something large: few enough to be still in the processor's cache
when they are copied to where they belong, and for the next process to begin meanwhile."""

PIPE_MAX = MIB
"""Bytes that a pipe may be made to hold (pipe-max-size; more is root's right)."""
