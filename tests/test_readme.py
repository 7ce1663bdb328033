"""The README says what is: its commands run, its options exist, its links lead somewhere."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import typer
from conftest import SIZE, STUDENT, write_encoder, write_tar
from typer.testing import CliRunner

import demo.cli
import distill.cli
import evaluate.cli
import extract.cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
APPS = {
    "unic-extract": extract.cli.app,
    "unic-distill": distill.cli.app,
    "unic-eval": evaluate.cli.app,
    "unic-demo": demo.cli.app,
}


def blocks(language: str, text: str = README) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [block for name, block in found if name == language]


def commands(text: str = README) -> list[list[str]]:
    """The words of every `unic-*` command in the shell blocks, continuation lines joined."""
    found = [*blocks("sh", text), *blocks("bash", text)]
    lines = "\n".join(found).replace("\\\n", " ").splitlines()
    launchers = r"^(?:torchrun --no-python --nproc-per-node \d+|srun|uv run) "
    lines = [re.sub(launchers, "", line.strip()) for line in lines]
    parts = [part for line in lines for part in line.partition("#")[0].split("&&")]
    words = [shlex.split(re.sub(launchers, "", part.strip())) for part in parts]
    return [found for found in words if found and found[0].startswith("unic-")]


def prose_options() -> list[str]:
    """Options that the text names between backquotes, such as `--store-views`."""
    return sorted(set(re.findall(r"`(?:unic-[a-z]+ )?(--[a-z-]+)[^`]*`", README)))


def command_of(program: str, arguments: list[str]):
    """The click command and the arguments left for it, below its subcommand if it has some."""
    command = typer.main.get_command(APPS[program])
    if arguments and arguments[0] in getattr(command, "commands", {}):
        return command.commands[arguments[0]], arguments[1:]
    return command, arguments


def every_command():
    for program, app in APPS.items():
        top = typer.main.get_command(app)
        subcommands = dict(getattr(top, "commands", None) or {})
        if not subcommands or top.invoke_without_command:
            yield program, top
        yield from ((f"{program} {name}".strip(), found) for name, found in subcommands.items())


def options(command) -> dict[str, str | None]:
    """Help texts by flag."""
    flags = [param for param in command.params if param.param_type_name == "option"]
    return {flag: param.help for param in flags for flag in param.opts}


def test_the_readme_shows_all_three_commands():
    assert {words[0] for words in commands()} == set(APPS)


@pytest.mark.parametrize("words", [*commands(), *commands(DOCS)], ids=" ".join)
def test_commands_use_options_that_exist(words):
    command, arguments = command_of(words[0], words[1:])
    used = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    assert used <= set(options(command))
    # Parsed as click does it: values of the right type, nothing left over.
    context = command.make_context(words[0], list(arguments))
    assert context.args == []


def test_options_in_the_text_exist():
    known = {flag for _, command in every_command() for flag in options(command)} | {"--help"}
    named = prose_options()
    assert len(named) >= 5
    assert set(named) <= known


def test_recipes_in_the_text_exist():
    (named,) = re.findall(r"`--recipe ([a-z|]+)`", README)
    assert set(named.split("|")) <= set(distill.cli.RECIPES)
    assert "single" in distill.cli.RECIPES


@pytest.mark.parametrize(("name", "command"), list(every_command()), ids=lambda value: str(value))
def test_every_option_has_help(name, command):
    assert command.help, name
    silent = [flag for flag, text in options(command).items() if not (text or "").strip()]
    # What it would be without a given value is no explanation of what it is.
    silent += [
        flag for flag, text in options(command).items() if (text or "").strip().startswith("(def")
    ]
    assert not silent, f"{name}: no help for {silent}"


def test_the_first_screen_says_it_all():
    first = README.splitlines()[:20]
    text = "\n".join(first)
    assert first[0].startswith("# ")
    assert "Distil several pretrained vision encoders into one student" in text
    (picture,) = (line for line in first if "─►" in line and "unic-extract" in line)
    stages = ["unic-extract", "unic-distill", "unic-eval"]
    assert sorted(stages, key=picture.index) == stages
    assert [line.partition("#")[0].strip() for line in first if line.startswith("pip ")] == [
        "pip install uv && uv run unic-demo",
        "pip install uv && uv run pytest",
    ]


def test_the_check_before_a_change_runs_the_very_test_command():
    (command,) = re.findall(r"^(pip .*?uv run pytest\S*)", README, re.M)
    script = ROOT / ".ci" / "run"
    assert command in script.read_text().splitlines()
    assert script.stat().st_mode & 0o111


def links() -> list[str]:
    return [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]


def test_linked_files_exist():
    assert "cache_layout.md" in links() and "examples/own_trainer.py" in links()
    missing = [link for link in links() if not (ROOT / link.partition("#")[0]).exists()]
    assert not missing


def test_the_scripts_are_those_of_the_package():
    import tomllib

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) == set(APPS)


def imported() -> list[tuple[str, str]]:
    found = []
    for block in blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                found += [(node.module or "", alias.name) for alias in node.names]
    return found


def test_the_snippets_import_what_exists():
    import importlib

    assert ("extract.cache", "CachedViews") in imported()
    for module, name in imported():
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


# One process for the three commands, each with its own entry point.
DRIVER = """
import contextlib, importlib, io, json, sys
import torch
import console.command
torch.set_num_threads(1)
modules = {f"unic-{name[:7]}": f"{name}.cli" for name in ("extract", "distill")}
modules["unic-eval"] = "evaluate.cli"
results = []
for words in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    sys.argv = words
    console.command.errors.file = err
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            importlib.import_module(modules[words[0]]).main()
        except SystemExit as leaving:
            code = leaving.code
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


