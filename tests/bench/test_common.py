"""What a result tells of the checkout that it comes from."""

import subprocess

import pytest

from bench import common


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of a program and a result, in the place of this one."""
    for name in ("program.py", "bench/results/result.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(common, "ROOT", tmp_path)
    return tmp_path


def test_a_commit_is_told_and_results_do_not_change_it(checkout):
    before = common.commit()
    assert len(before) >= 7
    assert "dirty" not in before
    (checkout / "bench/results/result.json").write_text("2")
    (checkout / "untracked").write_text("2")
    assert common.commit() == before
    (checkout / "program.py").write_text("2")
    assert common.commit() == f"{before}-dirty"


def test_without_git_the_environment_tells(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nothing"))
    monkeypatch.delenv("FUSEDOPT_COMMIT", raising=False)
    assert common.commit() == "unknown"
    monkeypatch.setenv("FUSEDOPT_COMMIT", "abc")
    assert common.commit() == "abc"
