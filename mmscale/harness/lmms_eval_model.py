"""A trained run as a model of lmms-eval (the package ``lmms_eval``, extra ``lmms-eval``).

    python -m lmms_eval --model mmscale --model_args run=runs/first --tasks chartqa

lmms-eval finds ``MANIFEST`` through the entry point ``lmms_eval.models``.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from data_pipeline.sample import Sample
from mmscale.errors import ConfigError
from mmscale.harness.tasks import loading_errors, require_tasks
from mmscale.harness.trained_model import TrainedModel

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance

MANIFEST = ModelManifest(model_id="mmscale", simple_class_path="mmscale.harness.lmms_eval_model.MMScaleLMM")
_IMAGE_MARK = "<image>"


class MMScaleLMM(lmms):
    """A run for lmms-eval.

    A task's text becomes the user's turn of the run's chat format, or is used as it is if the run was not trained on
    dialogues. Images come first, unless the text contains ``<image>`` once for each of them.

    Args:
        run: A run folder, or one checkpoint of it.
        **_: Arguments that lmms-eval passes to every model: batch size and device.

    Raises:
        MMScaleError: as ``TrainedModel``.
    """

    is_simple = True

    def __init__(self, run: str | Path, **_: Any) -> None:
        super().__init__()
        self.trained = TrainedModel(Path(run), "lmms-eval")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the text before the first stop text, for each request."""
        asked = []
        for request in requests:
            context, settings, doc_to_visual, doc_id, task, split = request.args
            asked.append((self._prompt(context, self._images(doc_to_visual, doc_id, task, split)), settings))
        return self.trained.texts(asked)

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Return (value, whether greedy decoding gives it) of each continuation, as the ``text`` of a result.

        The value is the log-likelihood in nats. For tasks of type ``multiple_choice`` it is the negative of that:
        lmms-eval chooses the continuation with the smallest value.

        Raises:
            ConfigError: the task uses ``acc_mutual_info``, which lmms-eval computes with the opposite sign.
        """
        pairs, signs = [], []
        prompts: dict[tuple[Any, ...], Sample] = {}
        for request in requests:
            if len(request.args) != 6:
                raise ConfigError("lmms-eval: acc_mutual_info is not supported; remove this metric from the task")
            context, continuation, doc_to_visual, doc_id, task, split = request.args
            signs.append(-1 if isinstance(continuation, str) else 1)
            text = continuation if isinstance(continuation, str) else continuation(self.task_dict[task][split][doc_id])
            if self.trained.dialogue is not None:
                text = text.removeprefix(" ")  # The chat format has its own text between a prompt and an answer.
            key = (task, split, doc_id, context)
            if key not in prompts:
                prompts[key] = self._prompt(context, self._images(doc_to_visual, doc_id, task, split))
            pairs.append((prompts[key], self.trained.tokenizer.encode(text)))
        found = self.trained.likelihoods(pairs)
        # lmms-eval 0.7.3 converts a tuple to a string, after which its own scoring fails; it leaves a text as it is.
        return [
            GenerationResult(cast(str, (sign * value, is_greedy)))
            for sign, (value, is_greedy) in zip(signs, found, strict=True)
        ]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Raise: tasks of several rounds are not supported.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("lmms-eval: tasks of type generate_until_multi_round are not supported")

    def _images(self, doc_to_visual: Any, doc_id: Any, task: str, split: str) -> list[bytes]:
        """Return the images of a document as PNG files.

        Raises:
            ConfigError: a visual is not an image.
        """
        if doc_to_visual is None:
            return []
        from PIL import Image

        encoded = []
        for visual in doc_to_visual(self.task_dict[task][split][doc_id]) or ():
            if not isinstance(visual, Image.Image):
                raise ConfigError(f"lmms-eval: task {task}: a {type(visual).__name__}, but the model reads images only")
            buffer = io.BytesIO()
            visual.convert("RGB").save(buffer, "PNG", compress_level=1)
            encoded.append(buffer.getvalue())
        return encoded

    def _prompt(self, context: str, images: Sequence[bytes]) -> Sample:
        if images and context.count(_IMAGE_MARK) == len(images):
            first, *others = context.split(_IMAGE_MARK)
            content = [_text(first), *(part for text in others for part in ({"type": "image"}, _text(text)))]
        else:
            content = [*({"type": "image"} for _ in images), _text(context)]
        return self.trained.conversation([{"role": "user", "content": content}], images)


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def evaluate_image_tasks(
    model: MMScaleLMM, tasks: Sequence[str], *, limit: int | None = None, include_path: Path | None = None
) -> dict[str, dict[str, Any]]:
    """Run tasks of lmms-eval and return its metrics by task.

    Args:
        model: The run.
        tasks: Names of tasks or groups.
        limit: Largest number of samples per task; None for all.
        include_path: Folder with further task files. They may run Python code.

    Raises:
        ConfigError: a task does not exist.
        MMScaleError: the data of a task cannot be loaded.
    """
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    folder = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):  # The index of lmms-eval's own tasks takes seconds.
        manager = TaskManager(include_path=folder)
    require_tasks(tasks, manager.all_tasks, "lmms-eval")
    results = loading_errors(
        tasks,
        lambda: simple_evaluate(
            model=model, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False, cli_args=None
        ),
    )
    return {name: dict(values) for name, values in results["results"].items()}