def small(words: list[str]) -> list[str]:
    """The README's command with a tiny student, small views, few epochs: its shape is kept."""
    replaced = [
        STUDENT
        if word == "vit_small_patch16_224"
        else word.replace("{000000..000099}", "{000000..000001}")
        for word in words
    ]
    cpu, recipe = ["--device", "cpu"], ["--recipe", f"unic@{SIZE}"]
    extra: dict[str, list[str]] = {
        "unic-extract": [*recipe, *cpu],
        "unic-extract plan": [*recipe, *cpu, "--images", "4"],
        "unic-extract verify": [*cpu, "--rows", "8"],
        "unic-distill": ["--epochs", "2", "--batch-size", "16", *cpu],
        "unic-eval": ["--size", str(SIZE), *cpu],
    }
    subcommand = " ".join(words[:2]) if words[0] == "unic-extract" and words[1][0] != "-" else ""
    return [*replaced, *extra.get(subcommand or words[0], [])]


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The README's three commands, one after the other, in a fresh folder."""
    folder = tmp_path_factory.mktemp("readme")
    for i in range(2):
        write_tar(folder / f"train-{i:06d}.tar", 24, seed=i)
        write_tar(folder / f"pets-train-{i}.tar", 18, seed=10 + i)
    write_tar(folder / "pets-test-0.tar", 18, seed=20)
    # The names of the README mean downloads; a project may give them to folders of its own.
    for seed, name in enumerate(("dino", "deit3")):
        write_encoder(folder / "models" / name, seed)
    (folder / "unic.toml").write_text(
        '[teachers]\ndino = "models/dino"\ndeit3 = "models/deit3"\n', encoding="utf-8"
    )
    calls = [small(words) for words in commands() if words[0] != "unic-demo"]
    assert [words[0] for words in calls][:3] == ["unic-extract", "unic-distill", "unic-eval"]
    assert [words[1] for words in calls[3:]] == ["plan", "info", "verify", "convert"]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(calls),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_the_three_commands_run(walked):
    _, results = walked
    assert [code for code, _, _ in results] == [0] * 7, results
    extracted, distilled, evaluated, _, told, verified, converted = (out for _, out, _ in results)
    assert "192 rows (48 images x 4 views), 192 computed now" in extracted
    assert 'timm.create_model("local-dir:runs/unic/student", pretrained=True)' in distilled
    assert all(name in evaluated for name in ("unic", "dino", "deit3"))
    assert "relative gain over the best teacher" in evaluated
    assert "deit3" in told and "intact" in verified
    assert "feats-int8/dino/unic@48: fp16 to int8" in converted


def test_the_results_tell_student_from_teachers(walked):
    records = json.loads((walked[0] / "results.json").read_text())["scores"]
    assert {r["encoder"]: r["role"] for r in records} == {
        "unic": "student",
        "dino": "teacher",
        "deit3": "teacher",
    }


def test_the_student_loads_by_timm_alone(walked, monkeypatch):
    monkeypatch.chdir(walked[0])
    (snippet,) = (block for block in blocks("python") if "create_model" in block)
    names = {"timm": timm, "images": torch.rand(2, 3, SIZE, SIZE)}
    exec(snippet, names)
    tokens = names["tokens"]
    assert tuple(tokens.shape) == (2, 1 + 9, 32)
    # Trained weights, and a norm without any: every token has mean 0 and variance 1.
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 10), atol=1e-4, rtol=0)
    random = timm.create_model("local-dir:runs/unic/student", pretrained=False)
    assert not torch.allclose(
        random.patch_embed.proj.weight, names["student"].patch_embed.proj.weight
    )


def test_the_loop_of_ones_own_trainer(walked, monkeypatch):
    monkeypatch.chdir(walked[0])
    (snippet,) = (block for block in blocks("python") if "CachedViews" in block)
    names = {"DataLoader": torch.utils.data.DataLoader}
    exec(snippet, names)
    batch = names["batch"]
    assert len(names["dataset"]) == 192 and len(names["loader"]) == 3
    assert batch["views"].dtype == torch.uint8
    assert tuple(batch["views"].shape) == (64, 3, SIZE, SIZE)
    assert set(batch["targets"]) == {"dino", "deit3"}
    patches = batch["targets"]["dino"]["patches"]
    assert patches.dtype == torch.float16 and tuple(patches.shape) == (64, 9, 32)


def test_help_shows_the_defaults() -> None:
    """Square brackets would be taken for markup, and vanish."""
    shown = CliRunner().invoke(distill.cli.app, ["--help"], env={"COLUMNS": "200"}).stdout
    for default in ("(default: vit_base_patch16_224)", "(default: 200)", "(default: runs/RECIPE)"):
        assert default in shown
