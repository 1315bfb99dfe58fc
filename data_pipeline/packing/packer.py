"""Documents to packs: what one lane feeds in one step.

    source --documents in order--> at most ``look_ahead`` waiting --strategy--> pack, within two budgets

A pack starts with the document that waits longest, so none waits for ever; then the strategy adds waiting documents
that still fit until none does. The state is the source's position and the places of the documents that wait: integers.
Not for: the order of documents (``lanes``), how a document is cut (``truncation``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from data_pipeline.document import Document
from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.order.state import Drawn, StreamPosition
from data_pipeline.packing.config import PackingConfig
from data_pipeline.packing.truncation import closed, longest_part, split


@dataclass(frozen=True)
class Pack:
    """Documents of one lane and step; ``lane`` is -1 if it holds null documents only.

    ``drawn`` are the places of the documents, in order; a null document at the end has none.
    """

    documents: tuple[Document, ...]
    lane: int
    drawn: tuple[Drawn, ...] = ()


class Load(NamedTuple):
    """What a pack, or a document alone, holds."""

    documents: int = 0
    tokens: int = 0
    cost: float = 0.0
    embedded: bool = False
    attended: bool = False

    @classmethod
    def of(cls, document: Document, spec: MediaSpec) -> Load:
        """The load of one document."""
        embedded = attended = False
        for item in document.items:
            embedded, attended = embedded or item.embedded, attended or not item.embedded
        return cls(1, document.num_tokens, document.cost(spec), embedded, attended)


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
        self._null_load = Load.of(null, spec)
        self._needs = (spec.needs_embedded, spec.needs_apart)
        self._pairs = spec.placement is Placement.PAIR
        if self._pairs and config.too_long == "split":
            raise DataConfigError(
                "packing.too_long=split: the later parts of a text would have no image to be compared with; use "
                "truncate, which keeps the end token, or error"
            )
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
        embedded, attended = self._needs
        return (embedded and not load.embedded) or (attended and not load.attended)

    def join(self, load: Load, more: Load) -> Load | None:
        """The load of a pack with one document more; None if a pack may not hold both."""
        config = self.config
        both = Load(
            load.documents + more.documents,
            load.tokens + more.tokens,
            load.cost + more.cost,
            load.embedded or more.embedded,
            load.attended or more.attended,
        )
        tokens, cost = both.tokens, both.cost
        if self.lacks_role(both):  # The null document takes tokens and cost, but it is no sample: no load counts it.
            tokens, cost = tokens + self._null_load.tokens, cost + self._null_load.cost
        if (
            tokens > config.max_tokens
            or (config.max_cost is not None and cost > config.max_cost)
            or (config.max_documents is not None and both.documents > config.max_documents)
        ):
            return None
        return both

    def admit(self, document: Document) -> list[Document]:
        """The document as packs can hold it: itself, or what ``too_long`` makes of it.

        Raises:
            SampleError: no pack can hold it and it may not be cut, or nothing to learn is left of it; it names the
                sample that the document was made of.
        """
        if self._alone(document):
            return [document]
        parts: list[Document] = []
        if self.config.too_long == "split":
            parts = list(split(document, self._alone))
        elif self.config.too_long == "truncate":
            first = longest_part(document, self._alone)
            parts = [] if first is None else [first]
            if self._pairs:  # The last token stands for the text.
                parts = [closed(part, document) for part in parts if part.images and part.num_tokens > 1]
        parts = [part for part in parts if part.loss_weights.any()]
        if parts:
            return parts
        error = SampleError(
            f"{document.num_tokens} tokens and {document.num_patches} patches (cost {document.cost(self.spec):g}); "
            f"{self._room()}; {self._remedy()}"
        )
        origin = document.provenance
        raise error if origin is None else error.located(origin.shard, origin.key)

    def _alone(self, document: Document) -> bool:
        most = self.spec.max_document_tokens  # Branches go on from the same position, so tokens do not tell.
        has_positions = most is None or int(document.position_ids.max()) < most
        return has_positions and self.join(Load(), Load.of(document, self.spec)) is not None

    def _room(self) -> str:
        room = f"a pack holds {self.config.max_tokens} tokens"
        if self.config.max_cost is not None:
            room += f" and a cost of {self.config.max_cost:g}"
        room += ", null documents included"
        most = self.spec.max_document_tokens
        return room if most is None else f"{room}, and the model has positions for {most} tokens of a document"

    def _remedy(self) -> str:
        if self.config.too_long != "error":
            return "nothing that is learned is left of it when it is cut"
        return "raise packing.max_tokens or max_cost, or set packing.too_long to truncate or split"


class Made(NamedTuple):
    """A document and the place to make it again from."""

    drawn: Drawn
    document: Document


class Source(Protocol):
    """A stream of documents whose place is a value."""

    @property
    def position(self) -> StreamPosition:
        """Where the next document is drawn from."""

    def make(self) -> list[Made] | None:
        """Draws the next sample: its documents, none if it was skipped; None if there are no more samples."""

    def remake(self, drawn: Drawn) -> Document | None:
        """A document that was drawn before, again; None if its sample went bad meanwhile."""


class _Waiting(NamedTuple):
    """A document that was drawn and not packed yet, weighed once."""

    drawn: Drawn
    document: Document
    load: Load


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
        self._waiting = [
            _Waiting(drawn, document, Load.of(document, budget.spec))
            for drawn, document in made
            if document is not None
        ]

    def next_pack(self) -> Pack:
        """The next pack, with the null document if it lacks a role; a null pack once there are no more samples."""
        documents: list[Document] = []
        drawn: list[Drawn] = []
        load, budget = Load(), self._budget
        while load.documents != budget.config.max_documents:
            while self._more and len(self._waiting) < budget.config.look_ahead:
                made = self._source.make()
                if made is None:
                    self._more = False
                else:
                    self._waiting += [_Waiting(*each, Load.of(each.document, budget.spec)) for each in made]
            choice = self._choose(load)
            if choice is None:
                break
            chosen, load = choice
            self._waiting = [waiting for waiting in self._waiting if waiting is not chosen]
            documents.append(chosen.document)
            drawn.append(chosen.drawn)
        if not documents:
            return Pack((budget.null,), lane=-1)
        if budget.lacks_role(load):
            documents.append(budget.null)
        return Pack(tuple(documents), self._lane, tuple(drawn))

    @property
    def exhausted(self) -> bool:
        """Whether every document has been packed and no sample is left."""
        return not self._more and not self._waiting

    def state(self) -> tuple[StreamPosition, tuple[Drawn, ...]]:
        """Where the source stands, and the places of the documents that wait, the oldest first."""
        return self._source.position, tuple(waiting.drawn for waiting in self._waiting)

    def _choose(self, load: Load) -> tuple[_Waiting, Load] | None:
        """The document to add to a pack, and the load of the pack with it; None if no document fits.

        An empty pack takes the oldest document, another one what the strategy takes of those that fit. Of equal
        documents it is the oldest.
        """
        budget, config = self._budget, self._budget.config
        choice, largest = None, 0.0
        for waiting in self._waiting:
            if load.documents == 0:
                return waiting, waiting.load
            # Packs of a step should be full alike by cost, if there is a budget of it.
            size = waiting.load.tokens if config.max_cost is None else waiting.load.cost
            if choice is not None and size <= largest:
                continue
            joined = budget.join(load, waiting.load)
            if joined is not None:
                choice, largest = (waiting, joined), size
                if config.strategy != "best_fit":  # Greedy holds one document, so the first is the only one.
                    break
        return choice
