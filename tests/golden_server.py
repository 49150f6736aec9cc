"""A real server with the golden checkpoints, and a root of checkpoints that cannot be loaded."""

import json
import shutil
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import moorage
from conftest import GOLDEN
from moorage_server.engine import Bucket
from moorage_server.engine.local import LocalEngine
from server_thread import channel_to, serving

SECRET = "hf_never_to_be_seen_in_any_answer"


class CountingEngine(LocalEngine):
    """Counts loads; each waits for `before_load` first."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.loads = []
        self.before_load = lambda: None

    def load(self, handle, checkpoint, monitor):
        self.loads.append(handle)
        self.before_load()
        return super().load(handle, checkpoint, monitor)


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A root with checkpoints that cannot be loaded."""
    root = tmp_path_factory.mktemp("root")
    for name in ("no_config", "truncated", "wrong_shapes", "quantised", "broken_json", "nan"):
        shutil.copytree(GOLDEN / "llama3", root / name)
    (root / "no_config" / "config.json").unlink()
    data = (GOLDEN / "llama3" / "model.safetensors").read_bytes()
    (root / "truncated" / "model.safetensors").write_bytes(data[: len(data) // 2])
    rewrite(root / "wrong_shapes", hidden_size=80)
    rewrite(root / "quantised", quantization_config={"quant_method": "gptq"})
    (root / "broken_json" / "config.json").write_text("{")
    (root / "nan" / "model.safetensors").write_bytes(with_nan(data, "model.norm.weight"))
    shutil.copytree(GOLDEN / "qwen3_moe", root / "missing_file")
    (root / "missing_file" / "model-00003-of-00007.safetensors").unlink()
    (root / "empty").mkdir()
    (root / "linked").mkdir()
    (root / "linked" / "config.json").symlink_to(__file__)
    return root


def rewrite(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_nan(data: bytes, name: str) -> bytes:
    """The safetensors file with one number of a bfloat16 tensor made a NaN."""
    (size,) = struct.unpack("<Q", data[:8])
    start = 8 + size + json.loads(data[8 : 8 + size])[name]["data_offsets"][0]
    return data[:start] + b"\xc0\x7f" + data[start + 2 :]


@pytest.fixture(scope="module")
def server(bad):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "tp"))
    engine = CountingEngine(mesh, [Bucket(128, 4), Bucket(512, 2)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", SECRET)
        with serving(engine, GOLDEN, bad) as running:
            yield running


@pytest.fixture(scope="module")
def client(server):
    with moorage.connect(server.address) as connected:
        yield connected


@pytest.fixture(scope="module")
def channel(server):
    with channel_to(server.address) as opened:
        yield opened


def load(client, name="llama3", **options):
    """Loads a golden checkpoint, to be computed in float32; it stays for other tests."""
    options = {"model_path": name, "compute_dtype": "float32", **options}
    return client.load(name, source="internal", **options)


def golden_case(name: str, case: str):
    """Rows, their segments, what transformers gives for them, and its own error."""
    with np.load(GOLDEN / name / "golden.npz") as stored:
        tokens, segments = stored[f"{case}/tokens"], stored[f"{case}/segments"]
        real = segments > 0
        pick = {
            key: [row[mask] for row, mask in zip(stored[f"{case}/{key}"], real, strict=True)]
            for key in ("logprobs", "logits", "scores")
            if f"{case}/{key}" in stored
        }
        noise = float(stored[f"{case}/noise"])
    rows = [row[mask] for row, mask in zip(tokens, real, strict=True)]
    ids = [row[mask] for row, mask in zip(segments, real, strict=True)]
    return rows, ids, pick, 3 * noise + 2e-5
