"""Where it was measured, and with what."""

import importlib.metadata
import os
import platform
from pathlib import Path

from OpenSSL import SSL


def describe() -> dict[str, str]:
    """Facts for people who compare figures: processor, system, versions, and how busy it was before."""
    one, _five, _fifteen = os.getloadavg()
    return {
        "processor": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": _memory(),
        "hypervisor": "yes" if "hypervisor" in _field("/proc/cpuinfo", "flags").split() else "no",
        "system": _field("/etc/os-release", "PRETTY_NAME", "=").strip('"'),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "openssl": SSL.SSLeay_version(SSL.SSLEAY_VERSION).decode("ascii", "replace"),
        "pyOpenSSL": version("pyOpenSSL"),
        "grpcio": version("grpcio") or "not installed",
        "asyncvarlink": version("asyncvarlink") or "not installed",
        "load before": f"{one:.2f}",
    }


def version(package: str) -> str:
    """The installed version; empty where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _memory() -> str:
    kilobytes = _field("/proc/meminfo", "MemTotal").split()[:1]
    return f"{int(kilobytes[0]) / 1024**2:.1f} GiB" if kilobytes else ""


def _field(file: str, name: str, separator: str = ":") -> str:
    """The first value of a field in a file of lines; empty where there is none."""
    try:
        text = Path(file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    for line in text.splitlines():
        key, _, value = line.partition(separator)
        if key.strip() == name:
            return value.strip()
    return ""
