"""An imported run gives what ``transformers`` gives with the folder's processor: token ids, logits, greedy answer."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.document import Document
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.sample import ImagePart, Sample
from data_pipeline.text.tokenizer import load_tokenizer
from mmscale.cli.trained import Trained, open_trained
from mmscale.evaluate.answers import respond
from mmscale.run.imported import import_run
from tests.hf.pages import picture, stored
from tests.hf.published_folders import FAMILIES, save
from tests.models.reference_models import distance
from tests.parity_table import Recorder
from tests.videos import decoded, encoded

pytestmark = pytest.mark.parity
BOUND = 3e-6
NEW_TOKENS = 6
QUESTION, MORE = "What is in this picture?", "How many cats?"
SIZES = [(50, 70), (31, 90)]


@dataclass(frozen=True)
class Both:
    """A folder of transformers, its model, and the run that was imported from it; the folder is gone."""

    family: str
    theirs: Any
    processor: Any
    run: Path
    notes: tuple[str, ...]

    @property
    def trained(self) -> Trained:
        return open_trained(self.run)


@pytest.fixture(scope="module")
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    import transformers

    work = tmp_path_factory.mktemp("import")
    family = FAMILIES[request.param]
    theirs = save(request.param, work / "folder")
    auto = transformers.AutoTokenizer if family.images is None else transformers.AutoProcessor
    processor = auto.from_pretrained(work / "folder")
    done = import_run(work / "folder", work / "first")
    assert done.is_whole
    shutil.rmtree(work / "folder")
    (work / "first").rename(work / "run")  # A run folder works wherever it is.
    return Both(request.param, theirs, processor, work / "run", done.report.data.notes)


def their_inputs(both: Both, turns: list[tuple[str, int]]) -> dict[str, Any]:
    """Return their inputs for a conversation. A turn is a text and its number of images; turns alternate."""
    sizes = iter(SIZES)
    pictures = [[picture(next(sizes)) for _ in range(count)] for _, count in turns]
    if both.family == "fuyu":
        ((text, _),) = turns
        # Without images their processor leaves out what begins an answer.
        inputs = both.processor(text=text, images=pictures[0], return_legacy_image_output=False, return_tensors="pt")
        return dict(inputs)
    if FAMILIES[both.family].chat is None:
        return dict(both.processor(turns[0][0], return_tensors="pt", return_token_type_ids=False))
    messages = []
    for number, ((text, _), shown) in enumerate(zip(turns, pictures, strict=True)):
        content: Any = text
        if FAMILIES[both.family].images is not None:
            content = [*({"type": "image", "image": one} for one in shown), {"type": "text", "text": text}]
        messages.append({"role": ("user", "assistant")[number % 2], "content": content})
    return dict(
        both.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    )


def our_prompt(trained: Trained, turns: list[tuple[str, int]]) -> tuple[DocumentBuilder, Document]:
    data = trained.config.data
    builder = DocumentBuilder(data.prompts, load_tokenizer(data.tokenizer), trained.config.media_spec)
    images = [ImagePart(stored(picture(size)), f"{n}.png") for n, size in zip(range(sum(n for _, n in turns)), SIZES)]  # noqa: B905
    messages = [
        {"role": ("user", "assistant")[number % 2], "content": "<image>" * count + text}
        for number, (text, count) in enumerate(turns)
    ]
    return builder, builder.build_prompt(Sample(tuple(images), {"messages": messages}))


CONVERSATIONS = {
    "a question": [(QUESTION, 0)],
    "an image": [(QUESTION, 1)],
    "two images": [(QUESTION, 2)],
    "three turns": [(QUESTION, 0), ("A red house.", 0), (MORE, 0)],
    "an image, three turns": [(QUESTION, 1), ("A red house.", 0), (MORE, 0)],
}


def reads(family: str, turns: list[tuple[str, int]]) -> bool:
    """Return whether the family's processor makes a conversation of these turns."""
    one, images = FAMILIES[family], sum(count for _, count in turns)
    if family == "fuyu":  # It reads one image with one question, and has no chat template.
        return images == len(turns) == 1
    # ``test_the_greedy_answer_is_theirs`` compares the plain prompts of folders without a chat template.
    return one.chat is not None and images <= (0 if one.images is None else 2)


