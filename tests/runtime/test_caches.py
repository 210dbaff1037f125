"""Without a home, or with a cache folder that cannot be written: what serves instead, and that it is said once."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from triton import knobs

import tune_fakes
from inception_fused.plan import tuned
from inception_fused.runtime import caches
from inception_fused.tools import environment
from tune_fakes import FakeBench
from tuner import session

GPU = tuned.Gpu("Test GPU", (9, 0))
CLOSED = "/dev/null/home"
"""A folder in which nobody can make anything, root included."""


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A process that has asked for nothing yet, with a folder for temporary files of its own."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(caches.tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(caches, "_given", None)
    monkeypatch.setattr(knobs.cache, "home_dir", str(tmp_path / "home"))
    # Set first, so that what prepare() sets is taken back.
    for name in ("TRITON_CACHE_DIR", "TRITON_CACHE_MANAGER", "TRITON_HOME", "INCEPTION_FUSED_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    caches.warn_once.cache_clear()
    tuned.forget()
    yield tmp_path
    tuned.forget()


def prepared():
    """What prepare() warns of, asked twice."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        caches.prepare()
        caches.prepare()
    return [str(item.message) for item in caught]


def test_a_folder_that_serves_is_left_alone(fresh):
    assert prepared() == []
    assert "TRITON_CACHE_DIR" not in os.environ
    assert caches.facts() == {"triton": str(fresh / "home/.triton/cache"), "problem": None}
    assert not (fresh / "home").exists(), "asking leaves nothing behind"
    assert list((fresh / "tmp").iterdir()) == []


@pytest.mark.parametrize("home", [CLOSED, "~/"], ids=["cannot be written", "no home"])
def test_triton_gets_a_folder_of_this_user(home, fresh, monkeypatch):
    monkeypatch.setattr(knobs.cache, "home_dir", home)
    (said,) = prepared()
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    assert folder.parent.parent == fresh / "tmp"
    assert str(folder) in said
    assert ("no home folder" if home == "~/" else f"{CLOSED}/.triton/cache cannot be written") in said
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    assert knobs.cache.dir == str(folder), "Triton takes it"
    assert caches.facts() == {"triton": str(folder), "problem": said}
    text = environment.format_info(environment.info())
    assert f"caches     {said}" in text


def test_another_users_folder_is_not_trusted(fresh, monkeypatch):
    """Whoever can write there could have this process load what he likes."""
    monkeypatch.setattr(knobs.cache, "home_dir", CLOSED)
    theirs = fresh / "tmp" / f"inception_fused-{os.geteuid()}"
    theirs.mkdir()
    theirs.chmod(0o777)
    (theirs / "kept").write_text("a file")
    prepared()
    assert theirs not in Path(os.environ["TRITON_CACHE_DIR"]).parents
    assert (theirs / "kept").read_text() == "a file"
    theirs.chmod(0o700)
    assert caches._users_folder(str(fresh / "tmp")) == str(theirs)
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    os.symlink(theirs, fresh / "tmp" / "inception_fused-4242")
    assert caches._users_folder(str(fresh / "tmp")) is None


def test_a_folder_that_the_user_named_stays_and_is_told(fresh, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", CLOSED)
    (said,) = prepared()
    assert said.startswith(f"TRITON_CACHE_DIR: {CLOSED} cannot be written")
    assert os.environ["TRITON_CACHE_DIR"] == CLOSED
    assert caches.facts() == {"triton": CLOSED, "problem": said}


def test_an_empty_variable_is_none(fresh, monkeypatch):
    """Triton takes it for a folder without a name, and fails."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    assert prepared() == []
    assert os.environ["TRITON_CACHE_DIR"] == str(fresh / "home/.triton/cache")


def test_a_cache_of_somebodys_own_is_his(fresh, monkeypatch):
    monkeypatch.setattr(knobs.cache, "home_dir", CLOSED)
    monkeypatch.setenv("TRITON_CACHE_MANAGER", "some:Manager")
    assert prepared() == []
    assert "TRITON_CACHE_DIR" not in os.environ


def test_a_full_and_a_noexec_folder(tmp_path, monkeypatch):
    real = os.statvfs(tmp_path)
    assert caches.unusable(tmp_path / "not" / "there") is None
    fields = {name: getattr(real, name) for name in dir(real) if name.startswith("f_")}
    for changes, words in (
        ({"f_bavail": 10, "f_frsize": 2**20}, "has 10 MiB left"),
        ({"f_flag": os.ST_NOEXEC}, "runs no programs"),
        ({"f_blocks": 0, "f_bavail": 0}, None),
    ):
        facts = type("facts", (), fields | changes)
        monkeypatch.setattr(os, "statvfs", lambda path, facts=facts: facts)
        found = caches.unusable(tmp_path)
        assert found is None if words is None else words in found
    assert list(tmp_path.iterdir()) == []


def test_where_warnings_are_errors_a_step_goes_on(fresh, monkeypatch):
    monkeypatch.setattr(knobs.cache, "home_dir", CLOSED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        caches.prepare()
    assert "TRITON_CACHE_DIR" in os.environ


def test_tuned_tiles_without_a_home(fresh, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(caches.Path, "home", no_home)
    monkeypatch.setenv("INCEPTION_FUSED_TUNED", "1")
    monkeypatch.setattr(tuned, "PACKAGE_TABLES", fresh)
    assert tuned.cache_folder() is None
    assert tuned.user_path("x") is None
    assert tuned.state(GPU) == ((), ())
    assert "no home folder" in tuned.describe(GPU)
    assert "INCEPTION_FUSED_CACHE=FOLDER" in tuned.describe(GPU)
    monkeypatch.setenv("INCEPTION_FUSED_CACHE", str(fresh))
    assert tuned.user_path("x") == fresh / "x.json"


def test_tuning_without_a_home_names_the_variable(monkeypatch, tmp_path):
    monkeypatch.setattr(tuned, "cache_folder", lambda: None)
    with pytest.raises(FileNotFoundError, match="INCEPTION_FUSED_CACHE=FOLDER"):
        session.tune(bench=FakeBench())
    assert tune_fakes.run(FakeBench(), tmp_path / "t.json")["failed"] == [], "--out needs none"


@pytest.mark.parametrize("arguments", [[], ["plan", "3a"]], ids=str)
def test_commands_of_a_user_without_a_home(arguments):
    """As in a container that runs under a user id of its host."""
    script = (
        "import pwd, sys\n"
        "def getpwuid(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = getpwuid\n"
        "from inception_fused.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    environ = {name: value for name, value in os.environ.items() if name in ("PATH", "LD_LIBRARY_PATH", "TMPDIR")}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(caches.__file__).parents[2]), *sys.path]))
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environ, cwd="/", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "K3" in done.stdout
    assert "plan" in arguments or "no home folder" in done.stdout
