"""A trained run as a model of lm-evaluation-harness (the package ``lm_eval``, extra ``lm-eval``).

    lm_eval.simple_evaluate(model=MMScaleLM("runs/first"), tasks=["hellaswag"])

Prompt and continuation are tokenised separately, as training tokenises the prompt and the answer of a sample. lm-eval's
own models tokenise them together, which gives other tokens with some tokenizers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from data_pipeline.sample import Sample
from mmscale.errors import ConfigError
from mmscale.harness.tasks import loading_errors, require_tasks
from mmscale.harness.trained_model import TrainedModel, generation_settings

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

T = TypeVar("T")
_log = logging.getLogger("mmscale.harness")


@register_model("mmscale")
class MMScaleLM(LM):
    """A run for lm-eval.

    Args:
        run: A run folder, or one checkpoint of it.
        **_: Arguments that lm-eval passes to every model: batch size and device. The run's ``evaluation`` block limits
            the size of a batch; the model uses a GPU if there is one.

    Raises:
        MMScaleError: as ``TrainedModel``.
    """

    def __init__(self, run: str | Path, **_: Any) -> None:
        super().__init__()
        self.trained = TrainedModel(Path(run), "lm-eval")
        self._has_warned = False
        self._conversations: dict[str, list[int]] = {}
        """Tokens of each conversation that ``apply_chat_template`` returned as a text. The text alone would not tell
        control tokens from text."""

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log P(continuation given context) in nats, and whether greedy decoding gives the continuation."""
        prompts: dict[tuple[int, ...], Sample] = {}
        pairs = []
        for request in requests:
            context, continuation = request.args
            length = len(context) - len(context.rstrip())
            if length and context not in self._conversations:  # Words begin with their space, as in lm-eval.
                context, continuation = context[:-length], context[-length:] + continuation
            pairs.append(self._pair(prompts, self._context_ids(context), self._encode(continuation)))
        found = self.trained.likelihoods(pairs)
        return self._cached("loglikelihood", requests, found)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return log P(text) in nats. Texts longer than ``TrainedModel.window`` are scored in windows."""
        prompts: dict[tuple[int, ...], Sample] = {}
        pairs, owner = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self._encode(request.args[0]), self._prefix[0], max_seq_len=self.trained.window, context_len=1
            )
            for context, predicted in map(make_disjoint_window, windows):
                pairs.append(self._pair(prompts, context, predicted))
                owner.append(number)
        sums = [0.0] * len(requests)
        for number, (value, _) in zip(owner, self.trained.likelihoods(pairs), strict=True):
            sums[number] += value
        return self._cached("loglikelihood_rolling", requests, sums)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text before the first stop text, for each context. White space at its ends is kept."""
        asked = []
        for request in requests:
            if len(request.args) > 2:
                raise ConfigError(
                    "lm-eval: a task with images; score it with lmms-eval (`mmscale eval RUN --lmms-eval`)"
                )
            context, settings = request.args
            ids = self._fitting(self._context_ids(context), generation_settings(settings)["max_new_tokens"])
            asked.append((self.trained.token_prompt(ids), settings))
        return self._cached("generate_until", requests, self.trained.texts(asked))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation in the run's chat format.

        Without ``add_generation_prompt`` the last message is the beginning of the answer.

        Raises:
            ConfigError: the run was not trained on dialogues, or a message does not fit its chat format.
        """
        if self.trained.dialogue is None:
            raise ConfigError(
                "lm-eval: the run's first data set has no template of kind dialogue; leave out the chat format"
            )
        begun = "" if add_generation_prompt else chat_history[-1]["content"]
        turns = chat_history if add_generation_prompt else chat_history[:-1]
        # A content that is a list is text as it is; in a string, <image> would refer to an image.
        messages = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in turns]
        ids = self.trained.turn_ids(messages) + (self._encode(begun) if begun else [])
        tokenizer = self.trained.tokenizer
        specials = {tokenizer.bos_id, tokenizer.eos_id} | {
            tokenizer.special_id(name, "template.special_tokens") for name in self.trained.dialogue.named_tokens
        }
        text, plain = "", list[int]()
        for token in [*ids, None]:
            if token is None or token in specials:
                text += tokenizer.decode(plain) + (tokenizer.name_of(token) if token is not None else "")
                plain = []
            else:
                plain.append(token)
        self._conversations[text] = ids
        return text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return a text that identifies the chat format; None if none is applied."""
        if not chat_template:
            return None
        return None if self.trained.dialogue is None else self.trained.dialogue.model_dump_json()

    @property
    def tokenizer_name(self) -> str:
        """Identifier of the tokenizer, for caches of requests."""
        return self.trained.tokenizer.fingerprint

    @property
    def _prefix(self) -> list[int]:
        """The token before a text: the begin token, else the end token."""
        return self.trained.begin_ids or [self.trained.tokenizer.eos_id]

    def _encode(self, text: str) -> list[int]:
        return self.trained.tokenizer.encode(text)

    def _context_ids(self, context: str) -> list[int]:
        if context in self._conversations:
            return self._conversations[context]
        return [*self.trained.begin_ids, *self._encode(context)] or self._prefix

    def _fitting(self, context: Sequence[int], length: int) -> tuple[int, ...]:
        """Return the end of a context that fits into the model's positions with ``length`` more tokens, as in lm-eval.

        Raises:
            ConfigError: the further tokens alone do not fit.
        """
        most = self.trained.max_tokens
        if most is None or len(context) + length <= most:
            return tuple(context)
        if length >= most:
            raise ConfigError(f"lm-eval: {length} tokens after the context exceed the model's {most} positions")
        if not self._has_warned:
            self._has_warned = True
            _log.warning("contexts lose their beginning: the longest have more than the model's %d positions", most)
        return tuple(context[length - most :])

    def _pair(
        self, prompts: dict[tuple[int, ...], Sample], context: Sequence[int], continuation: Sequence[int]
    ) -> tuple[Sample, Sequence[int]]:
        """Return a request; requests with the same context share one sample."""
        # The last token of a continuation is not an input, so it needs no position.
        key = self._fitting(context, max(0, len(continuation) - 1))
        if key not in prompts:
            prompts[key] = self.trained.token_prompt(key)
        return prompts[key], continuation

    def _cached(self, method: str, requests: Sequence[Instance], results: list[T]) -> list[T]:
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial(method, request.args, result)
        return results


def evaluate_tasks(
    model: MMScaleLM,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include_path: Path | None = None,
    chat: bool = False,
) -> dict[str, dict[str, Any]]:
    """Run tasks of lm-eval and return its metrics by task.

    Args:
        model: The run.
        tasks: Names of tasks or groups.
        limit: Largest number of samples per task; None for all.
        include_path: Folder with further task files. They may run Python code.
        chat: Whether to ask in the run's chat format.

    Raises:
        ConfigError: a task does not exist.
        MMScaleError: the data of a task cannot be loaded.
    """
    folder = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):  # The index of lm-eval's own 12,000 tasks takes seconds.
        manager = TaskManager(include_path=folder)
    require_tasks(tasks, manager.all_tasks, "lm-eval")
    results = loading_errors(
        tasks,
        lambda: simple_evaluate(
            model=model,
            tasks=list(tasks),
            limit=limit,
            task_manager=manager,
            apply_chat_template=chat,
            log_samples=False,
        ),
    )
    return {name: dict(values) for name, values in results["results"].items()}
