"""A run whose bytes do not fit on the disk does not start: on a real file system that is small."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_encoder, write_tar

UNSHARE = ["unshare", "--map-root-user", "--mount"]


def small_disks_can_be_mounted() -> bool:
    try:
        done = subprocess.run([*UNSHARE, "true"], capture_output=True, timeout=20)
    except FileNotFoundError:
        return False
    return done.returncode == 0


@pytest.mark.skipif(not small_disks_can_be_mounted(), reason="needs a mount namespace")
@pytest.mark.parametrize(("size", "code"), [("1m", 1), ("64m", 0)])
def test_a_disk_that_is_too_small_is_refused_before_the_first_tar(
    tmp_path: Path, size: str, code: int
) -> None:
    tar = write_tar(tmp_path / "a.tar", 20)
    encoder = write_encoder(tmp_path / "alpha", 0, patch_size=4, embed_dim=64)
    disk = tmp_path / "disk"
    disk.mkdir()
    command = Path(sys.executable).with_name("unic-extract")
    script = (
        f"mount -t tmpfs -o size={size} none {disk} && {command} --teacher alpha={encoder} "
        f"--data {tar} --cache {disk}/feats --recipe unic@48 --views 4 --device cpu; "
        f"code=$?; find {disk}/feats -name '*.zarr' | wc -l; exit $code"
    )
    done = subprocess.run(
        [*UNSHARE, "sh", "-c", script],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    groups = int(done.stdout.strip().splitlines()[-1])
    if code:
        assert "is too small: " in done.stderr and "--codec int8" in done.stderr
        assert groups == 0
    else:
        assert groups == 8
