"""Faults of files: wrong results in silence, half-written and damaged artefacts."""

import pytest

from helpers import WorkbookError, checkpoint


@pytest.mark.fault("a safetensors file that was cut off")
def test_a_truncated_shard(tiny_fp8, tmp_path, happened):
    whole = next(tiny_fp8.path.glob("*.safetensors")).read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1000])
    with pytest.raises(WorkbookError, match="its header announces") as said:
        checkpoint.census(tmp_path)
    happened(said.value)
