"""Checkpoints give back what was saved, are whole or passed over, and do not pile up."""

import copy
import json

import pytest
import torch
from torch import nn

from distill import checkpoint


def make(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    model[0].bias.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.AdamW(trained, lr=0.1, betas=(0.9, 0.99))


def advance(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 4)).square().mean().backward()
        optimizer.step()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_restored_run_goes_on_with_the_same_bits(tmp_path):
    model, optimizer = make()
    advance(model, optimizer, 3)
    checkpoint.save(tmp_path, 3, {"model": model}, optimizer)
    advance(model, optimizer, 4)

    other, other_optimizer = make(seed=9)
    found = checkpoint.load(tmp_path)
    assert found.step == 3
    checkpoint.restore(found, {"model": other}, other_optimizer)
    # Also the generator: these draws are those of the first model.
    advance(other, other_optimizer, 4)
    for one, two in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert other[0].bias.requires_grad is False


def test_an_optimizer_that_made_no_step(tmp_path):
    model, optimizer = make()
    checkpoint.save(tmp_path, 0, {"model": model}, optimizer)
    other, other_optimizer = make(seed=1)
    checkpoint.restore(checkpoint.load(tmp_path), {"model": other}, other_optimizer)
    assert not other_optimizer.state_dict()["state"]
    assert torch.equal(other[0].weight, model[0].weight)


def test_two_are_kept_and_nothing_lies_about(tmp_path):
    model, optimizer = make()
    for step in (1, 5, 12, 100):
        checkpoint.save(tmp_path, step, {"model": model}, optimizer)
    kept = ["00000012.json", "00000012.safetensors", "00000100.json", "00000100.safetensors"]
    assert names(tmp_path) == kept
    assert json.loads((tmp_path / "00000100.json").read_text())["step"] == 100


def test_saving_a_step_again_replaces_it(tmp_path):
    model, optimizer = make()
    checkpoint.save(tmp_path, 1, {"model": model}, optimizer)
    with torch.no_grad():
        model[0].weight.zero_()
    checkpoint.save(tmp_path, 1, {"model": model}, optimizer)
    assert not checkpoint.load(tmp_path).tensors["model.0.weight"].any()


def test_nothing_to_load(tmp_path):
    assert checkpoint.load(tmp_path) is None
    assert checkpoint.load(tmp_path / "nowhere") is None


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_cut_file_is_passed_over(tmp_path, length):
    model, optimizer = make()
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"model": model}, optimizer)
    newest = tmp_path / "00000002.safetensors"
    newest.write_bytes(newest.read_bytes()[:length])
    assert checkpoint.load(tmp_path).step == 1
    (tmp_path / "00000001.json").write_text("[]")
    assert checkpoint.load(tmp_path) is None


def test_damaged_ones_do_not_push_out_whole_ones(tmp_path):
    model, optimizer = make()
    for step in (10, 20):
        checkpoint.save(tmp_path, step, {"model": model}, optimizer)
    (tmp_path / "00000020.safetensors").write_bytes(b"")
    for step in (12, 14):
        checkpoint.save(tmp_path, step, {"model": model}, optimizer)
    assert checkpoint.load(tmp_path).step == 14
    assert names(tmp_path)[::2] == ["00000012.json", "00000014.json"]


def test_tensors_without_a_record_are_swept_away(tmp_path):
    model, optimizer = make()
    checkpoint.save(tmp_path, 10, {"model": model}, optimizer)
    (tmp_path / "00000011.safetensors").write_bytes(b"killed before the record was written")
    (tmp_path / ".00000011.safetensors.partial").write_bytes(b"or earlier")
    assert checkpoint.load(tmp_path).step == 10
    checkpoint.save(tmp_path, 12, {"model": model}, optimizer)
    assert [name[:8] for name in names(tmp_path)] == ["00000010"] * 2 + ["00000012"] * 2


def test_another_model_is_refused(tmp_path):
    model, optimizer = make()
    checkpoint.save(tmp_path, 1, {"model": model}, optimizer)
    other = copy.deepcopy(model)
    other[2] = nn.Linear(3, 2)
    with pytest.raises(RuntimeError, match="size mismatch"):
        checkpoint.restore(checkpoint.load(tmp_path), {"model": other}, optimizer)
