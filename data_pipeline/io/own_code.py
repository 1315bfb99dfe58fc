"""Parts of a configuration that a user's own package defines: ``kind: my_package.loss:Focal``, or an entry point.

    block with kind --OwnKinds--> a built-in class of the union, a class of an installed entry point, or module:attr

``kind: module:attr`` imports Python code, and a configuration may come from someone else. A path is therefore refused
until ``trust`` (``trusted_code.py``) was called with it; ``mmscale.config.load`` does so for the user's own files. An
entry point needs no such call: the user has installed its package, and a configuration can only choose among the
registered names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, get_args

from pydantic import (
    BaseModel,
    GetCoreSchemaHandler,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
)
from pydantic_core import InitErrorDetails, core_schema

from data_pipeline.io.trusted_code import import_attribute, is_import_path, is_trusted

KIND = "kind"


@dataclass(frozen=True)
class OwnKinds:
    """Annotation of a configuration field: it also accepts classes of other packages.

    The annotated type is a union of the built-in classes, or ``base`` alone if there are none.

    Attributes:
        base: Base class of all kinds. A class of another package derives from it and has a field ``kind: str``.
        group: Group of the entry points, for example ``mmscale.projectors``.
    """

    base: type[BaseModel]
    group: str

    def find(self, kind: str) -> type[BaseModel] | None:
        """Return the class of another package for ``kind``; None if no entry point has this name.

        Raises:
            ValueError: ``kind`` is an import path that is not trusted, cannot be imported, or is no such class.
        """
        if is_import_path(kind):
            if not is_trusted(kind):
                raise ValueError("would import Python code, and no file of yours names it")
            return self._checked(lambda: import_attribute(kind))
        found = next(iter(entry_points(group=self.group, name=kind)), None)
        return None if found is None else self._checked(found.load)

    def _checked(self, load: Callable[[], Any]) -> type[BaseModel]:
        try:
            found = load()
        except Exception as error:
            raise ValueError(f"cannot be imported: {type(error).__name__}: {error}") from error
        base = f"{self.base.__module__}.{self.base.__name__}"
        if not (isinstance(found, type) and issubclass(found, self.base)):
            raise ValueError(f"is {found!r:.80}, expected a class that derives from {base}")
        if missing := sorted(found.__abstractmethods__):
            raise ValueError(f"the class lacks {', '.join(missing)} of {base}")
        if KIND not in found.model_fields:
            raise ValueError(f"the class needs the field `{KIND}: str`")
        return found

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        builtin = {tag for option in get_args(source) or () for tag in _tags(option)}

        def validate(value: Any, inner: core_schema.ValidatorFunctionWrapHandler) -> Any:
            if isinstance(value, self.base):
                return value
            kind = value.get(KIND) if isinstance(value, dict) else None
            if isinstance(kind, str) and kind not in builtin:
                try:
                    found = self.find(kind)
                except ValueError as error:
                    raise _at_kind(error, kind) from error
                if found is not None:
                    return found.model_validate(value)
            if builtin or not isinstance(value, dict):
                return inner(value)
            names = ", ".join(point.name for point in entry_points(group=self.group)) or "none"
            problem = ValueError(
                f"expected the path of a class, my_package.my_module:MyClass, or the name of an entry point of the "
                f"group {self.group} (installed: {names})"
            )
            raise _at_kind(problem, kind)

        def serialize(value: Any, inner: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
            is_own = isinstance(value, self.base) and getattr(value, KIND, None) not in builtin
            return value.model_dump(mode=info.mode) if is_own else inner(value)

        return core_schema.no_info_wrap_validator_function(
            validate,
            handler(source),
            serialization=core_schema.wrap_serializer_function_ser_schema(serialize, info_arg=True),
        )


def _at_kind(error: ValueError, kind: Any) -> ValidationError:
    """Return the error as one of the key ``kind``, so that messages name the key and its line."""
    detail = InitErrorDetails(type="value_error", loc=(KIND,), input=kind, ctx={"error": error})
    return ValidationError.from_exception_data(KIND, [detail])


def _tags(option: Any) -> tuple[Any, ...]:
    """Return the values of ``kind`` of a built-in class."""
    field = getattr(option, "model_fields", {}).get(KIND)
    return () if field is None else get_args(field.annotation) or (field.default,)
