"""memory_map(): a self-contained HTML page that shows which pages back which addresses, right now.

a row for every strip of every range:   [== own ==][= shared =][~ offloaded ~][      reserved      ]
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch_vtensor.allocator.address_range import AddressRange
from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.page_pool import Page
from torch_vtensor.allocator.pools import all_schedulers

__all__ = ["memory_map"]

_COLORS = {
    "own": "#3b7dd8",
    "shared": "#8e5bd0",
    "prefix": "#d08a2e",
    "offloaded": "#6b8f71",
    "asleep": "#444c56",
    "reserved": "#e4e7eb",
}
_MOST_ROWS = 2000  # of one device; a page with more is slow to look at
_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2em; color: #222; }
table { border-collapse: collapse; } td { padding: 0 1em 0 0; white-space: nowrap; }
td.bar { width: 100%; padding: 1px 0; } .bar div { display: flex; height: 12px; } .bar span { height: 12px; }
.key span { display: inline-block; width: 12px; height: 12px; margin: 0 .4em 0 1.2em; }
"""


class _Stretch(NamedTuple):
    """Neighbouring addresses of one strip that are backed alike."""

    kind: str
    nbytes: int
    num_pages: int


def memory_map(path: str | Path | None = None) -> str:
    """The HTML of a page that shows the reserved, own, shared, offloaded and sleeping pages of every VTensor.

    Args:
        path: where to write it as well.

    Effects: takes each device's memory lock for a moment; never waits for a device. What is parked is shown, too.
    """
    body = "".join(_section(str(device), scheduler) for device, scheduler in all_schedulers().items())
    key = "".join(f'<span style="background:{color}"></span>{kind}' for kind, color in _COLORS.items())
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Memory of torch_vtensor</title>'
        f'<style>{_STYLE}</style><h1>Memory of torch_vtensor</h1><p class="key">{key}</p>'
        f"{body or '<p>Nothing was allocated yet.</p>'}</html>\n"
    )
    if path is not None:
        Path(path).write_text(page)
    return page


def _section(device: str, scheduler: GrowthScheduler) -> str:
    stats = scheduler.stats()
    rows, num_left = [], _MOST_ROWS
    with scheduler.pool.lock:
        for number, range_ in sorted(scheduler.pool.ranges.items()):
            strips = list(_strips(range_))[:num_left]
            num_left -= len(strips)
            rows += [_row(number, range_, index, strip) for index, strip in enumerate(strips)]
        num_hidden = sum(range_.num_strips for range_ in scheduler.pool.ranges.values()) - len(rows)
    names = ("reserved", "committed", "live", "shared", "prefix", "parked", "pooled", "torch", "offloaded")
    sizes = ", ".join(f"{name} {_mib(getattr(stats, f'{name}_bytes'))}" for name in names)
    hidden = f"<p>{num_hidden} more strips are not shown.</p>" if num_hidden > 0 else ""
    return f"<h2>{html.escape(device)}</h2><p>{sizes}</p><table>{''.join(rows)}</table>{hidden}"


def _strips(range_: AddressRange) -> Iterator[list[_Stretch]]:
    """What each strip consists of, from its first address on."""
    places = iter(range_.places())
    pages_per_strip = len(range_.pages) // range_.num_strips
    for _ in range(range_.num_strips):
        stretches = [_Stretch("reserved", range_.head_bytes, 0)]
        for ptr, page in (next(places) for _ in range(pages_per_strip)):
            kind = "asleep" if range_.is_vacant(ptr) else _kind_of(page)
            last = stretches[-1]
            if last.kind == kind:
                stretches[-1] = _Stretch(kind, last.nbytes + page.nbytes, last.num_pages + 1)
            else:
                stretches.append(_Stretch(kind, page.nbytes, 1))
        stretches.append(_Stretch("reserved", range_.strip_bytes - range_.committed_bytes, 0))
        yield [it for it in stretches if it.nbytes]


def _kind_of(page: Page) -> str:
    if page.is_outside:
        return "offloaded"
    if page.num_refs - page.num_held > 1:
        return "shared"
    return "prefix" if page.num_held else "own"


def _row(number: int, range_: AddressRange, index: int, strip: list[_Stretch]) -> str:
    sizes = Counter[str]()
    for it in strip:
        sizes[it.kind] += it.nbytes
    total_bytes = sum(it.nbytes for it in strip)
    bars = "".join(
        f'<span style="width:{100 * it.nbytes / total_bytes:.3f}%;background:{_COLORS[it.kind]}" '
        f'title="{it.kind}: {_mib(it.nbytes)} in {it.num_pages} mappings"></span>'
        for it in strip
    )
    backed = _mib(total_bytes - sizes["reserved"])
    idle = ", idle" if range_.is_idle else ""
    name = f"{html.escape(range_.tag)} {number}.{index} at {range_.base_ptr + index * range_.strip_bytes:#x}{idle}"
    return f'<tr><td>{name}</td><td>{backed}</td><td class="bar"><div>{bars}</div></td></tr>'


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.2f} MiB"
