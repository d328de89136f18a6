"""The batches of an epoch, as loops of others take them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmfast.data.batches import Shard, all_marks
from mmfast.data.devices import model_place
from mmfast.data.sources import in_memory
from mmfast.data.threads import fitting_threads
from mmfast.distributed import world
from mmfast.methods.base import Learner
from mmfast.training.divergence import Losses
from mmfast.training.state import set_random_state


@dataclass(eq=False)
class EpochBatches:
    """The batches of an epoch from where it stands, in this process: sized, and iterated once.

    Attributes:
        learner: what they are for.
        train: the run's training data.
        batch_size: over all processes.
        entries: what the epoch trains on.
        shard: this process's batches, of all of which `len` is the number.
        seed: of what data sets draw.
        losses: of the steps so far, scaled by this process's share of the batch.
        draws: random state to begin with.
        done: batches that are.
    """

    learner: Learner
    train: Any
    batch_size: int
    entries: Any
    shard: Shard
    seed: int
    losses: Losses
    draws: dict[str, Any]
    done: int = 0

    def __post_init__(self) -> None:
        self._held = contextlib.ExitStack()

    def __len__(self) -> int:
        return len(self.shard.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Nothing happens before the first batch is asked for: loops make iterators they drop again.
        learner, first = self.learner, self.done
        self.close()
        self._held.enter_context(fitting_threads(learner, self.train, self.batch_size))
        set_random_state(self.draws, learner.device)
        learner.train()
        device, dtype = model_place(learner)
        read = learner.reader.read(
            self.entries,
            self.shard.batches[first:],
            learner.modalities,
            device,
            dtype=dtype,
            seed=self.seed,
            first=first,
        )
        # Sized loops ask for no batch beyond the last, at which a generator would end by itself.
        self._held.enter_context(contextlib.closing(read))
        alone = world() is None or in_memory(getattr(self.entries, "base", self.entries))
        for batch in read:
            # All processes must know of a mark that one of them has met.
            yield batch if alone else batch | all_marks(batch, learner.modalities)

    @property
    def progress(self) -> float:
        """b / B of the epoch, as `edit_gradients` takes it."""
        return self.done / len(self)

    @property
    def scale(self) -> float:
        """What a loss is multiplied by, so that the mean of gradients over processes is the whole batch's."""
        return self.shard.scales[self.done]

    def close(self) -> None:
        """End reading, and give torch its threads back."""
        self._held.close()
