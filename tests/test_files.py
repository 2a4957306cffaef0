import os
import resource
import stat
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from utils.common import files
from utils.common.errors import UserError
from utils.common.files import atomic_write, check_input, check_output, file_size_mb, save_torch

OLD = "what stood there"


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text(OLD)
    return path


@contextmanager
def disk_full_after(size: int):
    """Writes beyond `size` bytes of a file fail, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_block_that_ends_well_replaces_the_file(target):
    with atomic_write(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == OLD
    assert target.read_text() == "new"
    assert names(target.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, RuntimeError("mine")])
def test_an_error_midway_passes_through_and_leaves_the_old_file(target, error):
    with pytest.raises(error if isinstance(error, type) else type(error)), atomic_write(target) as temporary:
        temporary.write_text("half of it")
        raise error
    assert target.read_text() == OLD
    assert names(target.parent) == ["file.txt"]


def test_a_full_disk_leaves_the_old_text(target):
    with (
        disk_full_after(10_000),
        pytest.raises(UserError, match=r"could not be written .*whole"),
        atomic_write(target) as temporary,
    ):
        temporary.write_text("x" * 20_000)
    assert target.read_text() == OLD
    assert names(target.parent) == ["file.txt"]


# torch's writer fails in several ways, depending on where in its archive the space ends.
@pytest.mark.parametrize("size", [0, 100, 3_000, 200_000, 399_000, 400_000])
def test_a_full_disk_leaves_the_old_weights(target, size):
    content = {str(i): torch.zeros(10_000) for i in range(10)}
    with disk_full_after(size), pytest.raises(UserError, match=r"could not be written .*whole"):
        save_torch(target, content)
    assert target.read_text() == OLD
    assert names(target.parent) == ["file.txt"]


def test_save_torch_gives_the_same_bytes_under_any_name(tmp_path):
    content = {"a": torch.arange(5), "b": [1, "two"]}
    save_torch(tmp_path / "one.pth", content)
    save_torch(tmp_path / "another.pth", content)
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "another.pth").read_bytes()
    assert torch.equal(torch.load(tmp_path / "one.pth")["a"], torch.arange(5))


def test_a_symbolic_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "store").mkdir()
    real = tmp_path / "store" / "real.txt"
    real.write_text(OLD)
    link = tmp_path / "link.txt"
    link.symlink_to(real)
    with atomic_write(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert names(tmp_path / "store") == ["real.txt"]


def test_a_replaced_file_keeps_its_permissions_and_a_new_one_gets_the_usual(target):
    target.chmod(0o640)
    new = target.with_name("new.txt")
    for path in (target, new):
        with atomic_write(path) as temporary:
            temporary.write_text("new")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert stat.S_IMODE(new.stat().st_mode) == 0o666 & ~umask


def test_an_output_may_be_new_in_a_new_folder_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "a" / "b" / "weights.pth"
    assert check_output(path, force=False) == path
    assert names(path.parent) == []


def test_an_output_that_exists_wants_force(target):
    with pytest.raises(UserError, match=r"file\.txt exists: give --force"):
        check_output(target, force=False)
    assert check_output(target, force=True) == target
    assert target.read_text() == OLD


# Root may write anywhere but where a file would have to be a folder, or the system refuses.
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("{tmp}", "is a folder"),
        ("", "is a folder"),
        ("{tmp}/file.txt/weights.pth", "cannot be written"),
        ("/proc/weights.pth", "cannot be written"),
        ("/proc/new_folder/weights.pth", "cannot be written"),
        ("/dev/null", "not a regular file"),
        ("{tmp}/" + "x" * 300, "cannot be written"),
        ("{tmp}/loop/weights.pth", "cannot be written"),
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_an_output_that_cannot_be_written_is_found_beforehand(target, path, reason, force):
    (target.parent / "loop").symlink_to(target.parent / "loop")
    with pytest.raises(UserError, match=reason) as caught:
        check_output(path.format(tmp=target.parent), force=force)
    assert len(str(caught.value).splitlines()) == 1
    assert target.read_text() == OLD


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_found_beforehand(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        check_output(tmp_path / "weights.pth", force=False)


@pytest.mark.parametrize(
    ("path", "reason"),
    [("{tmp}/none.pth", "does not exist"), ("{tmp}", "is a folder"), ("{tmp}/file.txt/x", "does not exist")],
)
def test_inputs_that_are_no_files_are_named(target, path, reason):
    path = path.format(tmp=target.parent)
    with pytest.raises(UserError, match=f"weights file {path} {reason}"):
        check_input(path, "weights file")
    assert check_input(target, "weights file") == target


def test_sizes_are_in_mebibytes(tmp_path):
    (tmp_path / "x").write_bytes(bytes(3 * 2**19))
    assert file_size_mb(tmp_path / "x") == 1.5


def test_two_flags_that_name_one_file_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "in.pth"
    source.write_text("precious")
    (tmp_path / "link.pth").symlink_to(source)
    for same in ("in.pth", "./in.pth", "link.pth"):
        with pytest.raises(UserError, match="--output and --weights both name"):
            files.check_outputs({"--output": same}, {"--weights": str(source)}, force=True)
    with pytest.raises(UserError, match="--record and --output both name"):
        files.check_outputs({"--output": "new", "--record": tmp_path / "new"}, {}, force=True)
    assert source.read_text() == "precious"


def test_an_output_is_locked_until_its_process_ends(tmp_path):
    output = tmp_path / "out.pth"
    code = (
        f"from utils.common import files; files.lock({str(output)!r}); print('locked', flush=True); input()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(UserError, match=f"process {other.pid} is writing"):
        files.lock(output)
    other.kill()
    other.wait()
    assert (tmp_path / ".out.pth.lock").exists()  # what a killed run leaves is no lock
    files.lock(output)
    files.lock(output)  # this process has it
    files.unlock(output)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_does_not_follow_a_planted_link(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".out.pth.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="cannot be locked"):
        files.lock(tmp_path / "out.pth")
    assert (tmp_path / "victim").read_text() == "precious"


def test_temporary_files_of_killed_runs_are_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead = [tmp_path / f".a.pth.{ended.pid}.tmp", tmp_path / f".a.pth.{ended.pid}-0badcafe.tmp"]
    kept = [tmp_path / f".a.pth.{os.getpid()}-0badcafe.tmp", tmp_path / f".b.pth.{ended.pid}.tmp"]
    for path in dead + kept:
        path.touch()
    files.check_output(tmp_path / "a.pth", force=False)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_a_file_that_is_no_lock_is_kept(tmp_path):
    precious = tmp_path / ".out.pth.lock"
    for content in (b"precious", b"\xff\xfe"):
        precious.write_bytes(content)
        with pytest.raises(UserError, match="not a lock"):
            files.lock(tmp_path / "out.pth")
        assert precious.read_bytes() == content


def test_two_runs_do_not_write_one_output(tmp_path, run_script, tiny_weights):
    for name in ("out.npz", "m.checkpoint.pth"):
        code = (
            f"from utils.common import files; files.lock({str(tmp_path / name)!r}); "
            "print('locked', flush=True); input()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as other:
            assert other.stdout is not None
            other.stdout.readline()
            if name == "out.npz":
                argv = ("scripts/pack_weights.py", "--weights", tiny_weights, "--o", tmp_path / name)
            else:  # that of m.pt as well
                argv = ("train.py", "--dataset", "synthetic", "--output", tmp_path / "m.pt")
            assert f"process {other.pid} is writing" in run_script(*argv, expect=2).stderr
            other.kill()
