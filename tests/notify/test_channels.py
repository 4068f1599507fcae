"""Channels: names, codecs; and the values of notifications."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from pgstructured.errors import ChannelNameError, DecodeError, PayloadTooLargeError
from pgstructured.notify import Channel, Gap, Notification, NotifyBus, Subscription
from pgstructured.notify._channels import check_payload, collapse, quote_name


@pytest.mark.parametrize(
    "name", ["a", "FooBar", 'a"b', "a$$b", "ON", "*", "é" * 31 + "x", "a" * 63]
)
def test_possible_names(name) -> None:
    assert Channel.text(name).name == name


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("", "empty"),
        ("a" * 64, "64 bytes"),
        ("é" * 32, "64 bytes"),
        ("a\0b", "NUL"),
        ("a\ud800", "no valid text"),
    ],
)
def test_impossible_names(name, complaint) -> None:
    with pytest.raises(ChannelNameError, match=complaint):
        Channel.text(name)


def test_quoting() -> None:
    assert quote_name('a"b') == '"a""b"'


def test_payload_bounds() -> None:
    assert check_payload("c", "é" * 3999 + "x") == "é" * 3999 + "x"
    with pytest.raises(PayloadTooLargeError, match="8000 bytes") as caught:
        check_payload("c", "é" * 4000)
    assert (caught.value.size, caught.value.limit) == (8000, 7999)


def test_a_list_of_channels_is_no_string() -> None:
    with pytest.raises(TypeError, match="collection"):
        collapse("abc")


def test_one_channel_has_one_codec() -> None:
    assert list(collapse(["a", Channel.text("a"), "b"])) == ["a", "b"]
    with pytest.raises(ValueError, match="'a' is given twice"):
        collapse(["a", Channel.json("a")])


def test_json() -> None:
    channel = Channel.json("c")
    assert channel.payload_of({"a": ["é", None]}) == '{"a":["é",null]}'
    assert Notification(channel="c", payload='{"a": 1}', decode=channel.decode).value == {"a": 1}


def test_text_takes_nothing_but_text() -> None:
    assert Channel.text("c").payload_of("x") == "x"
    with pytest.raises(TypeError, match="must be text, not int"):
        Channel.text("c").payload_of(1)  # type: ignore[arg-type]


def test_a_channel_can_be_made_with_its_type() -> None:
    assert Channel[int]("c", decode=int, encode=str).payload_of(3) == "3"


class Model:
    """What pydantic's models look like from here."""

    def __init__(self, x):
        self.x = x

    @classmethod
    def model_validate_json(cls, text):
        return cls(int(text))

    def model_dump_json(self):
        return str(self.x)


def test_models_bring_their_json() -> None:
    channel = Channel.of("c", Model)
    assert channel.payload_of(Model(3)) == "3"
    assert Notification(channel="c", payload="4", decode=channel.decode).value.x == 4


def test_structs_bring_their_json(monkeypatch) -> None:
    class Struct:
        __struct_fields__ = ("x",)

    msgspec_json = ModuleType("msgspec.json")
    msgspec_json.Decoder = lambda kind: SimpleNamespace(decode=lambda text: (kind, text))  # type: ignore[attr-defined]
    msgspec_json.encode = lambda value: b"encoded"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "msgspec", ModuleType("msgspec"))
    monkeypatch.setitem(sys.modules, "msgspec.json", msgspec_json)
    channel = Channel.of("c", Struct)
    assert channel.payload_of(Struct()) == "encoded"
    assert Notification(channel="c", payload="4", decode=channel.decode).value == (Struct, "4")  # type: ignore[comparison-overlap]


def test_other_types_need_a_codec() -> None:
    with pytest.raises(TypeError, match="int has no JSON of its own; pass decode="):
        Channel.of("c", int)
    channel = Channel.of("c", int, decode=int)
    assert Notification(channel="c", payload="4", decode=channel.decode).value == 4
    with pytest.raises(TypeError, match="no encode= for int"):
        channel.payload_of(4)
    assert Channel.of("c", int, decode=int, encode=str).payload_of(4) == "4"


def test_notifications_are_values() -> None:
    one = Notification[str](channel="c", payload="p", pid=1, generation=2, received_at=3.0)
    assert (one.channel, one.payload, one.pid, one.generation) == ("c", "p", 1, 2)
    assert one.received_at == 3.0
    assert one.value == "p"
    assert one == Notification(channel="c", payload="p", pid=1, generation=2, received_at=3.0)
    assert one != Notification(channel="c", payload="p", pid=1, generation=3, received_at=3.0)
    assert one != "p"
    assert (
        len({one, Notification(channel="c", payload="p", pid=1, generation=2, received_at=3.0)})
        == 1
    )
    assert "payload='p'" in repr(one)
    with pytest.raises(AttributeError):
        one.payload = "q"  # type: ignore[misc]


def test_fields_in_their_order() -> None:
    one = Notification[str]("c", "p", 1, 2, 3.0)
    assert one == Notification(channel="c", payload="p", pid=1, generation=2, received_at=3.0)
    match one:
        case Notification("c", payload, pid):
            assert (payload, pid) == ("p", 1)
        case _:
            pytest.fail("no match")
    gap = Gap("lagged", 2, 3)
    assert gap == Gap(reason="lagged", generation=2, lost=3)
    match gap:
        case Gap("lagged", _, lost):
            assert lost == 3
        case _:
            pytest.fail("no match")


def test_a_value_is_decoded_once_and_lazily() -> None:
    calls: list[str] = []

    def decode(payload: str) -> int:
        calls.append(payload)
        return int(payload)

    one = Notification(channel="c", payload="7", decode=decode)
    assert not calls
    assert [one.value, one.value] == [7, 7]
    assert calls == ["7"]


def test_a_bad_payload_is_a_decode_error_each_time() -> None:
    one = Notification(channel="c", payload="seven", decode=int)
    for _ in range(2):
        with pytest.raises(DecodeError, match="channel 'c' could not be decoded") as caught:
            _ = one.value
        assert caught.value.notification is one
        assert isinstance(caught.value.__cause__, ValueError)


def test_bytes_that_are_no_utf8_stay_recognisable() -> None:
    one = Notification[str](channel="c", payload="\udcff")
    assert one.payload == "\udcff"
    assert one.value == "\udcff"


def test_handles_are_not_made_by_hand() -> None:
    for kind in (NotifyBus, Subscription):
        with pytest.raises(TypeError, match="no public constructor"):
            kind()  # type: ignore[call-arg]