@pytest.mark.parametrize(
    ("both", "name"),
    [(family, name) for family in FAMILIES for name, turns in CONVERSATIONS.items() if reads(family, turns)],
    indirect=["both"],
    scope="module",
)
def test_a_conversation_has_the_same_tokens_and_logits(name: str, both: Both, parity: Recorder) -> None:
    turns = CONVERSATIONS[name]
    inputs = their_inputs(both, turns)
    trained = both.trained
    builder, document = our_prompt(trained, turns)
    assert document.token_ids.tolist() == inputs["input_ids"][0].tolist()
    spec = builder.spec
    batch = collate([Pack((document, dummy_document(spec, builder.tokenizer.pad_id)), 0)], spec)
    with torch.no_grad():
        expected = both.theirs(**inputs).logits[0, -1]
        ours = trained.model.head(trained.model(batch).hidden)[document.num_tokens - 1]
    parity(both.family.split(",")[0], "logits of an imported run", distance(ours[: len(expected)], expected), BOUND)


@pytest.mark.parametrize(
    ("both", "count"),
    [
        (family, count)
        for family, one in FAMILIES.items()
        for count in (0, 1)
        if count <= (one.images is not None) and (count or family != "fuyu")
    ],
    indirect=["both"],
    scope="module",
)
def test_the_greedy_answer_is_theirs(count: int, both: Both, tmp_path: Path) -> None:
    inputs = their_inputs(both, [(QUESTION, count)])
    answer = both.theirs.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ]
    # Fuyu's tokenizer does not mark the placeholder as special.
    expected = both.processor.decode(answer, skip_special_tokens=True).replace("|SPEAKER|", "").strip()
    picture(SIZES[0]).save(tmp_path / "image.png")
    trained = both.trained
    found = respond(
        trained.model,
        trained.config.data,
        trained.config.media_spec,
        images=[tmp_path / "image.png"] * count,
        prompt=QUESTION,
        max_new_tokens=NEW_TOKENS,
    )
    assert found == [expected]


@pytest.mark.parametrize("both", ["qwen2_vl", "qwen2_5_vl", "smolvlm"], indirect=True, scope="module")
def test_the_greedy_answer_about_a_video_is_theirs(both: Both, tmp_path: Path) -> None:
    """Four frames in two seconds; Qwen2-VL takes all of them, and SmolVLM one a second."""
    clip = encoded(4, height=64, width=96, per_second=2)
    (tmp_path / "clip.mp4").write_bytes(clip)
    is_smol, content = both.family == "smolvlm", [{"type": "video"}, {"type": "text", "text": QUESTION}]
    text = both.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = both.processor(
        text=[text],
        videos=[decoded(clip).transpose(0, 3, 1, 2)],
        video_metadata=[{"total_num_frames": 4, "fps": 2, "duration": 2, "frames_indices": [0, 1, 2, 3]}],
        return_tensors="pt",
        **({"do_sample_frames": True, "fps": 1, "num_frames": 3} if is_smol else {"cap_pixels_per_frame": False}),
    )
    answer = both.theirs.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    trained = both.trained
    found = respond(
        trained.model,
        trained.config.data,
        trained.config.media_spec,
        images=[],
        videos=[tmp_path / "clip.mp4"],
        prompt=QUESTION,
        max_new_tokens=NEW_TOKENS,
    )
    assert found == [both.processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()]


@pytest.mark.parametrize("both", FAMILIES, indirect=True, scope="module")
def test_the_import_has_nothing_to_report(both: Both) -> None:
    known = {
        "mistral": "the chat template writes a system turn",
        "llava": "the chat template writes a system turn",
        "llava, CLIP": "the chat template moves an image",
        "internvl": "the chat template places videos in another way",  # A line break after each.
        **dict.fromkeys(("olmo2", "olmoe", "qwen3_moe"), "a conversation that ends with an answer"),
    }
    assert [note.startswith(known.get(both.family, "none")) for note in both.notes] == [True] * len(both.notes)
