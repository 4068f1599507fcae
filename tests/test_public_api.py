"""The public interface: complete, documented, closed to misuse, and reviewed.

`public_api.txt` is its snapshot; a change of it is a change for users. Write it anew with
``PGSTRUCTURED_WRITE_PUBLIC_API=1 pytest tests/test_public_api.py``.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import os
import textwrap
from abc import ABCMeta
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, ForwardRef, get_origin, is_typeddict

import pytest

MODULES = (
    "pgstructured",
    "pgstructured.cli",
    "pgstructured.driver",
    "pgstructured.errors",
    "pgstructured.locks",
    "pgstructured.log",
    "pgstructured.notify",
    "pgstructured.observe",
    "pgstructured.pool",
    "pgstructured.store",
    "pgstructured.supervise",
    "pgstructured.testing",
)
SNAPSHOT = Path(__file__).with_name("public_api.txt")
WRITE = "PGSTRUCTURED_WRITE_PUBLIC_API"

# Everything else that is no value, exception or interface is a handle, which only the
# library makes.
MADE_BY_HAND = {
    "pgstructured.driver.Connection": "psycopg's own way of making one",
    "pgstructured.log.Event": "by a program that tests what it does with them",
    "pgstructured.log.EventLog": "a name; it needs no server",
    "pgstructured.notify.Channel": "a name with its decoding, a program's own",
    "pgstructured.notify.Notification": "by a program that tests what it does with them",
    "pgstructured.observe.OpenTelemetryInstrument": "given to `instrumented`",
    "pgstructured.store.TableStore": "a pool and a name, without a life of its own",
    "pgstructured.supervise.Supervision": "the owner keeps count in one of its own",
    "pgstructured.testing.Cluster": "a context manager that starts a server",
    "pgstructured.testing.FaultProxy": "a context manager that starts a proxy",
    "pgstructured.testing.PgBouncer": "a context manager that starts a pooler",
    "pgstructured.testing.Sequencer": "a test's own",
    "pgstructured.testing.VirtualClock": "a test's own",
}
NOT_FINAL: dict[str, str] = {
    "pgstructured.driver.Connection": "psycopg makes it, and subclasses it for cursor factories",
    "pgstructured.locks.HeldLock": "`HeldSlot` and `Leadership` are held locks, and more",
}
# At the door for the rooms above, and promised to nobody else.
INTERNAL = {
    "pgstructured.driver": {
        "Command",
        "Gatherable",
        "Parking",
        "PooledConnection",
        "Prepared",
        "Statement",
        "conninfo_of",
        "create_parking",
        "foreign_codec",
        "current_task_id",
        "default_application_name",
        "hold_turn",
        "is_session_pooled",
        "keep_watched",
        "running_event_loop",
        "set_characteristics",
    },
    "pgstructured.pool": {
        "Loan",
        "direct_conninfo",
        "lend_session",
        "session_conninfo",
        "session_pooler",
        "session_required",
    },
}


def public_names(module):
    """Yield the exported names of a module with their objects."""
    for name in module.__all__:
        yield name, getattr(module, name)


def public_classes():
    for module_name in MODULES:
        for name, obj in public_names(import_module(module_name)):
            if inspect.isclass(obj):
                yield f"{module_name}.{name}", obj


def own_classes(cls):
    """Return the class and its bases that are ours; what psycopg and AnyIO bring is theirs."""
    return [base for base in cls.__mro__ if base.__module__.partition(".")[0] == "pgstructured"]


def own_members(cls):
    """Return public attributes by name, each as its most derived class has it."""
    members: dict[str, Any] = {}
    for base in reversed(own_classes(cls)):
        members |= {name: value for name, value in vars(base).items() if not name.startswith("_")}
    return members


def unwrapped(member):
    if isinstance(member, staticmethod | classmethod):
        member = member.__func__
    return inspect.unwrap(member) if callable(member) else member


def is_async(member):
    function = unwrapped(member)
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def signature_of(function):
    signature = inspect.signature(function)
    parts, keyword_only = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            keyword_only = True
        elif parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            parts.append("*")
        stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}
        text = stars.get(parameter.kind.name, "") + parameter.name
        if parameter.annotation is not parameter.empty:
            text += f": {annotation_of(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            text += f" = {value_of(parameter.default)}"
        parts.append(text)
        if parameter.kind is parameter.POSITIONAL_ONLY:
            following = list(signature.parameters.values())[len(parts) :]
            if not any(other.kind is parameter.POSITIONAL_ONLY for other in following):
                parts.append("/")
    returns = signature.return_annotation
    arrow = "" if returns is signature.empty else f" -> {annotation_of(returns)}"
    return f"({', '.join(parts)}){arrow}"


def annotation_of(annotation):
    if isinstance(annotation, ForwardRef):
        return annotation.__forward_arg__
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def value_of(value):
    if inspect.isroutine(value) or inspect.isclass(value):
        return value.__qualname__
    text = repr(value)
    return f"<{type(value).__name__}>" if " at 0x" in text else text


def describe_function(name, member):
    kind = "async def" if is_async(member) else "def"
    function = unwrapped(member)
    if inspect.isasyncgenfunction(function) and function is not member:
        kind = "@asynccontextmanager async def"
    elif inspect.isgeneratorfunction(function) and function is not member:
        kind = "@contextmanager def"
    prefix = {staticmethod: "@staticmethod ", classmethod: "@classmethod "}.get(type(member), "")
    return f"{prefix}{kind} {name}{signature_of(function)}"


def instance_attributes(cls):
    """Yield name and annotation of what ``__init__`` gives an instance to show."""
    init = vars(cls).get("__init__")
    if init is None or not inspect.isfunction(init) or dataclasses.is_dataclass(cls):
        return
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(init)))):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            match target:
                case ast.Attribute(value=ast.Name(id="self"), attr=name) if name[0] != "_":
                    annotation = getattr(node, "annotation", None)
                    yield name, f": {ast.unparse(annotation)}" if annotation else ""


def public_bases(cls):
    """Yield the bases that readers know, for a private one its own."""
    for base in cls.__bases__:
        if base.__module__.startswith("pgstructured.") and base.__module__ not in MODULES:
            yield from public_bases(base)
        elif base is not object:
            yield base


def describe_class(name, cls):
    bases = ", ".join(dict.fromkeys(base.__qualname__ for base in public_bases(cls)))
    lines = []
    if is_handle(cls):
        lines.append("no public constructor")
    elif "__init__" in vars(cls) and not is_interface(cls):
        lines.append(f"def __init__{signature_of(cls)}")
    described: dict[str, str] = {}
    for base in reversed(own_classes(cls)):
        for attribute, annotation in vars(base).get("__annotations__", {}).items():
            if not attribute.startswith("_"):
                described[attribute] = f"{attribute}: {annotation_of(annotation)}"
        for attribute, annotation in instance_attributes(base):
            described.setdefault(attribute, attribute + annotation)
    for attribute, member in own_members(cls).items():
        if isinstance(member, property | cached_property):
            getter: Any = member.fget if isinstance(member, property) else member.func
            returns = inspect.signature(getter).return_annotation
            described[attribute] = f"property {attribute}: {annotation_of(returns)}"
        elif isinstance(member, enum.Enum):
            described[attribute] = f"{attribute} = {member.value!r}"
        elif callable(unwrapped(member)):
            described[attribute] = describe_function(attribute, member)
        else:
            described.setdefault(attribute, attribute)
    lines += [described[attribute] for attribute in sorted(described)]
    return [f"class {name}({bases})" if bases else f"class {name}", *(f"    {x}" for x in lines)]


def describe(module_name):
    lines = [f"# {module_name}"]
    for name, obj in public_names(import_module(module_name)):
        home = getattr(obj, "__module__", "")
        if module_name == "pgstructured" and home.startswith("pgstructured."):
            lines.append(f"{name} = {home}.{name}")
        elif inspect.isclass(obj):
            lines += describe_class(name, obj)
        elif inspect.isfunction(obj):
            lines.append(describe_function(name, obj))
        elif get_origin(obj) is not None:
            lines.append(f"{name} = {obj!r}")
        else:
            lines.append(f"{name}: {type(obj).__name__}")
    return lines


def is_handle(cls):
    return isinstance(cls, ABCMeta) and type(cls).__name__ == "NoPublicConstructor"


def test_the_snapshot_shows_every_public_name():
    for name in MODULES:  # all of them first: a lazy room's classes say where they are found
        dict(public_names(import_module(name)))
    text = "\n\n".join("\n".join(describe(name)) for name in MODULES) + "\n"
    if os.environ.get(WRITE):
        SNAPSHOT.write_text(text, encoding="utf-8")
    assert text == SNAPSHOT.read_text(encoding="utf-8"), f"review, then set {WRITE}=1"


@pytest.mark.parametrize("module_name", MODULES)
def test_all_is_sorted_and_exact(module_name):
    module = import_module(module_name)
    assert isinstance(module.__all__, tuple)
    assert list(module.__all__) == sorted(set(module.__all__))
    ours = {
        name
        for name, obj in vars(module).items()
        if not name.startswith("_")
        and not isinstance(obj, ModuleType)
        and str(getattr(obj, "__module__", "")).startswith("pgstructured")
    }
    ours -= {"publish"}  # what doors are made with
    assert ours - INTERNAL.get(module_name, set()) <= set(module.__all__)
    assert INTERNAL.get(module_name, set()) <= ours - set(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None


@pytest.mark.parametrize("module_name", MODULES)
def test_what_is_public_says_where_it_is_found(module_name):
    public = {f"{name}.{export}" for name in MODULES for export in import_module(name).__all__}
    for name, obj in public_names(import_module(module_name)):
        if inspect.isclass(obj) or inspect.isfunction(obj):
            assert f"{obj.__module__}.{obj.__qualname__}" in public, name


def test_every_public_async_function_says_what_cancelling_it_does():
    silent = []
    for module_name in MODULES:
        for name, obj in public_names(import_module(module_name)):
            if inspect.isclass(obj):
                silent += [
                    f"{module_name}.{name}.{attribute}"
                    for attribute, member in own_members(obj).items()
                    if is_async(member) and "Cancellation:" not in (unwrapped(member).__doc__ or "")
                ]
            elif is_async(obj) and "Cancellation:" not in (unwrapped(obj).__doc__ or ""):
                silent.append(f"{module_name}.{name}")
    assert silent == []


def test_every_public_name_has_a_docstring():
    bare = []
    for module_name in MODULES:
        for name, obj in public_names(import_module(module_name)):
            if not (inspect.isclass(obj) or inspect.isfunction(obj)):
                continue
            if not obj.__doc__:
                bare.append(f"{module_name}.{name}")
            if inspect.isclass(obj) and not issubclass(obj, enum.Enum):
                bare += [
                    f"{module_name}.{name}.{attribute}"
                    for attribute, member in own_members(obj).items()
                    if isinstance(member, property) or inspect.isroutine(unwrapped(member))
                    if not inspect.getdoc(member)
                ]
    assert bare == []


def is_interface(cls):
    return getattr(cls, "_is_protocol", False) or inspect.isabstract(cls)


def is_value(cls):
    parameters = getattr(cls, "__dataclass_params__", None)
    is_frozen = parameters is not None and parameters.frozen
    is_named_tuple = issubclass(cls, tuple) and hasattr(cls, "_fields")
    return is_frozen or is_named_tuple or issubclass(cls, enum.Enum) or is_typeddict(cls)


def test_public_classes_are_closed_to_subclassing():
    open_classes = [
        name
        for name, cls in public_classes()
        if not (
            getattr(cls, "__final__", False)
            or is_interface(cls)
            or is_value(cls)
            or issubclass(cls, BaseException)
            or f"{cls.__module__}.{cls.__qualname__}" in NOT_FINAL
        )
    ]
    assert open_classes == []


def test_handles_cannot_be_made_by_hand():
    makeable = []
    for name, cls in public_classes():
        qualified = f"{cls.__module__}.{cls.__qualname__}"
        if is_interface(cls) or is_value(cls) or issubclass(cls, BaseException):
            continue
        if qualified in MADE_BY_HAND:
            assert not is_handle(cls), name
        elif not is_handle(cls):
            makeable.append(name)
        else:
            with pytest.raises(TypeError, match="no public constructor"):
                cls()
    assert makeable == []
