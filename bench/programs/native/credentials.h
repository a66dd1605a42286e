// TLS (or, for unix: addresses, none) for gRPC's servers and channels, and the size of messages that they allow.

#ifndef BENCH_CREDENTIALS_H
#define BENCH_CREDENTIALS_H

#include <grpcpp/grpcpp.h>

#include <fstream>
#include <memory>
#include <sstream>
#include <string>

constexpr int kLargest = 32 * 1024 * 1024;  // gRPC takes 4 MB by default

inline std::string ContentsOf(const char* path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

inline std::unique_ptr<grpc::Server> Listening(grpc::Service* service, char** argv) {  // ADDRESS [KEY CERTIFICATE]
  std::string address = argv[0];
  auto credentials = grpc::InsecureServerCredentials();
  if (argv[1]) {
    grpc::SslServerCredentialsOptions options;
    options.pem_key_cert_pairs.push_back({ContentsOf(argv[1]), ContentsOf(argv[2])});
    credentials = grpc::SslServerCredentials(options);
  }
  int port = 0;
  grpc::ServerBuilder builder;
  builder.AddListeningPort(address, credentials, &port);
  builder.RegisterService(service);
  builder.SetMaxReceiveMessageSize(kLargest);
  auto server = builder.BuildAndStart();
  if (!server) exit(1);
  if (argv[1]) address = "127.0.0.1:" + std::to_string(port);
  printf("{\"ready\": {\"address\": \"%s\", \"version\": \"%s\"}}\n", address.c_str(), grpc::Version().c_str());
  fflush(stdout);
  return server;
}

inline std::shared_ptr<grpc::Channel> Connected(char** argv) {  // ADDRESS [CERTIFICATE]
  auto credentials = grpc::InsecureChannelCredentials();
  if (argv[1]) {
    grpc::SslCredentialsOptions options;
    options.pem_root_certs = ContentsOf(argv[1]);
    credentials = grpc::SslCredentials(options);
  }
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kLargest);
  auto channel = grpc::CreateCustomChannel(argv[0], credentials, arguments);
  if (!channel->WaitForConnected(std::chrono::system_clock::now() + std::chrono::seconds(20))) exit(1);
  printf("{\"ready\": {}}\n");
  fflush(stdout);
  return channel;
}

#endif
