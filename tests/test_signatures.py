"""The losses take torch's arguments, and info-nce-pytorch's, as those packages take them."""

import ast
import inspect
from pathlib import Path

import info_nce
import pytest
import torch
from torch.nn import functional as F

import neglog

KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY
KINDS = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

# Ours, and what it replaces. torch has linear_cross_entropy since 2.13.
REPLACED = [
    (neglog.cross_entropy, F.cross_entropy),
    (neglog.nn.CrossEntropyLoss, torch.nn.CrossEntropyLoss),
    (neglog.info_nce, info_nce.info_nce),
    (neglog.nn.InfoNCELoss, info_nce.InfoNCE),
]
if hasattr(F, "linear_cross_entropy"):
    REPLACED += [
        (neglog.linear_cross_entropy, F.linear_cross_entropy),
        (neglog.nn.LinearCrossEntropyLoss, torch.nn.LinearCrossEntropyLoss),
    ]

MODULES = {
    neglog.nn.CrossEntropyLoss: neglog.cross_entropy,
    neglog.nn.MaskedCrossEntropyLoss: neglog.masked_cross_entropy,
    neglog.nn.LinearCrossEntropyLoss: neglog.linear_cross_entropy,
    neglog.nn.InfoNCELoss: neglog.info_nce,
    neglog.nn.CLIPLoss: neglog.clip_loss,
    neglog.nn.SigLIPLoss: neglog.siglip_loss,
    neglog.nn.NTXentLoss: neglog.nt_xent,
    neglog.nn.DCLLoss: neglog.dcl,
    neglog.nn.SupConLoss: neglog.sup_con,
}
# What LinearCrossEntropyLoss makes of its own `linear`.
OF_HEAD = {"linear_weight", "linear_bias"}


def parameters(function):
    return {
        name: (x.kind, x.default)
        for name, x in inspect.signature(function).parameters.items()
        if x.kind not in KINDS
    }


@pytest.mark.parametrize(("ours", "theirs"), REPLACED, ids=lambda x: x.__module__)
def test_the_arguments_of_what_is_replaced_come_first(ours, theirs):
    given, expected = list(parameters(ours).items()), list(parameters(theirs).items())
    assert given[: len(expected)] == expected
    further = [kind for _, (kind, _) in given[len(expected) :]]
    assert further == [KEYWORD_ONLY] * len(further)


def test_the_forward_of_a_module_of_torch_is_kept():
    for ours in (neglog.nn.CrossEntropyLoss, neglog.nn.LinearCrossEntropyLoss):
        given = list(parameters(ours.forward).items())
        assert given[:3] == list(parameters(torch.nn.CrossEntropyLoss.forward).items())
        assert all(default in (None, False) for _, (_, default) in given[3:])


@pytest.mark.parametrize(("module", "function"), MODULES.items(), ids=lambda x: x.__name__)
def test_a_module_and_its_call_take_what_the_function_takes(module, function):
    by_call, by_module = parameters(module.forward), parameters(module)
    options = {name: x for name, x in parameters(function).items() if name not in by_call}
    assert options.keys() - by_module.keys() <= OF_HEAD
    assert {name: x for name, x in by_module.items() if name in options} == {
        name: x for name, x in options.items() if name not in OF_HEAD
    }


@pytest.mark.parametrize("module", MODULES, ids=lambda x: x.__name__)
def test_options_are_attributes_and_are_shown(module):
    made = module(4, 3) if module is neglog.nn.LinearCrossEntropyLoss else module()
    for name in parameters(MODULES[module]).keys() & parameters(module).keys():
        if name not in ("size_average", "reduce"):  # torch keeps them as `reduction`
            assert f"{name}={getattr(made, name)!r}" in made.extra_repr()


def test_bad_arguments_of_a_module():
    for arguments, options, message in (
        ((0.1, "mean", "unpaired", True), {}, "too many positional arguments"),
        ((0.1,), {"temperature": 0.2}, "multiple values for argument 'temperature'"),
        ((), {"num_items": 3}, "got an unexpected argument 'num_items'"),
    ):
        with pytest.raises(TypeError, match=f"InfoNCELoss: {message}"):
            neglog.nn.InfoNCELoss(*arguments, **options)


def test_torchs_older_names_of_a_reduction():
    with pytest.warns(UserWarning, match="reduction='sum'"):
        assert neglog.nn.CrossEntropyLoss(size_average=False).reduction == "sum"
    module = neglog.nn.CrossEntropyLoss(reduction="elementwise_mean")
    with pytest.warns(UserWarning, match="'elementwise_mean' is deprecated"):
        loss = module(torch.zeros(2, 4), torch.tensor([0, 1]))
    torch.testing.assert_close(loss, torch.tensor(4.0).log())


def test_class_weights_are_a_buffer():
    """They move and are saved with the module, as torch has them."""
    weight = torch.ones(3)
    for module in (neglog.nn.CrossEntropyLoss, neglog.nn.MaskedCrossEntropyLoss):
        assert list(module(weight).state_dict()) == ["weight"]
        assert list(module().state_dict()) == []
    linear = neglog.nn.LinearCrossEntropyLoss(4, 3, weight=weight)
    assert sorted(linear.state_dict()) == ["linear.weight", "weight"]


def test_a_subclass_has_its_own_signature():
    class Sharp(neglog.nn.InfoNCELoss):
        def __init__(self, sharpness: float) -> None:
            super().__init__(1 / sharpness, symmetric=True)

    class Named(neglog.nn.InfoNCELoss):
        pass

    assert list(inspect.signature(Sharp).parameters) == ["sharpness"]
    assert Sharp(4.0).temperature == 0.25
    assert inspect.signature(Named) == inspect.signature(neglog.nn.InfoNCELoss)


@pytest.mark.parametrize("name", ["cross_entropy", "masked_cross_entropy",
                                  "linear_cross_entropy", "info_nce"])  # fmt: skip
def test_overloads_have_one_list_of_arguments(name):
    """All but return_stats, whose value decides the result, are as in the implementation."""
    source = Path(inspect.getsourcefile(getattr(neglog, name))).read_text(encoding="utf-8")
    found = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    assert len(found) == 4
    results = [ast.unparse(node.returns) for node in found]
    assert results == ["Tensor", "LossStats", "Tensor | LossStats", "Tensor | LossStats"]

    def arguments(node):
        given = node.args
        defaults = [*given.defaults, *given.kw_defaults]
        names = [ast.unparse(x) for x in (*given.args, *given.kwonlyargs)]
        values = [None if x is None else ast.unparse(x) for x in defaults]
        values = [None] * (len(names) - len(values)) + values
        return [
            pair for pair in zip(names, values, strict=True) if not pair[0].startswith("return_")
        ]

    *overloads, implementation = map(arguments, found)
    assert overloads == [implementation] * 3


def test_options_are_named_and_change_nothing_unless_given():
    assert parameters(neglog.options) == {"gradient": (KEYWORD_ONLY, None)}
