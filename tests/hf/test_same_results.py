"""Imported models give the results of transformers: logits, loss, all gradients, answers, bfloat16, exports.

A row of ``CASES`` is a family with one kind of input. Tests of what only one family has are in the file of that family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.packing.collate import collate, concatenate
from data_pipeline.packing.packer import Pack
from mmscale.models.generation import generate
from mmscale.objectives.next_token import NextToken
from tests.hf import (
    test_aria,
    test_idefics3,
    test_internvl,
    test_llava,
    test_pixtral,
    test_qwen2_5_omni,
    test_qwen2_5_vl,
    test_qwen2_audio,
    test_qwen2_vl,
    test_qwen2_vl_video,
)
from tests.hf.pages import PAGES, Seen, assert_round_trip, bfloat16_ratio, compare, odd_pages
from tests.hf.reference_models import import_reference
from tests.parity_table import Recorder

pytestmark = pytest.mark.parity
IMAGES = [*PAGES.values()]
EXPORTED = (PAGES["several"], PAGES["none"])
VIDEOS = [*test_qwen2_vl_video.PAGES.values()]
SOUNDS = [*test_qwen2_audio.PAGES.values()]
MIXED = test_qwen2_5_omni.PAGES
NEEDS_LANCZOS = [test_idefics3.LANCZOS]


@dataclass(frozen=True)
class Case:
    """A family with one kind of input.

    Attributes:
        reference: Returns a tiny random model of transformers.
        seen: Returns the inputs of both sides, from a folder, our model and pages.
        pages: Pages whose results are compared; empty if another row compares them.
        gradients: Bound of the errors of gradients.
        answered: Pages that both sides continue greedily. The rows with them also compare packs with microbatches.
        exported: Pages whose logits an exported folder must give too.
        counted: A page whose operations torch counts.
    """

    reference: Callable[[], Any]
    seen: Callable[[Path, Any, list[Any]], Seen]
    pages: Sequence[Any] = tuple(IMAGES)
    gradients: float = 8e-6
    answered: Sequence[Any] = ()
    exported: Sequence[Any] = ()
    counted: Any = None


def _images(module: Any, *names: str) -> dict[str, Case]:
    """Return a row for each model of a family whose pages have images."""
    own = {"exported": EXPORTED, "gradients": module.GRADIENT_BOUND}
    return {
        f"{module.__name__.rpartition('test_')[2]}: {name}": Case(
            partial(module.reference_model, name), module.seen, **own
        )
        for name in names
    }


CASES = {
    **_images(test_llava, *test_llava.TWINS),
    **_images(test_pixtral, *test_pixtral.TWINS),
    **_images(test_internvl, *test_internvl.TWINS),
    **_images(test_qwen2_vl, *test_qwen2_vl.TWINS),
    **{
        name: Case(
            partial(test_idefics3.reference_model, name),
            partial(test_idefics3.seen, name=name),
            exported=() if name == test_idefics3.SECOND else EXPORTED,
        )
        for name in test_idefics3.CASES
    },
    "aria: 490": Case(test_aria.reference_model, test_aria.seen, exported=(PAGES["last"], PAGES["none"])),
    "aria: 980": Case(
        test_aria.reference_model, partial(test_aria.seen, longer=980), [PAGES["in the middle"], PAGES["none"]]
    ),
    "aria: split": Case(
        test_aria.reference_model,
        partial(test_aria.seen, split=True),
        [["before", (60, 200), "after"], [(150, 40), "."]],
    ),
    "qwen2_vl: videos": Case(
        test_qwen2_vl.reference_model,
        test_qwen2_vl_video.video_seen,
        VIDEOS,
        gradients=6e-6,
        answered=VIDEOS,
        counted=VIDEOS[0],
    ),
    "qwen2_5_vl: images": Case(
        test_qwen2_5_vl.reference_model,
        test_qwen2_vl.seen,
        [*IMAGES, *odd_pages(3, 60, 190)],
        gradients=6e-6,
        exported=EXPORTED,
    ),
    "qwen2_5_vl: tied": Case(
        partial(test_qwen2_5_vl.reference_model, tied=True), test_qwen2_vl.seen, (), exported=EXPORTED
    ),
    "qwen2_5_vl: videos": Case(
        test_qwen2_5_vl.reference_model,
        partial(test_qwen2_vl_video.video_seen, make=test_qwen2_5_vl.processor),
        test_qwen2_5_vl.VIDEOS,
        gradients=6e-6,
        counted=test_qwen2_5_vl.VIDEOS[0],
    ),
    # transformers lets generated text follow the largest position, also where the prompt's text overlaps a video.
    "qwen2_5_vl: text after a video as there": Case(
        test_qwen2_5_vl.reference_model,
        test_qwen2_5_vl.seen_as_there,
        (),
        answered=[*test_qwen2_5_vl.VIDEOS[::2], *test_qwen2_5_vl.SLOW],
    ),
    "qwen2_audio: sounds": Case(
        test_qwen2_audio.reference_model, test_qwen2_audio.heard, SOUNDS, gradients=6e-6, answered=SOUNDS
    ),
    "qwen2_5_omni: pictures, videos and sounds": Case(
        test_qwen2_5_omni.reference_model,
        test_qwen2_5_omni.omni_seen,
        [*MIXED.values()],
        gradients=6e-6,
        answered=[MIXED[name] for name in ("all", "film", "short film", "slow video, then sound")],
    ),
}
ROUNDED: dict[str, tuple[Callable[..., Any], Callable[[Path, Any, list[Any]], Seen], dict[str, Any]]] = {
    "llava": (test_pixtral.reference_model, test_pixtral.seen, {}),
    "internvl": (test_internvl.reference_model, test_internvl.seen, {}),
    "idefics3": (test_idefics3.reference_model, test_idefics3.seen, {}),
    "qwen2_vl": (test_qwen2_vl.reference_model, test_qwen2_vl.seen, {}),
    # With all experts chosen: a rounded router may choose another expert, here and there.
    "aria": (partial(test_aria.reference_model, moe_topk=8), test_aria.seen, {}),
    "qwen2_audio": (
        test_qwen2_audio.reference_model,
        test_qwen2_audio.heard,
        {"pages": SOUNDS[:2], "auto": test_qwen2_audio.AUTO},
    ),
}
"""By family: reference model by ``seed``, inputs, and options of ``bfloat16_ratio``."""


def rows(field: str) -> Any:
    """Parametrise a test with the rows that have a value of ``field``."""
    found = [
        pytest.param(case, id=name, marks=NEEDS_LANCZOS if name in test_idefics3.CASES else [])
        for name, case in CASES.items()
        if getattr(case, field)
    ]
    return pytest.mark.parametrize("case", found)


@rows("pages")
def test_the_same_logits_loss_and_gradients(case: Case, tmp_path: Path, parity: Recorder) -> None:
    """All pages are one pack, so images, videos or sounds of several documents pass through the tower together."""
    theirs = case.reference()
    ours = import_reference(theirs, tmp_path)
    compare(ours, theirs, case.seen(tmp_path, ours, [*case.pages]), tmp_path, parity, (2e-6, case.gradients))
    if hasattr(ours.vision, "idle_norm"):  # transformers gives the norm after an idle block no gradient.
        assert not any(parameter.grad.any() for parameter in ours.vision.idle_norm.parameters())


@rows("answered")
def test_the_same_answers(case: Case, tmp_path: Path) -> None:
    theirs = case.reference()
    ours = import_reference(theirs, tmp_path).eval()
    seen = case.seen(tmp_path, ours, [*case.answered])
    answers = generate(ours, seen.batch(), 6, eos_id=-1)
    for answer, inputs in zip(answers, seen.inputs, strict=True):
        ids = theirs.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert answer == ids[0, inputs["input_ids"].shape[1] :].tolist()


@rows("answered")
def test_microbatches_of_several_packs_equal_one_pack(case: Case, tmp_path: Path) -> None:
    ours = import_reference(case.reference(), tmp_path)
    seen = case.seen(tmp_path, ours, [*case.answered])
    documents = [document for document in seen.documents if document.items]
    together = collate([Pack(tuple(documents), 0)], seen.spec)
    apart = concatenate([collate([Pack((document,), 0)], seen.spec) for document in documents], seen.spec)
    for name, block in together.media.items():
        for field in ("values", "later_values", "later_index"):
            mine, other = getattr(block, field), getattr(apart.media[name], field)
            assert (mine is None and other is None) or torch.equal(mine, other), (name, field)
    with torch.no_grad():
        assert torch.equal(ours(together).hidden, ours(apart).hidden)


@rows("counted")
def test_operations_equal_the_counter(case: Case, tmp_path: Path) -> None:
    ours = import_reference(case.reference(), tmp_path)
    batch = case.seen(tmp_path, ours, [case.counted]).batch()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        NextToken()(ours, batch).loss_sum.backward()
    flops = ours.training_flops(batch, ["vision", "connector", "decoder"])
    assert flops.hardware == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=NEEDS_LANCZOS if name == "idefics3" else []) for name in ROUNDED]
)
def test_bfloat16_is_no_further_from_float32_than_theirs(family: str, tmp_path: Path, parity: Recorder) -> None:
    reference, seen, options = ROUNDED[family]
    ratio = bfloat16_ratio(lambda seed: reference(seed=seed), seen, tmp_path, **options)
    parity(family, "error of bfloat16, over theirs", ratio, 1.1)


@rows("exported")
def test_export_restores_the_folder(case: Case, tmp_path: Path) -> None:
    assert_round_trip(case.reference(), lambda ours: case.seen(tmp_path, ours, [*case.exported]), tmp_path)
