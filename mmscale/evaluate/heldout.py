"""The samples of a held-out set, their right answers, and their prompts as documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.batch import MultimodalBatch
from data_pipeline.collate import collate
from data_pipeline.config import DataConfig
from data_pipeline.documents import DocumentBuilder, null_document
from data_pipeline.errors import SampleError
from data_pipeline.media_spec import MediaSpec
from data_pipeline.packing import Pack
from data_pipeline.reader import read_samples
from data_pipeline.sample import Sample
from data_pipeline.templates import CaptionTemplate
from data_pipeline.tokenizer import Tokenizer
from mmscale.errors import ConfigError
from mmscale.evaluate.config import HeldOutSet


@dataclass(frozen=True)
class Questions:
    """A set, read.

    Attributes:
        config: What is asked.
        samples: The chosen samples.
        answers: The right answer of each.
        pool: Values that may be candidates.
    """

    config: HeldOutSet
    samples: list[Sample]
    answers: list[str]
    pool: list[str]

    @classmethod
    def read(cls, config: HeldOutSet, limit: int | None = None) -> Questions:
        """Reads the manifests; at most ``limit`` samples if given, else ``config.limit``.

        Raises:
            ConfigError: the set is empty, or a sample lacks the field.
            ManifestError, ShardError, SampleError: a file is missing or damaged.
        """
        samples = list(read_samples(config.manifest, config.name))
        values = [_value(sample, config) for sample in samples]
        if not samples:
            raise ConfigError(f"evaluation set {config.name}: {config.manifest} holds no samples")
        pool = values if config.candidates_from is None else _values(config.candidates_from, config)
        order = np.random.default_rng([config.seed, len(samples)]).permutation(len(samples)).tolist()
        chosen = order[: limit or config.limit or len(order)]
        return cls(config, [samples[i] for i in chosen], [values[i] for i in chosen], pool)

    def answer_ids(self, value: str, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Token ids of a candidate, with the end token if the set asks for it.

        Raises:
            ConfigError: the tokenizer makes nothing of it.
        """
        ids = tokenizer.encode(self.config.template.format(value=value))
        if self.config.ends:
            ids = [*ids, tokenizer.eos_id]
        if not ids:
            raise ConfigError(f"evaluation set {self.config.name}: the answer {value!r} has no tokens")
        return tuple(ids)


def _values(manifest: Path, config: HeldOutSet) -> list[str]:
    return [_value(sample, config) for sample in read_samples(manifest, config.name)]


def _value(sample: Sample, config: HeldOutSet) -> str:
    value: Any = sample.fields
    for name in config.field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if not isinstance(value, str) or not value.strip():
        origin = sample.provenance
        raise ConfigError(
            f"evaluation set {config.name}: field {config.field!r} of {origin.shard}/{origin.key} is {value!r}, "
            f"expected a text; the sample has the fields {', '.join(sorted(sample.fields)) or 'none'}"
        )
    return value


class PromptBuilder:
    """Makes prompts as the training data's documents are made.

    Args:
        config: Prompt and transform of the set.
        data: Gives the tokenizer's place and the default transform.
        tokenizer: Text to ids.
        spec: What the model takes.
        prompt: In place of the set's prompt.
    """

    def __init__(
        self,
        config: HeldOutSet,
        data: DataConfig,
        tokenizer: Tokenizer,
        spec: MediaSpec,
        prompt: str | None = None,
    ) -> None:
        transforms = config.transforms or data.datasets[0].transforms
        template = CaptionTemplate(prompts=(config.prompt if prompt is None else prompt,))
        dataset = data.datasets[0].model_copy(update={"template": template, "transforms": transforms})
        self._builder = DocumentBuilder(dataset, tokenizer, spec)
        self._null = null_document(spec, tokenizer.pad_id)
        self._spec = spec

    def __call__(self, samples: Sequence[Sample]) -> MultimodalBatch:
        """The prompts of the samples, in order, then one null document, so that every module of the model runs.

        Raises:
            SampleError: an image is damaged or does not fit the model.
        """
        documents = [self._builder.build_prompt(sample) for sample in samples]
        for document in documents:
            if not document.items:
                origin = document.provenance
                place = ("?", "?") if origin is None else (origin.shard, origin.key)
                raise SampleError("no image: there is nothing to ask about", shard=place[0], key=place[1])
        return collate([Pack((*documents, self._null), lane=-1)], self._spec)
