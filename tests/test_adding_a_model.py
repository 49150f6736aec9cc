"""docs/adding-a-model.md, followed step by step on a copy of the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors.numpy import save_file

import moorage_models
from checkpoints import GOLDEN, stored_tensors

PAGE = Path(__file__).parent.parent / "docs" / "adding-a-model.md"
PACKAGE = Path(moorage_models.__file__).parent

SCRIPT = """
import sys
import jax
import numpy as np
from moorage_models import AutoModel, ModelConfig, ModelNaming, ModelSource

folder, golden = sys.argv[1:]
naming = ModelNaming(model_id="port/harbor-1.5-7b")
assert naming.model_config_id == "harbor1p5_7b", naming
assert ModelConfig.harbor1p5_7b().family == "harbor"
mesh = jax.make_mesh((1, 1), ("fsdp", "tp"))
model, _ = AutoModel.from_pretrained(
    "port/harbor-1.5-tiny", mesh, ModelSource.INTERNAL, folder, dtype="float32"
)
with np.load(golden) as values:
    logits = np.asarray(model(values["plain/tokens"])[0])
    error = np.abs(logits - values["plain/logits"]).max()
    assert error <= 3 * values["plain/noise"] + 2e-5, error
"""


def test_the_page_adds_a_family(tmp_path: Path) -> None:
    copy = tmp_path / "moorage_models"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    module = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    (copy / "families" / "harbor.py").write_text(module)
    table = copy / "families" / "__init__.py"
    entered = table.read_text().replace("gemma3, llama3", "gemma3, harbor, llama3")
    assert entered.count("harbor") == 2  # the import and the tuple
    table.write_text(entered)
    assert len(module.splitlines()) + 2 < 100

    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    source = GOLDEN / "qwen3_tied"
    raw = json.loads((source / "config.json").read_text())
    raw |= {"architectures": ["HarborForCausalLM"], "model_type": "harbor"}
    (checkpoint / "config.json").write_text(json.dumps(raw))
    tensors = stored_tensors(source)
    renamed = {k.replace("embed_tokens", "word_embeddings"): v for k, v in tensors.items()}
    save_file(renamed, checkpoint / "model.safetensors", metadata={"format": "pt"})

    command = [sys.executable, "-c", SCRIPT, str(checkpoint), str(source / "golden.npz")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
