"""Exchanges of tensors that are alike: found for the first, written down for the others.

Tensors are alike if operators that are cut and placed in the same way make and read them: those of equal layers, on the
same ranks or on ranks that share nodes in the same way. Their makers and readers correspond by position, and on the
same ranks the communication between them is the same object.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Self

from torch_vtensor.compile.addends import Reader
from torch_vtensor.compile.communication import Communication, Placed
from torch_vtensor.compile.exchange import Exchange, GradientGroup, Input, Instance
from torch_vtensor.compile.tensor_view import LogicalTensor, Mask

Numbers = tuple[int, ...]
"""Makers or readers, by position among all of their tensor."""


class _Group(NamedTuple):
    addends: tuple[tuple[Placed, Numbers], ...]
    communication: Communication


class _One(NamedTuple):
    """An exchange with numbers for makers, readers and groups; ``inputs`` has what an `Input` tells of each reader."""

    microbatch: int | None
    makers: tuple[tuple[Placed, Numbers], ...]
    readers: Numbers
    inputs: tuple[tuple[int | None, int | None, Placed | None], ...]
    communication: Communication
    groups: tuple[_Group, ...]
    anew: bool


class Pattern(NamedTuple):
    """The exchanges of a tensor, and the parts of it that ranks keep, without the tensor.

    ``is_local`` tells whether no rank keeps a part that does not read the tensor; ``makers`` and ``readers`` are the
    ranks of these, by position.
    """

    exchanges: tuple[_One, ...]
    storage: Mapping[int, Mask] | None
    is_local: bool
    makers: Numbers
    readers: Numbers

    @classmethod
    def of(
        cls,
        exchanges: Sequence[Exchange],
        storage: Mapping[int, Mask] | None,
        makers: Sequence[Instance],
        readers: Sequence[Reader],
    ) -> Self:
        """What a tensor's exchanges have in common with those of others."""
        # By identity: what they hold takes long to hash.
        maker_number = {id(maker): number for number, maker in enumerate(makers)}
        reader_number = {id(reader): number for number, reader in enumerate(readers)}
        ones = []
        for exchange in exchanges:
            group_number = {group: number for number, group in enumerate(exchange.groups)}
            inputs = [
                (
                    None if source is None else maker_number[id(source)],
                    None if group is None else group_number[group],
                    part,
                )
                for source, group, part in exchange.serves
            ]
            ones.append(
                _One(
                    exchange.microbatch,
                    tuple((part, tuple([maker_number[id(one)] for one in by])) for part, by in exchange.makers.items()),
                    tuple([reader_number[id(reader)] for reader in exchange.readers]),
                    tuple(inputs),
                    exchange.communication,
                    tuple(
                        _Group(
                            tuple(
                                (part, tuple([reader_number[id(reader)] for reader in some]))
                                for part, some in group.addends.items()
                            ),
                            group.communication,
                        )
                        for group in exchange.groups
                    ),
                    exchange.anew,
                )
            )
        of_makers, of_readers = (tuple([one.rank for one in some]) for some in (makers, readers))
        return cls(tuple(ones), storage, set(storage or ()) <= set(of_readers), of_makers, of_readers)

    def shifted(self, by: int) -> Pattern:
        """The same on ranks of other numbers."""

        def move(parts: tuple[tuple[Placed, Numbers], ...]) -> tuple[tuple[Placed, Numbers], ...]:
            return tuple((Placed(part.rank + by, part.mask), numbers) for part, numbers in parts)

        return Pattern(
            tuple(
                one._replace(
                    makers=move(one.makers),
                    inputs=tuple(
                        (source, group, part and Placed(part.rank + by, part.mask))
                        for source, group, part in one.inputs
                    ),
                    communication=one.communication.shifted(by),
                    groups=tuple(_Group(move(addends), found.shifted(by)) for addends, found in one.groups),
                )
                for one in self.exchanges
            ),
            None if self.storage is None else {rank + by: mask for rank, mask in self.storage.items()},
            self.is_local,
            tuple([rank + by for rank in self.makers]),
            tuple([rank + by for rank in self.readers]),
        )

    def on(self, ranks: frozenset[int]) -> Pattern:
        """What it is to these ranks alone, by position among their makers and readers."""
        makers, readers = (
            {number: place for place, number in enumerate(n for n, rank in enumerate(of) if rank in ranks)}
            for of in (self.makers, self.readers)
        )

        def keep(
            parts: tuple[tuple[Placed, Numbers], ...], places: Mapping[int, int]
        ) -> tuple[tuple[Placed, Numbers], ...]:
            return tuple([(part, tuple([places[number] for number in by])) for part, by in parts if part.rank in ranks])

        return self._replace(
            exchanges=tuple(
                [
                    one._replace(
                        makers=keep(one.makers, makers),
                        readers=tuple([readers[number] for number in one.readers if number in readers]),
                        inputs=tuple(
                            [
                                (None if source is None else makers[source], group, part)
                                for number, (source, group, part) in zip(one.readers, one.inputs, strict=True)
                                if number in readers
                            ]
                        ),
                        communication=one.communication.on(ranks),
                        groups=tuple(
                            [_Group(keep(addends, readers), found.on(ranks)) for addends, found in one.groups]
                        ),
                    )
                    for one in self.exchanges
                ]
            ),
            makers=tuple([rank for rank in self.makers if rank in ranks]),
            readers=tuple([rank for rank in self.readers if rank in ranks]),
        )

    def exchanges_of(
        self, tensor: LogicalTensor, makers: Sequence[Instance], readers: Sequence[Reader]
    ) -> Iterator[tuple[Exchange, list[Input]]]:
        """The exchanges of a tensor that is alike, each with what it is to its readers."""
        for one in self.exchanges:
            groups = tuple(
                [
                    GradientGroup(
                        {part: tuple([readers[number] for number in some]) for part, some in addends}, communication
                    )
                    for addends, communication in one.groups
                ]
            )
            exchange = Exchange(
                tensor,
                one.microbatch,
                {part: tuple([makers[number] for number in by]) for part, by in one.makers},
                tuple([readers[number] for number in one.readers]),
                one.communication,
                groups,
                one.anew,
            )
            yield (
                exchange,
                [
                    Input(
                        exchange,
                        reader,
                        None if source is None else makers[source],
                        None if group is None else groups[group],
                        part,
                    )
                    for reader, (source, group, part) in zip(exchange.readers, one.inputs, strict=True)
                ],
            )
