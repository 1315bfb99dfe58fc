"""Documents to packs: what one lane feeds in one step.

    source --documents in order--> at most ``look_ahead`` waiting --best fit--> pack, within two budgets

A pack starts with the document that waits longest, so none waits for ever; then the largest waiting document that still
fits is added until none does. The state is the source's position and the places of the documents that wait: integers.
Not for: the order of documents (``lanes``, ``mixture``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from data_pipeline.config import PackingConfig
from data_pipeline.document import Document
from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.media_spec import MediaSpec
from data_pipeline.state import Drawn, StreamPosition


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
                shorter = truncate(document, length)
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


def truncate(document: Document, length: int) -> Document:
    """The first ``length`` tokens at most; an image stays whole or goes."""
    for image in document.images:
        if image.start < length < image.stop:
            length = image.start
    if length >= document.num_tokens:
        return document
    images = tuple(image for image in document.images if image.start < length)
    num_items = document.images[len(images)].first_item if len(images) < document.num_images else len(document.items)
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


class Made(NamedTuple):
    """A document and the place to make it again from."""

    drawn: Drawn
    document: Document


class Source(Protocol):
    """A stream of documents whose place is a value."""

    def position(self) -> StreamPosition:
        """Where the next document is drawn from."""

    def make(self) -> list[Made] | None:
        """Draws the next sample: its documents, none if it was skipped; None if there are no more samples."""

    def remake(self, drawn: Drawn) -> Document | None:
        """A document that was drawn before, again; None if its sample went bad meanwhile."""


class Packer:
    """Packs of one lane.

    Args:
        source: Documents in order.
        budget: What fits.
        lane: Written on each pack.
        waiting: Documents that were drawn and not packed when the state was taken.
    """

    def __init__(self, source: Source, budget: Budget, lane: int, waiting: Sequence[Drawn] = ()) -> None:
        self._source = source
        self._budget = budget
        self._lane = lane
        self._more = True
        made = ((drawn, source.remake(drawn)) for drawn in waiting)
        self._waiting = [Made(drawn, document) for drawn, document in made if document is not None]

    def next_pack(self) -> Pack:
        """The next pack, with the null document if it lacks a role; a null pack once there are no more samples."""
        documents: list[Document] = []
        load = Load()
        while True:
            self._fill()
            chosen = self._choose(load)
            if chosen is None:
                break
            self._waiting = [made for made in self._waiting if made is not chosen]
            documents.append(chosen.document)
            load = load.plus(chosen.document, self._budget.spec)
            if load.documents == self._budget.config.max_documents:
                break
        if not documents:
            return Pack((self._budget.null,), lane=-1)
        if self._budget.lacks_role(load):
            documents.append(self._budget.null)
        return Pack(tuple(documents), self._lane)

    @property
    def exhausted(self) -> bool:
        """Whether every document has been packed and no sample is left."""
        return not self._more and not self._waiting

    def state(self) -> tuple[StreamPosition, tuple[Drawn, ...]]:
        """Where the source stands, and the places of the documents that wait, the oldest first."""
        return self._source.position(), tuple(made.drawn for made in self._waiting)

    def _fill(self) -> None:
        while self._more and len(self._waiting) < self._budget.config.look_ahead:
            made = self._source.make()
            if made is None:
                self._more = False
            else:
                self._waiting.extend(made)

    def _choose(self, load: Load) -> Made | None:
        """The first document of an empty pack, else the largest that fits; of equals the oldest."""
        if load.documents == 0:
            return self._waiting[0] if self._waiting else None
        spec = self._budget.spec
        fitting = [made for made in self._waiting if self._budget.fits(load.plus(made.document, spec))]
        return max(fitting, key=lambda made: made.document.num_tokens, default=None)
