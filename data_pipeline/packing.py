"""Documents to packs: what one lane feeds in one step.

    source --documents in order--> at most ``look_ahead`` waiting --best fit--> pack, within two budgets

A pack starts with the document that waits longest, so none waits for ever; then the largest waiting document that still
fits is added until none does. The state is the source's position at the document that waits longest, plus which of the
following ordinals are done: integers. Not for: the order of documents (``lanes``, ``mixture``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from data_pipeline.config import PackingConfig
from data_pipeline.document import Document
from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.media_spec import MediaSpec

Position = TypeVar("Position")
PositionOut = TypeVar("PositionOut", covariant=True)


@dataclass(frozen=True)
class Pack:
    """Documents of one lane and step; ``lane`` is -1 if it holds null documents only."""

    documents: tuple[Document, ...]
    lane: int


@dataclass(frozen=True)
class Load:
    """What a pack holds so far."""

    documents: int = 0
    tokens: int = 0
    cost: float = 0.0
    embedded: bool = False
    attended: bool = False

    def plus(self, document: Document, spec: MediaSpec) -> Load:
        """The load with one more document."""
        return Load(
            self.documents + 1,
            self.tokens + document.num_tokens,
            self.cost + document.cost(spec),
            self.embedded or any(item.embedded for item in document.items),
            self.attended or any(not item.embedded for item in document.items),
        )


class Budget:
    """What fits into a pack, with room kept for the null document that the pack would need.

    Args:
        config: The budgets.
        spec: Prices of patches, and which roles each pack needs.
        null: The null document of ``spec``.

    Raises:
        DataConfigError: not even a null document and one token fit.
    """

    def __init__(self, config: PackingConfig, spec: MediaSpec, null: Document) -> None:
        self.config = config
        self.spec = spec
        self.null = null
        least = null.num_tokens + 1
        if config.max_tokens < least:
            raise DataConfigError(
                f"packing.max_tokens={config.max_tokens}: a text with its null document takes at least {least}"
            )
        if config.max_cost is not None and config.max_cost < null.cost(spec) + 1:
            raise DataConfigError(
                f"packing.max_cost={config.max_cost:g}: a text with its null document costs at least "
                f"{null.cost(spec) + 1:g}"
            )

    def lacks_role(self, load: Load) -> bool:
        """Whether a pack needs the null document."""
        return (self.spec.needs_embedded and not load.embedded) or (self.spec.needs_attended and not load.attended)

    def fits(self, load: Load) -> bool:
        """Whether a pack may hold this much."""
        full = load.plus(self.null, self.spec) if self.lacks_role(load) else load
        config = self.config
        return (
            full.tokens <= config.max_tokens
            and (config.max_cost is None or full.cost <= config.max_cost)
            and (config.max_documents is None or load.documents <= config.max_documents)
        )

    def admit(self, document: Document) -> Document:
        """The document as some pack can hold it.

        Raises:
            SampleError: no pack can hold it, or nothing to learn is left of it.
        """
        if self._alone(document):
            return document
        if self.config.too_long == "truncate":
            for length in (self.config.max_tokens, self.config.max_tokens - self.null.num_tokens):
                shorter = truncate(document, length, self.spec)
                if self._alone(shorter) and shorter.loss_weights.any():
                    return shorter
        room = f"{self.config.max_tokens} tokens"
        if self.config.max_cost is not None:
            room += f" and a cost of {self.config.max_cost:g}"
        raise SampleError(
            f"{document.num_tokens} tokens and {document.num_patches} patches (cost {document.cost(self.spec):g}); "
            f"a pack holds {room}, null documents included"
        )

    def _alone(self, document: Document) -> bool:
        return self.fits(Load().plus(document, self.spec))


def truncate(document: Document, length: int, spec: MediaSpec) -> Document:
    """The first ``length`` tokens at most; an image stays whole or goes."""
    next_items = [*(item for _, item in document.images[1:]), len(document.items)]
    for (start, first_item), next_item in zip(document.images, next_items, strict=False):
        embedded = [item for item in document.items[first_item:next_item] if item.embedded]
        size = sum(spec.num_features(item.grid) for item in embedded) if embedded else 1
        if start < length < start + size:
            length = start
    if length >= document.num_tokens:
        return document
    images = tuple(image for image in document.images if image[0] < length)
    num_items = document.images[len(images)][1] if len(images) < document.num_images else len(document.items)
    return replace(
        document,
        token_ids=document.token_ids[:length],
        labels=document.labels[:length],
        loss_weights=document.loss_weights[:length],
        position_ids=document.position_ids[:length],
        items=document.items[:num_items],
        dest=document.dest[document.dest < length],
        spans=tuple(span for span in document.spans if span.start < length),
        images=images,
    )


class Source(Protocol[PositionOut]):
    """An endless stream of documents that can be put back to a position."""

    def position(self) -> PositionOut:
        """Where the next document is read from."""

    def make(self) -> Document | None:
        """Reads the next document; None if it was skipped."""

    def pass_over(self) -> None:
        """Moves past the next document without reading it."""


@dataclass(frozen=True)
class _Waiting(Generic[Position]):
    ordinal: int
    position: Position
    document: Document


class Packer(Generic[Position]):
    """Packs of one lane.

    Args:
        source: Documents in order.
        budget: What fits.
        lane: Written on each pack.
        done: Ordinals, counted from the source's position, that earlier packs used (from ``state``).
    """

    def __init__(self, source: Source[Position], budget: Budget, lane: int, done: tuple[int, ...] = ()) -> None:
        self._source = source
        self._budget = budget
        self._lane = lane
        self._done = set(done)
        self._ordinal = 0
        self._waiting: list[_Waiting[Position]] = []

    def next_pack(self) -> Pack:
        """The next pack, with the null document if it lacks a role."""
        documents: list[Document] = []
        load = Load()
        while True:
            self._fill()
            chosen = self._choose(load)
            if chosen is None:
                break
            self._waiting = [waiting for waiting in self._waiting if waiting is not chosen]
            self._done.add(chosen.ordinal)
            documents.append(chosen.document)
            load = load.plus(chosen.document, self._budget.spec)
            if load.documents == self._budget.config.max_documents:
                break
        if self._budget.lacks_role(load):
            documents.append(self._budget.null)
        return Pack(tuple(documents), self._lane)

    def state(self) -> tuple[Position, tuple[int, ...]]:
        """Position of the document that waits longest, and the done ordinals counted from it."""
        if self._waiting:
            base, position = self._waiting[0].ordinal, self._waiting[0].position
        else:
            base, position = self._ordinal, self._source.position()
        self._done = {ordinal for ordinal in self._done if ordinal > base}
        return position, tuple(sorted(ordinal - base for ordinal in self._done))

    def _fill(self) -> None:
        while len(self._waiting) < self._budget.config.look_ahead:
            ordinal, position = self._ordinal, self._source.position()
            self._ordinal += 1
            if ordinal in self._done:
                self._source.pass_over()
                continue
            document = self._source.make()
            if document is None:
                self._done.add(ordinal)
            else:
                self._waiting.append(_Waiting(ordinal, position, document))

    def _choose(self, load: Load) -> _Waiting[Position] | None:
        """The first document of an empty pack, else the largest that fits; of equals the oldest."""
        if load.documents == 0:
            return self._waiting[0]
        spec = self._budget.spec
        fitting = [waiting for waiting in self._waiting if self._budget.fits(load.plus(waiting.document, spec))]
        return max(fitting, key=lambda waiting: waiting.document.num_tokens, default=None)
