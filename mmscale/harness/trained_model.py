"""A trained run that answers the requests of an evaluation harness.

    text, turns or images --> prompt (a sample) --> likelihood of a continuation, or a generated text

Prompts are built as in the run's evaluation sets, and scored by the same code. A harness runs in one process.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from data_pipeline.batch import MultimodalBatch
from data_pipeline.document import IGNORE, Document, Span
from data_pipeline.errors import DataPipelineError
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.sample import ImagePart, Provenance, Sample
from data_pipeline.text.templates import LITERAL, DialogueTemplate
from data_pipeline.text.tokenizer import load_tokenizer
from mmscale.cli.trained import open_trained
from mmscale.errors import ConfigError
from mmscale.evaluate.config import GenerationSet
from mmscale.evaluate.generation import generate_answers
from mmscale.evaluate.heldout import EvaluationContext, PromptBuilder
from mmscale.evaluate.likelihood import ScoredModel
from mmscale.evaluate.pairs import Pair, PairScorer, Prompts
from mmscale.models.sampling import SamplingConfig

_MAX_TOKENS_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SETTINGS_KEYS = (*_MAX_TOKENS_KEYS, "until", "do_sample", "temperature", "top_p", "top_k", "num_beams")
_DEFAULT_MAX_TOKENS = 256
"""Longest answer if a task sets none, as in lm-evaluation-harness."""

_log = logging.getLogger("mmscale.harness")


class TrainedModel:
    """The model of a run, for requests of a harness.

    Args:
        run: A run folder, or one checkpoint of it.
        harness: Name of the harness, for messages.

    Attributes:
        dialogue: Chat format of the run's first data set; None if the run was not trained on dialogues.
        max_tokens: Longest prompt with its answer, tokens; None for any length.
        window: Longest text of ``loglikelihood_rolling``, tokens.

    Raises:
        ConfigError: ``run`` is not a run, or its model cannot write text.
        CheckpointError: the run has no usable checkpoint.
    """

    def __init__(self, run: Path, harness: str) -> None:
        trained = open_trained(run)
        config = trained.config
        data, spec = config.evaluation_data(trained.stage), config.stage_media(trained.stage)
        if spec.placement is Placement.PAIR:
            raise ConfigError(
                f"{run}: {harness} cannot score a model that compares images with texts (connector.kind=contrastive): "
                "it cannot continue a text; use `mmscale eval` with sets of kind images"
            )
        self.name = f"{run.name}/{trained.checkpoint.name}"
        self.checkpoint = trained.checkpoint
        self.tokenizer = load_tokenizer(data.tokenizer)
        self.max_tokens = spec.max_document_tokens
        self.window = min(data.packing.max_tokens, spec.max_document_tokens or data.packing.max_tokens)
        template = data.prompts.template.branch_template
        self.dialogue = template if isinstance(template, DialogueTemplate) else None
        self._spec = spec
        self._held = GenerationSet(kind="generation", name=harness, manifest=run)
        self._context = EvaluationContext(
            cast(ScoredModel, trained.model), config.evaluation, data, self.tokenizer, spec, trained.world
        )
        dataset = data.prompts.model_copy(update={"template": self.dialogue or LITERAL})
        self._turns = DocumentBuilder(dataset, self.tokenizer, spec)
        self._prompts = PromptBuilder(self._turns)
        self._tokens = TokenPrompts(spec, self.tokenizer.pad_id)

    @property
    def begin_ids(self) -> list[int]:
        """The token at the beginning of a document; empty if the tokenizer has none."""
        return [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]

    def turn_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the tokens of a conversation in the run's chat format, up to the beginning of the next answer.

        Raises:
            ConfigError: the run was not trained on dialogues, or the chat format lacks a role.
        """
        try:
            return self._turns.build_prompt(self.conversation(messages)).token_ids.tolist()
        except DataPipelineError as error:
            raise ConfigError(
                f"{self._held.name}: a conversation does not fit the chat format of the run: {error}"
            ) from error

    def conversation(self, messages: Sequence[Mapping[str, Any]], images: Sequence[bytes] = ()) -> Sample:
        """Return the sample of a conversation, for ``likelihoods`` and ``texts``.

        Args:
            messages: ``{"role": ..., "content": ...}`` in order. A content that is a list refers to the next image by
                ``{"type": "image"}``; without references all images come first in the first turn of the user.
            images: Encoded images (JPEG, PNG or WebP).
        """
        if self.dialogue is None:
            messages = [{"role": "user", "content": [part for one in messages for part in _parts(one["content"])]}]
        field = (self.dialogue and self.dialogue.field) or "messages"
        parts = tuple(ImagePart(data, f"{number}.png") for number, data in enumerate(images))
        return Sample(parts, {field: list(messages)}, Provenance(self._held.name, self._held.name, "request", 0))

    def token_prompt(self, ids: Sequence[int]) -> Sample:
        """Return the sample of a prompt that is given as tokens, for ``likelihoods`` and ``texts``.

        Raises:
            ConfigError: there is no token.
        """
        if not ids:
            raise ConfigError(f"{self._held.name}: an empty prompt, and the tokenizer has no begin token to start from")
        return Sample((), {"ids": list(ids)}, Provenance(self._held.name, self._held.name, "request", 0))

    def likelihoods(self, requests: Sequence[tuple[Sample, Sequence[int]]]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation in nats, and whether greedy decoding gives it.

        Args:
            requests: (prompt, continuation as tokens). Requests with the same sample object share its images.

        Raises:
            ConfigError: a continuation has no token.
            DataPipelineError: an image is damaged or does not fit the model.
        """
        if not requests:
            return []
        if not all(len(ids) for _, ids in requests):
            raise ConfigError(f"{self._held.name}: a continuation has no token")
        numbers = {id(sample): number for number, sample in enumerate({id(one): one for one, _ in requests}.values())}
        samples = list({id(one): one for one, _ in requests}.values())
        pairs = [Pair(numbers[id(sample)], tuple(ids)) for sample, ids in requests]
        found = PairScorer(self._context, self._held, samples, self._prompts_of(samples)).run(pairs)
        return list(zip(found.likelihoods.tolist(), found.is_greedy.tolist(), strict=True))

    def texts(self, requests: Sequence[tuple[Sample, Mapping[str, Any]]]) -> list[str]:
        """Return a generated text for each (prompt, settings of the harness).

        Raises:
            ConfigError: a setting is not supported.
            DataPipelineError: an image is damaged, or a prompt does not fit the model.
        """
        groups: dict[str, list[int]] = {}
        for number, (_, settings) in enumerate(requests):
            groups.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(number)
        texts = [""] * len(requests)
        closing = self.dialogue.closing if self.dialogue is not None else ()
        for numbers in groups.values():
            held = self._held.model_copy(update=generation_settings(requests[numbers[0]][1]))
            samples = [requests[number][0] for number in numbers]
            answers = generate_answers(self._context, held, self._prompts_of(samples), closing, samples)
            for number, answer in zip(numbers, answers, strict=True):
                texts[number] = answer
        return texts

    def _prompts_of(self, samples: Sequence[Sample]) -> Prompts:
        """Return the builder of samples that are all made by ``token_prompt`` or all by ``conversation``."""
        return self._tokens if "ids" in samples[0].fields else self._prompts


def generation_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the generation settings of a task to fields of ``GenerationSet``.

    Without ``do_sample`` a temperature above 0 samples, as in the harnesses. Settings with other names are logged and
    left out.

    Raises:
        ConfigError: a value is not supported.
    """
    known = {key: value for key, value in given.items() if value is not None}
    if unknown := sorted(known.keys() - set(_SETTINGS_KEYS)):
        _log.warning("generation settings that this model does not use: %s", ", ".join(unknown))
    if known.get("num_beams", 1) != 1:
        raise ConfigError(
            f"num_beams={known['num_beams']}: answers are greedy or sampled; set num_beams: 1 in the task"
        )
    until = known.get("until", [])
    stop = [until] if isinstance(until, str) else list(until)
    temperature = float(known.get("temperature", 1.0 if known.get("do_sample") else 0.0))
    if known.get("do_sample") is False:
        temperature = 0.0
    try:
        most = int(next((known[key] for key in _MAX_TOKENS_KEYS if key in known), _DEFAULT_MAX_TOKENS))
        sampling = SamplingConfig(temperature=temperature)
        if temperature:
            top_k = known.get("top_k") or None  # 0 means no limit in transformers.
            sampling = SamplingConfig(temperature=temperature, top_p=known.get("top_p", 1.0), top_k=top_k)
        if most < 1:
            raise ValueError(f"{most} new tokens, expected at least 1")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"generation settings {dict(given)}: {error}") from error
    return {"max_new_tokens": most, "stop": tuple(text for text in stop if text), "sampling": sampling}


