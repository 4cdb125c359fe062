"""Kill a process that saves in a loop, at random moments, and see what is left. `benchmarks/checkpoints.py` uses it too."""

import os
import random
import signal
import time
from pathlib import Path

import torch

import models
import sparing
from sparing.checkpoint import replacing
from sparing.policies import SkipModules


def versions():
    """Two checkpoints of the same shapes that differ in every tensor and in their policy."""
    model = models.llama(layers=2)
    made = []
    for fill in (0.25, 0.75):
        weights = {name: torch.full_like(p, fill) for name, p in model.state_dict().items()}
        made.append((weights, SkipModules(mlp=[0 if fill < 0.5 else 1])))
    return model, made


def save_for_ever(directory):
    """What the child does; alone, because threads do not survive a fork."""
    torch.set_num_threads(1)
    model, made = versions()
    while True:
        for weights, policy in made:
            model.load_state_dict(weights)
            sparing.save(model, directory, [policy])


def is_whole(directory):
    """Whether `sparing.load` finds one version: its weights with its policy."""
    try:
        loaded, _ = sparing.load(directory)
    except (ValueError, OSError):
        return False
    values = {float(p.flatten()[0]) for p in loaded.state_dict().values()}
    same = all(bool((p == p.flatten()[0]).all()) for p in loaded.state_dict().values())
    fill = values.pop()
    return same and not values and repr(sparing.run_of(loaded)) == repr(SkipModules(mlp=[0 if fill < 0.5 else 1]))


def kill_while_saving(folder, kills, seed):
    """Fork, save in a loop, SIGKILL after a random time, load; `kills` times over in the same folder.

    A fork, because starting Python and torch anew would take seconds a kill.
    """
    directory, chance = Path(folder) / "loop", random.Random(seed)
    model, made = versions()
    model.load_state_dict(made[0][0])
    begin = time.monotonic()
    sparing.save(model, directory, [made[0][1]])
    once = time.monotonic() - begin
    lost = interrupted = aside = 0
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            try:
                save_for_ever(directory)
            finally:
                os._exit(1)
        time.sleep(chance.uniform(0, 4 * once) + 0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        interrupted += any(p.name.startswith(".loop.sparing-") for p in directory.parent.iterdir())
        aside += not directory.exists()
        lost += not is_whole(directory)
    return {"kills": kills, "lost_on_kill": lost, "interrupted_mid_save": interrupted, "between_renames": aside}


def kill_at_each_step(folder):
    """Fork, save, and SIGKILL right before or right after the nth rename or removal, for every n."""
    directory = Path(folder) / "loop"
    model, made = versions()
    model.load_state_dict(made[0][0])
    sparing.save(model, directory, [made[0][1]])
    model.load_state_dict(made[1][0])
    kills = lost = aside = 0
    for nth in range(100):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            left = [nth]
            for owner, name in ((replacing.os, "rename"), (replacing.shutil, "rmtree")):
                setattr(owner, name, _dying(getattr(owner, name), left))
            try:
                sparing.save(model, directory, [made[1][1]])
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        kills += 1
        aside += not directory.exists()
        lost += not is_whole(directory)
    return {"kills": kills, "lost_on_kill": lost, "between_renames": aside}


def _dying(real, left):
    """`real`, killed before its call when `left` is even and 0, after it when odd."""

    def call(*args, **kwargs):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if left[0] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 2
        return result

    return call
