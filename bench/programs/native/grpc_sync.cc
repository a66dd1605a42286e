// gRPC C++'s synchronous side, as its quick start has it: a server with its own threads, a stub that blocks.
//
//     grpc_sync server ADDRESS [KEY CERTIFICATE]
//     grpc_sync caller ADDRESS [CERTIFICATE]
//
// Several in flight are as many threads that share one channel.

#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "credentials.h"
#include "echo.grpc.pb.h"
#include "told.h"

namespace {

class EchoService final : public bench::Echo::Service {
  grpc::Status Call(grpc::ServerContext*, const bench::Payload* request, bench::Payload* reply) override {
    reply->set_data(request->data());
    return grpc::Status::OK;
  }
};

void CallOnce(bench::Echo::Stub* stub, const bench::Payload& request) {
  grpc::ClientContext context;
  bench::Payload reply;
  grpc::Status status = stub->Call(&context, request, &reply);
  if (!status.ok() || reply.data().size() != request.data().size()) {
    fprintf(stderr, "a wrong answer: %s\n", status.error_message().c_str());
    exit(1);
  }
}

long Spend(bench::Echo::Stub* stub, const bench::Payload& request, int inflight, double seconds, answer* answer) {
  const uint64_t end = now_ns() + static_cast<uint64_t>(seconds * 1e9);
  if (inflight == 1) {
    long calls = 0;
    for (uint64_t last = now_ns(), now; last < end; last = now, calls++) {
      CallOnce(stub, request);
      now = now_ns();
      count_latency(answer, now - last);
    }
    return calls;
  }
  std::atomic<long> calls{0};
  std::vector<std::thread> threads;
  for (int each = 0; each < inflight; each++)
    threads.emplace_back([&] {
      long own = 0;
      for (; now_ns() < end; own++) CallOnce(stub, request);
      calls += own;
    });
  for (auto& thread : threads) thread.join();
  return calls;
}

void Caller(char** argv) {
  auto stub = bench::Echo::NewStub(Connected(argv));
  for (told told; next_told(&told);) {
    bench::Payload request;
    request.set_data(std::string(told.size, 'x'));
    static answer answer;
    answer.all = Spend(stub.get(), request, told.inflight, told.seconds * WARM_UP, &answer);
    memset(answer.latencies, 0, sizeof answer.latencies);
    const uint64_t begun = now_ns();
    answer.calls = Spend(stub.get(), request, told.inflight, told.seconds, &answer);
    answer.elapsed = (now_ns() - begun) / 1e9;
    answer.all += answer.calls;
    say(&answer);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  skip_setup();
  if (strcmp(argv[1], "caller") == 0) {
    Caller(argv + 2);
    return 0;
  }
  EchoService service;
  auto server = Listening(&service, argv + 2);
  while (getchar() != EOF) {
  }
  server->Shutdown();
}
