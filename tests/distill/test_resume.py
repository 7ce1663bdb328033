"""A run that was stopped, in whatever way, ends with the bits of one that was not."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from console.command import Terminated
from distill.config import DistillConfig, DistillError
from distill.run import Training, distill

STUDENT = "vit_tiny_patch16_224 patch_size=16 embed_dim=32 depth=3 num_heads=2"
STEPS = 12  # 51 images in batches of 12, 3 epochs
TIMINGS = ("images_per_second", "data_wait")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors of this size are faster on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def configure(feats, out, **changes):
    plain = dict(epochs=3, batch_size=12, lr=3e-2, warmup_epochs=1, log_every=1, device="cpu")
    return DistillConfig(cache=feats, out=out, student=STUDENT, **(plain | changes))


def lines(out):
    found = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in found]


def results(out):
    student = load_file(out / "student" / "model.safetensors")
    heads = load_file(out / "heads.safetensors")
    return {"student." + k: v for k, v in student.items()} | heads


def assert_equal_runs(one, other):
    assert lines(one) == lines(other)
    tensors, others = results(one), results(other)
    assert tensors.keys() == others.keys()
    different = [name for name in tensors if not torch.equal(tensors[name], others[name])]
    assert not different


def stop_at(config, step, number=signal.SIGINT):
    """Run until `step` steps are made, when a real signal reaches the process."""
    plain = Training.step

    def signalled(self, at, batch):
        values = plain(self, at, batch)
        if at + 1 == step:
            os.kill(os.getpid(), number)
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "step", signalled)
        expected = KeyboardInterrupt if number == signal.SIGINT else Terminated
        with pytest.raises(expected):
            distill(config)


@pytest.fixture(scope="module", params=[False, True], ids=["unic", "reference"])
def undisturbed(request, feats, tmp_path_factory):
    """A run that nothing stopped, with drop path, teacher dropping and two reading threads."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    config = configure(feats, out, reference=request.param, workers=2)
    assert config.drop_path == 0.1
    assert distill(config).made == STEPS
    return config


@pytest.fixture(scope="module")
def plain(feats, tmp_path_factory):
    config = configure(feats, tmp_path_factory.mktemp("plain") / "run")
    distill(config)
    return config


def test_the_undisturbed_run_uses_what_must_be_resumed(undisturbed):
    found = lines(undisturbed.out)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    coefficients = {t["coefficient"] for line in found for t in line["teachers"].values()}
    assert len(coefficients) > 3 and min(coefficients) < 1
    statistics = results(undisturbed.out)["standardization.teachers.alpha.cls.std"]
    assert not torch.equal(statistics, torch.ones_like(statistics))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_stopped_in_the_middle_of_an_epoch(undisturbed, tmp_path, number):
    config = replace(undisturbed, out=tmp_path / "run")
    stop_at(config, 6, number)
    assert [line["step"] for line in lines(config.out)] == list(range(1, 7))
    assert not (config.out / "student").exists()
    assert distill(config).made == STEPS - 6
    assert_equal_runs(undisturbed.out, config.out)


def test_twice_stopped_and_resumed_with_other_numbers_of_threads(undisturbed, tmp_path):
    config = replace(undisturbed, out=tmp_path / "run", workers=1)
    stop_at(config, 3)
    stop_at(replace(config, workers=4), 8)
    assert distill(replace(config, workers=3)).made == STEPS - 8
    assert_equal_runs(undisturbed.out, config.out)


def test_a_crash_without_a_checkpoint_starts_over(plain, tmp_path):
    config = replace(plain, out=tmp_path / "run")
    usual = Training.step

    def crashing(self, at, batch):
        if at == 4:
            raise MemoryError
        return usual(self, at, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "step", crashing)
        with pytest.raises(MemoryError):
            distill(config)
    assert len(lines(config.out)) == 4
    assert distill(config).made == STEPS
    assert_equal_runs(plain.out, config.out)


def cut(folder):
    data = folder / "00000007.safetensors"
    data.write_bytes(data.read_bytes()[:-100])


def flip(folder):
    data = folder / "00000007.safetensors"
    content = bytearray(data.read_bytes())
    content[-5] ^= 1
    data.write_bytes(content)


def no_record(folder):
    (folder / "00000007.json").unlink()


def torn_record(folder):
    (folder / "00000007.json").write_text('{"step": 7, "sha')


def no_tensors(folder):
    (folder / "00000007.safetensors").unlink()


@pytest.mark.parametrize("damage", [cut, flip, no_record, torn_record, no_tensors])
def test_killed_while_saving_goes_on_from_the_checkpoint_before(plain, tmp_path, damage):
    config = replace(plain, out=tmp_path / "run")
    stop_at(config, 3)
    stop_at(config, 7)
    damage(config.out / "checkpoints")
    with (config.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "epo')
    assert distill(config).made == STEPS - 3
    assert_equal_runs(plain.out, config.out)


def test_a_finished_run_makes_no_step(plain, capsys):
    before, tensors = lines(plain.out), results(plain.out)
    done = distill(plain)
    assert (done.made, done.steps) == (0, STEPS)
    assert done.last["step"] == STEPS
    assert lines(plain.out) == before
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in results(plain.out).items())


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(lr=1e-3), "lr: 0.03 -> 0.001"),
        (dict(seed=1), "seed: 0 -> 1"),
        (dict(recipe="ladder"), "recipe: 'unic' -> 'ladder'"),
        (dict(reference=True), "reference: False -> True"),
        (dict(teachers=("alpha",)), r"teachers: \['alpha', 'beta'\] -> \['alpha'\]"),
        (dict(views=1), "views: 2 -> 1"),
        (dict(epochs=5), "epochs: 3 -> 5"),
        (dict(drop_path=0.2), "drop_path: 0.1 -> 0.2"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_other_settings_in_the_same_folder_are_refused(plain, changes, named):
    before = {path: path.read_bytes() for path in plain.out.rglob("*") if path.is_file()}
    with pytest.raises(DistillError, match=named):
        distill(replace(plain, **changes))
    assert before == {path: path.read_bytes() for path in before}


def test_settings_that_may_change(plain):
    changed = replace(plain, workers=1, log_every=7, checkpoint_minutes=1.0, data=())
    assert distill(changed).made == 0


def test_a_config_json_torn_by_a_kill_is_named(plain, tmp_path):
    config = replace(plain, out=tmp_path / "run")
    config.out.mkdir()
    (config.out / "config.json").write_text('{"cache": "fe')
    with pytest.raises(DistillError, match=r"config\.json"):
        distill(config)
