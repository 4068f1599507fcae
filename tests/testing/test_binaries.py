"""Where a server is found."""

from __future__ import annotations

import importlib.util
import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

import pgstructured.testing
from pgstructured.testing import ServerNotFoundError, _binaries, _ports, find_server_binaries
from pgstructured.testing._ports import free_port

if TYPE_CHECKING:
    from pathlib import Path


def make_set(folder: Path, version: str) -> Path:
    folder.mkdir(parents=True)
    for name in ("postgres", "initdb"):
        program = folder / name
        program.write_text(f"#!/bin/sh\necho 'postgres (PostgreSQL) {version}'\n")
        program.chmod(0o755)
    return folder


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without any server."""
    monkeypatch.delenv("PGSTRUCTURED_PG_BIN", raising=False)
    (tmp_path / "path").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/bin:/usr/bin")
    monkeypatch.setattr(_binaries, "_DISTRIBUTION_FOLDERS", ())
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    which: dict[str, str] = {}
    monkeypatch.setattr(shutil, "which", which.get)
    return which


def test_nothing(bare):
    with pytest.raises(ServerNotFoundError, match="no programs of a Postgres server on this"):
        find_server_binaries()


def test_the_order(bare, monkeypatch, tmp_path):
    bare["postgres"] = str(tmp_path / "nothing" / "postgres")
    distribution = [make_set(tmp_path / "usr" / n / "bin", f"{n}.1") for n in ("9", "10")]
    monkeypatch.setattr(_binaries, "_DISTRIBUTION_FOLDERS", (f"{tmp_path}/usr/*/bin",))
    assert find_server_binaries().bindir == distribution[1]

    on_path = make_set(tmp_path / "onpath", "11.2 (Mine 1)")
    bare["postgres"] = str(on_path / "postgres")
    assert find_server_binaries().version == "11.2 (Mine 1)"
    assert find_server_binaries().program("initdb") == str(on_path / "initdb")

    configured = make_set(tmp_path / "configured", "12.0")
    pg_config = tmp_path / "pg_config"
    bare["pg_config"] = str(pg_config)
    assert find_server_binaries().major == 11  # one that does not run
    pg_config.write_text(f"#!/bin/sh\necho {configured}\n")
    pg_config.chmod(0o755)
    assert find_server_binaries().major == 12

    wheel = make_set(tmp_path / "wheel" / "pginstall" / "bin", "13.5")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "wheel")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    assert find_server_binaries().bindir == wheel

    given = make_set(tmp_path / "given", "14beta1")
    monkeypatch.setenv("PGSTRUCTURED_PG_BIN", str(given))
    assert find_server_binaries().major == 14
    assert find_server_binaries(bindir=wheel).major == 13

    with pytest.raises(ServerNotFoundError, match="Postgres 9 wanted, and 14beta1 is in"):
        find_server_binaries(version=9)
    monkeypatch.delenv("PGSTRUCTURED_PG_BIN")
    assert find_server_binaries(version=9).bindir == distribution[0]
    with pytest.raises(ServerNotFoundError, match=r"Postgres 8 server .*13\.5, 12\.0, 11\.2"):
        find_server_binaries(version=8)


def test_what_is_no_set(bare, tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(ServerNotFoundError, match="no postgres and initdb in"):
        find_server_binaries(bindir=tmp_path / "other")
    said = make_set(tmp_path / "odd", "x")
    (said / "postgres").write_text("#!/bin/sh\necho something else\n")
    with pytest.raises(ServerNotFoundError):
        find_server_binaries(bindir=said)
    (said / "postgres").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(ServerNotFoundError):
        find_server_binaries(bindir=said)


def test_a_link_leads_to_the_folder(bare, tmp_path):
    real = make_set(tmp_path / "real", "15.1")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "postgres").symlink_to(real / "postgres")
    bare["postgres"] = str(tmp_path / "links" / "postgres")
    assert find_server_binaries().bindir == real


def test_no_free_port(monkeypatch):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(_ports, "_PORTS", [taken.getsockname()[1]])
        with pytest.raises(OSError, match="in use"):
            free_port()


def test_the_room_shows_all_it_has():
    for name in pgstructured.testing.__all__:
        found = getattr(pgstructured.testing, name)
        assert found.__module__ == "pgstructured.testing"
        assert name in dir(pgstructured.testing)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pgstructured.testing.nothing  # type: ignore[attr-defined]
