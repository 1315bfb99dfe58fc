"""Add the log-probabilities of a frozen reference model to preference pairs, as a source for new shards.

    members of a chunk --template--> documents --reference model--> log-probabilities --> JSON member of each sample

The model is passed in, because the data side knows none. ``computed`` runs it on whole chunks of stored samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from data_pipeline.config import DatasetConfig
from data_pipeline.document import Document
from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.io.json_member import parse_member
from data_pipeline.media_spec import MediaSpec
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.stored_reference import FIELD, reference_record
from data_pipeline.prepare.computed import ComputedSource
from data_pipeline.prepare.records import dump_json
from data_pipeline.prepare.reshard import ReshardSource
from data_pipeline.prepare.rows import Members
from data_pipeline.sample import Provenance
from data_pipeline.shards.sample_reader import assemble
from data_pipeline.text.templates import DrawingTemplate, PreferenceTemplate
from data_pipeline.text.tokenizer import TokenizerConfig, load_tokenizer


class ReferenceModel(Protocol):
    """A frozen model. Every worker process gets a pickled copy, so load the weights in the first call.

    Equal documents must give equal values in every process.
    """

    @property
    def checksum(self) -> str:
        """Identifies the weights, as ``template.stored_reference`` names them."""

    def __call__(self, documents: Sequence[Document]) -> list[tuple[float, float]]:
        """Return the log-probability of the chosen and of the rejected answer of each pair."""


class ReferenceSource(ComputedSource):
    """Stored preference pairs with the log-probabilities of a reference model: a ``RowSource``.

    A pair that gives no document, or one that no pack can hold, is a bad sample. Log-probabilities that a sample has
    already are replaced.

    Args:
        samples: The pairs.
        model: The reference model.
        dataset: Template and transforms of the run that will train on the pairs.
        tokenizer: Tokenizer of that run.
        spec: Inputs of its model.
        max_tokens: Longest document, tokens.

    Raises:
        DataConfigError: the template is not of kind ``preference``, or the data set does not fit the model.
    """

    def __init__(
        self,
        samples: ReshardSource,
        model: ReferenceModel,
        dataset: DatasetConfig,
        tokenizer: TokenizerConfig,
        spec: MediaSpec,
        max_tokens: int,
    ) -> None:
        template = dataset.template
        if not isinstance(template, PreferenceTemplate):
            raise DataConfigError(f"data set {dataset.name}: template.kind={template.kind} gives no pairs")
        # Name the model, so that settings under which documents are random are refused as in training.
        DocumentBuilder(_with_reference(dataset, template, model.checksum), load_tokenizer(tokenizer), spec)
        plain = _with_reference(dataset, template, None)
        settings = (
            plain.template,
            plain.transforms,
            plain.image_tokens,
            plain.video,
            *plain.modalities.values(),
            tokenizer,
        )
        super().__init__(
            samples,
            _Scoring(model, plain, tokenizer, spec, max_tokens),
            f"{model.checksum} {max_tokens} {spec} {settings}",
            f"with log-probabilities of the reference model {model.checksum}",
        )


def _with_reference(dataset: DatasetConfig, template: PreferenceTemplate, checksum: str | None) -> DatasetConfig:
    return dataset.model_copy(update={"template": template.model_copy(update={"stored_reference": checksum})})


@dataclass
class _Scoring:
    """Computes the log-probabilities of the pairs of a chunk: a ``ChunkProgram``."""

    model: ReferenceModel
    dataset: DatasetConfig
    tokenizer: TokenizerConfig
    spec: MediaSpec
    max_tokens: int
    _builder: DocumentBuilder | None = field(default=None, repr=False)

    def __call__(self, samples: Sequence[Members | SampleError], first: int) -> list[Members | SampleError]:
        results = [each if isinstance(each, SampleError) else self._document(each) for each in samples]
        documents = [each for each in results if isinstance(each, Document)]
        found = iter(self.model(documents))
        return [
            document if isinstance(document, SampleError) else self._recorded(members, document, next(found))
            for members, document in zip(samples, results, strict=True)
        ]

    def _document(self, members: Members) -> Document | SampleError:
        if self._builder is None:
            self._builder = DocumentBuilder(self.dataset, load_tokenizer(self.tokenizer), self.spec)
        each = self.dataset.template.branch_template
        try:
            sample = assemble(members, Provenance(self.dataset.name, "", "", 0))
            if isinstance(each, DrawingTemplate) and (count := each.num_captions(sample)) > 1:
                return SampleError(
                    f"it has {count} captions, of which each epoch draws another, and the values belong to one; give a "
                    "field with one text in each.prompts instead of {caption}"
                )
            document = self._builder(sample)
        except SampleError as error:
            return error
        if document.num_tokens > self.max_tokens:
            return SampleError(f"{document.num_tokens} tokens, but a pack holds {self.max_tokens} (packing.max_tokens)")
        return document

    def _recorded(
        self, members: Members | SampleError, document: Document, log_probs: tuple[float, float]
    ) -> Members | SampleError:
        assert not isinstance(members, SampleError), "it gave a document"
        further = (self.dataset.video, *self.dataset.modalities.values())
        record = reference_record(document, self.dataset.transforms, further, log_probs, self.model.checksum)
        try:
            return {**members, "json": dump_json({**parse_member(members["json"]), FIELD: record})}
        except SampleError as error:  # Another field holds half of a surrogate pair, which is no UTF-8.
            return error
