"""One's own encoder: `path/to/file.py:function`.

The function is called with the keyword `size`, the side of the views in pixels, and returns an
`nn.Module` that maps normalised pixels `[B, 3, size, size]` to a dict of float tensors:

    cls      [B, D]       the global token
    patches  [B, P, D]    row by row of a grid
    others   [B, ...]     further named tokens, if there are any

What the module cannot say by its output it says by attributes, of which `mean` and `std` must be
there; `Description` lists them. `docs/teachers.md` has an example. Naming a file runs it, as
`python path/to/file.py` would.
"""

import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from extract.encoders.checkpoints import NATIVE
from extract.encoders.encoder import Encoder, EncoderError, EncoderSpec, weights_sha256
from extract.encoders.names import OWN_CODE

# Names that the cache gives to arrays of its own.
TAKEN = {"key", "scale_patches", "mean_patch", "image_index"}
GLOBAL_TOKENS, TAPS = ("cls", "pool"), ("norm", "features")


@dataclass(frozen=True)
class Description:
    """The attributes of one's own encoder that are recorded beside its features.

    Attributes:
        mean: of the normalisation, for pixels in [0, 1], three numbers.
        std: the same.
        licence: of the weights.
        global_token: `cls` if it is a class token, `pool` if it is pooled from others.
        tap: `norm` if the tokens come after a final norm, `features` if not.
        grid: patch rows and columns, None for a square.
        patch_size: side of a cell of the grid, in pixels, None if the model embeds no patches.
        interpolation: that the model's preprocessing resizes images with.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    licence: str = "unknown"
    global_token: str = "cls"
    tap: str = "features"
    grid: tuple[int, int] | None = None
    patch_size: int | None = None
    interpolation: str = "bicubic"


def custom_encoder(
    name: str, target: str, *, size: int, device: torch.device | str = "cpu"
) -> Encoder:
    """Make the encoder of `target`, a `file.py:function`; `name` is what to call it.

    Raises:
        EncoderError: if there is no such file or function, if the code in it fails, or if what it
            returns is not as the top of this file says.
    """
    match = OWN_CODE.fullmatch(target)
    if match is None:
        raise EncoderError(f"{target}: expected path/to/file.py:function")
    file, function = Path(match["file"]).expanduser(), match["function"]
    module = _call(file, function, size)
    where = f"{file.name}:{function}"
    if not isinstance(module, nn.Module):
        raise EncoderError(f"{where} returned {_kind(module)}, expected a torch.nn.Module")
    about = _describe(module, where)
    module = module.to(device).eval()
    tokens = _blank_tokens(module, file, where, size, torch.device(device))
    spec = EncoderSpec(
        name=name,
        source=f"file:{where}",
        architecture=type(module).__name__,
        sha256=weights_sha256(module),
        global_token=about.global_token,
        tap=about.tap,
        size=size,
        grid=_grid(about, tokens["patches"].shape[1], where),
        patch_size=about.patch_size,
        cls_width=tokens["cls"].shape[-1],
        patch_width=tokens["patches"].shape[-1],
        mean=about.mean,
        std=about.std,
        interpolation=about.interpolation,
        position_embedding=NATIVE,
        precision="bf16-autocast" if torch.device(device).type == "cuda" else "fp32",
        licence=about.licence,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
    )
    return Encoder(module, spec).to(device)


def _call(file: Path, function: str, size: int) -> Any:
    """What the function returns, after running the file."""
    if not file.is_file():
        raise EncoderError(f"no file at {file}")
    loader = importlib.util.spec_from_file_location(f"own_encoder_{file.stem}", file)
    assert loader is not None and loader.loader is not None
    code = importlib.util.module_from_spec(loader)
    # Dataclasses and pickling look a module up by its name.
    sys.modules[loader.name] = code
    with _own_code(file, file.name):
        loader.loader.exec_module(code)
    build = getattr(code, function, None)
    if not callable(build):
        own = [n for n, f in vars(code).items() if inspect.isfunction(f) and not n.startswith("_")]
        raise EncoderError(
            f"{file.name} has no function {function!r}; it has: {', '.join(own) or 'none'}"
        )
    with _own_code(file, f"{file.name}:{function}"):
        return build(size=size)


@contextmanager
def _own_code(file: Path, what: str) -> Iterator[None]:
    """Inside, modules beside the file can be imported; what the code raises names its line."""
    folder = str(file.resolve().parent)
    sys.path.append(folder)
    try:
        yield
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if _is(f, file)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        at = f" in line {line}" if line else ""
        raise EncoderError(f"{what} failed{at}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)


def _is(frame: traceback.FrameSummary, file: Path) -> bool:
    return Path(frame.filename).resolve() == file.resolve()


def _describe(module: nn.Module, where: str) -> Description:
    found = {
        f.name: getattr(module, f.name) for f in fields(Description) if hasattr(module, f.name)
    }
    missing = [name for name in ("mean", "std") if name not in found]
    if missing:
        raise EncoderError(
            f"{where}: the encoder has no attribute {' and no '.join(missing)}; give it the three "
            "numbers that its pixels are normalised by, as in mean = (0.485, 0.456, 0.406)"
        )
    for name in ("mean", "std"):
        values = torch.as_tensor(found[name], dtype=torch.float64).flatten().tolist()
        if len(values) != 3 or (name == "std" and min(values) <= 0):
            raise EncoderError(f"{where}: {name} = {found[name]!r}, expected three numbers")
        found[name] = tuple(values)
    for name, known in (("global_token", GLOBAL_TOKENS), ("tap", TAPS)):
        if name in found and found[name] not in known:
            raise EncoderError(
                f"{where}: {name} = {found[name]!r}, expected one of {', '.join(known)}"
            )
    return Description(**found)


def _blank_tokens(
    module: nn.Module, file: Path, where: str, size: int, device: torch.device
) -> dict[str, Tensor]:
    """The checked tokens of two blank views: of one, a lost batch axis would not be seen."""
    with _own_code(file, f"the encoder of {where}"), torch.no_grad():
        tokens = module(torch.zeros(2, 3, size, size, device=device))
    if not isinstance(tokens, dict) or not {"cls", "patches"} <= tokens.keys():
        found = f"a dict of {', '.join(map(str, tokens))}" if isinstance(tokens, dict) else None
        raise EncoderError(
            f"the encoder of {where} gave {found or _kind(tokens)}, expected a dict with "
            "'cls' [B, D] and 'patches' [B, P, D]"
        )
    expected = {"cls": ("[2, D]", 2), "patches": ("[2, P, D]", 3)}
    for name, token in tokens.items():
        shape, axes = expected.get(name, ("[2, ...]", None))
        fits = (
            isinstance(token, Tensor)
            and token.is_floating_point()
            and token.ndim >= 2
            and axes in (None, token.ndim)
            and len(token) == 2
        )
        if not fits:
            raise EncoderError(
                f"the encoder of {where} gave {name!r} as {_kind(token)} for two views, expected a "
                f"float tensor {shape}"
            )
        if not re.fullmatch(r"[a-z][a-z0-9_]*", str(name)) or name in TAKEN:
            raise EncoderError(f"the encoder of {where}: {name!r} cannot name tokens in a cache")
    return tokens


def _grid(about: Description, count: int, where: str) -> tuple[int, int]:
    rows, columns = about.grid or (round(count**0.5),) * 2
    if rows * columns != count:
        raise EncoderError(
            f"the encoder of {where} gives {count} patch tokens, which is no grid of {rows} x "
            f"{columns}: leave out class token and registers, or set its attribute "
            "grid = (rows, columns)"
        )
    return int(rows), int(columns)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"a {type(value).__name__}"
