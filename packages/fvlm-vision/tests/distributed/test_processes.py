"""What settings become where there are several processes, without starting any."""

from __future__ import annotations

import copy

import pytest
import torch
from trl import SFTConfig

from fvlm_core.errors import ConfigError
from fvlm_vision.binding import push_to_hub_merged, save_pretrained_merged
from fvlm_vision.processes import NOTHING, check_world, counting, fit_processes, refuse_sharding
from fvlm_vision.training_args import own_copy


@pytest.fixture
def args(tmp_path):
    return SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)


def test_defaults_of_several_processes(args):
    fit_processes(args, torch.nn.Linear(2, 2))
    assert args.accelerator_config.dispatch_batches is False
    assert args.ddp_find_unused_parameters is True
    assert args.ddp_broadcast_buffers is False
    fit_processes(args, torch.nn.Linear(2, 2))  # twice is as once


def test_what_the_user_chose_stands(args):
    args.ddp_find_unused_parameters, args.ddp_broadcast_buffers = False, True
    fit_processes(args, torch.nn.Linear(2, 2))
    assert (args.ddp_find_unused_parameters, args.ddp_broadcast_buffers) == (False, True)


def test_running_statistics_are_sent_around(args):
    fit_processes(args, torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)))
    assert args.ddp_broadcast_buffers is True


def test_batches_are_not_cut_by_rows(args):
    args.accelerator_config.dispatch_batches = True
    with pytest.raises(ConfigError, match="dispatch_batches=True"):
        fit_processes(args, torch.nn.Linear(2, 2))


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharding_by_the_launcher_is_refused(args, monkeypatch, variable):
    refuse_sharding(args)
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigError, match=r"(fsdp|deepspeed) splits the weights among processes"):
        refuse_sharding(args)


def test_sharding_by_the_arguments_is_refused(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, fsdp=True)
    with pytest.raises(ConfigError, match="fsdp splits the weights among processes"):
        own_copy(args)


def test_each_way_to_shard_is_refused_by_its_name_with_what_to_do(args):
    refused = {"fsdp": ["full_shard", "auto_wrap"], "deepspeed": {"zero_optimization": {"stage": 3}}}
    for name, value in {**refused, "parallelism_config": object()}.items():
        asking = copy.copy(args)
        setattr(asking, name, value)  # as SFTConfig would hold it; it asks for the package itself
        with pytest.raises(ConfigError) as raised:
            own_copy(asking)
        message = str(raised.value)
        assert message.startswith(f"{name} splits the weights among processes, which FVLM does not do: leave it out")
        assert "device_map='balanced'" in message
        assert "\n" not in message


def test_arguments_that_miss_other_processes_are_refused(args, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    check_world(args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2 .* know of 1: without a GPU several processes need use_cpu"):
        check_world(args)


def test_a_model_on_several_devices_is_refused(args):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    with pytest.raises(ConfigError, match="the model lies on cpu, meta"):
        fit_processes(args, model)


def test_only_batches_with_nothing_to_learn_are_left_out():
    losses = torch.tensor([1.0, NOTHING, float("nan"), 2.0])
    kept = counting(lambda values: values)(losses)
    assert kept[[0, 2]].tolist() == [1.0, 2.0]
    assert kept.isnan().tolist() == [False, True, False]
    logits = torch.full((2, 3), NOTHING)
    assert torch.equal(counting(lambda values: values)(logits), logits)


def test_another_process_than_the_first_neither_merges_nor_pushes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert save_pretrained_merged(object(), tmp_path / "merged") == tmp_path / "merged"  # no model, and no complaint
    assert not (tmp_path / "merged").exists()
    assert push_to_hub_merged(object(), "somebody/model") == "somebody/model"
