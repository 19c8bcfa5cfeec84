"""neglog.integrations.sentence_transformers beside sentence-transformers' own losses."""

from __future__ import annotations

import re
from functools import partial
from itertools import product

import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    util,
)
from sentence_transformers.sentence_transformer import losses as theirs
from torch import nn

from neglog import dispatch
from neglog.integrations import sentence_transformers as ours
from tests.support import ranks
from tests.support.allocations import largest_allocation
from tests.support.backends import BEST
from tests.support.processes import python

FEATURES = 16
Q2D, SYMMETRIC = ("query_to_doc",), ("query_to_doc", "doc_to_query")
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
DIRECTIONS = {
    "plain": {"directions": Q2D},
    "plain, per direction": {"directions": Q2D, "partition_mode": "per_direction"},
    "symmetric, joint": {"directions": SYMMETRIC},
    "symmetric": {"directions": SYMMETRIC, "partition_mode": "per_direction"},
    "doc to query first": {"directions": SYMMETRIC[::-1], "partition_mode": "per_direction"},
    "all": {"directions": ALL},
    "queries": {"directions": ("query_to_doc", "query_to_query")},
    "documents": {"directions": ("query_to_doc", "doc_to_doc")},
}
HARDNESS = {
    "none": {},
    "no strength": {"hardness_mode": "all_negatives"},
    **{
        mode: {"hardness_mode": mode, "hardness_strength": 9.0}
        for mode in ("in_batch_negatives", "hard_negatives", "all_negatives")
    },
}
SIMILARITY = {
    "cosine": {},
    "dot": {"similarity_fct": util.dot_score, "scale": 1.0},
    "sharp": {"scale": 100.0},
}


def columns(rows: int, negatives: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(rows)
    anchor = torch.randn(rows, FEATURES, generator=random, dtype=torch.float64)
    others = [
        (anchor if number == 0 else 0)
        + torch.randn(rows, FEATURES, generator=random, dtype=torch.float64)
        for number in range(1 + negatives)
    ]
    return [x.to(dtype).requires_grad_() for x in (anchor, *others)]


def answer(loss: nn.Module, given: list[torch.Tensor]) -> list[torch.Tensor]:
    value = loss.compute_loss_from_embeddings(given, None)
    return [value, *torch.autograd.grad(1.5 * value, given)]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], rtol: float = 1e-5):
    for one, other in zip(found, expected, strict=True):
        atol = rtol * max(float(other.abs().max()), 1e-3)
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("directions", "hardness", "similarity"), product(DIRECTIONS, HARDNESS, SIMILARITY)
)
def test_every_option(directions, hardness, similarity):
    options = {**DIRECTIONS[directions], **HARDNESS[hardness], **SIMILARITY[similarity]}
    for rows, negatives in ((1, 0), (2, 1), (37, 0), (37, 2)):
        if rows == 1 and set(options["directions"]) - set(SYMMETRIC):
            continue  # a query has no other
        given = columns(rows, negatives)
        with dispatch.record() as ran:
            found = answer(ours.MultipleNegativesRankingLoss(None, **options), given)
        assert ran
        assert {op.split(":")[1] for op in ran} <= {BEST}
        assert_same(found, answer(theirs.MultipleNegativesRankingLoss(None, **options), given))


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_float32(directions):
    given = columns(37, 1, torch.float32)
    options = DIRECTIONS[directions]
    expected = answer(theirs.MultipleNegativesRankingLoss(None, **options), given)
    assert_same(answer(ours.MultipleNegativesRankingLoss(None, **options), given), expected)


def test_16_bits_are_compared_in_float32():
    given = columns(64, 1, torch.bfloat16)
    exact = theirs.MultipleNegativesRankingLoss(None)
    truth = answer(exact, [x.detach().double().requires_grad_() for x in given])
    found = answer(ours.MultipleNegativesRankingLoss(None), given)
    other = answer(exact, given)
    assert found[0].dtype == torch.float32
    for one, theirs_, true in zip(found, other, truth, strict=True):
        assert (one - true).abs().max() <= (theirs_ - true).abs().max() * 1.5 + 1e-6


def test_no_matrix_of_similarities(monkeypatch):
    monkeypatch.setenv("NEGLOG_WORKSPACE_MB", "1")
    given = columns(1500, 1, torch.float32)
    loss = ours.MultipleNegativesRankingLoss(None, directions=ALL)
    largest = largest_allocation(lambda: answer(loss, given))
    assert largest < 1500 * 1500 * 4 / 4


def cosines(a, b):
    return util.cos_sim(a, b)


def test_another_similarity_is_theirs_and_said_so():
    given = columns(9, 1)
    loss = ours.MultipleNegativesRankingLoss(None, similarity_fct=cosines)
    with pytest.warns(UserWarning, match="no kernel for similarity_fct='cosines'"):
        found = answer(loss, given)
    assert_same(found, answer(theirs.MultipleNegativesRankingLoss(None), given))


def test_one_column_is_their_error():
    with pytest.raises(ValueError, match="Expected at least 2 embeddings"):
        ours.MultipleNegativesRankingLoss(None).compute_loss_from_embeddings(
            columns(3, 0)[:1], None
        )


@pytest.mark.parametrize(
    "name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"]
)
def test_configuration_and_citation(name):
    options = {"scale": 7.0, "directions": ALL, "similarity_fct": util.dot_score}
    one, other = (getattr(module, name)(Encoder(), **options) for module in (ours, theirs))
    assert one.get_config_dict() == other.get_config_dict()
    assert one.citation == other.citation
    assert isinstance(one, getattr(theirs, name))
    one.scale = other.scale = 3.0
    assert one.temperature == other.temperature == 1 / 3


