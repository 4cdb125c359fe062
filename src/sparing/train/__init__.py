"""Training of models under policies, on `transformers.Trainer`: any data of conversations, whole or by LoRA, in stages."""

from sparing.train.beginning import forget_projector
from sparing.train.conversations import Conversation, ConversationFile, Turn
from sparing.train.drawn import DrawnConversations, about_scene, speaks_scenes, write_conversations
from sparing.train.fitting import Fit, Optimisation, fit
from sparing.train.parts import Lora, Part, trained_parts
from sparing.train.recipe import TrainingRecipe, read_recipe
from sparing.train.stages import Stage, train_stages
from sparing.train.turns import ChatBatches, encode

__all__ = [
    "ChatBatches",
    "Conversation",
    "ConversationFile",
    "DrawnConversations",
    "Fit",
    "Lora",
    "Optimisation",
    "Part",
    "Stage",
    "TrainingRecipe",
    "Turn",
    "about_scene",
    "encode",
    "fit",
    "forget_projector",
    "read_recipe",
    "speaks_scenes",
    "train_stages",
    "trained_parts",
    "write_conversations",
]
