"""Trainings that are stopped, killed, or run out of disk: what they say, and that they go on as if nothing had been."""

import copy
import json
import os
import signal
import zipfile

import pytest
import torch

import processors
from sparing.policies import ViCA
from sparing.train import Conversation, Lora, Optimisation, Stage, Turn, fitting, train_stages

POLICY = ViCA([0, 2], "freeze")


def conversation(number, pictures):
    question = Turn("user", (*[None] * pictures, "what colour is the dog ?"))
    answer = Turn("assistant", (" ".join(["blue"] * (number + 1)),))
    return Conversation((question, answer), tuple(processors.picture(40, 40, seed=number + i) for i in range(pictures)))


TEXT = [conversation(i, 0) for i in range(2)]
MIXED = [conversation(i, i % 3) for i in range(7)]


def stage(steps=4, parts=("projector", "language"), rows=MIXED, **more):
    how = Optimisation(steps=steps, batch=2, at_once=1, lr=1e-3, warmup=0)
    return Stage(more.pop("name", "tune"), parts, how, rows, "some rows", **more)


def train(folder, *stages, stop=None, save_every=100, **more):
    """The model trained, from the same start each time; `stop`: Ctrl-C at this step of the command."""
    model, processor = processors.family("llava")
    model, steps = copy.deepcopy(model).float(), iter(range(1, 1000))

    def on_step(done, word):
        if next(steps) == stop:
            os.kill(os.getpid(), signal.SIGINT)

    fits = train_stages(model, processor, [POLICY], stages, folder, on_step=on_step, save_every=save_every, **more)
    return model, fits


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("stops", [(3, 3), (4, 2), (5,)], ids=str)
@pytest.mark.parametrize("lora", [None, Lora(2, 4, 0.3)], ids=["whole", "adapters"])
def test_ctrl_c_at_any_step_changes_nothing_in_the_end(tmp_path, lora, stops):
    """Also in the last step of the first stage, which is followed by another one; dropout of the adapters goes on as well."""
    stages = stage(parts=("projector",), name="first"), stage(6, lora=lora, name="second")
    whole, _ = train(tmp_path / "whole", *stages)
    for step in stops:
        with pytest.raises(KeyboardInterrupt, match="run again to go on"):
            train(tmp_path / "cut", *stages, stop=step)
    again, fits = train(tmp_path / "cut", *stages)
    assert [fit.steps for fit in fits] == [4, 6]
    assert same(whole, again)


def test_a_run_with_few_steps_left_knows_its_loss(tmp_path):
    long = stage(21)  # every second step is logged
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, long, stop=20)
    _, (fit,) = train(tmp_path, long)
    log = [json.loads(line) for line in (tmp_path / "tune" / "log.jsonl").read_text().splitlines()]
    assert fit.loss == [entry["loss"] for entry in log if "loss" in entry][-1]


def test_rows_without_pictures_do_not_stop_a_projector_s_training(tmp_path):
    """At once or apart: such rows count in the loss, and teach the projector nothing."""
    found = []
    for at_once in (1, 4):
        how = Optimisation(steps=2, batch=4, at_once=at_once, lr=1e-3, warmup=0)
        rows = [*TEXT, conversation(2, 1), conversation(3, 2)]
        found.append(train(tmp_path / str(at_once), Stage("first", ("projector",), how, rows, "rows")))
    for one, two in zip(found[0][0].parameters(), found[1][0].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=5e-5)
    start = processors.family("llava")[0]
    moved, _ = train(tmp_path / "text", stage(parts=("projector",), rows=TEXT))
    assert same(start.float(), moved)
    assert not same(start, found[0][0])


def test_answers_that_are_all_cut_off_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"the first 2 conversations, whose answers all lie behind 4 tokens: give shorter"
    ):
        train(tmp_path, stage(rows=TEXT, max_length=4))
    # One that is left is enough; and of what did not begin nothing is left that would refuse other settings.
    train(tmp_path, stage(1, rows=[*TEXT, conversation(0, 0)]))


class Broken(list):
    """Rows of which one cannot be read, until it is mended."""

    bad = None

    def __init__(self, rows):
        super().__init__(rows)
        self.read = []

    def __getitem__(self, index):
        if index == self.bad:
            raise ValueError("rows.jsonl, row 6: no JSON")
        self.read.append(index)
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_cannot_be_read_is_named_and_no_step_is_lost(tmp_path, workers):
    """Of a process that prepares batches comes a traceback as a text; the last checkpoint may be hours old."""
    rows = Broken(MIXED)
    whole, _ = train(tmp_path / "whole", stage(rows=rows))
    rows.bad = rows.read[6]
    with pytest.raises(
        ValueError, match=r"^rows.jsonl, row 6: no JSON \(step \d is kept: mend it, and the same command goes"
    ):
        train(tmp_path / "cut", stage(rows=rows), workers=workers)
    (kept,) = (tmp_path / "cut" / "tune").glob("checkpoint-*")
    assert kept.name in ("checkpoint-1", "checkpoint-2")
    rows.bad = None
    again, _ = train(tmp_path / "cut", stage(rows=rows), workers=workers)
    assert same(whole, again)


def stopped(folder):
    with pytest.raises(KeyboardInterrupt):
        train(folder, stage(), stop=2)
    return folder / "tune" / "checkpoint-2"


def test_a_log_that_a_kill_cut_short_is_no_hindrance(tmp_path):
    stopped(tmp_path)
    log = tmp_path / "tune" / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 2, "sec')
    train(tmp_path, stage())
    assert {json.loads(line)["step"] for line in log.read_text().splitlines()} == {1, 2, 3, 4}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_damaged_checkpoint_is_named_with_its_cure(tmp_path, name):
    checkpoint = stopped(tmp_path)
    os.truncate(checkpoint / name, 1000)
    assert not zipfile.is_zipfile(checkpoint / name)
    with pytest.raises(ValueError, match=rf"{name} is damaged .*: remove {checkpoint}, then the training"):
        train(tmp_path, stage())


def test_damaged_settings_are_named_with_their_cure(tmp_path):
    stopped(tmp_path)
    os.truncate(tmp_path / "settings.json", 50)
    with pytest.raises(ValueError, match=r"settings.json is damaged .*: choose another --out, or remove it"):
        train(tmp_path, stage())


def test_a_full_disk_leaves_the_last_whole_checkpoint(tmp_path, monkeypatch):
    """torch's writer says `unexpected pos`, and nothing of the disk."""
    whole, _ = train(tmp_path / "whole", stage(), save_every=2)
    write = fitting._Checked._save_optimizer_and_scheduler

    def full(self, output_dir):
        if self.state.global_step == 4:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 24000 vs 23892")
        return write(self, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(fitting._Checked, "_save_optimizer_and_scheduler", full)
        with pytest.raises(
            OSError, match=r"checkpoint-4 could not be written, \d+ MB are free .*goes on from checkpoint-2"
        ):
            train(tmp_path / "cut", stage(), save_every=2)
    assert [path.name for path in (tmp_path / "cut" / "tune").glob("checkpoint-*")] == ["checkpoint-2"]
    assert same(whole, train(tmp_path / "cut", stage(), save_every=2)[0])
