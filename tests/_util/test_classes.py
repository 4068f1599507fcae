"""Handles that only the library makes, and names that say where they are found."""

from __future__ import annotations

import types

import pytest

from pgstructured._util import NoPublicConstructor, create, lazy_door, publish


class Handle(metaclass=NoPublicConstructor):
    def __init__(self, number: int, *, name: str = "") -> None:
        self.number = number
        self.name = name


def test_a_handle_is_made_by_its_factory_alone():
    with pytest.raises(TypeError, match=r"Handle has no public constructor"):
        Handle(1)
    handle = create(Handle, 1, name="one")
    assert isinstance(handle, Handle)
    assert (handle.number, handle.name) == (1, "one")


def test_publishing_touches_only_our_own_public_names():
    ours = type("Ours", (), {"__module__": "package.room._module"})
    hidden = type("_Hidden", (), {"__module__": "package.room._module"})
    foreign = type("Foreign", (), {"__module__": "elsewhere"})
    publish("package.room", {"Ours": ours, "_Hidden": hidden, "Foreign": foreign, "number": 1})
    assert ours.__module__ == "package.room"
    assert hidden.__module__ == "package.room._module"
    assert foreign.__module__ == "elsewhere"


@pytest.fixture
def package(monkeypatch):
    """A package with a private module and a room."""
    private = types.ModuleType("package._private")
    private.Inner = type("Inner", (), {"__module__": "package._private"})  # type: ignore[attr-defined]
    room = types.ModuleType("package.room")
    room.Public = type("Public", (), {"__module__": "package.room"})  # type: ignore[attr-defined]
    door = types.ModuleType("package")
    door.__path__ = []
    for module in (private, room, door):
        monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
    return door


def test_a_lazy_door_opens_a_room_when_a_name_is_asked_for(package):
    find, names = lazy_door("package", {"_private": ("Inner",), "room": ("Public",)})
    assert names() == ["Inner", "Public"]
    assert "Inner" not in vars(package)
    inner, public = find("Inner"), find("Public")
    assert package.Inner is inner
    assert package.Public is public
    assert inner.__module__ == "package"
    assert public.__module__ == "package.room"


def test_a_lazy_door_has_no_other_names():
    find, _ = lazy_door("package", {})
    with pytest.raises(AttributeError, match="module 'package' has no attribute 'missing'"):
        find("missing")


def test_the_front_door_lists_what_it_has():
    import pgstructured

    assert dir(pgstructured) == list(pgstructured.__all__)
