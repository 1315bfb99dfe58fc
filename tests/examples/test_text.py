"""The bundled text data equal the output of their script, and held-out concepts are not in training data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.text.tokenizer import SentencePieceTokenizerConfig, load_tokenizer

REPO = Path(__file__).resolve().parents[2]
TEXT = REPO / "examples" / "text"


def test_the_files_are_what_the_script_builds(tmp_path: Path) -> None:
    command = [sys.executable, str(TEXT / "build.py"), "--output", str(tmp_path)]
    subprocess.run(command, cwd=REPO, check=True, timeout=120)
    built = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(built) == 19
    for name, content in built.items():
        assert (TEXT / name).read_bytes() == content, name


def test_held_out_concepts_are_in_no_training_dialogue() -> None:
    def said(name: str) -> str:
        samples = read_samples(TEXT / "shards" / f"{name}.manifest")
        return "\n".join(text for sample in samples for text in sample.texts)

    taught = said("talks")
    questions = [sample.fields for sample in read_samples(TEXT / "shards" / "questions-heldout.manifest")]
    assert len(questions) == 298
    assert all(len(set(fields["choices"])) == 4 for fields in questions)
    assert not any(fields["question"] in taught for fields in questions)
    assert all(fields["question"] in said_later for said_later in [said("talks-heldout")] for fields in questions)
    places = [fields["answer"] for fields in questions]
    assert all(
        places.count(place) > 50 for place in range(4)
    )  # The right answer is not much more often at one position than at others.


def test_pairs_prefer_the_right_group() -> None:
    questions = read_samples(TEXT / "shards" / "questions-heldout.manifest")
    right = {sample.fields["question"]: sample.fields["choices"][sample.fields["answer"]] for sample in questions}
    held_out = [sample.fields for sample in read_samples(TEXT / "shards" / "pairs-heldout.manifest")]
    taught = [sample.fields for sample in read_samples(TEXT / "shards" / "pairs.manifest")]
    assert len(held_out) == 128
    assert len(taught) == 256
    assert all(right[fields["prompt"]] == fields["chosen"] != fields["rejected"] for fields in held_out)
    assert not any(fields["prompt"] in right for fields in taught)


def test_the_tokenizer_has_the_tokens_of_chatml() -> None:
    tokenizer = load_tokenizer(SentencePieceTokenizerConfig(path=TEXT / "tokenizer.model"))
    ids = [tokenizer.special_id(name, "") for name in ("<|im_start|>", "<|im_end|>")]
    assert not set(ids) & set(tokenizer.encode("<|im_start|>user<|im_end|>"))
    assert tokenizer.vocab_size == 2048
