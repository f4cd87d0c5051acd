"""How much of the host may be pinned, on pretended systems and on this one."""

from pathlib import Path

import pytest

from torch_vtensor.allocator.host_memory import spare_host_bytes

GIB = 2**30


def make(root: Path, files: dict[str, str]) -> Path:
    for name, text in ({"proc/meminfo": f"MemTotal: {64 * 2**20} kB\nMemAvailable: {40 * 2**20} kB\n"} | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_part_of_the_system_stays_for_others(tmp_path: Path) -> None:
    assert spare_host_bytes(make(tmp_path, {})) == 36 * GIB
    assert spare_host_bytes(make(tmp_path, {"proc/meminfo": "MemTotal: 1000 kB\nMemAvailable: 10 kB\n"})) == 0
    assert 0 <= spare_host_bytes() < 2**60


@pytest.mark.parametrize("folder", ["", "memory/"])
def test_a_containers_limit_counts(tmp_path: Path, folder: str) -> None:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if folder else ("memory.max", "memory.current")
    files = {names[0]: 16 * GIB, names[1]: 7 * GIB}
    root = make(tmp_path, {f"sys/fs/cgroup/{folder}{name}": f"{size}\n" for name, size in files.items()})
    (root / f"sys/fs/cgroup/{folder}memory.stat").write_text(f"anon 5\ninactive_file {2 * GIB}\n")
    assert spare_host_bytes(root) == 10 * GIB
    (root / f"sys/fs/cgroup/{folder}{names[0]}").write_text("max\n")
    assert spare_host_bytes(root) == 36 * GIB
