"""Which precision and dtype the arguments choose, and what contradictions get."""

from itertools import combinations

import pytest
import torch

from fvlm_core import ConfigError, Precision, choose_dtype, choose_precision
from fvlm_core.precision import explicit_precision

ARGUMENTS = ("load_in_4bit", "load_in_8bit", "load_in_16bit", "full_finetuning")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, Precision.NF4),
        ({"load_in_4bit": True}, Precision.NF4),
        ({"load_in_8bit": True}, Precision.INT8),
        ({"load_in_4bit": False, "load_in_8bit": True}, Precision.INT8),
        ({"load_in_16bit": True}, Precision.HALF),
        ({"load_in_4bit": False, "load_in_16bit": True}, Precision.HALF),
        ({"load_in_4bit": False}, Precision.HALF),
        ({"full_finetuning": True}, Precision.FULL),
        ({"load_in_4bit": False, "full_finetuning": True}, Precision.FULL),
    ],
)
def test_arguments_choose_a_precision(arguments, expected):
    assert choose_precision(**arguments) is expected


def test_nothing_given_is_no_explicit_choice():
    assert explicit_precision() is None
    assert explicit_precision(load_in_4bit=True) is Precision.NF4


@pytest.mark.parametrize("pair", list(combinations(ARGUMENTS, 2)))
def test_a_contradiction_names_both(pair):
    with pytest.raises(ConfigError) as caught:
        choose_precision(**dict.fromkeys(pair, True))
    assert all(f"{name}=True" in str(caught.value) for name in pair)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_choice_that_is_no_boolean_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name}='yes'"):
        choose_precision(**{name: "yes"})


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_precision_knows_its_argument(name):
    assert choose_precision(**{name: True}).argument == name


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, torch.float32),
        ("auto", torch.float32),
        (torch.bfloat16, torch.bfloat16),
        ("bf16", torch.bfloat16),
        ("torch.float16", torch.float16),
        ("float32", torch.float32),
    ],
)
def test_dtypes_on_the_cpu(given, expected):
    assert choose_dtype(given, torch.device("cpu")) is expected


@pytest.mark.parametrize("given", ["int8", "bfloat17", torch.int8, torch.float64, 16, ""])
def test_a_dtype_that_cannot_be_trained_in_is_refused(given):
    with pytest.raises(ConfigError, match="dtype="):
        choose_dtype(given, torch.device("cpu"))


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_without_bfloat16_gets_float16(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert choose_dtype(None, torch.device("cuda", 0)) is expected
