/*
 * The floor under a call: the same six hops with nothing in them.
 *
 *     relay
 *
 * Four processes as in sRPC: caller ⇄ gate by a TCP connection on loopback, gate ⇄ worker and worker ⇄ service by two
 * pipes each. Each waits (poll), reads what is there (64 KiB at most) and writes it on; nobody parses, encrypts or
 * checks. The caller puts 20 bytes in front of each payload, as sRPC's header is long.
 */

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <signal.h>
#include <unistd.h>

#include "told.h"

enum { HEADER = 20, READ = 64 * 1024 };

static void fail(const char *what) {
  perror(what);
  exit(1);
}

/* One direction of a hop. What could not be written yet lies in data[at..end], and nothing more is read until it is. */
struct direction {
  int from, to;
  size_t at, end;
  char data[READ];
};

static void move(struct direction *way, short ready_from, short ready_to) {
  if (way->at == way->end) {
    if (!ready_from) return;
    ssize_t got = read(way->from, way->data, READ);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) exit(0);
    way->at = 0, way->end = (size_t)got;
  } else if (!ready_to) {
    return;
  }
  ssize_t written = write(way->to, way->data + way->at, way->end - way->at);
  if (written < 0 && errno != EAGAIN) exit(0);
  if (written > 0) way->at += (size_t)written;
}

/* A process that only passes on. fds: in pairs, from and to; they are made non-blocking. */
static void hop(int count, const int *fds) {
  static struct direction ways[2];
  struct pollfd polled[4];
  for (int each = 0; each < count; each++) {
    ways[each].from = fds[2 * each], ways[each].to = fds[2 * each + 1];
    fcntl(ways[each].from, F_SETFL, O_NONBLOCK);
    fcntl(ways[each].to, F_SETFL, O_NONBLOCK);
  }
  for (;;) {
    for (int each = 0; each < count; each++) {
      int full = ways[each].at < ways[each].end; /* poll(2) leaves negative descriptors out */
      polled[2 * each] = (struct pollfd){full ? -1 : ways[each].from, POLLIN, 0};
      polled[2 * each + 1] = (struct pollfd){full ? ways[each].to : -1, POLLOUT, 0};
    }
    if (poll(polled, (nfds_t)(2 * count), -1) < 0) fail("poll");
    for (int each = 0; each < count; each++) move(&ways[each], polled[2 * each].revents, polled[2 * each + 1].revents);
  }
}

/* A child that ends with its parent. */
static void start(int count, const int *fds, int unwanted) {
  if (fork() == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    close(unwanted);
    hop(count, fds);
  }
}

/* The socket to a gate with everything behind it. */
static int connected(void) {
  int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1;
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
  socklen_t length = sizeof address;
  if (bind(listener, (struct sockaddr *)&address, length) || listen(listener, 1)) fail("listen");
  getsockname(listener, (struct sockaddr *)&address, &length);
  int caller = socket(AF_INET, SOCK_STREAM, 0);
  if (connect(caller, (struct sockaddr *)&address, length)) fail("connect");
  int gate = accept(listener, NULL, NULL);
  setsockopt(caller, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  setsockopt(gate, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  int pipes[4][2]; /* gate to worker, worker to gate, worker to service, service to worker */
  for (int each = 0; each < 4; each++)
    if (pipe(pipes[each])) fail("pipe");
  start(2, (int[]){gate, pipes[0][1], pipes[1][0], gate}, caller);
  start(2, (int[]){pipes[0][0], pipes[2][1], pipes[3][0], pipes[1][1]}, caller);
  start(1, (int[]){pipes[2][0], pipes[3][1]}, caller);
  close(gate);
  close(listener);
  for (int each = 0; each < 8; each++) close(pipes[each / 2][each % 2]);
  return caller;
}

/* Keep `inflight` messages outstanding until the time is over; then take in what is still out. */
static long spend(int fd, const struct told *told, double seconds, struct answer *answer) {
  size_t length = HEADER + (size_t)told->size;
  size_t chunk = length * (size_t)told->inflight;
  char *messages = calloc(1, chunk), *data = malloc(READ);
  size_t to_send = chunk, out = 0, received = 0;
  long calls = 0;
  uint64_t begun = now_ns(), last = begun, end = begun + (uint64_t)(seconds * 1e9);
  fcntl(fd, F_SETFL, O_NONBLOCK);
  /* to_send: bytes that may go out now. out: bytes sent and not yet back. */
  while (to_send || out) {
    size_t moved = 0;
    if (to_send) {
      ssize_t sent = write(fd, messages, to_send < chunk ? to_send : chunk);
      if (sent < 0 && errno != EAGAIN) fail("write");
      if (sent > 0) to_send -= (size_t)sent, out += (size_t)sent, moved = 1;
    }
    ssize_t got = out ? read(fd, data, READ) : 0;
    if (got < 0 && errno != EAGAIN) fail("read");
    if (got > 0) {
      out -= (size_t)got, received += (size_t)got, moved = 1;
      for (; received >= length; received -= length) {
        uint64_t now = now_ns();
        calls++;
        if (told->inflight == 1) count_latency(answer, now - last);
        last = now;
        if (now < end) to_send += length;
      }
    }
    if (!moved) {
      struct pollfd ready = {fd, (short)(POLLIN | (to_send ? POLLOUT : 0)), 0};
      if (poll(&ready, 1, -1) < 0) fail("poll");
    }
  }
  free(messages);
  free(data);
  return calls;
}

int main(void) {
  signal(SIGPIPE, SIG_IGN);
  skip_setup();
  int fd = connected();
  printf("{\"ready\": {}}\n");
  fflush(stdout);
  static struct answer answer;
  for (struct told told; next_told(&told);) {
    answer.all = spend(fd, &told, told.seconds * WARM_UP, &answer);
    memset(answer.latencies, 0, sizeof answer.latencies);
    uint64_t begun = now_ns();
    answer.calls = spend(fd, &told, told.seconds, &answer);
    answer.elapsed = (double)(now_ns() - begun) / 1e9;
    answer.all += answer.calls;
    say(&answer);
  }
  return 0;
}
