"""The real-scenes world: handwritten digits in coloured ink and photographs on a grid, one in a patch.

Its pictures come from MNIST and CIFAR-10, in a folder that is named when the world is opened; none come with the package:

    world = RealScenesWorld.open("data")
    scene = next(world.stream("test", seed=0))
    world.picture(scene)                 # PIL, 160x160
    scene.truth().kind                   # [10 10], indices into KINDS
    world.questions(scene, rng, 8)       # what digit is red ? -> seven

Scenes are split by a hash of what they show, and so are the pictures in them: no digit or photograph of a test scene is
in any train scene.
"""

from sparing.worlds.real_scenes.gallery import Gallery
from sparing.worlds.real_scenes.scene import RealScene, RealSceneSpec
from sparing.worlds.real_scenes.words import CLASSES, COLOURS, DIGITS, FACTS, KINDS, PHOTO, vocabulary
from sparing.worlds.real_scenes.world import TASKS, RealScenesWorld

__all__ = [
    "CLASSES",
    "COLOURS",
    "DIGITS",
    "FACTS",
    "KINDS",
    "PHOTO",
    "TASKS",
    "Gallery",
    "RealScene",
    "RealSceneSpec",
    "RealScenesWorld",
    "vocabulary",
]
