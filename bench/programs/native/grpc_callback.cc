// gRPC C++'s asynchronous side: the callback API at both ends, which its performance guide prefers to the others.
//
//     grpc_callback server ADDRESS [KEY CERTIFICATE]
//     grpc_callback caller ADDRESS [CERTIFICATE]

#include <condition_variable>
#include <cstring>
#include <mutex>

#include "credentials.h"
#include "echo.grpc.pb.h"
#include "told.h"

namespace {

class EchoService final : public bench::Echo::CallbackService {
  grpc::ServerUnaryReactor* Call(grpc::CallbackServerContext* context, const bench::Payload* request,
                                 bench::Payload* reply) override {
    reply->set_data(request->data());
    auto* reactor = context->DefaultReactor();
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }
};

// One sample: `inflight` calls outstanding, each of which makes the next when it is answered.
class Sample {
 public:
  Sample(bench::Echo::Stub* stub, const bench::Payload& request, int inflight, double seconds, answer* answer)
      : stub_(stub), request_(request), inflight_(inflight), answer_(answer) {
    end_ = now_ns() + static_cast<uint64_t>(seconds * 1e9);
  }

  long Run() {
    running_ = inflight_;
    for (int each = 0; each < inflight_; each++) Start(new Call);
    std::unique_lock<std::mutex> lock(mutex_);
    over_.wait(lock, [this] { return running_ == 0; });
    return calls_;
  }

 private:
  struct Call {
    std::unique_ptr<grpc::ClientContext> context;
    bench::Payload reply;
    uint64_t begun;
    long made = 0;
  };

  void Start(Call* call) {
    call->context = std::make_unique<grpc::ClientContext>();
    call->begun = now_ns();
    stub_->async()->Call(call->context.get(), &request_, &call->reply, [this, call](grpc::Status status) {
      if (!status.ok() || call->reply.data().size() != request_.data().size()) {
        fprintf(stderr, "a wrong answer: %s\n", status.error_message().c_str());
        exit(1);
      }
      const uint64_t now = now_ns();
      call->made++;
      if (inflight_ == 1) count_latency(answer_, now - call->begun);
      if (now < end_) {
        Start(call);
        return;
      }
      std::lock_guard<std::mutex> lock(mutex_);
      calls_ += call->made;
      delete call;
      if (--running_ == 0) over_.notify_one();
    });
  }

  bench::Echo::Stub* stub_;
  const bench::Payload& request_;
  const int inflight_;
  answer* answer_;
  uint64_t end_;
  std::mutex mutex_;
  std::condition_variable over_;
  int running_ = 0;
  long calls_ = 0;
};

void Caller(char** argv) {
  auto stub = bench::Echo::NewStub(Connected(argv));
  for (told told; next_told(&told);) {
    bench::Payload request;
    request.set_data(std::string(told.size, 'x'));
    static answer answer;
    answer.all = Sample(stub.get(), request, told.inflight, told.seconds * WARM_UP, &answer).Run();
    memset(answer.latencies, 0, sizeof answer.latencies);
    const uint64_t begun = now_ns();
    answer.calls = Sample(stub.get(), request, told.inflight, told.seconds, &answer).Run();
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
