"""The copy of a run elsewhere: whole checkpoints only, and a machine without the workdir goes on from it."""

import dataclasses
import shutil
import time
from threading import Event

import fsspec
import jax
import pytest
from states import assert_same_bits, small_state, target_of
from test_checkpoint import save
from tiny import TINY

from clip_jax.checkpoints.checkpoint import Checkpoints
from clip_jax.checkpoints.mirror import Mirror
from clip_jax.config import CheckpointConfig
from clip_jax.data.loader import open_training_data
from clip_jax.errors import RestartError, UserError
from clip_jax.run import metrics
from clip_jax.run.trainer import train

STATES = {step: small_state(step) for step in (1, 2, 3)}


def trained(workdir, url, steps=(1, 2, 3)):
    """Writes checkpoints of these steps, of which two are kept, and other files, with a copy."""
    with Mirror(url, workdir) as mirror:
        mirror.fetch()
        with Checkpoints(workdir, CheckpointConfig(keep=2), on_change=mirror.request) as checkpoints:
            for step in steps:
                save(checkpoints, step, STATES[step])
                (workdir / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
    return workdir


def files(folder):
    """Returns the bytes of a run's files, but for its lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def test_an_empty_workdir_gets_what_the_copy_has(tmp_path, store):
    workdir = trained(tmp_path / "run", store)
    before, copy = files(workdir), f"/{tmp_path.name}/run/"
    lists = {f"checkpoints/{step}/files.json" for step in (2, 3)}
    found = {path.removeprefix(copy) for path in fsspec.filesystem("memory").find(copy)}
    assert found == before.keys() | lists | {"workdir"}
    shutil.rmtree(workdir)
    with Mirror(store, workdir) as mirror:
        assert mirror.fetch() == [f"brought from {store}/run: checkpoints 2, 3"]
        assert mirror.fetch() == []
    assert files(workdir) == before
    step, restored = Checkpoints(workdir, CheckpointConfig()).restore_latest(target_of(STATES[3]))
    assert step == 3
    assert_same_bits(restored.state, STATES[3])


def test_what_is_not_whole_there_is_not_brought(tmp_path, store, caplog):
    """A machine that is lost while it copies leaves files without their list."""
    workdir = trained(tmp_path / "run", store)
    memory, copy = fsspec.filesystem("memory"), f"/{tmp_path.name}/run/checkpoints"
    shutil.rmtree(workdir)
    memory.rm_file(f"{copy}/3/files.json")
    with Mirror(store, workdir) as mirror:
        assert mirror.fetch() == [f"brought from {store}/run: checkpoints 2"]
        shutil.rmtree(workdir)
        damaged, lost, *_ = (path for path in memory.find(f"{copy}/2") if not path.endswith("files.json"))
        memory.pipe_file(damaged, b"shorter")
        memory.rm_file(lost)
        assert mirror.fetch() == []
    assert "/run/checkpoints/2 is not what was copied there; it is passed over" in caplog.text
    assert not list((workdir / "checkpoints").iterdir())


def test_a_list_that_was_cut_off_there_is_of_nothing(tmp_path, store, caplog):
    """As a machine that loses its power leaves it on a disk; the checkpoint is then copied anew."""
    workdir = trained(tmp_path / "run", store)
    fsspec.filesystem("memory").pipe_file(f"/{tmp_path.name}/run/checkpoints/3/files.json", b"")
    other = tmp_path / "elsewhere" / "run"
    with Mirror(store, other) as mirror:
        assert mirror.fetch() == [f"brought from {store}/run: checkpoints 2"]
    assert "/run/checkpoints/3 is not what was copied there; it is passed over" in caplog.text
    with Mirror(store, workdir):
        pass
    shutil.rmtree(other)
    with Mirror(store, other) as mirror:
        assert mirror.fetch() == [f"brought from {store}/run: checkpoints 2, 3"]


def test_an_older_workdir_gets_the_newer_checkpoints(tmp_path, store):
    """As where a run went on elsewhere, and comes back to the first machine."""
    first = trained(tmp_path / "a" / "run", store, steps=(1, 2))
    second = trained(tmp_path / "b" / "run", store, steps=(3,))
    assert (second / "checkpoints" / "2").is_dir()
    with Mirror(store, first) as mirror:
        assert mirror.fetch() == [f"brought from {store}/run: checkpoints 3"]
    assert (first / "metrics.jsonl").read_text() == '{"step": 3}\n'


def test_a_store_that_fails_ends_no_training(tmp_path, store, monkeypatch, caplog):
    """The end of the run says so, if it lasts; what was missed is copied the next time."""
    with monkeypatch.context() as patched:
        patched.setattr(type(fsspec.filesystem("memory")), "put", refusing)
        with pytest.raises(RestartError, match="could not be copied .* no quota; it is whole where it is"):
            trained(tmp_path / "run", store)
    assert "no quota; it is tried again with the next checkpoint" in caplog.text
    workdir = tmp_path / "run"
    with Mirror(store, workdir):
        pass
    expected = files(workdir)
    shutil.rmtree(workdir)
    with Mirror(store, workdir) as mirror:
        mirror.fetch()
    assert files(workdir) == expected


def test_what_waits_for_a_slow_store_is_one_copy(tmp_path, store, monkeypatch):
    begun, may_end, copies = Event(), Event(), []

    def copy(_):
        copies.append(begun.set())
        may_end.wait(10)

    monkeypatch.setattr(Mirror, "_copy", copy)
    with Mirror(store, tmp_path / "run") as mirror:
        for _ in range(9):
            mirror.request()
            begun.wait(10)
        may_end.set()
    assert len(copies) in (2, 3)  # the one for the end may come when the second has begun


def test_copying_is_asked_for_when_checkpoints_come_and_go(tmp_path):
    asked = []
    with Checkpoints(tmp_path, CheckpointConfig(), on_change=lambda: asked.append(checkpoints.steps())) as checkpoints:
        for step in (1, 2):
            save(checkpoints, step, STATES[step])
            checkpoints.wait()
        checkpoints.restore_before(2, target_of(STATES[1]))
    assert asked == [[1], [2, 1], [1]]


def test_of_several_processes_the_first_copies_without_waiting_for_the_next_checkpoint(tmp_path, monkeypatch):
    """Whether a write failed they hear of together at the next one; what is whole by then could be lost."""
    asked = []
    with Checkpoints(tmp_path, CheckpointConfig(), on_change=lambda: asked.append(checkpoints.steps())) as checkpoints:
        save(checkpoints, 1, STATES[1])
        while checkpoints._manager.is_saving_in_progress():
            time.sleep(0.01)
        with monkeypatch.context() as patched:
            patched.setattr(jax, "process_count", lambda: 2)
            for step in (2, 3):
                assert not checkpoints.save(step, STATES[2], position=0, config=TINY, data={})
            assert asked == [[1]]


def test_what_a_run_went_back_over_is_not_in_the_copy(tmp_path, store):
    workdir = trained(tmp_path / "run", store, steps=(1, 2))
    assert Checkpoints(workdir, CheckpointConfig()).restore_before(2, target_of(STATES[1]))[0] == 1
    with Mirror(store, workdir) as mirror:  # the run was killed before the copy heard of it
        assert mirror.fetch() == []
    shutil.rmtree(workdir)
    with Mirror(store, workdir) as mirror:
        assert mirror.fetch() == [f"brought from {store}/run: checkpoints 1"]


def test_what_is_damaged_or_deleted_here_is_kept_there_and_comes_back(tmp_path, store):
    workdir = trained(tmp_path / "run", store, steps=(1, 2))
    for step in (1, 2):
        (workdir / "checkpoints" / str(step) / "record" / "metadata").write_text("{}")
    with Mirror(store, workdir) as mirror:
        assert mirror.fetch() == []
        with pytest.raises(UserError, match="no checkpoint that can be used"):
            Checkpoints(workdir, CheckpointConfig()).restore_latest(target_of(STATES[2]))
    with Mirror(store, workdir) as mirror:
        assert mirror.fetch() == [f"brought from {store}/run: checkpoints 1, 2"]
        shutil.rmtree(workdir)
    with Mirror(store, workdir) as mirror:
        mirror.fetch()
    step, restored = Checkpoints(workdir, CheckpointConfig()).restore_latest(target_of(STATES[2]))
    assert step == 2
    assert_same_bits(restored.state, STATES[2])


@pytest.mark.parametrize("lost", ["state", "record"])
def test_a_copy_does_not_follow_a_checkpoint_here_that_lost_files(tmp_path, store, lost):
    """Nobody reads an older checkpoint's arrays while the run goes on."""
    workdir = trained(tmp_path / "run", store, steps=(1, 2))
    shutil.rmtree(workdir / "checkpoints" / "1" / lost)
    with Mirror(store, workdir):
        pass
    shutil.rmtree(workdir)
    with Mirror(store, workdir) as mirror:
        assert mirror.fetch() == [f"brought from {store}/run: checkpoints 1, 2"]
    assert_same_bits(Checkpoints(workdir, CheckpointConfig()).restore(1, target_of(STATES[1])).state, STATES[1])


def test_an_old_checkpoint_goes_from_the_copy_when_a_newer_one_is_there(tmp_path, store, monkeypatch):
    """A machine may be lost while it sends, and a store may fail."""
    memory, workdir = fsspec.filesystem("memory"), tmp_path / "run"
    wholes, put = [], type(memory).put

    def watched(*arguments):
        wholes.append([path.split("/")[-2] for path in memory.find(f"/{tmp_path.name}") if path.endswith("files.json")])
        put(*arguments)

    monkeypatch.setattr(type(memory), "put", watched)
    checkpoints = Checkpoints(workdir, CheckpointConfig(keep=1))
    for step in (1, 2):
        with Mirror(store, workdir), checkpoints:
            save(checkpoints, step, STATES[step])
    assert wholes == [[], ["1"]]
    assert [path for path in memory.find(f"/{tmp_path.name}") if path.endswith("files.json")] == [
        f"/{tmp_path.name}/run/checkpoints/2/files.json"
    ]


def test_a_checkpoint_that_goes_before_it_is_copied_is_said_and_leaves_nothing(tmp_path, store, monkeypatch, caplog):
    """As where a store is slower than checkpoints are written and deleted; then there might never be a copy."""
    memory, workdir = fsspec.filesystem("memory"), trained(tmp_path / "run", "", steps=(1, 2))
    put = type(memory).put

    def slow(self, sources, targets):
        put(self, sources[:1], targets[:1])
        shutil.rmtree(workdir / "checkpoints" / "1", ignore_errors=True)
        put(self, sources, targets)

    monkeypatch.setattr(type(memory), "put", slow)
    with Mirror(store, workdir):
        pass
    assert "checkpoint 1 was deleted in the workdir before all of it was copied" in caplog.text
    assert {path.split("/")[4] for path in memory.find(f"/{tmp_path.name}/run/checkpoints")} == {"2"}


def test_another_checkpoint_of_the_same_step_takes_the_place_of_the_first(tmp_path, store):
    """A run that went back comes to a step again, and the copy may not have been made meanwhile."""
    workdir = trained(tmp_path / "run", store, steps=(1, 2))
    shutil.rmtree(workdir / "checkpoints" / "2")
    with Mirror(store, workdir), Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        save(checkpoints, 2, STATES[3])
    shutil.rmtree(workdir)
    with Mirror(store, workdir) as mirror:
        mirror.fetch()
    assert_same_bits(Checkpoints(workdir, CheckpointConfig()).restore(2, target_of(STATES[3])).state, STATES[3])


def refusing(*_, **__):
    raise OSError("no quota")


@pytest.mark.parametrize(
    ("url", "message"),
    [("memry://runs", "^config.checkpoint.mirror: .*unknown protocol; did you mean 'memory'")],
)
def test_a_store_that_is_not_known(tmp_path, url, message):
    with pytest.raises(UserError, match=message):
        Mirror(url, tmp_path / "run")


@pytest.mark.parametrize("url", ["{0}", "file://{0}/", "{0}/run", "{0}/link/copies"])
def test_a_copy_in_the_workdir_itself_is_refused(tmp_path, url):
    """It would be copied too, into itself, until the disk is full."""
    (tmp_path / "link").symlink_to("run")
    with pytest.raises(UserError, match="^config.checkpoint.mirror=.*: the copy would lie in --workdir .*/run itself"):
        Mirror(url.format(tmp_path), tmp_path / "run")


def test_a_store_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").touch()
    with Mirror("", tmp_path) as none:
        assert none.fetch() == []
    mirror = Mirror(f"{tmp_path}/file", tmp_path / "run")
    with pytest.raises(UserError, match="config.checkpoint.mirror=.*/file/run cannot be used: .*Not a directory"):
        mirror.fetch()
    assert not (tmp_path / "run").exists()
    (tmp_path / "run" / "checkpoints" / "7").mkdir(parents=True)  # it has begun: an outage, and not a wrong name
    with pytest.raises(RestartError, match="config.checkpoint.mirror=.*/file/run cannot be used: .*Not a directory"):
        mirror.fetch()


@pytest.mark.slow
def test_a_run_whose_machine_is_lost_goes_on_from_the_copy(tmp_path):
    """The same bits as the run that was never interrupted."""
    config = dataclasses.replace(TINY, checkpoint=CheckpointConfig(every=3, mirror=str(tmp_path / "copies")))
    straight = train(dataclasses.replace(config, checkpoint=CheckpointConfig()), tmp_path / "straight")
    data = open_training_data(config)

    def failing(position):
        for number, batch in enumerate(data.batches(position)):
            if number == 10:
                raise ConnectionError("the machine is gone")
            yield batch

    with pytest.raises(ConnectionError):
        train(config, tmp_path / "run", data=data._replace(batches=failing))
    shutil.rmtree(tmp_path / "run")
    resumed = train(config, tmp_path / "run", data=data)
    assert_same_bits(straight, resumed)
    losses = [row["step"] for row in metrics.read(tmp_path / "run") if "loss" in row]
    assert losses == list(range(1, config.steps + 1))
    assert files(tmp_path / "copies" / "run").keys() >= files(tmp_path / "run").keys() >= {"training.png"}
