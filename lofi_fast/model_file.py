"""The file of a trained detector, `model.safetensors`: where it is, and what it says of itself beside its weights.

Importing this file imports no torch: a wrong folder is told of at once.
"""

from __future__ import annotations

from pathlib import Path

from lofi_fast import __version__
from lofi_fast.config import Config
from lofi_fast.errors import InputError

MODEL = "model.safetensors"  # in a run folder
FORMAT = 1  # of the file; raised when a reader of before would misread it
RUNS_SHOWN = 3  # of those that a folder holds, in a sentence


def model_file(path: Path) -> Path:
    """The model file of a finished run's folder, or `path` itself where it is no folder. Raises InputError for a folder
    without one.
    """
    if not path.is_dir():
        return path
    if not (path / MODEL).exists():
        raise InputError(_without_model(path))
    return path / MODEL


def metadata_of(file: Path) -> dict[str, str]:
    """What a model file says beside its weights, checked to be of a version that can be read. Raises InputError."""
    import safetensors  # which a machine for measuring, that reads no model, need not have

    try:
        with safetensors.safe_open(file, framework="np") as content:
            metadata: dict[str, str] = content.metadata() or {}
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; name a run folder or a {MODEL}") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error})") from None
    except safetensors.SafetensorError as error:
        raise InputError(f"{file}: not a whole safetensors file ({error}); name a run folder or a {MODEL}") from None
    version = metadata.get("format", "")
    if not {"settings", "classes"} <= metadata.keys() or not version.isdecimal() or len(version) > 9:
        raise InputError(f"{file}: a safetensors file, but no detector of lofi_fast; name a run folder or a {MODEL}")
    if int(version) > FORMAT:
        writer = metadata.get("lofi_fast", "a newer one")
        raise InputError(f"{file}: written by lofi_fast {writer}, newer than this {__version__}: update lofi_fast")
    return metadata


def _without_model(folder: Path) -> str:
    """Why a folder holds no model file, and what to do."""
    if not (folder / "config.json").exists():
        return f"{folder}: no run folder (neither {MODEL} nor config.json is there); {hint_of_run(folder, MODEL)}"
    config = Config.read(folder / "config.json")
    if not {"joint", "head"} & set(config.stages):
        asked = ",".join(config.stages)
        return f"{folder}: its --stages {asked} trained no head, so there is no detector: resume it with all stages"
    return (
        f"{folder}: the run has not finished, its {MODEL} is not there yet; go on with it by the command that started "
        f"it, with --out {folder} --resume"
    )


def hint_of_run(path: Path, holds: str) -> str:
    """Which run may be meant by a path that is none: what lies above a file or folder inside one, or inside a folder of
    runs. `holds`: a file that a run of this kind has.
    """
    above = next((folder for folder in list(path.absolute().parents)[:2] if (folder / holds).exists()), None)
    if above is not None:
        return f"perhaps you meant {above}, which holds it"
    inside = sorted(file.parent for file in path.glob(f"*/{holds}")) if path.is_dir() else []
    if inside:
        shown = ", ".join(str(run) for run in inside[:RUNS_SHOWN])
        return f"perhaps you meant {shown}{' or another in it' if len(inside) > RUNS_SHOWN else ''}, inside it"
    return "name the run's --out"
