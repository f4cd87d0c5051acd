"""metrics(): the figures of ``stats()`` as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch_vtensor.allocator.page_pool import PoolStats
from torch_vtensor.allocator.statistics import Stats, stats

__all__ = ["metrics"]

_Sample = tuple[dict[str, str], float]

_POOL_GAUGES = {
    "reserved_bytes": "Addresses reserved.",
    "committed_bytes": "Physical memory of the device: live, of prefixes, parked, pooled and under torch's tensors.",
    "live_bytes": "Memory that tensors or views use.",
    "shared_bytes": "Memory that several tensors or views use.",
    "prefix_bytes": "Memory that only prefixes keep.",
    "parked_bytes": "Memory still mapped for the next tensor.",
    "pooled_bytes": "Memory that is mapped nowhere.",
    "torch_bytes": "Memory under torch's own tensors.",
    "offloaded_bytes": "Memory outside the device that holds pages.",
    "offload_pooled_bytes": "Memory outside the device that is kept for pages.",
    "budget_bytes": "The most physical memory to hold; no sample where there is no limit.",
    "num_mappings": "Live mappings.",
}
_POOL_COUNTERS = {
    "scrubbed_bytes": "Memory overwritten with zeros, because it passed between tenants.",
    "num_device_waits": "Times that memory was short enough to wait for the device.",
}


def metrics() -> str:
    """The figures of ``stats()`` in the text format that Prometheus scrapes.

    Every sample of memory has the label ``device``, the counts of appends, attention, prefixes and serving
    the label ``how``.
    Reading them takes the device's memory lock for a moment, and never waits for a device.
    """
    return "".join(line + "\n" for line in _lines(stats()))


def _lines(found: Stats) -> Iterator[str]:
    for name, text in _POOL_GAUGES.items():
        yield from _family(name, "gauge", text, _of_pools(found.devices.items(), name))
    for name, text in _POOL_COUNTERS.items():
        yield from _family(f"{name}_total", "counter", text, _of_pools(found.devices.items(), name))
    calls = [({"device": str(device), "call": call}, it) for device, pool in found.devices.items()
             for call, it in pool.driver_calls.items()]  # fmt: skip
    yield from _family(
        "driver_calls_total", "counter", "Calls of the memory driver.", [(labels, it.count) for labels, it in calls]
    )
    yield from _family(
        "driver_call_seconds", "gauge", "What a call costs the host, over the latest 4,096.",
        [(labels | {"quantile": quantile}, us / 1e6) for labels, it in calls
         for quantile, us in (("0.5", it.p50_us), ("0.99", it.p99_us))],
    )  # fmt: skip
    for name, text, counts in (
        ("appends_total", "Appends of cache layers, zero-copy or stock and why.", found.appends),
        ("attention_total", "Calls of attention, fast or stock and why.", found.attention),
        ("prefixes_total", "Tokens that calls of generate() reused, and calls that did not and why.", found.prefixes),
        ("serving_total", "What continuous batching did, and what it left to transformers and why.", found.serving),
    ):
        yield from _family(name, "counter", text, [({"how": how}, count) for how, count in counts.items()])


def _of_pools(pools: Iterable[tuple[object, PoolStats]], name: str) -> list[_Sample]:
    values = [({"device": str(device)}, getattr(pool, name)) for device, pool in pools]
    return [(labels, value) for labels, value in values if value is not None]


def _family(name: str, kind: str, text: str, samples: Iterable[_Sample]) -> Iterator[str]:
    full_name = f"torch_vtensor_{name.removeprefix('num_')}"
    yield f"# HELP {full_name} {text}"
    yield f"# TYPE {full_name} {kind}"
    for labels, value in samples:
        shown = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
        yield f"{full_name}{{{shown}}} {value!r}"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
