"""Load a trained model into one process, without DeepSpeed; for ``eval``, ``generate`` and ``mmscale.load``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmscale.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from PIL import Image

    from mmscale.config import Loaded
    from mmscale.dist import World
    from mmscale.metrics.sample_images import Pixels
    from mmscale.models.build import AnyModel
    from mmscale.models.sampling import SamplingConfig
    from mmscale.run.config import RunConfig


@dataclass(frozen=True, repr=False)
class Trained:
    """A model with the weights of ``checkpoint``, in evaluation mode on ``world.device``.

    Attributes:
        config: The run.
        stage: Number of the stage whose model configuration is used.
        model: The model.
        world: A world of one rank.
        checkpoint: The checkpoint that was loaded.
    """

    config: RunConfig
    stage: int
    model: AnyModel
    world: World
    checkpoint: Path

    def __repr__(self) -> str:
        return f"Trained({self.checkpoint}: {self.model!r})"

    def generate(
        self,
        prompt: str | None = None,
        images: str | Path | Image.Image | Sequence[str | Path | Image.Image] = (),
        *,
        max_new_tokens: int = 32,
        sampling: SamplingConfig | None = None,
        stop: Sequence[str] = (),
    ) -> str:
        """Return the answer to a prompt about images, without surrounding white space.

        Args:
            prompt: Text before the answer; in a dialogue the user's turn. ``<image>`` in it marks the position of the
                next image; without marks the images come first. None for the first prompt of training.
            images: A picture of Pillow or a JPEG, PNG or WebP file, or a list of these.
            max_new_tokens: Longest answer, tokens.
            sampling: How tokens are sampled; None takes the most likely token each time.
            stop: The answer ends before the first of these texts.

        Raises:
            ConfigError: prompt and images do not fit the model or its template.
            MMScaleError, SampleError: a file cannot be read, or is no image.
        """
        from mmscale.evaluate.answers import respond
        from mmscale.models.sampling import SamplingConfig

        several = images if isinstance(images, Sequence) and not isinstance(images, str) else (images,)
        (answer,) = respond(
            self.model,
            self.config.evaluation_data(self.stage),
            self.config.stage_media(self.stage),
            images=[Path(each) if isinstance(each, str) else each for each in several],
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling or SamplingConfig(),
            stop=stop,
        )
        return answer

    def draw(
        self,
        prompt: str,
        num: int = 1,
        *,
        size: int | tuple[int, int] | None = None,
        guidance: float = 1.0,
        sampling: SamplingConfig | None = None,
        tokenizer: str | Path | None = None,
    ) -> list[Pixels]:
        """Return drawings of a text, uint8 ``(height, width, 3)``; see ``mmscale.evaluate.drawings.draw_images``.

        Args:
            prompt: The text.
            num: Number of images; image i uses the seed of ``sampling`` plus i.
            size: Side, or height and width, in pixels; None for the only size of training.
            guidance: Scale of classifier-free guidance, at least 1.
            sampling: How codes are chosen; None draws from their whole distribution.
            tokenizer: Run or checkpoint of the image tokenizer, for a model that does not contain it.

        Raises:
            ConfigError: the model draws no images, or an option does not fit it.
            CheckpointError: the tokenizer has no usable checkpoint.
        """
        from mmscale.evaluate.drawings import FREE, draw_images
        from mmscale.run.image_tokens import tokenizer_of_data

        data = self.config.drawing_data(self.stage)
        found = None if tokenizer is None else tokenizer_of_data(Path(tokenizer), data, self.world.device)
        spec, texts = self.config.stage_media(self.stage), [prompt] * num
        drawings = draw_images(
            self.model,
            data,
            spec,
            texts,
            size=size,
            sampling=sampling or FREE,
            guidance=guidance,
            image_tokenizer=found,
        )
        return [drawing.pixels for drawing in drawings]


def load_trained(config: RunConfig, checkpoint: Path | None = None) -> Trained:
    """Build the model of a run and load a checkpoint: its averaged weights (EMA) if it has them, else the trained ones.

    Args:
        config: The run.
        checkpoint: The checkpoint; None loads the newest one of the run.

    Raises:
        CheckpointError: there is no checkpoint, or it has another model.
    """
    import torch

    from mmscale.checkpoint import find_latest, load_weights, read_manifest
    from mmscale.dist import World
    from mmscale.models.build import build_model
    from mmscale.run.folder import CHECKPOINTS

    folder = config.run_dir / CHECKPOINTS
    path = checkpoint or (find_latest(folder) if folder.is_dir() else None)
    if path is None:
        raise CheckpointError(
            f"{folder}: no checkpoint there; train first: mmscale train CONFIG run_dir={config.run_dir}"
        )
    path = path.resolve() if path.is_symlink() else path  # Name the checkpoint that ``checkpoints/best`` means.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    manifest = read_manifest(path)
    # A configuration with fewer stages may still have the same model. If it does not, load_weights raises.
    stage = max(0, min(manifest.state.stage_index, len(config.stages) - 1))
    # ``engine.attention`` may name a kernel that computes in 16 bits only, or that this machine lacks.
    model = build_model(config.decoder_model(stage), seed=None)
    load_weights(model, path, ema=manifest.ema)
    return Trained(config, stage, model.to(device).eval(), World(0, 1, 0, device), path)


def open_run(run: Path, overrides: Sequence[str] = ()) -> Loaded[RunConfig]:
    """Load the configuration of a run folder, wherever the folder is now.

    Raises:
        ConfigError: ``config.yaml`` or an override is invalid, or it describes an imported model without a tokenizer.
    """
    from mmscale.config import load
    from mmscale.config.layers import read_layers
    from mmscale.hf.kept_files import HF_FILES
    from mmscale.run.config import RunConfig
    from mmscale.run.folder import CONFIG

    if (run / HF_FILES).is_dir() and read_layers(run / CONFIG).child("stages") is None:
        raise ConfigError(
            f"{run}: an imported model without a tokenizer (a vision tower, or a folder without tokenizer.json): use "
            "it as `base:` in a run file, or import a folder that has a tokenizer"
        )
    loaded = load(run / CONFIG, list(overrides), RunConfig)
    config = loaded.value.model_copy(update={"run_dir": run})
    tokenizer = config.data.tokenizer
    moved = run / HF_FILES / tokenizer.path.name
    if tokenizer.path.parent.name == HF_FILES and not tokenizer.path.exists() and moved.is_file():
        there = {"tokenizer": tokenizer.model_copy(update={"path": moved})}
        config = config.model_copy(update={"data": config.data.model_copy(update=there)})
    return replace(loaded, value=config)


def open_trained(path: str | Path, *, allow_code: bool = False) -> Trained:
    """Load the trained model of a run folder, or of one checkpoint in it, with the run's own ``config.yaml``.

    Args:
        path: ``RUN`` or ``RUN/checkpoints/step-N``.
        allow_code: Whether ``config.yaml`` may name Python code of projectors, templates and objectives, which is
            imported. ``--allow-commands`` on the command line allows it too.

    Raises:
        ConfigError: the path is neither of the two.
        CheckpointError: the path is a Hugging Face folder, or the run has no usable checkpoint.
    """
    from data_pipeline.io.missing import no_such_file
    from mmscale.config.trust import code_allowed
    from mmscale.hf.read import require_no_folder
    from mmscale.run.folder import CONFIG

    path = Path(path)
    if (found := run_and_checkpoint(path)) is not None:
        with code_allowed(allow_code):
            return load_trained(open_run(found[0]).value, found[1])
    require_no_folder(path, f"make a checkpoint of it with: mmscale checkpoint import {path} RUN --from hf")
    if not path.exists():
        raise ConfigError(f"{path}: {no_such_file(path)}; give a run folder or a checkpoint of one")
    raise ConfigError(
        f"{path}: neither a run folder (with a {CONFIG}) nor a checkpoint of one (RUN/checkpoints/step-N)"
    )


def run_and_checkpoint(path: Path) -> tuple[Path, Path | None] | None:
    """Return the run folder that a path names, and the checkpoint if the path is one; None if it is neither."""
    from mmscale.run.folder import CONFIG

    pairs = ((path, None), (path.parent.parent, path))
    return next((pair for pair in pairs if path.is_dir() and (pair[0] / CONFIG).is_file()), None)


def _run_of(path: Path) -> Path | None:
    """Return the run folder that is ``path``, or that contains it as checkpoints folder or checkpoint; None if none."""
    from mmscale.run.folder import CONFIG

    return next((each for each in (path, path.parent, path.parent.parent) if (each / CONFIG).is_file()), None)


def imported_files(path: Path) -> Path | None:
    """Return the Hugging Face files of the model that a run began with, for an export of the run.

    Args:
        path: A run folder, its checkpoints folder, or one checkpoint.

    Returns:
        The folder; None if the run has another tokenizer, or a model that the folder's family cannot express.

    Raises:
        CheckpointError: the files have changed since the import, or there is no checkpoint.
        ConfigError: the run's configuration is invalid.
    """
    from mmscale.checkpoint.manifest import model_config_of, newest_of, read_manifest
    from mmscale.hf.kept_files import HF_FILES, kept_folder
    from mmscale.hf.layouts import layout_of
    from mmscale.hf.read import read_config
    from mmscale.run.folder import CONFIG

    run = _run_of(path)
    if run is None:
        return None
    own = run / HF_FILES / CONFIG
    folder = kept_folder(own if own.parent.is_dir() else open_run(run).value.data.tokenizer.path)
    if folder is None:
        return None
    checkpoint = newest_of(path)
    config = model_config_of(read_manifest(checkpoint), checkpoint)
    if getattr(config, "adapters", None) is not None:  # An export merges them.
        config = config.model_copy(update={"adapters": None})
    try:
        layout_of(read_config(folder)["model_type"]).config_values(config)
    except CheckpointError:
        return None
    return folder


def own_tokenizer(path: Path, folder: Path) -> tuple[Path, ...]:
    """Write the tokenizer of a run into a folder, as ``transformers`` loads it, and return the files.

    Returns no files, with a warning, for a run without a configuration, and for a tokenizer that cannot be converted.

    Args:
        path: A run folder, its checkpoints folder, or one checkpoint.
        folder: An existing folder.
    """
    from data_pipeline.errors import DataConfigError
    from mmscale.cli.console import warn
    from mmscale.hf.own_tokenizer import write_tokenizer

    run = _run_of(path)
    if run is None:
        return ()
    try:
        data = open_run(run).value.data
        return tuple(write_tokenizer(data.tokenizer, data.prompts.template.branch_template, folder))
    except (CheckpointError, ConfigError, DataConfigError) as error:
        warn([f"the tokenizer is not exported: {error}"])
        return ()
