"""Find the model that a new run starts from: a file of ``configs/models``, or the folder of a run or an import."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.audio.transform import AudioConfig
from data_pipeline.images.transforms import TransformConfig
from data_pipeline.images.video import VideoConfig
from data_pipeline.text.templates import TemplateConfig
from data_pipeline.text.tokenizer import TokenizerConfig
from mmscale.checkpoint import find_latest
from mmscale.config import load, load_tree
from mmscale.config.layers import read_layers
from mmscale.errors import ConfigError
from mmscale.hf.hub import SCHEME
from mmscale.models.config import ModelConfig
from mmscale.run.config import RunConfig
from mmscale.run.folder import CHECKPOINTS, CONFIG
from mmscale.run.imported import ImportedRun

_MODELS = "configs/models"
_PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Trained:
    """Settings that a run folder adds to its model.

    Attributes:
        folder: The run folder.
        tokenizer: The run's tokenizer.
        template: Template of its prompts.
        transforms: Its transforms.
        video, audio: Its configuration of videos and of sounds; None without one.
        defaults: Keys of ``data`` that a file with ``base: FOLDER`` inherits for data sets that do not set them.
        has_stages: Whether the folder holds a training run, and not only an imported model.
    """

    folder: Path
    tokenizer: TokenizerConfig
    template: TemplateConfig
    transforms: TransformConfig
    video: VideoConfig | None
    audio: AudioConfig | None
    defaults: frozenset[str]
    has_stages: bool


@dataclass(frozen=True)
class StartingModel:
    """The model of a new run.

    Attributes:
        config: The model.
        name: Its name, for titles and folders.
        file: YAML file with the model, for a start from random values; None with ``trained``.
        trained: The run that the weights come from; None for a start from random values.
    """

    config: ModelConfig
    name: str
    file: Path | None = None
    trained: Trained | None = None


def starting_model(model: str) -> StartingModel:
    """Return the model that MODEL names: a run folder, a YAML file, or a name in ``configs/models``.

    Raises:
        ConfigError: there is no such model; or it cannot be trained by ``init``.
    """
    path = Path(model)
    if (path / CONFIG).is_file():
        return _of_run(path)
    if path.is_dir():
        raise ConfigError(f"{model}: neither a run folder ({CONFIG}) nor a Hugging Face folder (config.json)")
    file = next((each for each in _candidates(model) if each.is_file()), None)
    if file is None:
        names = sorted({each.stem for folder in _folders() for each in folder.glob("*.yaml")})
        raise ConfigError(
            f"{model}: no such model; give a folder (of a run, of an import, or of Hugging Face), a YAML file, "
            f"{SCHEME}ORG/NAME, or a name of {_MODELS}: {', '.join(names) or 'there are none here'}"
        )
    root = read_layers(file)
    block = root.child("model") or root
    if block.child("decoder") is None:
        raise ConfigError(f"{file}: a vision tower without a decoder; choose a file with decoder:")
    return StartingModel(load_tree(block, ModelConfig, str(file)).value, file.stem, file=file)


def require_whole(imported: ImportedRun, source: str) -> None:
    """Check that an import is a model that can be trained.

    Raises:
        ConfigError: it is a vision tower alone, or the folder has no tokenizer.
    """
    if not imported.is_whole:
        raise ConfigError(
            f"{source}: a vision tower, or a folder without a tokenizer; init needs a whole model. "
            f"{imported.config} has its blocks: use them in a run file of your own"
        )


def _folders() -> tuple[Path, ...]:
    return (Path(_MODELS), _PROJECT / _MODELS)


def _candidates(model: str) -> Iterator[Path]:
    yield Path(model)
    if Path(model).name == model:
        yield from (folder / f"{model}.yaml" for folder in _folders())


def _of_run(folder: Path) -> StartingModel:
    run = load(folder / CONFIG, [], RunConfig).value
    if find_latest(folder / CHECKPOINTS) is None:
        raise ConfigError(f"{folder}: has no complete checkpoint to start from; see `mmscale checkpoint list {folder}`")
    if any(stage.model for stage in run.stages):
        raise ConfigError(
            f"{folder}: its stages change the model (stages.N.model), and a new run takes the model block alone; "
            "write the file by hand: docs/training.md"
        )
    if run.model.adapters is not None:
        raise ConfigError(
            f"{folder}: the model has adapters already; merge them (mmscale checkpoint export {folder} FOLDER --to hf) "
            "and start from the exported folder, or resume the run itself"
        )
    prompts = run.data.prompts
    defaults = frozenset(
        name for name in ("template", "transforms", "video", "audio") if getattr(run.data, name) is not None
    )
    name = folder.resolve().name
    settings = (run.data.tokenizer, prompts.template, prompts.transforms, prompts.video, prompts.audio)
    trained = Trained(folder, *settings, defaults, bool(run.stages))
    return StartingModel(run.decoder_model(0), name, trained=trained)
