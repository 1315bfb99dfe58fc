"""Base classes of the data side of a modality besides images: its configuration, and the inputs of a data set.

    DatasetConfig.audio (ModalityConfig) --inputs--> ModalityInputs --decode_task or dry_run--> items of a document

``DatasetConfig`` and ``DataConfig`` have a field for each modality, with the name of the modality in ``MediaSpec``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from data_pipeline.document import MediaItem
from data_pipeline.io.strict import StrictConfig
from data_pipeline.media_spec import MediaSpec
from data_pipeline.sample import MediaPart, VideoPart

if TYPE_CHECKING:
    from data_pipeline.text.tokenizer import Tokenizer


class DecodeTask(Protocol):
    """A planned part of a sample that is not decoded yet."""

    @property
    def crops(self) -> tuple[MediaItem, ...]:
        """The items, with uninitialised values until ``decode`` has run."""

    def decode(self) -> None:
        """Decode the part and write the values of the items. Call it once, from any thread.

        Raises:
            SampleError: the part is damaged.
        """


class ModalityInputs(ABC):
    """The inputs of one modality in a data set: how a part becomes items, and the tokens around them.

    Attributes:
        part_type: Class of the parts of a sample that it reads.
        placeholder: Id of the token that stands for each feature.
        start, end: Ids of the tokens before and after each part.
        reserved: Ids of its tokens by name, which no text may spell. The tokenizer's image token is left out.
        reads_tracks: Whether it reads the tracks of videos, which ``track_of`` returns.
        interleave_seconds: Seconds of a video after which its track has a turn; None: it follows the whole video.
    """

    part_type: ClassVar[type[MediaPart]]
    placeholder: int
    start: Sequence[int] = ()
    end: Sequence[int] = ()
    reserved: Mapping[str, int]
    reads_tracks: bool = False
    interleave_seconds: float | None = None

    def track_of(self, video: VideoPart) -> MediaPart | None:
        """Return the track of a video that it reads as a part of its own; None if there is none.

        Raises:
            SampleError: the sample lacks the track although the video may have one.
        """
        return None

    @abstractmethod
    def dry_run(self, part: MediaPart) -> tuple[MediaItem, ...]:
        """Return the items of a part without decoding it: their values are constant and take no memory.

        The size comes from ``part.size``, or from the header of the file if that is None.

        Raises:
            SampleError: the part does not fit the model or the limits of the configuration.
        """

    @abstractmethod
    def decode_task(self, part: MediaPart) -> DecodeTask:
        """Plan a part, and return a task that decodes it later.

        Raises:
            SampleError: as ``dry_run``.
        """


class Film(NamedTuple):
    """A video whose track has turns between its frames, and the inputs that read the track."""

    video: VideoPart
    track: MediaPart
    inputs: ModalityInputs


class ModalityConfig(StrictConfig, ABC):
    """Base class of a modality's block in a data set."""

    @abstractmethod
    def inputs(self, tokenizer: Tokenizer, spec: MediaSpec) -> ModalityInputs:
        """Return the inputs for a model of ``spec``, which has the modality.

        Raises:
            DataConfigError: the configuration does not fit the model, or the tokenizer lacks a token.
        """
