"""Packs the documents of one lane; a pack is the lane's part of one step.

    source --documents in order--> at least ``look_ahead`` waiting --strategy--> pack, within the budgets

A pack starts with the document that waits longest, so no document waits without end. Then the strategy adds waiting
documents that fit, until none fits or the pack has ``max_documents``. The state is the position of the source and the
samples of the waiting documents. Not for: the order of documents (``lanes``), cutting documents (``truncation``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from data_pipeline.document import Document
from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.media_spec import VIDEO, MediaSpec, Placement
from data_pipeline.order.state import Drawn, StreamPosition
from data_pipeline.packing.config import PackingConfig
from data_pipeline.packing.truncation import longest_part, split, with_end_token


@dataclass(frozen=True)
class Pack:
    """The documents of one lane in one step.

    Attributes:
        documents: The documents; the last one may be a dummy document.
        lane: Number of the lane; -1 if there is only a dummy document.
        drawn: The samples of the documents in order, without the dummy document.
    """

    documents: tuple[Document, ...]
    lane: int
    drawn: tuple[Drawn, ...] = ()


class PackUsage(NamedTuple):
    """The part of the budgets that a pack or a single document uses, and the kinds of items that it has.

    A kind is (modality or ``VIDEO``, embedded), as in ``MediaSpec.needed_kinds``.
    """

    documents: int = 0
    tokens: int = 0
    cost: float = 0.0
    kinds: frozenset[tuple[str, bool]] = frozenset()

    @classmethod
    def of_document(cls, document: Document, spec: MediaSpec) -> PackUsage:
        """Return the usage of one document."""
        separate = spec.videos is not None
        kinds = frozenset(
            (VIDEO if separate and item.is_video else item.modality, item.embedded) for item in document.items
        )
        return cls(1, document.num_tokens, document.cost(spec), kinds)


class Budget:
    """The limits of a pack. Room is reserved for the dummy document that the pack would need.

    Args:
        config: The limits.
        spec: The model's inputs: the cost of patches, and the kinds of items that each batch needs.
        dummy: The dummy document of ``spec``.

    Raises:
        DataConfigError: a dummy document and one token do not fit, or ``too_long`` is ``split`` for pairs.
    """

    def __init__(self, config: PackingConfig, spec: MediaSpec, dummy: Document) -> None:
        self.config = config
        self.spec = spec
        self.dummy = dummy
        self._dummy_usage = PackUsage.of_document(dummy, spec)
        self._needs = spec.needed_kinds
        self._pairs = spec.placement is Placement.PAIR
        if self._pairs and config.too_long == "split":
            raise DataConfigError(
                "packing.too_long=split: the later parts of a text would have no image to compare with; use "
                "truncate, which keeps the end token, or error"
            )
        least = dummy.num_tokens + 1
        if config.max_tokens < least:
            raise DataConfigError(
                f"packing.max_tokens={config.max_tokens}: a text with its dummy document takes at least {least} tokens"
            )
        if config.max_cost is not None and config.max_cost < dummy.cost(spec) + 1:
            raise DataConfigError(
                f"packing.max_cost={config.max_cost:g}: a text with its dummy document costs at least "
                f"{dummy.cost(spec) + 1:g}"
            )

    def needs_dummy(self, usage: PackUsage) -> bool:
        """Return whether a pack lacks a kind of item that the model needs, so that it needs the dummy document."""
        return not self._needs <= usage.kinds

    def join(self, usage: PackUsage, more: PackUsage) -> PackUsage | None:
        """Return the usage of both together, without a dummy document; None if a pack may not hold both."""
        config = self.config
        both = PackUsage(
            usage.documents + more.documents,
            usage.tokens + more.tokens,
            usage.cost + more.cost,
            usage.kinds | more.kinds,
        )
        tokens, cost = both.tokens, both.cost
        if self.needs_dummy(both):
            tokens, cost = tokens + self._dummy_usage.tokens, cost + self._dummy_usage.cost
        if (
            tokens > config.max_tokens
            or (config.max_cost is not None and cost > config.max_cost)
            or (config.max_documents is not None and both.documents > config.max_documents)
        ):
            return None
        return both

    def admit(self, document: Document) -> list[Document]:
        """Return the document if a pack can hold it, otherwise its parts according to ``too_long``.

        Raises:
            SampleError: no pack can hold the document and ``too_long`` is ``error``, or no part has learned tokens. The
                error names the document's sample.
        """
        if self._fits(document):
            return [document]
        parts: list[Document] = []
        if self.config.too_long == "split":
            parts = list(split(document, self._fits))
        elif self.config.too_long == "truncate":
            first = longest_part(document, self._fits)
            parts = [] if first is None else [first]
            if self._pairs:  # The text embedding is that of the last token, so the part must end with the end token.
                parts = [with_end_token(part, document) for part in parts if part.images and part.num_tokens > 1]
        parts = [part for part in parts if part.loss_weights.any()]
        if parts:
            return parts
        error = SampleError(
            f"{document.num_tokens} tokens and {document.num_patches} patches (cost {document.cost(self.spec):g}); "
            f"{self._room()}; {self._remedy()}"
        )
        origin = document.provenance
        raise error if origin is None else error.located(origin.shard, origin.key)

    def _fits(self, document: Document) -> bool:
        """Return whether a pack can hold the document, and the model has enough positions."""
        limit = self.spec.max_document_tokens
        # Positions, not tokens: all branches start at the same position.
        has_positions = limit is None or int(document.position_ids.max()) < limit
        return has_positions and self.join(PackUsage(), PackUsage.of_document(document, self.spec)) is not None

    def _room(self) -> str:
        room = f"a pack holds {self.config.max_tokens} tokens"
        if self.config.max_cost is not None:
            room += f" and a cost of {self.config.max_cost:g}"
        room += ", dummy documents included"
        most = self.spec.max_document_tokens
        return room if most is None else f"{room}, and the model has positions for {most} tokens of a document"

    def _remedy(self) -> str:
        if self.config.too_long != "error":
            return "no learned token is left when it is cut"
        return "raise packing.max_tokens or max_cost, or set packing.too_long to truncate or split"


class DrawnDocument(NamedTuple):
    """A document, and the drawn sample to make it again from."""

    drawn: Drawn
    document: Document


class DocumentSource(Protocol):
    """A stream of documents that can be resumed from a position."""

    @property
    def position(self) -> StreamPosition:
        """Position of the next sample."""

    def make(self) -> list[DrawnDocument] | None:
        """Draw the next sample and return its documents: none if it was skipped. None if there are no more samples."""

    def remake(self, drawn: Drawn) -> Document | None:
        """Return a document that was drawn before; None if its sample has become bad."""


class _Waiting(NamedTuple):
    """A drawn document that is not packed yet, and its usage of the budgets."""

    drawn: Drawn
    document: Document
    usage: PackUsage


class Packer:
    """Makes the packs of one lane.

    Args:
        source: The documents in order.
        budget: The limits of a pack.
        lane: Number of the lane.
        waiting: The waiting documents of the state to resume from. Those whose samples have become bad are dropped.
    """

    def __init__(self, source: DocumentSource, budget: Budget, lane: int, waiting: Sequence[Drawn] = ()) -> None:
        self._source = source
        self._budget = budget
        self._lane = lane
        self._more = True
        made = ((drawn, source.remake(drawn)) for drawn in waiting)
        self._waiting = [
            _Waiting(drawn, document, PackUsage.of_document(document, budget.spec))
            for drawn, document in made
            if document is not None
        ]

    def next_pack(self) -> Pack:
        """Return the next pack, with the dummy document if the pack needs it; a dummy pack if no document is left."""
        documents: list[Document] = []
        drawn: list[Drawn] = []
        usage, budget = PackUsage(), self._budget
        self._more = True  # An exhausted source continues when another data set gets a weight at a later step.
        while usage.documents != budget.config.max_documents:
            while self._more and len(self._waiting) < budget.config.look_ahead:
                made = self._source.make()
                if made is None:
                    self._more = False
                else:
                    self._waiting += [
                        _Waiting(*each, PackUsage.of_document(each.document, budget.spec)) for each in made
                    ]
            choice = self._choose(usage)
            if choice is None:
                break
            chosen, usage = choice
            self._waiting = [waiting for waiting in self._waiting if waiting is not chosen]
            documents.append(chosen.document)
            drawn.append(chosen.drawn)
        if not documents:
            return Pack((budget.dummy,), lane=-1)
        if budget.needs_dummy(usage):
            documents.append(budget.dummy)
        return Pack(tuple(documents), self._lane, tuple(drawn))

    @property
    def exhausted(self) -> bool:
        """Whether every document has been packed and no sample is left."""
        return not self._more and not self._waiting

    def state(self) -> tuple[StreamPosition, tuple[Drawn, ...]]:
        """Return the position of the source, and the samples of the waiting documents, oldest first."""
        return self._source.position, tuple(waiting.drawn for waiting in self._waiting)

    def _choose(self, usage: PackUsage) -> tuple[_Waiting, PackUsage] | None:
        """Return the document to add to a pack, and the usage of the pack with it; None if no document fits.

        For an empty pack it is the oldest document, otherwise the choice of the strategy among those that fit. Among
        equal documents it is the oldest.
        """
        budget, config = self._budget, self._budget.config
        choice, largest = None, 0.0
        for waiting in self._waiting:
            if usage.documents == 0:
                return waiting, waiting.usage
            # With a limit of the cost, compare costs: the packs of a step should take about the same time.
            size = waiting.usage.tokens if config.max_cost is None else waiting.usage.cost
            if choice is not None and size <= largest:
                continue
            joined = budget.join(usage, waiting.usage)
            if joined is not None:
                choice, largest = (waiting, joined), size
                if config.strategy != "best_fit":  # With ``greedy`` one document waits, or parts of one sample.
                    break
        return choice
