"""Peers in C and C++: compiled on the spot by plain commands, kept by their inputs' hash where `make clean` removes them."""

import functools
import hashlib
import shutil
import subprocess
from pathlib import Path

from bench.running import Missing

SOURCE = Path(__file__).resolve().parent / "programs/native"
KEPT = Path(__file__).resolve().parent.parent / "build/bench"

GRPC_LIBRARIES = ["-lgrpc++", "-lgrpc", "-lgpr", "-lprotobuf", "-labsl_synchronization", "-lpthread"]
PACKAGES = "libgrpc++-dev libprotobuf-dev protobuf-compiler-grpc g++"


def program(name: str) -> Path:
    """The compiled program of this name. Raises Missing where its compiler or libraries are not here."""
    return relay() if name == "relay" else grpc(name)


def relay() -> Path:
    """The relay, in C."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        raise Missing("a C compiler is missing: apt-get install gcc libc6-dev")
    command = [compiler, "-O2", "-Wall", "-Wextra", "relay.c", "-lm", "-o"]
    return _kept("relay", [command], ["relay.c", "told.h"])


def grpc(name: str) -> Path:
    """grpc_sync or grpc_callback, in C++."""
    compiler, protoc, plugin = (shutil.which(each) for each in ("g++", "protoc", "grpc_cpp_plugin"))
    headers = _headers(compiler) if compiler else b""
    if not compiler or not protoc or not plugin or not headers:
        raise Missing(f"gRPC for C++ is missing: apt-get install {PACKAGES}")
    generate = [protoc, "-I", ".", "echo.proto", f"--plugin=protoc-gen-grpc={plugin}", "--cpp_out=OUT", "--grpc_out=OUT"]
    sources = [f"{name}.cc", "OUT/echo.pb.cc", "OUT/echo.grpc.pb.cc"]
    compile_ = [compiler, "-std=c++17", "-O2", "-Wall", "-I", ".", "-I", "OUT", *sources, *GRPC_LIBRARIES, "-o"]
    return _kept(name, [generate, compile_], [f"{name}.cc", "credentials.h", "echo.proto", "told.h"], headers)


@functools.cache
def _headers(compiler: str) -> bytes:
    """The libraries' headers, preprocessed, so that another version of them compiles anew; empty where they are missing."""
    code = "#include <google/protobuf/message.h>\n#include <grpcpp/grpcpp.h>\n"
    command = [compiler, "-std=c++17", "-E", "-P", "-x", "c++", "-"]
    done = subprocess.run(command, input=code.encode(), capture_output=True, check=False)
    return b"" if done.returncode else done.stdout


def _kept(name: str, commands: list[list[str]], inputs: list[str], more: bytes = b"") -> Path:
    """Run the commands, the last of which gets the result's path, unless that has been done for the same inputs.

    OUT in a command: a directory of their own. more: further input.
    """
    digest = hashlib.sha256(repr(commands).encode() + more)
    for each in inputs:
        digest.update((SOURCE / each).read_bytes())
    compiler = subprocess.run([commands[-1][0], "--version"], capture_output=True, check=True).stdout
    digest.update(compiler)
    directory = KEPT / f"{name}-{digest.hexdigest()[:16]}"
    made = directory / name
    if made.exists():
        return made
    shutil.rmtree(directory, ignore_errors=True)
    try:
        directory.mkdir(parents=True)
    except PermissionError as fault:
        raise Missing(f"{name} can't be kept: {fault}") from None
    for number, command in enumerate(commands):
        last = [str(directory / "new")] if number == len(commands) - 1 else []
        words = [word.replace("OUT", str(directory)) for word in command]
        done = subprocess.run([*words, *last], cwd=SOURCE, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Missing(f"{name} can't be compiled here: {done.stderr.strip()[-400:]}")
    return (directory / "new").rename(made)
