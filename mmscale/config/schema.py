"""Find the pydantic class that governs a path of a configuration. Error messages need it to list the legal keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel

from data_pipeline.io.own_code import KIND, OwnKinds

TAG = KIND
"""Discriminator key of all tagged unions in mmscale's configurations."""


def model_at(schema: type[BaseModel], data: Any, path: tuple[str, ...]) -> type[BaseModel] | None:
    """Return the configuration class of the block at ``path``; None if there is none.

    Args:
        schema: Class of the root.
        data: The configuration as plain values; its ``kind`` keys select the members of unions.
        path: Keys and list indices.
    """
    annotation: Any = schema
    for key in path:
        annotation = _child_annotation(annotation, data, key)
        data = _child_value(data, key)
        if annotation is None:
            return None
    return _model(annotation, data)


def _child_annotation(annotation: Any, data: Any, key: str) -> Any:
    model = _model(annotation, data)
    if model is not None:
        info = model.model_fields.get(key)
        if info is None:
            return None
        own = [each for each in info.metadata if isinstance(each, OwnKinds)]
        return Annotated[info.annotation, own[0]] if own else info.annotation
    for option in _options(annotation):
        arguments = get_args(option)
        if get_origin(option) is dict and len(arguments) == 2:
            return arguments[1]
        if get_origin(option) in (list, tuple) and arguments and key.isdigit():
            same = get_origin(option) is list or arguments[-1] is Ellipsis
            return arguments[0] if same else arguments[min(int(key), len(arguments) - 1)]
    return None


def _child_value(data: Any, key: str) -> Any:
    if isinstance(data, dict):
        return data.get(key)
    if isinstance(data, list) and key.isdigit() and int(key) < len(data):
        return data[int(key)]
    return None


def _options(annotation: Any) -> Iterator[Any]:
    """Yield the members of a nested or annotated union, or the annotation itself, and the ``OwnKinds`` of a union."""
    if get_origin(annotation) is Annotated:
        yield from _options(get_args(annotation)[0])
        yield from (each for each in get_args(annotation)[1:] if isinstance(each, OwnKinds))
    elif get_origin(annotation) in (list, tuple, dict, Literal) or not get_args(annotation):
        yield annotation
    else:
        for member in get_args(annotation):
            yield from _options(member)


def _model(annotation: Any, data: Any) -> type[BaseModel] | None:
    options = list(_options(annotation))
    models = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
    for own in options:
        kind = data.get(TAG) if isinstance(data, dict) and isinstance(own, OwnKinds) else None
        if isinstance(kind, str) and not any(kind in _tags(model) for model in models):
            try:
                return own.find(kind)
            except ValueError:
                return None
    if len(models) <= 1:
        return models[0] if models else None
    tag = data.get(TAG) if isinstance(data, dict) else None
    if tag is not None:
        return next((model for model in models if tag in _tags(model)), None)
    # Without a tag, pydantic chooses the member with a default tag, or tries all members.
    untagged = [model for model in models if (info := model.model_fields.get(TAG)) is None or not info.is_required()]
    if len(untagged) == 1:
        return untagged[0]
    keys = set(data) if isinstance(data, dict) else set()
    return max(models, key=lambda model: len(keys & model.model_fields.keys())) if keys else None


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    info = model.model_fields.get(TAG)
    if info is None:
        return ()
    # An enum member or the values of a Literal; both compare equal to the string in the file.
    return get_args(info.annotation) or (info.default,)
