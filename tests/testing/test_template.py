"""The cache of initdb'ed templates and of programs."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from pgstructured.testing import Cluster, ServerFailedError, ServerNotFoundError, _account, _storage
from pgstructured.testing._account import (
    Account,
    is_ours,
    readable_binaries,
    server_account,
    server_environment,
)
from pgstructured.testing._binaries import ServerBinaries

_START = """
    import sys
    from pathlib import Path
    from pgstructured.testing import _storage
    from pgstructured.testing._cluster import Cluster

    _storage._MEMORY = Path(sys.argv[2])
    with Cluster(bindir=sys.argv[1]) as cluster:
        print(cluster.execute("select 'started'")[0][0])
"""


@pytest.fixture
def open_folder():
    """A folder that every user may use, as the one for temporary files."""
    folder = Path(tempfile.mkdtemp(prefix="pgstructured-tests-", dir=_storage.storage_folder()))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


def test_several_processes_at_once_build_one_template(runner, some_binaries, open_folder):
    processes = [
        runner.start(_START, str(some_binaries.bindir), str(open_folder)) for _ in range(3)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert said == ["started\n"] * 3
    (left,) = open_folder.iterdir()
    assert left.name.startswith("pgstructured-template-")


def test_a_template_of_somebody_else_is_not_used(monkeypatch, open_folder):
    monkeypatch.setattr(_storage, "_MEMORY", open_folder)
    with Cluster():
        pass
    (template,) = open_folder.iterdir()
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    os.chown(template, 12345, 12345)
    with pytest.raises(PermissionError, match="not a folder of user"):
        Cluster().__enter__()
    template.rename(open_folder / "elsewhere")
    template.symlink_to(open_folder / "elsewhere")
    with pytest.raises(PermissionError, match="not a folder of user"):
        is_ours(template, os.geteuid())


def test_a_template_that_cannot_be_put_in_place(monkeypatch, open_folder, binaries):
    account = server_account()

    def refuse(self, target):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr(_storage, "_MEMORY", open_folder)
    with pytest.raises(OSError, match="no space left"):
        _storage.make_data(binaries, account, open_folder / "data", template=True)
    assert not list(open_folder.iterdir())


def test_a_template_that_another_process_put_in_place_first(monkeypatch, open_folder, binaries):
    rename = os.rename

    def lose(self, target):
        rename(self, target)
        raise OSError("there is one already")

    monkeypatch.setattr(Path, "rename", lose)
    monkeypatch.setattr(_storage, "_MEMORY", open_folder)
    _storage.make_data(binaries, server_account(), open_folder / "data", template=True)
    assert (open_folder / "data" / "PG_VERSION").exists()


def test_initdb_says_why_it_failed(binaries, open_folder):
    (open_folder / "data").mkdir()
    (open_folder / "data" / "occupied").touch()
    with pytest.raises(ServerFailedError, match="initdb failed"):
        _storage.make_data(binaries, server_account(), open_folder / "data", template=False)


def test_initdb_has_a_deadline(binaries, open_folder, monkeypatch):
    monkeypatch.setattr(_storage, "_INITDB_TIMEOUT", 0.001)
    with pytest.raises(ServerFailedError, match="initdb took longer"):
        _storage.make_data(binaries, server_account(), open_folder / "data", template=False)


def test_storage_is_in_memory_where_there_is_room(monkeypatch):
    monkeypatch.setattr(_storage, "_MEMORY", Path(tempfile.gettempdir()))
    assert _storage.storage_folder() == Path(tempfile.gettempdir())
    monkeypatch.setattr(_storage, "_MEMORY", Path("/"))
    monkeypatch.setattr(_storage, "_MEMORY_NEEDED", 1 << 60)
    assert _storage.storage_folder() == Path(tempfile.gettempdir())


def test_copying_leaves_out_what_vanishes(open_folder, monkeypatch):
    source = open_folder / "source"
    (source / "sub").mkdir(parents=True)
    for name in ("kept", "vanishes", "sub/left_out", "sub/kept"):
        (source / name).write_text(name)
    copy = shutil.copyfile

    def vanish(path, target):
        if path.name == "vanishes":
            path.unlink()
        return copy(path, target)

    monkeypatch.setattr(shutil, "copyfile", vanish)
    target = open_folder / "target"
    account = server_account()
    _storage.copy_tree(source, target, account, leave_out=lambda path: path == "sub/left_out")
    found = sorted(str(path.relative_to(target)) for path in target.rglob("*"))
    assert found == ["kept", "sub", "sub/kept"]
    assert target.stat().st_uid == (target / "sub/kept").stat().st_uid == account.uid
    assert target.stat().st_mode & 0o777 == 0o700


# ---------------------------------------------------------------- who runs it


def test_root_drops_to_an_account_that_exists(monkeypatch):
    import pwd

    known = {"nobody": pwd.getpwnam("nobody")}
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(pwd, "getpwnam", lambda name: known[name])
    assert server_account().name == "nobody"
    assert server_account().popen_options()["user"] == known["nobody"].pw_uid
    known.clear()
    with pytest.raises(ServerNotFoundError, match="neither a user postgres nor nobody"):
        server_account()


def test_a_normal_user_runs_it_as_itself(monkeypatch, tmp_path):
    import pwd

    uid = pwd.getpwnam("nobody").pw_uid
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    account = server_account()
    assert (account.name, account.uid) == ("nobody", uid)
    assert account.popen_options() == {}
    account.own(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 3999999)
    assert server_account().name == "3999999"


def test_no_setting_of_libpq_reaches_a_server(monkeypatch):
    monkeypatch.setenv("PGDATA", "/elsewhere")
    assert "PGDATA" not in server_environment()


@pytest.fixture
def other():
    """An account that is not this process's."""
    if os.geteuid() != 0:
        pytest.skip("only root runs servers as somebody else")
    return server_account()


