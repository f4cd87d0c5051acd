"""What it costs to move bytes between ranks: latency and bandwidth, within a node and between nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


class Link(NamedTuple):
    """What a rank's connection to others can do.

    Units:  seconds before a message's first byte arrives; bytes a second that one rank sends while it receives as many.
    """

    latency_seconds: float
    bytes_per_second: float


class Topology(NamedTuple):
    """Ranks ``[n * ranks_per_node, (n + 1) * ranks_per_node)`` share node n; others reach each other by the network.

    The defaults are an eight-GPU NVLink node with one 400 Gbit/s adapter for each GPU.

    Units:  launch_seconds: what it takes a host to start one collective, or one batch of sends and receives.
    """

    ranks_per_node: int = 8
    inside: Link = Link(2e-6, 350e9)
    between: Link = Link(8e-6, 45e9)
    launch_seconds: float = 10e-6

    def node(self, rank: int) -> int:
        """The node that a rank is on."""
        return rank // self.ranks_per_node

    def link(self, ranks: Sequence[int]) -> Link:
        """What a ring through these ranks is bound by.

        Between nodes, a ring can be laid through all adapters of a node: it is as fast as those of the ranks that it
        has on the node where it has fewest, but no faster than within one.
        """
        ranks_of_node = Counter(map(self.node, ranks))
        if len(ranks_of_node) == 1:
            return self.inside
        bandwidth = self.between.bytes_per_second * min(ranks_of_node.values())
        return Link(self.between.latency_seconds, min(bandwidth, self.inside.bytes_per_second))

    def ring_seconds(self, ranks: Sequence[int], num_bytes: float, num_hops: int | None = None) -> float:
        """Time of a collective in which each rank sends `num_bytes`, in as many hops as there are other ranks."""
        link = self.link(ranks)
        hops = len(ranks) - 1 if num_hops is None else num_hops
        return self.launch_seconds + hops * link.latency_seconds + num_bytes / link.bytes_per_second

    def all_reduce_seconds(self, ranks: Sequence[int], num_bytes: float) -> float:
        """Time to add up `num_bytes` of every rank on every rank: a reduce-scatter and an all-gather."""
        others = len(ranks) - 1
        return self.ring_seconds(ranks, 2 * num_bytes * others / len(ranks), 2 * others)

    def all_gather_seconds(self, ranks: Sequence[int], num_bytes: float) -> float:
        """Time to gather `num_bytes`, all shards together, on every rank; a reduce-scatter of as many takes as long."""
        return self.ring_seconds(ranks, num_bytes * (len(ranks) - 1) / len(ranks))

    def all_to_all_seconds(self, ranks: Sequence[int], num_bytes: float) -> float:
        """Time to exchange `num_bytes`, what one rank has, between all. Nothing is passed on: every adapter is busy."""
        remote = num_bytes * (len(ranks) - 1) / len(ranks)
        link = self.inside if len({self.node(rank) for rank in ranks}) == 1 else self.between
        return self.launch_seconds + (len(ranks) - 1) * link.latency_seconds + remote / link.bytes_per_second

    def broadcast_seconds(self, ranks: Sequence[int], num_bytes: float) -> float:
        """Time to bring `num_bytes` from the first rank to the others, passed on piece by piece."""
        return self.ring_seconds(ranks, num_bytes)

    def pattern(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """Which of these ranks share a node, as numbers that do not tell which node: nodes in order of appearance."""
        number_of: dict[int, int] = {}
        return tuple(number_of.setdefault(self.node(rank), len(number_of)) for rank in ranks)

    def collective_seconds(self, kind: str, ranks: Sequence[int], num_bytes: float) -> float:
        """Time of a collective by its name, in which each rank gives `num_bytes`."""
        match kind:
            case "all_reduce":
                return self.all_reduce_seconds(ranks, num_bytes)
            case "all_gather":
                return self.all_gather_seconds(ranks, num_bytes * len(ranks))
            case "all_to_all":
                return self.all_to_all_seconds(ranks, num_bytes)
            case "broadcast":
                return self.broadcast_seconds(ranks, num_bytes)
            case "reduce_scatter":
                return self.all_gather_seconds(ranks, num_bytes)
        raise ValueError(f"there is no collective {kind!r}")
