"""Questions about pydantic classes that pydantic's error messages leave open: which keys are legal at a path?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel

TAG = "kind"
"""Discriminator of every union in our configurations."""


def model_at(schema: type[BaseModel], data: Any, path: tuple[str, ...]) -> type[BaseModel] | None:
    """The configuration class that governs the block at ``path``; None where there is none.

    Args:
        schema: Class of the root.
        data: The plain configuration; its ``kind`` keys choose among the members of a union.
        path: Keys and list indices.
    """
    annotation: Any = schema
    for key in path:
        annotation = _step(annotation, data, key)
        data = _down(data, key)
        if annotation is None:
            return None
    return _model(annotation, data)


def _step(annotation: Any, data: Any, key: str) -> Any:
    model = _model(annotation, data)
    if model is not None:
        info = model.model_fields.get(key)
        return None if info is None else info.annotation
    for option in _options(annotation):
        arguments = get_args(option)
        if get_origin(option) is dict and len(arguments) == 2:
            return arguments[1]
        if get_origin(option) in (list, tuple) and arguments and key.isdigit():
            same = get_origin(option) is list or arguments[-1] is Ellipsis
            return arguments[0] if same else arguments[min(int(key), len(arguments) - 1)]
    return None


def _down(data: Any, key: str) -> Any:
    if isinstance(data, dict):
        return data.get(key)
    if isinstance(data, list) and key.isdigit() and int(key) < len(data):
        return data[int(key)]
    return None


def _options(annotation: Any) -> Iterator[Any]:
    """Members of a (nested, annotated) union, or the annotation itself."""
    if get_origin(annotation) is Annotated:
        yield from _options(get_args(annotation)[0])
    elif get_origin(annotation) in (list, tuple, dict, Literal) or not get_args(annotation):
        yield annotation
    else:
        for member in get_args(annotation):
            yield from _options(member)


def _model(annotation: Any, data: Any) -> type[BaseModel] | None:
    models = [option for option in _options(annotation) if isinstance(option, type) and issubclass(option, BaseModel)]
    if len(models) <= 1:
        return models[0] if models else None
    if isinstance(data, dict) and TAG not in data:  # Then a member may be meant whose tag can be left out.
        return models[0]
    tag = data.get(TAG) if isinstance(data, dict) else None
    if tag is None:  # A union may have one member that needs no tag.
        untagged = [model for model in models if (info := model.model_fields.get(TAG)) and not info.is_required()]
        return untagged[0] if len(untagged) == 1 else None
    return next((model for model in models if tag in _tags(model)), None)


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    info = model.model_fields.get(TAG)
    if info is None:
        return ()
    # An enum member or a Literal's words; both compare equal to the word in the file.
    return get_args(info.annotation) or (info.default,)
