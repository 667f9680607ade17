"""Rows of a dataset that is never held: endless passes over pieces of it, shared out, shuffled, and skipped to resume.

A pass reads every row once. Pieces (files, mostly) are dealt out to shares, one for each worker of each process, in an
order drawn for the pass; those that are left over are read by several, each of which takes its own rows. Nothing is
exchanged between processes, and each row is prepared by one alone: were rows dispatched by the first process, it would
prepare all of them, and batches would have to be of one length; were each to read all, as Accelerate otherwise does, it
would prepare all too. A share that is through begins its next pass without waiting, so none can run dry before another.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, IterableDataset
from transformers import TrainingArguments

from hfcompress.errors import DataError
from hfcompress.files import write_atomically

Row = dict[str, Any]
SKIPPED: Final = None
"""Stands for a row that a resumed run has had."""
_AT_ONCE = 100
_PIECE_ROWS = 50_000


@dataclass(frozen=True)
class Pieces:
    """Rows, nothing decoded, in `count` pieces that can be read apart."""

    count: int
    read: Callable[[int], Iterator[Row]]

    @classmethod
    def of(cls, dataset: Dataset | IterableDataset) -> "Pieces":
        """A dataset's: its shards where it is streamed, runs of rows where it is not."""
        streamed = isinstance(dataset, IterableDataset)
        number = dataset.num_shards if streamed else max(1, len(dataset) // _PIECE_ROWS)

        def read(piece: int) -> Iterator[Row]:
            # not by iter(): in a worker, that would be shared out once more
            for batch in dataset.shard(number, piece, contiguous=True).iter(_AT_ONCE):
                for values in zip(*batch.values()):
                    yield dict(zip(batch, values))

        return cls(number, read)

    def __iter__(self) -> Iterator[Row]:
        return chain.from_iterable(map(self.read, range(self.count)))

    def first(self, rows: int | None) -> "Pieces":
        """The first rows alone, in one piece."""
        return self if rows is None else Pieces(1, lambda piece: islice(iter(self), rows))

    def share(self, share: int, shares: int, order: Sequence[int]) -> Iterator[Row]:
        """The rows of one share of a pass, pieces in that order; those of all shares are all rows, each once."""
        whole = self.count - self.count % shares
        own = chain.from_iterable(self.read(piece) for piece in order[share:whole:shares])
        left = order[whole:]
        if not whole:  # fewer pieces than shares: all read all
            return chain(own, *(islice(self.read(piece), share, None, shares) for piece in left))
        if not left:
            return own
        which, place = share % len(left), share // len(left)
        readers = len(range(which, shares, len(left)))
        return chain(own, islice(self.read(left[which]), place, None, readers))


Collator = Callable[[list[Any]], Mapping[str, Any]]
Prepare = Callable[[Iterator[Row], tuple[int, int, int], int], Iterator[Row | None]]
"""(rows of a pass in their order, what its draws are seeded with, so many to skip) → what is trained on; those skipped
are SKIPPED, as cheaply as can be."""


class Passes(torch.utils.data.IterableDataset[Row | None]):
    """Endless passes of one process over its share; the Trainer's epochs and `max_steps` say when it ends.

    buffer: the next row is drawn from so many. Raises DataError: a pass has no rows for a share.
    """

    def __init__(
        self, pieces: Pieces, prepare: Prepare, *, seed: int, buffer: int, process: int = 0, processes: int = 1
    ) -> None:
        self.pieces, self.prepare, self.seed, self.buffer = pieces, prepare, seed, buffer
        self.process, self.processes = process, processes
        self._first, self._skipped, self._batch_size = 0, 0, 1
        self._notes: Path | None = None

    def set_epoch(self, epoch: int) -> None:
        """Begin with this pass. All passes are shuffled differently, also those that follow without being asked for."""
        self._first = epoch

    def skip(self, batches: int, batch_size: int) -> None:
        """Let the first rows, so many batches of this process, be SKIPPED."""
        self._skipped, self._batch_size = batches, batch_size

    def note_in(self, folder: Path) -> None:
        """Let each share note there how many rows its passes had, so that they can be skipped unread."""
        self._notes = folder

    def loader(self, collator: Collator, batch_size: int, args: TrainingArguments) -> Any:
        """Its batches, on this process' device; Accelerate, told of one process, shares nothing out once more."""
        loader = torch.utils.data.DataLoader(
            self,
            batch_size=batch_size,
            collate_fn=Batches(collator),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return prepare_data_loader(loader, args.device, 1, 0, put_on_device=True, dispatch_batches=False)

    def __iter__(self) -> Iterator[Row | None]:
        worker = torch.utils.data.get_worker_info()
        index, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        share, shares = self.process * workers + index, self.processes * workers
        # batches are asked of the workers in turn
        skip = len(range(index, self._skipped, workers)) * self._batch_size
        path = self._notes and self._notes / f"{share}-of-{shares}.json"
        lengths = _noted(path)
        for number in count(self._first):
            length = lengths.get(number, skip + 1)
            if length > skip:
                length = yield from self._pass(number, share, shares, max(1, self.buffer // workers), skip)
                lengths[number] = length
                if path is not None:
                    write_atomically(path, json.dumps(lengths).encode())
            else:
                yield from (SKIPPED for _ in range(length))
            skip = max(0, skip - length)

    def _pass(self, number: int, share: int, shares: int, buffer: int, skip: int) -> Any:
        """The rows of one pass; gives their number."""
        order = np.random.default_rng((self.seed, number)).permutation(self.pieces.count).tolist()
        rows = shuffled(self.pieces.share(share, shares, order), buffer, random.Random(f"{self.seed} {number} {share}"))
        length = 0
        for row in self.prepare(rows, (self.seed, number, share), skip):
            length += 1
            yield row
        if not length:
            raise DataError(
                f"No training row is left for part {share + 1} of {shares} of the streamed split: there are too few "
                "for so many processes and workers, or all are left out (max_length)."
            )
        return length


class Batches:
    """A collator that makes nothing of rows that are only skipped."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __call__(self, rows: list[Row | None]) -> Mapping[str, Any]:
        return {} if rows[-1] is SKIPPED else self.collator(rows)


def shuffled(rows: Iterator[Row], buffer: int, draw: random.Random) -> Iterator[Row]:
    """Each row drawn from the next `buffer` ones."""
    held = list(islice(rows, buffer))
    for row in rows:
        drawn = draw.randrange(buffer)
        yield held[drawn]
        held[drawn] = row
    draw.shuffle(held)
    yield from held


def _noted(path: Path | None) -> dict[int, int]:
    if path is None or not path.is_file():
        return {}
    return {int(number): length for number, length in json.loads(path.read_text()).items()}