@dataclass(frozen=True)
class TokenPrompts:
    """Builds prompts from samples whose field ``ids`` lists the tokens; see ``pairs.Prompts``."""

    spec: MediaSpec
    pad_id: int

    def num_tokens(self, sample: Sample) -> int:
        """Return the number of tokens of a sample's prompt."""
        return len(sample.fields["ids"])

    def __call__(self, samples: Sequence[Sample]) -> MultimodalBatch:
        """Return one batch with the prompts of the samples, in order, and a dummy document at the end."""
        documents = [self._document(sample) for sample in samples]
        return collate([Pack((*documents, dummy_document(self.spec, self.pad_id)), lane=-1)], self.spec)

    def _document(self, sample: Sample) -> Document:
        ids = np.array(sample.fields["ids"], dtype=np.int32)
        positions = np.arange(len(ids), dtype=np.int32)
        return Document(
            token_ids=ids,
            labels=np.full(len(ids), IGNORE, dtype=np.int32),
            loss_weights=np.zeros(len(ids), dtype=np.float32),
            position_ids=positions if self.spec.position_axes == 1 else np.repeat(positions[:, None], 3, axis=1),
            items=(),
            scatter_index=np.empty(0, dtype=np.int32),
            spans=(Span(0, ()),),
            provenance=sample.provenance,
        )


def _parts(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [{"type": "text", "text": content}]
