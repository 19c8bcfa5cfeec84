"""The demo's runs, and the parts they are made of: text, masking, losses, curves."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import neglog as library
from neglog.bench import files
from neglog.cli import main
from neglog.examples.demo import SHOWS, TASKS, bert, docstrings, mlm, pretrain, topics
from neglog.examples.demo.text import Tokenizer, load, windows
from neglog.examples.demo.text import topics as library_topics
from neglog.examples.demo.train import loss_and_gradient
from tests.support.commands import neglog

# Nothing may be fetched: any attempt to connect ends the command.
OFFLINE = """
import sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise SystemExit(f"{event} {arguments}")
sys.addaudithook(refuse)
from neglog.cli import main
sys.exit(main(%r))
"""


@pytest.fixture(scope="module")
def masked() -> mlm.MaskedLanguageModel:
    return mlm.load(quick=True)


@pytest.mark.parametrize("task", [*TASKS, *SHOWS])
def test_no_file_of_the_user_is_overwritten(task, tmp_path, capsys):
    mine = tmp_path / "mine.png"
    mine.write_text("a picture of my cat")
    assert main(["demo", "--task", task, "--quick", "--out", str(mine)]) == 2
    assert "was not made by neglog; --force overwrites it" in capsys.readouterr().err
    assert mine.read_text() == "a picture of my cat"


@pytest.mark.parametrize("task", TASKS)
def test_a_task_trains_twice_alike_and_draws_and_fetches_nothing(task, tmp_path):
    command = ["demo", "--task", task, "--steps", "3", "--quick"]
    done = neglog(code=OFFLINE % command, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    losses = re.findall(r"^(torch|neglog) +step +\d/3 +loss ([\d.]+)", done.stdout, re.MULTILINE)
    assert [name for name, _ in losses] == ["torch", "neglog"] * 3
    assert len({loss for name, loss in losses if name == "torch"}) == 3  # it moves
    # Of losses near 10: a float32 there has steps of 1e-6.
    assert float(re.search(r"curves at the same step: (\S+)\.", done.stdout).group(1)) < 2e-5
    scores = re.findall(r"^ *(?:torch|neglog) .* \d+\.\d+ +([\d.,]+)%? *$", done.stdout, re.M)
    assert len(scores) == 2
    first, second = (float(score.replace(",", "")) for score in scores)
    assert first == pytest.approx(second, rel=1e-4)
    picture = tmp_path / "demo.png"
    assert files.made_by_us(picture)
    assert files.check_output(str(picture), ".png", force=False) == picture  # ours: no refusal


def test_every_way_to_the_masked_loss_is_the_same_number_with_the_same_gradients(masked):
    torch.manual_seed(0)
    batch = next(masked.batches(0))
    made = {}
    for name, loss in (*masked.losses.items(), masked.by_hand):
        torch.manual_seed(0)
        model = masked.model()
        with library.dispatch.record() as ran:
            value, _ = loss_and_gradient(loss, masked.features(model, batch), batch)
        assert bool(ran) == (name == "neglog"), ran
        made[name] = value, [parameter.grad for parameter in model.parameters()]
    expected, gradients = made["torch"]
    for value, others in made.values():
        assert value == pytest.approx(expected, rel=1e-6)
        for one, other in zip(gradients, others, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-6)


def test_cutting_the_graph_changes_no_gradient(masked):
    """By the tied head, whose gradient has two terms."""
    batch = next(masked.batches(0))
    torch.manual_seed(0)
    model = masked.model()
    features = masked.features(model, batch)
    mlm.torch_loss(features, batch).backward()
    whole = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    loss_and_gradient(mlm.torch_loss, masked.features(model, batch), batch)
    for cut, expected in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(cut.grad, expected, rtol=1e-4, atol=1e-7)


def test_masking_is_berts(masked):
    rule = masked.masking
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1000, rule.vocab, (2000, 126), generator=generator)
    inputs, tokens, mask = rule(text, generator)
    torch.testing.assert_close(tokens[:, 1:-1], text)
    assert torch.equal(inputs[~mask], tokens[~mask])
    assert (inputs[:, 0] == rule.cls).all()
    assert (inputs[:, -1] == rule.sep).all()
    assert not mask[:, [0, -1]].any()  # the special tokens are never asked for
    # Of 37,800 masked tokens: five standard deviations are 0.0036 of all, 0.01 of the masked.
    assert mask[:, 1:-1].float().mean().item() == pytest.approx(0.15, abs=4e-3)
    hidden = inputs[mask] == rule.mask
    kept = inputs[mask] == tokens[mask]
    assert hidden.float().mean().item() == pytest.approx(0.8, abs=0.0104)
    assert kept.float().mean().item() == pytest.approx(0.1, abs=0.0078)
    others = inputs[mask][~hidden & ~kept]
    assert len(others.unique()) > 0.9 * len(others) * (1 - len(others) / rule.vocab / 2)
    assert not torch.equal(mask[0], mask[1])


def test_batches_are_the_same_for_the_same_seed(masked):
    for first, again in zip(next(masked.batches(3)), next(masked.batches(3)), strict=True):
        assert torch.equal(first, again)
    assert not torch.equal(next(masked.batches(3)).tokens, next(masked.batches(4)).tokens)
    assert next(masked.batches(3)).tokens.shape == (mlm.BATCH, bert.CONTEXT)


def test_topics_hold_out_what_none_trains_on():
    texts = dict(topics.distinct({"a": "one\n\ntwo", "b": "two\n\n\n\nthree", "c": "one"}))
    assert texts == {"a": "one\n\ntwo", "b": "three", "c": ""}
    tokenizer = topics.wordpiece()
    assert tokenizer.get_vocab_size() == 30522
    found = topics.load(tokenizer)
    assert len(found) > 50
    lengths = [len(topic.train) for topic in found]
    assert lengths == sorted(lengths, reverse=True)
    for topic in found[:12]:
        share = len(topic.held_out) / (len(topic.held_out) + len(topic.train))
        assert share == pytest.approx(topics.HELD_OUT, abs=0.01)


def test_windows_reach_both_ends():
    drawn = windows(torch.arange(5), 4, 100, torch.Generator().manual_seed(0))
    assert drawn.shape == (100, 4)
    assert sorted({tuple(row.tolist()) for row in drawn}) == [(0, 1, 2, 3), (1, 2, 3, 4)]


TOKENIZER = Tokenizer("the cat sat on the mat, the end.\n\nfrom cat import mat")


@settings(deadline=None)
@given(st.text())
def test_tokens_spell_every_text(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.decode(TOKENIZER.encode(text, spelled=0.5)) == text


def test_held_out_text_is_not_trained_on():
    data = load()
    assert int(data.train.max()) < len(data.tokenizer)
    held_out = data.tokenizer.decode(data.held_out.tolist())
    assert held_out not in data.tokenizer.decode(data.train.tolist())
    assert len(data.held_out) > 10_000


def test_pretraining_is_compared_and_drawn_and_fetches_nothing(tmp_path):
    command = ["demo", "--task", "pretrain", "--steps", "3", "--quick"]
    done = neglog(code=OFFLINE % command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"^(pretrained|from random weights) .* ([\d.]+(?:, [\d.]+)+)$", done.stdout, re.M
    )
    assert [name for name, _ in rows] == ["pretrained", "from random weights"]
    assert all(len(seeds.split(", ")) == pretrain.QUICK.seeds for _, seeds in rows)
    assert files.made_by_us(tmp_path / "demo.png")


def test_no_page_is_trained_and_tested_on():
    """Of all seeds; and the docstrings are another book."""
    tokenizer = Tokenizer(" ".join(library_topics().values()))
    pages = pretrain.cut(tokenizer, pretrain.WHOLE)
    parts = [*pages.train, pages.validation, pages.test]
    assert [len(part) for part in parts] == [pretrain.PAGES] * 3 + [
        pretrain.VALIDATION, pretrain.TEST,
    ]  # fmt: skip
    texts = [tokenizer.decode(part.tolist()) for part in parts]
    for number, text in enumerate(texts):
        others = texts[:number] + texts[number + 1 :]
        assert not any(text[:300] in other for other in others)
    page = max(library_topics().values(), key=len)
    assert page[:200] not in docstrings.read(quick=True)


def test_validation_chooses_the_step():
    tried = pretrain.Try([9.0, 5.0, 6.0], [8.0, 4.0, 3.0])
    assert tried.test[tried.best()] == 4.0