class Encoder(nn.Module):
    """Of features that are embeddings already, as the cached loss asks it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(FEATURES, FEATURES, dtype=torch.float64)

    def __getitem__(self, index):
        return self.layer

    def forward(self, features):
        return {"sentence_embedding": self.layer(features["x"])}


@pytest.mark.parametrize("hardness", HARDNESS)
@pytest.mark.parametrize("directions", ["plain", "symmetric", "all"])
@pytest.mark.filterwarnings("ignore")
def test_cached(directions, hardness):
    results = []
    for module in (ours, theirs):
        encoder = Encoder()
        loss = module.CachedMultipleNegativesRankingLoss(
            encoder, mini_batch_size=5, **DIRECTIONS[directions], **HARDNESS[hardness]
        )
        features = [{"x": x.detach()} for x in columns(23, 1)]
        with dispatch.record() as ran:
            value = loss(features, None)
            value.backward()
        assert bool(ran) == (module is ours)
        results.append([value.detach(), *(p.grad for p in encoder.parameters())])
        with torch.no_grad():
            torch.testing.assert_close(loss(features, None), value.detach())
    assert_same(*results)


def minilm() -> SentenceTransformer:
    """Of its shape, small, with random weights."""
    from sentence_transformers.sentence_transformer import modules
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(50))]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    transformer = _transformer(config, words, BertModel, BertTokenizerFast, modules)
    return SentenceTransformer(modules=[transformer, modules.Pooling(32)], device="cpu")


def _transformer(config, words, model, tokenizer, modules):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.txt").write_text("\n".join(words))
        model(config).save_pretrained(folder)
        tokenizer(str(Path(folder, "vocab.txt"))).save_pretrained(folder)
        return modules.Transformer(folder)


def trained(module, folder, name, wrap=lambda model, loss: loss):
    model = minilm()
    rows = [{"anchor": f"w{i} w{i + 1}", "positive": f"w{i + 1} w{i + 2}"} for i in range(32)]
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=8, logging_steps=1,
        report_to=[], use_cpu=True, save_strategy="no", seed=3, disable_tqdm=True,
    )  # fmt: skip
    loss = wrap(model, getattr(module, name)(model))
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), loss=loss
    )
    with dispatch.record() as ran:
        trainer.train()
    assert bool(ran) == (module is ours)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    model.save_pretrained(str(folder / "model"))
    return losses, SentenceTransformer(str(folder / "model"), device="cpu"), folder


def matryoshka(model, loss):
    return theirs.MatryoshkaLoss(model, loss, matryoshka_dims=[32, 16, 8])


RUNS = {
    "plain": ("MultipleNegativesRankingLoss", lambda model, loss: loss),
    "cached": ("CachedMultipleNegativesRankingLoss", lambda model, loss: loss),
    "Matryoshka": ("MultipleNegativesRankingLoss", matryoshka),
    "Matryoshka, cached": ("CachedMultipleNegativesRankingLoss", matryoshka),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("run", RUNS)
def test_trainer_and_model_card(run, tmp_path):
    name, wrap = RUNS[run]
    found, model, folder = trained(ours, tmp_path / "ours", name, wrap)
    expected, other, their_folder = trained(theirs, tmp_path / "theirs", name, wrap)
    assert found == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(
        model.encode(["w3 w4"]), other.encode(["w3 w4"]), rtol=1e-3, atol=1e-4
    )
    cards = [(path / "model" / "README.md").read_text() for path in (folder, their_folder)]
    # The loss's own name is in it, with its module's in ours.
    configurations = [re.findall(r"```json\n(.*?)```", card, re.S) for card in cards]
    citations = [re.findall(r"@misc\{.*?\n\}", card, re.S) for card in cards]
    assert configurations[0] == configurations[1] != []
    assert citations[0] == citations[1] != []
    assert f"loss:{name}" in cards[0]


def gathered(name, rank, world):
    """Each process has queries of its own, against the documents of all."""
    options = {**DIRECTIONS[name], "gather_across_devices": True}
    given = [x.detach()[rank * 9 :][:9].requires_grad_() for x in columns(18, 1)]
    with dispatch.record() as ran:
        found = answer(ours.MultipleNegativesRankingLoss(None, **options), given)
    assert ran
    assert_same(found, answer(theirs.MultipleNegativesRankingLoss(None, **options), given))


def gathered_hard(name, rank, world):
    options = {**HARDNESS[name], "gather_across_devices": True}
    given = [x.detach()[rank * 9 :][:9].requires_grad_() for x in columns(18, 2)]
    found = answer(ours.MultipleNegativesRankingLoss(None, **options), given)
    assert_same(found, answer(theirs.MultipleNegativesRankingLoss(None, **options), given))


CHECKS = {
    **{f"gathered, {name}": partial(gathered, name) for name in DIRECTIONS},
    **{f"gathered, hard, {name}": partial(gathered_hard, name) for name in HARDNESS},
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    return ranks.run(CHECKS, 2, tmp_path_factory.mktemp("group"))


@pytest.mark.parametrize("name", CHECKS)
def test_over_two_processes(name, said):
    assert said[name] == ["", ""]


def test_what_to_install():
    run = python("""
import sys
sys.modules["sentence_transformers"] = None  # as where it is not installed
import neglog.integrations.sentence_transformers
""")
    assert run.returncode
    assert "pip install 'neglog[sentence-transformers]'" in run.stderr
