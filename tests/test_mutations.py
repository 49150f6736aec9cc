"""Mistakes that computed wrong numbers in other loaders, planted one by one in a copy.

Each must make the golden tests fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moorage_models

PACKAGE = Path(moorage_models.__file__).parent
TESTS = Path(__file__).parent

#: What goes wrong, where, what stands there, and what stands there instead.
# fmt: off
MISTAKES = [
    ("window off by one", "attention.py", "queries - keys < window", "queries - keys <= window"),
    ("pattern shifted", "config.py", "(self.pattern * repeats)[: self.num_layers]", "(self.pattern * repeats * 2)[1:][: self.num_layers]"),
    ("rotary base ignored", "decoder.py", "config.head_dim, config.rope_theta,", "config.head_dim, 1e4,"),
    ("rotary factor ignored", "ops.py", "if scaling is None:", "if scaling or not scaling:"),
    ("no renormalisation", "moe.py", "if linear.config.norm_topk:", "if False:"),
    ("renormalised always", "moe.py", "if linear.config.norm_topk:", "if True:"),
    ("w for 1 + w", "ops.py", "(1.0 if offset else 0.0)", "0.0"),
    ("exact gelu for tanh", "decoder.py", "jax.nn.gelu, approximate=True", "jax.nn.gelu, approximate=False"),
    ("bias dropped", "decoder.py", "if config.qkv_bias:", "if False:"),
    ("scores' soft-cap dropped", "attention.py", "softcap(scores, config.attn_softcap)", "scores"),
    ("logits' soft-cap dropped", "decoder.py", "config.final_softcap", "None"),
    ("padding seen", "attention.py", " & (others != 0)", " | (others == 0)"),
    ("query scale of the head", "attention.py", "config.query_scale", "config.head_dim**-0.5"),
    ("embedding not scaled", "decoder.py", "if config.embed_scale:", "if False:"),
]
# fmt: on


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake[0])
def test_a_planted_mistake_is_noticed(mistake: tuple[str, ...], tmp_path: Path) -> None:
    _, file, right, wrong = mistake
    copy = tmp_path / "moorage_models"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    text = (copy / file).read_text()
    assert text.count(right) == 1
    (copy / file).write_text(text.replace(right, wrong))
    chosen = "float32_is_within_the_references_own_noise"
    command = [sys.executable, "-m", "pytest", "-x", str(TESTS / "test_decoder.py"), "-k", chosen]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout[-2000:]
    assert "AssertionError" in done.stdout or "assert " in done.stdout