@pytest.fixture
def closed_binaries(binaries, tmp_path, other):
    """A copy of the programs in a place that only this user can reach."""
    package = tmp_path / "closed" / "package"
    package.parent.mkdir(mode=0o700)
    prefix = binaries.bindir.parent
    # Where the programs look for what they share: one level up, or, on Debian, at a fixed place.
    shutil.copytree(prefix, package / "prefix", symlinks=True)
    libraries = prefix.parent.with_name(f"{prefix.parent.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, package.parent / "package.libs")
        (package.parent / libraries.name).symlink_to("package.libs")
    return ServerBinaries(bindir=package / "prefix" / "bin", version=binaries.version)


def test_programs_that_the_account_can_not_read_are_copied_once(
    closed_binaries, other, open_folder, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(open_folder))
    assert not other.can_run(closed_binaries.program("postgres"))
    copied = readable_binaries(closed_binaries, other)
    (cache,) = open_folder.iterdir()
    assert copied.bindir.is_relative_to(cache)
    before = cache.stat().st_ino
    assert readable_binaries(closed_binaries, other) == copied
    assert [cache.stat().st_ino] == [path.stat().st_ino for path in open_folder.iterdir()]
    assert before == cache.stat().st_ino


def test_programs_that_nobody_can_run(tmp_path, other, open_folder, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(open_folder))
    monkeypatch.setattr(_account, "_FALLBACKS", ())
    (tmp_path / "prefix" / "bin").mkdir(parents=True)
    for name in ("postgres", "initdb"):
        (tmp_path / "prefix" / "bin" / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "prefix" / "bin" / name).chmod(0o755)
    broken = ServerBinaries(bindir=tmp_path / "prefix" / "bin", version="1")
    with pytest.raises(ServerNotFoundError, match=f"the user {other.name} can't run"):
        readable_binaries(broken, other)


def test_no_room_for_a_copy(closed_binaries, other, open_folder, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(tempfile, "tempdir", str(open_folder))
    monkeypatch.setattr(_account, "_FALLBACKS", ())
    monkeypatch.setattr(shutil, "copytree", refuse)
    with pytest.raises(ServerNotFoundError, match="nor a copy of it in"):
        readable_binaries(closed_binaries, other)
    assert not list(open_folder.iterdir())


def test_copies_go_where_there_is_room(closed_binaries, other, open_folder, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    monkeypatch.setattr(_account, "_FALLBACKS", (str(open_folder),))
    assert readable_binaries(closed_binaries, other).bindir.is_relative_to(open_folder)


def test_a_copy_that_another_process_made_meanwhile(tmp_path, monkeypatch):
    (tmp_path / "package" / "prefix" / "bin").mkdir(parents=True)
    cache = tmp_path / "cache"
    answers = [False, True]
    monkeypatch.setattr(_account, "is_ours", lambda *_: answers.pop(0))
    (cache / "theirs").mkdir(parents=True)
    _account._copy_once(tmp_path / "package" / "prefix", cache)
    assert [path.name for path in cache.iterdir()] == ["theirs"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "package"]


def test_root_of_these_tests():
    # What the two `runner`s of the other tests stand for.
    account = server_account()
    assert isinstance(account, Account)
    assert account.is_other == (os.geteuid() == 0)
    assert json.dumps(account.popen_options())
