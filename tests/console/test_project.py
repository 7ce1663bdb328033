"""`unic.toml`: what it may say, and what is said about one that is wrong."""

import textwrap
from pathlib import Path

import pytest

from console import project
from console.project import Project, ProjectError, read_project

DOCUMENTED = textwrap.dedent(
    "\n".join(line for line in (project.__doc__ or "").splitlines() if line.startswith("    "))
)


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "unic.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_no_file_is_an_empty_project(tmp_path):
    found = read_project(tmp_path)
    assert found == Project() and found.size is None


def test_the_example_of_the_documentation(tmp_path):
    found = read_project(written(tmp_path, DOCUMENTED))
    assert found.data == [str(tmp_path / "images/train-*.tar")]
    assert found.cache == tmp_path / "feats" and found.runs == tmp_path / "runs"
    assert (found.recipe, found.size, found.views) == ("unic@224", 224, 4)
    assert found.teachers == {"mine": str(tmp_path / "models/mine")}
    pets = found.tasks["pets"]
    assert pets.train == [str(tmp_path / "pets/train-*.tar")]
    assert pets.test == [str(tmp_path / "pets/test-*.tar")]
    assert pets.classes == []


def test_paths_stay_relative_in_the_own_folder(tmp_path, monkeypatch):
    written(tmp_path, 'data = ["a.tar", "/abs/b.tar"]\ncache = "/abs/feats"\nruns = "r"')
    monkeypatch.chdir(tmp_path)
    found = read_project()
    assert found.data == ["a.tar", "/abs/b.tar"]
    assert (found.cache, found.runs) == (Path("/abs/feats"), Path("r"))


def test_numbers_and_categories(tmp_path):
    text = """
    views = 2
    seed = 0
    epochs = 3
    batch_size = 16
    learning_rate = 1
    student = "vit_tiny_patch16_224 depth=3"

    [tasks.boxes]
    train = "a.tar"
    test = ["b.tar", "c.tar"]
    classes = ["background", "box"]
    """
    found = read_project(written(tmp_path, text))
    assert (found.views, found.seed, found.epochs, found.batch_size) == (2, 0, 3, 16)
    assert found.learning_rate == 1 and found.student == "vit_tiny_patch16_224 depth=3"
    assert found.tasks["boxes"].test == [str(tmp_path / "b.tar"), str(tmp_path / "c.tar")]
    assert found.tasks["boxes"].classes == ["background", "box"]


@pytest.mark.parametrize(
    ("recipe", "size"), [("unic@48", 48), ("center@224r256", 224), ("unic", None), ("unic@x", None)]
)
def test_the_size_of_a_recipe(recipe, size):
    assert Project(recipe=recipe).size == size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('cahce = "feats"', "unknown entries cahce; known are batch_size, cache"),
        ("[task.pets]\ntrain = 'a'\ntest = 'b'", "unknown entries task; known"),
        ('[tasks.pets]\ntrain = "a"\ntest = "b"\nclass = []', "unknown entries tasks.pets.class"),
        ('[tasks.pets]\ntrain = "a"', "tasks.pets needs both train and test, found ['train']"),
        ("cache = 3", "cache must be str, found 3"),
        ("runs = ['a']", "runs must be str, found ['a']"),
        ("recipe = 224", "recipe must be str, found 224"),
        ("student = false", "student must be str, found False"),
        ('views = "4"', "views must be int, found '4'"),
        ("views = true", "views must be int, found True"),
        ("seed = 1.5", "seed must be int, found 1.5"),
        ('learning_rate = "3e-4"', "learning_rate must be int or float, found '3e-4'"),
        ("data = 7", "data must be str, found 7"),
        ("data = ['a', 7]", "data must be str, found 7"),
        ('teachers = "dino"', "teachers must be dict, found 'dino'"),
        ("[teachers]\nmine = 1", "teachers.mine must be str, found 1"),
        ("tasks = 1", "tasks must be dict, found 1"),
        ("[tasks]\npets = 'a.tar'", "tasks.pets must be dict, found 'a.tar'"),
        ("[tasks.pets]\ntrain = 1\ntest = 'b'", "tasks.pets.train must be str, found 1"),
        (
            "[tasks.pets]\ntrain = 'a'\ntest = 'b'\nclasses = 'cat'",
            "tasks.pets.classes must be list, found 'cat'",
        ),
        (
            "[tasks.pets]\ntrain = 'a'\ntest = 'b'\nclasses = 3",
            "tasks.pets.classes must be list, found 3",
        ),
        ("cache = ", "is not valid TOML"),
        ("cache = 'a'\ncache = 'b'", "is not valid TOML"),
        (b"cache = '\xff'", "is not valid TOML"),
    ],
)
def test_a_file_that_is_wrong(tmp_path, text, message):
    with pytest.raises(ProjectError) as caught:
        read_project(written(tmp_path, text))
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "unic.toml"))
