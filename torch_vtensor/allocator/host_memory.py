"""How much memory of the host may still be pinned: Linux gives out more than there is, and then kills. And where."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

__all__ = ["cpus_of_node", "spare_host_bytes"]

_KEPT_FRACTION = 16  # of what there is, which stays for others


def cpus_of_node(node: int, root: Path = Path("/")) -> frozenset[int]:
    """The CPUs of a NUMA node; none where the system does not say."""
    try:
        text = (root / f"sys/devices/system/node/node{node}/cpulist").read_text()
    except OSError:
        return frozenset()
    spans = [span.partition("-")[::2] for span in text.strip().split(",") if span]
    return frozenset(cpu for first, last in spans for cpu in range(int(first), int(last or first) + 1))


def spare_host_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process can take without bringing the system, or its own container, to its limit."""
    known = {}
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, size = line.partition(":")
        known[name] = int(size.split()[0]) * 1024
    spare_bytes = [known["MemAvailable"] - known["MemTotal"] // _KEPT_FRACTION]
    for limit, used, of_files in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        with suppress(OSError, ValueError):  # no container, or no limit ("max")
            folder = root / "sys/fs/cgroup"
            limit_bytes = int((folder / limit).read_text())
            stat = dict(line.split() for line in (folder / of_files).read_text().splitlines())
            cached_bytes = int(stat.get("inactive_file", "0"))  # goes before anything is killed
            used_bytes = int((folder / used).read_text()) - cached_bytes
            spare_bytes.append(limit_bytes - used_bytes - limit_bytes // _KEPT_FRACTION)
    return max(min(spare_bytes), 0)
