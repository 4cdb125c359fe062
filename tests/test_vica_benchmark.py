"""`benchmarks/vica.py` and `gpu_vica.py` at a toy shape: they run, their arms compute the same, and they say what was measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_vica  # noqa: E402
import vica  # noqa: E402
from arms import build  # noqa: E402

SHAPE = {"layers": 4, "hidden": 64, "heads": 4, "mlp": 96, "vocabulary": 200}


def test_arms_compute_the_same():
    """A second question gives the first one's logits, those the oracle's; counted costs are in order; a step trains every weight."""
    decoder = build(**SHAPE, kv_heads=2, dtype=torch.float32)
    setting = vica.Setting(decoder, [0, 2], 3, visual=16, text=12)
    found = vica.prefill(setting, 2, 1, captured=True) | vica.predicted(setting)
    assert found["max_rel_of_oracle"] <= 1e-5
    assert found["max_rel_of_second"] <= 1e-5
    assert found["max_rel_of_captured"] <= 1e-5
    assert found["vs_dense_by_flops"] > 1
    assert 1 < found["reread_vs_text_by_flops"] < found["vs_text_by_flops"]
    for name in ("second", "reread"):
        assert found[f"{name}_vs_first_by_flops"] == pytest.approx(
            found[f"{name}_vs_text_by_flops"] / found["vs_text_by_flops"]
        )
    # A third of the text is the system prompt, which a second question does not read again.
    assert found["second_vs_text_by_flops"] < 0.75 * found["reread_vs_text_by_flops"]
    setting.train(vica.ViCA([0, 2]))()
    assert all(p.grad is not None for name, p in decoder.named_parameters() if "embed_tokens" not in name)
    assert not decoder.training


def test_retained_accuracy_is_read_where_it_was_measured(tmp_path):
    assert vica.retained(tmp_path / "none.json") == {}
    (tmp_path / "some.json").write_text(json.dumps({"figures": {"retained_accuracy": 0.9}}))
    assert vica.retained(tmp_path / "some.json") == {"retained_accuracy": 0.9}


def test_shrunk_on_any_machine(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    script = ROOT / "benchmarks" / "gpu_vica.py"
    command = [sys.executable, script, "--shrink", "--json", tmp_path / "out.json"]
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=250)
    written = json.loads((tmp_path / "out.json").read_text())
    assert {*vica.REACH, *gpu_vica.REACH, "vica_captured_vs_dense_b8_half_the_text"} <= set(written["figures"])
    cell = written["runs"]["grid"]["v16_b2"]
    assert set(cell["prefill_ms"]) == {"dense", "text", "vica", "fastv", "pyramid_drop", "second"}
    assert set(cell["decode_ms_a_token"]) == set(cell["end_to_end_ms"]) == set(cell["prefill_ms"])
    assert cell["encoder_ms"] > 0
