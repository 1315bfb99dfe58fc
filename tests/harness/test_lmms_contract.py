"""The adapter to lmms-eval on a stand-in of the package's interface; ``test_lmms_eval`` runs the real package."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from mmscale.errors import ConfigError

RED, BLUE = (Image.new("RGBA", (4, 2), colour) for colour in ("red", "blue"))


class _Model:
    """Base class of models: lmms-eval fills ``task_dict`` with task -> split -> documents."""

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}


@dataclass
class _Result:
    text: Any


class _Trained:
    """Records the requests of the adapter."""

    def __init__(self, run: Path, harness: str) -> None:
        self.tokenizer = SimpleNamespace(encode=lambda text: [ord(letter) for letter in text])
        self.dialogue: object | None = None
        self.asked: list[Any] = []

    def conversation(self, messages: Any, images: Any) -> Any:
        pixels = [Image.open(io.BytesIO(data)).getpixel((0, 0)) for data in images]
        return SimpleNamespace(content=messages[0]["content"], role=messages[0]["role"], pixels=pixels)

    def likelihoods(self, requests: Any) -> list[tuple[float, bool]]:
        self.asked = requests
        return [(-1.5, True)] * len(requests)

    def texts(self, requests: Any) -> list[str]:
        self.asked = requests
        return ["said"] * len(requests)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    parts = {
        "lmms_eval.api.instance": {"GenerationResult": _Result},
        "lmms_eval.api.model": {"lmms": _Model},
        "lmms_eval.models.registry_v2": {"ModelManifest": SimpleNamespace},
    }
    for name, values in {"lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.models": {}, **parts}.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "mmscale.harness.lmms_eval_model", raising=False)
    adapter = importlib.import_module("mmscale.harness.lmms_eval_model")
    monkeypatch.setattr(adapter, "TrainedModel", _Trained)
    made = adapter.MMScaleLMM("runs/first", batch_size=1, device=None)
    made.task_dict = {"t": {"test": [{"target": " a cat", "images": [RED, BLUE]}]}}
    yield made
    del sys.modules["mmscale.harness.lmms_eval_model"]


def _request(*arguments: Any) -> Any:
    return SimpleNamespace(args=(*arguments, lambda doc: doc["images"], 0, "t", "test"))


def _text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def test_images_come_first_or_where_the_text_marks_them(model: Any) -> None:
    image = {"type": "image"}
    asked = [_request(words, {"until": ["x"]}) for words in ("which?", "a <image> b <image>", "only <image>")]
    assert model.generate_until(asked) == ["said"] * 3
    contents = [prompt.content for prompt, _ in model.trained.asked]
    assert contents == [
        [image, image, _text("which?")],
        [_text("a "), image, _text(" b "), image, _text("")],
        [image, image, _text("only <image>")],
    ]
    prompt, settings = model.trained.asked[0]
    assert (prompt.role, prompt.pixels, settings) == ("user", [(255, 0, 0), (0, 0, 255)], {"until": ["x"]})


def test_a_choice_has_a_loss_and_a_target_a_likelihood(model: Any) -> None:
    found = model.loglikelihood([_request("q", " a"), _request("q", " b"), _request("q", lambda doc: doc["target"])])
    assert [one.text for one in found] == [(1.5, True), (1.5, True), (-1.5, True)]
    (first, a), (second, b), (_, target) = model.trained.asked
    assert first is second  # The image is encoded once for all choices.
    assert ["".join(map(chr, ids)) for ids in (a, b, target)] == [" a", " b", " a cat"]
    model.trained.dialogue = object()
    model.loglikelihood([_request("q", " a")])
    assert model.trained.asked[0][1] == [ord("a")]  # A chat format has its own text before an answer.


def test_tasks_that_are_not_supported_end_in_a_sentence(model: Any) -> None:
    with pytest.raises(ConfigError, match="acc_mutual_info is not supported"):
        model.loglikelihood([SimpleNamespace(args=("", " a"))])
    model.task_dict["t"]["test"][0]["images"] = ["video.mp4"]
    with pytest.raises(ConfigError, match="task t: a str, but the model reads images only"):
        model.generate_until([_request("q", {})])
    with pytest.raises(ConfigError, match="generate_until_multi_round are not supported"):
        model.generate_until_multi_round([])
