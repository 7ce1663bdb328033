"""What the name of an encoder stands for: a timm model, arguments for it, and a place of weights.

Every kind of name (`extract.teachers` lists them) becomes a `Request`, of which
`extract.encoders.building` makes a model.
"""

import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm

from extract.encoders.baselines import RANDOM_SEED
from extract.encoders.encoder import EncoderError
from extract.encoders.registry import TEACHERS, TeacherCard

FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# `path/to/file.py:function`, one's own encoder.
OWN_CODE = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)")


@dataclass(frozen=True)
class Request:
    """A timm model to make, and where its weights come from.

    `model` is what `timm.create_model` takes (`architecture[.tag]` or `local-dir:FOLDER`), `file`
    the weights if they are not the hub's, `url` their place if they must be downloaded for that,
    `native` whether they have timm's own names, and `sized` whether the architecture is built for
    one input size. `rule` is None where nobody chose one, `mean` and `std` where timm's are right.
    """

    model: str
    architecture: str
    args: Mapping[str, Any] = field(default_factory=dict)
    card: TeacherCard | None = None
    file: Path | None = None
    native: bool = False
    random: bool = False
    sized: bool = False
    global_token: str | None = None
    licence: str | None = None
    rule: str | None = None

    @property
    def url(self) -> str | None:
        """Where the weights are, if neither here nor on the hub."""
        return self.card.url if self.card is not None and self.file is None else None

    @property
    def source(self) -> str:
        """Where the weights come from, without paths of one machine."""
        if self.random:
            return f"random:{RANDOM_SEED}"
        if self.url is not None:
            return f"url:{self.url}"
        if self.file is None:
            return f"timm:{self.model}"
        return f"folder:{folder_name(self.file)}" if self.native else f"file:{self.file.name}"


def split_alias(name: str) -> tuple[str | None, str]:
    """`OTHER=NAME` into its parts; None and the name itself where there is no other name."""
    alias, equals, target = name.partition("=")
    if equals and target and re.fullmatch(r"[\w.+-]+", alias) and not Path(name).exists():
        return alias, target
    return None, name


def encoder_folder(name: str) -> str:
    """The folder of the cache that an encoder called `name` gets, unless `OTHER=NAME` names it.

    Raises `EncoderError` for an unknown name.
    """
    alias, target = split_alias(name)
    if alias is not None:
        return alias
    if target in TEACHERS or target == "pixels":
        return target
    if own := OWN_CODE.fullmatch(target):
        return _safe(f"{Path(own['file']).stem}-{own['function']}")
    kind, _, rest = target.partition(":")
    if kind == "timm":
        return _safe(rest, r"\W+")
    if kind == "pixels":
        return f"pixels-{_safe(rest)}"
    if kind == "random":
        return "random-" + (_safe(rest, r"\W+") if timm.is_model(rest) else encoder_folder(rest))
    return _safe(folder_name(_find_folder(target) / FOLDER_WEIGHTS[0]))


def resolve(target: str) -> Request:
    """What a name (without alias) stands for; raises `EncoderError` for an unknown one."""
    if target in TEACHERS:
        return _card_request(TEACHERS[target])
    kind, _, rest = target.partition(":")
    if kind == "timm":
        return _timm_request(rest)
    if kind == "random":
        inner = _timm_request(rest) if timm.is_model(rest) else resolve(rest)
        return replace(inner, random=True, licence="none")
    return _folder_request(_find_folder(target))


def folder_name(file: Path) -> str:
    """What to call the folder of a weights file: a run's student is called like the run."""
    # Not resolve(): in a hub's cache the file is a link to a blob, and a link's own name is meant.
    folder = Path(os.path.abspath(file.parent))
    return folder.parent.name if folder.name == "student" else folder.name


def _card_request(card: TeacherCard) -> Request:
    request = _timm_request(card.tag)
    return replace(
        request,
        # Not the tag that timm completes it to: those are other weights of the architecture.
        model=card.tag,
        args=card.args,
        card=card,
        global_token=card.global_token,
        licence=card.licence,
    )


def _timm_request(tag: str) -> Request:
    architecture, _, pretrained_tag = tag.partition(".")
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise EncoderError(f"timm {timm.__version__} has no model {architecture!r}{hint}")
    cfg = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
    if pretrained_tag:
        tags = [t.partition(".")[2] for t in timm.list_pretrained(f"{architecture}.*")]
        if pretrained_tag not in tags:
            raise EncoderError(
                f"timm has no weights {pretrained_tag!r} of {architecture}; it has: "
                f"{', '.join(tags) or 'none'}"
            )
        cfg = timm.get_pretrained_cfg(tag)
    elif cfg is not None and cfg.tag:
        tag = f"{architecture}.{cfg.tag}"
    sized = bool(cfg is not None and cfg.fixed_input_size)
    return Request(model=tag, architecture=architecture, sized=sized)


def _find_folder(target: str) -> Path:
    """The timm folder at a path, or in `student/` under it."""
    path = Path(target).expanduser()
    for folder in (path, path / "student"):
        if (folder / "config.json").is_file():
            return folder
    if path.is_dir():
        raise EncoderError(
            f"{target} is no timm folder: expected config.json and {FOLDER_WEIGHTS[0]} in it or "
            f"in {path / 'student'}"
        )
    if path.suffix == ".py":
        raise EncoderError(f"{target}: name the function that makes the encoder: {target}:build")
    if re.search(r"[/\\]|^[.~]", target):
        raise EncoderError(f"no folder at {target}")
    choices = [*TEACHERS, "pixels"]
    close = difflib.get_close_matches(target, choices, n=1)
    if timm.is_model(target.partition(".")[0]):
        close = [f"timm:{target}"]
    hint = f"did you mean {close[0]}? " if close else ""
    raise EncoderError(
        f"unknown encoder {target!r}: {hint}expected {', '.join(choices)}, timm:TAG, random:NAME, "
        "pixels:PATCH, FILE.py:FUNCTION, or the path of a timm folder"
    )


def _folder_request(folder: Path) -> Request:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise EncoderError(f"{folder / 'config.json'} is no JSON: {error}") from error
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise EncoderError(
            f"{folder / 'config.json'} names the architecture {architecture!r}, which timm "
            f"{timm.__version__} does not have"
        )
    args, cfg = config.get("model_args") or {}, config.get("pretrained_cfg") or config
    file = next((folder / f for f in FOLDER_WEIGHTS if (folder / f).is_file()), None)
    flexible = {"img_size", "dynamic_img_size", "strict_img_size"}
    return Request(
        model=f"local-dir:{folder}",
        architecture=architecture,
        file=file or folder / FOLDER_WEIGHTS[0],
        native=True,
        sized=bool(cfg.get("fixed_input_size") or flexible & args.keys()),
        global_token=config.get("global_token"),
        licence=cfg.get("license"),
        rule=config.get("position_embedding"),
    )


def _safe(text: str, foreign: str = r"[^\w.-]+") -> str:
    return re.sub(foreign, "-", text).strip("-.") or "encoder"
