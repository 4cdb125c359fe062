"""Fixtures that several test files share: tiny models, batches with padding, seeded policies of every kind."""

import pytest

import models
from policy_cases import CASES


def pytest_addoption(parser):
    """What a run may be told: where lmms-eval is, which has an environment of its own."""
    parser.addoption("--vlm-python", help="the Python of an environment that has lmms-eval; else its tests are skipped")


@pytest.fixture(scope="session")
def tiny_llama():
    """A 3-layer Llama with grouped-query attention."""
    return models.llama()


@pytest.fixture(scope="session")
def tiny_llava():
    """A 4-layer LLaVA whose pictures are 3x3 tokens."""
    return models.llava()


@pytest.fixture
def text_batch():
    """`side -> inputs`: three rows of different lengths, padded `left` or `right`, or `none`."""
    return models.text_batch


@pytest.fixture
def llava_batch():
    """`side -> inputs`: two pictures, a picture first, one picture, text alone."""
    return models.llava_batch


@pytest.fixture(scope="session")
def tokenizer():
    """One token a word, as many as the tiny models have."""
    from evaluate_cases import word_tokenizer

    return word_tokenizer()


@pytest.fixture(scope="session")
def solver():
    """The shipped model, which can really do some arithmetic, in float32; and its tokenizer."""
    from evaluate_cases import arithmetic_solver

    return arithmetic_solver()


@pytest.fixture
def own_datasets_cache(tmp_path, monkeypatch):
    """`datasets` keeps what it read in a folder of the test's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def policy_case(request):
    """Every policy, in every variant that is a method of its own."""
    return request.param
