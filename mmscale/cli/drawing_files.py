"""The drawings of ``mmscale generate``: one PNG each, and a contact sheet of all; or those of an answer in words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmscale.cli.console import console, emit

if TYPE_CHECKING:
    from mmscale.metrics.sample_images import Pixels
    from mmscale.models.sampling import SamplingConfig

CONTACT_SHEET = "contact.png"


@dataclass(frozen=True)
class DrawingRequest:
    """The options of drawings.

    Attributes:
        size: ``H`` or ``HxW`` in pixels; None for the only size of training.
        guidance: Scale of classifier-free guidance.
        tokenizer: Run or checkpoint of the image tokenizer; None for that of the model.
        output: Folder to write to.
    """

    size: str | None
    guidance: float
    tokenizer: Path | None
    output: Path | None

    def draw(self, run: Path, prompt: str | None, num: int, sampling: SamplingConfig, *, json: bool) -> None:
        """Draw ``num`` images of a text, write them, and print their paths.

        Raises:
            ConfigError: an option is missing or does not fit the model, or the folder has drawings already.
        """
        from mmscale.cli.trained import open_trained
        from mmscale.errors import ConfigError
        from mmscale.evaluate.drawings import drawing_dataset
        from mmscale.metrics.sample_images import contact_sheet

        if prompt is None:
            raise ConfigError("--images: give the text to draw as --prompt")
        if self.output is None:
            raise ConfigError("--images: give the folder of the drawings as --output")
        if num > 1 and not sampling.is_random:
            raise ConfigError(f"--images {num}: all drawings would be the same; give a --temperature above 0")
        size, paths = self.pixels(), [self.output / f"{number:04d}.png" for number in range(num)]
        contact = self.output / CONTACT_SHEET
        refuse_existing([*paths, contact])
        trained = open_trained(run)
        _, template = drawing_dataset(trained.config.drawing_data(trained.stage))
        if self.guidance > 1 and not template.text_dropout:
            console.print(
                "note: the model has not learned images without text (template.text_dropout is 0), so --guidance may "
                "not help"
            )
        images = trained.draw(
            prompt, num, size=size, guidance=self.guidance, sampling=sampling, tokenizer=self.tokenizer
        )
        write_images([*images, contact_sheet(images, prompt)], [*paths, contact])
        if json:
            written = {"images": [str(path) for path in paths], "contact": str(contact)}
            emit({**written, "prompt": prompt, "seed": sampling.seed, "checkpoint": str(trained.checkpoint)}, json=True)
        else:
            print("\n".join(map(str, [*paths, contact])))

    def answer(self, run: Path, prompt: str | None, length: int, sampling: SamplingConfig, *, json: bool) -> None:
        """Answer a prompt in words and drawings, write the drawings, and print texts and paths in order.

        Raises:
            ConfigError: the model writes no such answers, or the folder has drawings already.
        """
        from mmscale.cli.trained import open_trained
        from mmscale.evaluate.mixed_answers import MOST_IMAGES, respond_with_drawings
        from mmscale.run.image_tokens import tokenizer_of_data

        assert self.output is not None, "generate calls this with --output"
        size, paths = self.pixels(), [self.output / f"{number:04d}.png" for number in range(MOST_IMAGES)]
        refuse_existing(paths)
        trained = open_trained(run)
        config, data = trained.config, trained.config.drawing_data(trained.stage)
        path, device = self.tokenizer, trained.world.device
        parts = respond_with_drawings(
            trained.model,
            config.evaluation_data(trained.stage),
            data,
            config.stage_media(trained.stage),
            prompt,
            size=size,
            max_new_tokens=length,
            sampling=sampling,
            guidance=self.guidance,
            image_tokenizer=None if path is None else tokenizer_of_data(path, data, device),
        )
        images = [part.pixels for part in parts if not isinstance(part, str)]
        write_images(images, paths[: len(images)])
        left = iter(paths)
        shown = [("text", part) if isinstance(part, str) else ("image", str(next(left))) for part in parts]
        if json:
            emit({"parts": [{kind: each} for kind, each in shown], "checkpoint": str(trained.checkpoint)}, json=True)
        else:
            print("\n".join(each for _, each in shown))

    def pixels(self) -> tuple[int, int] | None:
        """Return height and width.

        Raises:
            ConfigError: the size has another form.
        """
        from mmscale.errors import ConfigError

        if self.size is None:
            return None
        if (match := re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", self.size)) is None:
            raise ConfigError(f"--size {self.size}: expected pixels as H or HxW: 256, or 256x384 (height x width)")
        return int(match[1]), int(match[2] or match[1])


def refuse_existing(paths: Sequence[Path]) -> None:
    """Raise ``ConfigError`` if one of the files exists, or their folder is a file."""
    from mmscale.errors import ConfigError

    folder = paths[0].parent
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {folder}: a file, expected a folder for the drawings")
    if existing := [path for path in paths if path.exists()]:
        raise ConfigError(f"{existing[0]}: exists already; give another --output, or delete it")


def write_images(images: Sequence[Pixels], paths: Sequence[Path]) -> None:
    """Write one PNG for each image, whole or not at all.

    Raises:
        MMScaleError: a file cannot be written.
    """
    from data_pipeline.io.atomic import write_whole
    from mmscale.errors import MMScaleError
    from mmscale.metrics.sample_images import encode_png

    for path, pixels in zip(paths, images, strict=True):
        try:
            write_whole(path, encode_png(pixels), parents=True)
        except OSError as error:
            raise MMScaleError(f"{path}: {error.strerror}") from error
