"""``mmscale chat``: a conversation through a pipe and in a terminal, against ``transformers`` with its processor."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from mmscale.cli import chat
from mmscale.cli.main import main
from mmscale.errors import ConfigError
from mmscale.run.imported import import_run
from tests.hf.pages import picture
from tests.hf.published_folders import save
from tests.videos import decoded, encoded

TOKENS = 5


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """Return a run, and the model and processor of the folder that was imported."""
    import transformers

    work = tmp_path_factory.mktemp("chat")
    model = save("qwen2_vl", work / "folder")
    import_run(work / "folder", work / "run")
    picture((50, 70)).save(work / "a picture.png")
    return work / "run", model, transformers.AutoProcessor.from_pretrained(work / "folder")


def theirs(model: Any, processor: Any, messages: list[dict[str, Any]]) -> str:
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    new = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return str(processor.decode(new, skip_special_tokens=True).strip())


def turn(role: str, words: str, image: Any = None) -> dict[str, Any]:
    shown = [] if image is None else [{"type": "image", "image": image}]
    return {"role": role, "content": [*shown, {"type": "text", "text": words}]}


def piped(
    lines: list[str], run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int = 0
) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    assert main(["chat", str(run), "--max-new-tokens", str(TOKENS)]) == code
    return capsys.readouterr()


def test_a_conversation_keeps_its_images_and_answers(
    imported: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, model, processor = imported
    file = run.parent / "a picture.png"
    image = picture((50, 70))
    one = [turn("user", "What is in it?", image)]
    first = theirs(model, processor, one)
    second = theirs(model, processor, [*one, turn("assistant", first), turn("user", "More?")])
    alone = theirs(model, processor, [turn("user", "More?")])
    assert len({first, second, alone}) == 3  # Otherwise a lost history would not be seen.
    lines = [
        f'"{file}" What is in it?',
        "More?",
        "/reset",
        "More?",
        f"/image {file}",
        "What is in it?",
        "/quit",
        "never",
    ]
    out, _ = piped(lines, run, monkeypatch, capsys)
    last = [turn("user", "More?"), turn("assistant", alone), turn("user", "What is in it?", image)]
    expected = [first, second, alone, theirs(model, processor, last)]
    assert out.splitlines() == [answer.rstrip("\ufffd") for answer in expected]  # An incomplete letter is not printed.


def test_a_question_about_a_video(
    imported: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, model, processor = imported
    file = run.parent / "a clip.mp4"
    clip = encoded(4, height=64, width=96, per_second=2)  # All of its frames are used, as by their processor.
    file.write_bytes(clip)
    asked = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What moves?"}]}]
    inputs = processor(
        text=[processor.apply_chat_template(asked, add_generation_prompt=True)],
        videos=[decoded(clip).transpose(0, 3, 1, 2)],
        video_metadata=[{"total_num_frames": 4, "fps": 2, "frames_indices": [0, 1, 2, 3]}],
        cap_pixels_per_frame=False,
        return_tensors="pt",
    )
    new = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = processor.decode(new, skip_special_tokens=True).strip().rstrip("\ufffd")
    folder = run.parent / "a clip"
    folder.mkdir()
    for number, frame in enumerate(decoded(clip)):
        Image.fromarray(frame).save(folder / f"{number}.png")
    (run.parent / "a clip.json").write_text('{"fps": 2}')
    lines = [f'"{file}" What moves?']
    for path in (file, folder):
        lines += ["/reset", f"/video {path}", "What moves?"]
    out, _ = piped(lines, run, monkeypatch, capsys)
    assert out.splitlines() == [expected] * 3
    _, err = piped([f"/image {file}"], run, monkeypatch, capsys, code=1)
    assert "its name is not that of an image" in err


def test_a_line_that_fails_leaves_the_conversation_as_it_was(
    imported: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, model, processor = imported
    broken = run.parent / "broken.png"
    broken.write_bytes(b"no picture")
    lines = ["/image none.png", f"{broken} What?", "/unknown", "Don't you know? <image> </s>", "More?"]
    out, err = piped(["More?"], run, monkeypatch, capsys)
    lines[2:2] = [f"/image {broken}", "What?"]
    again, err = piped([*lines[:5], "More?"], run, monkeypatch, capsys, code=1)
    assert again == out == theirs(model, processor, [turn("user", "More?")]).rstrip("\ufffd") + "\n"
    assert "/image none.png: no such file; write the path of" in err
    assert err.count("question 1 (") == err.count("broken.png): ") == 2
    assert "/reset" in err  # The help, for a command that does not exist.
    piped(lines[5:], run, monkeypatch, capsys)  # Names of special tokens are text.


def test_paths_in_a_line_are_media_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "b.MOV", "c d.wav", "notes.txt"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    words, files = chat._split("is a.png in b.MOV or 'c d.wav' or notes.txt or gone.mp3?")
    assert (words, files) == ("is in or or notes.txt or gone.mp3?", [Path("a.png"), Path("b.MOV"), Path("c d.wav")])
    assert chat._file("/audio", " 'c d.wav'") == Path("c d.wav")
    with pytest.raises(ConfigError, match=r"/audio a\.png: its name is not that of a sound; expected a WAV"):
        chat._file("/audio", "a.png")


def test_a_mistyped_path_keeps_the_files_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question that fails drops its files: a damaged one would fail the next question too."""
    (tmp_path / "a.png").touch()
    monkeypatch.chdir(tmp_path)
    asked = list[tuple[str, list[Path]]]()

    def ask(words: str, images: list[Path], *rest: Any) -> str:
        asked.append((words, images))
        if words == "bad?":
            raise ConfigError("bad")
        return ""

    lines = ["/image a.png", "/image none.png", "good?", "/image a.png", "bad?", "more?"]
    monkeypatch.setattr(chat, "_lines", lambda: iter(lines))
    conversation: Any = SimpleNamespace(ask=ask)
    assert not chat._talk(conversation)
    assert asked == [("good?", [Path("a.png")]), ("bad?", [Path("a.png")]), ("more?", [])]


def test_a_run_without_a_chat_format_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save("persimmon", tmp_path / "folder")
    import_run(tmp_path / "folder", tmp_path / "run")
    assert main(["chat", str(tmp_path / "run")]) == 2
    assert "this run has no chat format" in capsys.readouterr().err


def test_a_terminal(imported: tuple[Path, Any, Any]) -> None:
    run, model, processor = imported
    expected = theirs(model, processor, [turn("user", "More?")])
    main_end, terminal = pty.openpty()
    words = [sys.executable, "-m", "mmscale.cli.main", "chat", str(run), "--max-new-tokens", str(TOKENS)]
    process = subprocess.Popen(words, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    os.write(main_end, b"More?\n/quit\n")
    out = b""
    try:
        while chunk := os.read(main_end, 4096):
            out += chunk
    except OSError:  # The terminal is closed when the process ends.
        pass
    os.close(main_end)
    assert process.wait(60) == 0
    text = out.decode().replace("\r\n", "\n")
    assert "/image PATH" in text
    assert "".join(letter for letter in expected if letter.isalnum()) in text.replace(" ", "") or expected in text
