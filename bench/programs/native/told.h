// What a caller is told, and what it answers: the lines of bench/programs/driver.py, read and written without a library.

#ifndef BENCH_TOLD_H
#define BENCH_TOLD_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define WARM_UP 0.15   /* share of a sample's time before the counting begins, as in driver.py */
#define BUCKET 0.02    /* width of a latency's bucket: log(ns) / BUCKET, as in driver.py */
#define BUCKETS 2048

struct told {
  int inflight;
  long size;
  double seconds;
};

struct answer {
  long calls;         /* counted */
  long all;           /* with those of the warm-up */
  double elapsed;     /* seconds of the counted ones */
  long latencies[BUCKETS];
};

static inline uint64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* The next command; 0 at the end of file. */
static inline int next_told(struct told *told) {
  char line[1024];
  if (!fgets(line, sizeof line, stdin)) return 0;
  if (sscanf(line, "{\"inflight\": %d, \"size\": %ld, \"seconds\": %lf}", &told->inflight, &told->size, &told->seconds) != 3) {
    fprintf(stderr, "not understood: %s", line);
    exit(1);
  }
  return 1;
}

static inline void skip_setup(void) {
  int each;
  while ((each = getchar()) != '\n')
    if (each == EOF) exit(0);
}

static inline void count_latency(struct answer *answer, uint64_t ns) {
  int bucket = (int)(log((double)(ns ? ns : 1)) / BUCKET);
  answer->latencies[bucket < BUCKETS ? bucket : BUCKETS - 1]++;
}

static inline void say(const struct answer *answer) {
  printf("{\"calls\": %ld, \"all\": %ld, \"elapsed\": %.9f, \"latencies\": {", answer->calls, answer->all, answer->elapsed);
  const char *comma = "";
  for (int bucket = 0; bucket < BUCKETS; bucket++)
    if (answer->latencies[bucket]) {
      printf("%s\"%d\": %ld", comma, bucket, answer->latencies[bucket]);
      comma = ", ";
    }
  printf("}}\n");
  fflush(stdout);
}

#endif
