"""Class-design helpers."""

from __future__ import annotations

from abc import ABCMeta
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

P = ParamSpec("P")
T = TypeVar("T")


class NoPublicConstructor(ABCMeta):
    """Metaclass of handles that only a factory of this library may make.

    The class stays importable for annotations and ``isinstance``; calling it
    raises `TypeError`. Factories call `create`, which type checkers see through.
    """

    if not TYPE_CHECKING:

        def __call__(cls, *_args: object, **_kwargs: object) -> None:
            """Refuse direct construction."""
            raise TypeError(f"{cls.__module__}.{cls.__qualname__} has no public constructor")


def create(cls: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Instantiate a `NoPublicConstructor` class, with checked arguments."""
    instance: T = type.__call__(cls, *args, **kwargs)  # type: ignore[arg-type]
    return instance


def publish(module_name: str, namespace: MutableMapping[str, Any]) -> None:
    """Make re-exported objects report their public module.

    Tracebacks, documentation and pickle all read ``__module__``.
    """
    private = module_name.split(".", 1)[0] + "."
    for name, obj in namespace.items():
        if name.startswith("_"):
            continue
        if getattr(obj, "__module__", "").startswith(private):
            obj.__module__ = module_name
