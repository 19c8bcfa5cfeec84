"""examples/trainers: what they print and when they fail. .ci/run runs each of them."""

import re
import sys
from pathlib import Path

import pytest
import torch

from neglog.bench import files
from neglog.examples import trainers
from neglog.examples.trainers import clip_loop, measure, text
from tests.support.commands import neglog

FOLDER = Path(trainers.__file__).parent
SCRIPTS = [path for path in FOLDER.glob("*.py") if "compare(train," in path.read_text()]


def alike(ours, clock, steps):
    clock.start()
    for number in range(steps):
        clock.step(2.0 + number)


def unlike(ours, clock, steps):
    clock.start()
    for number in range(steps):
        clock.step(2.0 + number + 0.01 * ours)


def failing(ours, clock, steps):
    raise RuntimeError


def test_both_are_shown(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["name", "--steps", "4"])
    measure.compare(alike, steps=12)
    shown = capsys.readouterr().out
    assert "4 steps" in shown
    assert shown.count("2.0000") == shown.count("5.0000") == 2
    assert "0.0e+00" in shown


@pytest.mark.parametrize(("training", "said"), [(unlike, "differ"), (failing, "failed")])
def test_a_difference_or_a_failure_ends_with_an_error(training, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["name", "--quick"])
    with pytest.raises(SystemExit, match=said):
        measure.compare(training, steps=12)


def test_losses_must_be_told(monkeypatch):
    monkeypatch.setattr(measure, "in_a_process", lambda *given: measure.Result([], 1.0, None))
    monkeypatch.setattr(sys, "argv", ["name", "--quick"])
    with pytest.raises((SystemExit, ValueError)):
        measure.compare(alike, steps=3)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_line_that_changes_is_marked(script):
    code = script.read_text()
    assert code.count("  # the line") == 1
    assert f"python examples/trainers/{script.name} [--quick]" in code
    assert "_" in script.stem  # .ci/run finds them by it


def test_all_scripts_are_there():
    assert len(SCRIPTS) == 7


def test_text_is_ids_below_the_vocabulary():
    rows = text.rows(64)
    assert {len(row["input_ids"]) for row in rows} == {64}
    assert text.tokens().max() < text.VOCAB
    assert text.tokens().unique().numel() > 5000


def test_pictures_show_what_their_captions_say():
    images, captions = clip_loop.batch(torch.Generator().manual_seed(0))
    bands = images.mean(3).view(len(images), 8, -1).mean(2)
    words = captions % clip_loop.WORDS / clip_loop.WORDS
    assert torch.corrcoef(torch.stack([bands.flatten(), words.flatten()]))[0, 1] > 0.95


def test_demo_of_a_trainer(tmp_path):
    done = neglog(
        code="import sys; from neglog.cli import main; sys.exit(main(%r))"
        % ["demo", "--task", "trainer", "--steps", "2"],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("times as fast a step") == 2
    differences = re.findall(r"at the same step: (\S+)\.", done.stdout)
    assert [float(found) < 1e-4 for found in differences] == [True, True]
    assert files.made_by_us(tmp_path / "demo.png")
