"""Which share of the work a launcher gave this process: torchrun, SLURM tasks, SLURM arrays."""

from collections.abc import Mapping

from extract.cache.errors import UserError


def worker(environment: Mapping[str, str]) -> tuple[int, int]:
    """(index, number) of this process among all that the launchers started; (0, 1) without one.

    torchrun sets RANK and WORLD_SIZE, `srun` SLURM_PROCID and SLURM_NTASKS, job arrays
    SLURM_ARRAY_TASK_ID, _COUNT and _MIN; tasks within the jobs of an array are counted through.
    Raises `UserError` when one of these is no number.
    """
    if "WORLD_SIZE" in environment:
        index, count = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    else:
        index, count = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_NTASKS", 1)
    jobs = _number(environment, "SLURM_ARRAY_TASK_COUNT", 1)
    first = _number(environment, "SLURM_ARRAY_TASK_MIN")
    job = _number(environment, "SLURM_ARRAY_TASK_ID", first) - first
    step = _number(environment, "SLURM_ARRAY_TASK_STEP", 1)
    return job // step * count + index, jobs * count


def _number(environment: Mapping[str, str], name: str, default: int = 0) -> int:
    text = environment.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise UserError(f"the environment says {name}={text!r}, expected a number") from None
