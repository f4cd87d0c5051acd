"""memory_map(): a self-contained HTML page that shows which pages back which addresses now, and what was held before.

a row for every strip of every range:   [== own ==][= shared =][~ offloaded ~][      reserved      ]

With ``record_memory()`` the page has a picture of each device's memory over time beside the map.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch_vtensor.allocator.address_range import AddressRange
from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.memory_timeline import STYLE as TIMELINE_STYLE
from torch_vtensor.allocator.memory_timeline import legend, timeline
from torch_vtensor.allocator.page_pool import Page
from torch_vtensor.allocator.pools import all_schedulers, set_recording

__all__ = ["memory_map", "record_memory"]

_KINDS = ("own", "shared", "prefix", "offloaded", "asleep", "reserved")
_FIGURES = ("reserved", "committed", "live", "shared", "prefix", "parked", "pooled", "torch", "offloaded")
_MOST_ROWS = 2000  # of one device; a page with more is slow to look at
_STYLE = """
:root { --own: #3b7dd8; --shared: #8e5bd0; --prefix: #d08a2e; --offloaded: #3f8f5b; --asleep: #444c56; --torch: #7fb2ea;
  --pooled: #cfd8e3; --reserved: #e8ebef; --budget: #c0392b; --text: #1f2328; --quiet: #57606a; --line: #dde1e6;
  --ground: #ffffff; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --own: #5b9bf0; --shared: #b48cf0; --prefix: #e0a54f;
  --offloaded: #5fc583; --asleep: #9aa4af; --torch: #3f6ea5; --pooled: #3d4753; --reserved: #262c34; --budget: #ff7b6b;
  --text: #e6e9ec; --quiet: #a3adb8; --line: #343b44; --ground: #14181d; } }
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem; color: var(--text); background: var(--ground); }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } h3 { font-size: .95rem; margin: .2rem 0 .6rem; }
.key { color: var(--quiet); } .key span { margin-right: 1.2em; white-space: nowrap; }
.key i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px; }
.sizes { display: flex; flex-wrap: wrap; gap: .6rem 2rem; margin: 0 0 1rem; padding: 0; }
.sizes div { min-width: 6rem; }
.sizes dt { color: var(--quiet); } .sizes dd { margin: 0; font-variant-numeric: tabular-nums; font-weight: 600; }
.both { display: grid; gap: 1.5rem 2.5rem; grid-template-columns: minmax(0, 1fr); align-items: start; }
@media (min-width: 75rem) { .both.recorded { grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); } }
figure { margin: 0; } figcaption { color: var(--quiet); margin-top: .4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: 1px 1em 1px 0; white-space: nowrap; text-align: left; font-weight: 400; }
thead th, .figures th { color: var(--quiet); } .map { width: 100%; } td.bar { width: 100%; }
.bar div { display: flex; height: 12px; border-radius: 3px; overflow: hidden; }
"""


class _Stretch(NamedTuple):
    """Neighbouring addresses of one strip that are backed alike."""

    kind: str
    nbytes: int
    num_pages: int


def record_memory(is_on: bool = True, *, every_s: float = 0.01, most_samples: int = 2000) -> None:
    """Keep what each device's pool holds from now on, for ``memory_map`` to show; or, with False, no longer.

    Args:
        every_s: the least time between two samples. Once there are ``most_samples`` of a device every second one goes,
            and those to come are twice as far apart, so that it can stay on.

    Effects: a change of what is held takes a few microseconds more, and a sample about 200 bytes. What was recorded
        before is forgotten.
    Raises:  ValueError for a negative time, or fewer than 16 samples.
    """
    if every_s < 0 or most_samples < 16:
        raise ValueError(f"every_s is {every_s} and most_samples {most_samples}: give at least 0 s, and 16 samples")
    set_recording((every_s, most_samples) if is_on else None)


def memory_map(path: str | Path | None = None) -> str:
    """The HTML of a page that shows the reserved, own, shared, offloaded and sleeping pages of every VTensor.

    With ``record_memory`` on also what each device held since. The page needs no network.

    Args:
        path: where to write it as well.

    Effects: takes each device's memory lock for a moment; never waits for a device. What is parked is shown, too.
    """
    body = "".join(_section(str(device), scheduler) for device, scheduler in all_schedulers().items())
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Memory of torch_vtensor</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}{TIMELINE_STYLE}</style></head><body><main><h1>Memory of torch_vtensor</h1>"
        f"{body or '<p>Nothing was allocated yet.</p>'}</main></body></html>\n"
    )
    if path is not None:
        Path(path).write_text(page, encoding="utf-8")
    return page


def _section(device: str, scheduler: GrowthScheduler) -> str:
    stats, name = scheduler.stats(), html.escape(device)
    rows, num_left = [], _MOST_ROWS
    with scheduler.pool.lock:
        recorder = scheduler.pool.recorder
        samples = [] if recorder is None else recorder.samples()
        for number, range_ in sorted(scheduler.pool.ranges.items()):
            strips = list(_strips(range_))[:num_left]
            num_left -= len(strips)
            rows += [_row(number, range_, index, strip) for index, strip in enumerate(strips)]
        num_hidden = sum(range_.num_strips for range_ in scheduler.pool.ranges.values()) - len(rows)
    sizes = "".join(f"<div><dt>{it}</dt><dd>{_mib(getattr(stats, f'{it}_bytes'))}</dd></div>" for it in _FIGURES)
    hidden = f"<p>{num_hidden} more strips are not shown.</p>" if num_hidden > 0 else ""
    key = "".join(f'<span><i style="background:var(--{kind})"></i>{kind}</span>' for kind in _KINDS)
    columns = "".join(f'<th scope="col">{column}</th>' for column in ("strip", "memory", "addresses"))
    now = (
        f'<div><h3>Now, by address</h3><p class="key">{key}</p><table class="map"><thead><tr>{columns}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>{hidden}</div>"
    )
    if samples:
        over_time = f'<h3>Over time</h3><p class="key">{legend()}</p>{timeline(samples, name)}'
        now = f'<div class="both recorded"><div>{over_time}</div>{now}</div>'
    return f'<section><h2>{name}</h2><dl class="sizes">{sizes}</dl>{now}</section>'


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
        f'<span style="width:{100 * it.nbytes / total_bytes:.3f}%;background:var(--{it.kind})" '
        f'title="{it.kind}: {_mib(it.nbytes)} in {it.num_pages} mappings"></span>'
        for it in strip
    )
    backed = _mib(total_bytes - sizes["reserved"])
    told = ", ".join(f"{kind} {_mib(nbytes)}" for kind, nbytes in sizes.items())
    idle = ", idle" if range_.is_idle else ""
    name = f"{html.escape(range_.tag)} {number}.{index} at {range_.base_ptr + index * range_.strip_bytes:#x}{idle}"
    return (
        f'<tr><th scope="row">{name}</th><td>{backed}</td>'
        f'<td class="bar"><div role="img" aria-label="{told}">{bars}</div></td></tr>'
    )


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.2f} MiB"
