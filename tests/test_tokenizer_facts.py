"""Whatever a checkpoint says, the description of its model can be sent, and is small."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from checkpoints import GOLDEN, golden_config, open_folder
from hostile import refusal
from moorage.v1 import moorage_pb2 as pb
from moorage_models.errors import Reason
from moorage_models.hf_config import read_config
from moorage_models.naming import preset_for
from moorage_server.convert import to_model
from moorage_server.model import Model, Snapshot


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN / "gemma3_text_mqa", tmp_path / "model")
    return tmp_path / "model"


def said(name: str, value: Mapping[str, Any]) -> Callable[[Path], None]:
    """Writes into one of a checkpoint's files, over what is there."""

    def arrange(folder: Path) -> None:
        path = folder / name
        had = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(had | value))

    return arrange


def many_files(folder: Path) -> None:
    (folder / "tokenizer").mkdir()
    for i in range(1000):
        (folder / "tokenizer" / f"{'n' * 200}{i}").touch()


def name_that_is_no_text(folder: Path) -> None:
    (folder / os.fsdecode(b"tokenizer\xff.json")).touch()


def described(folder: Path) -> pb.Model:
    model = Model("m", open_folder(folder), lambda model: None)
    message = to_model(Snapshot.of(model, (), 0), 0.0)
    assert message.ByteSize() <= 64 << 10
    return message


FAR = 2**40
LIES: Mapping[str, Callable[[Path], None]] = {
    "bos": said("generation_config.json", {"bos_token_id": FAR}),
    "eos": said("generation_config.json", {"eos_token_id": [-FAR, 2**31, -1]}),
    "pad": said("config.json", {"pad_token_id": 2**31}),
    "many eos": said("config.json", {"eos_token_id": list(range(10**9, 10**9 + 10**5))}),
    "a name that is no text": name_that_is_no_text,
    "many files": many_files,
    "a long template": said("tokenizer_config.json", {"chat_template": "x" * (1 << 20)}),
}


@pytest.mark.parametrize("arrange", LIES.values(), ids=LIES)
def test_what_is_said_of_a_tokenizer_can_be_sent(
    arrange: Callable[[Path], None], folder: Path
) -> None:
    arrange(folder)
    facts = described(folder).tokenizer
    assert not {FAR, -FAR, -1, 2**31} & {facts.bos_id, facts.pad_id, *facts.eos_ids}
    assert len(facts.eos_ids) <= 256
    assert len(facts.files) <= 64


def test_what_is_good_is_kept(folder: Path) -> None:
    said("generation_config.json", {"bos_token_id": 2**31 - 1, "eos_token_id": [-1, 0, 7]})(folder)
    name_that_is_no_text(folder)
    (folder / "tokenizer.json").touch()
    (folder / "chat_template.jinja").touch()
    facts = described(folder).tokenizer
    assert facts.bos_id == 2**31 - 1
    assert list(facts.eos_ids)[-2:] == [0, 7]
    assert list(facts.files) == ["chat_template.jinja", "tokenizer.json"]
    assert facts.has_chat_template


@pytest.mark.parametrize("key", ["vocab_size", "max_position_embeddings"])
def test_a_number_that_does_not_fit_is_refused(key: str, folder: Path) -> None:
    said("config.json", {key: 2**31})(folder)
    assert refusal(lambda: open_folder(folder)).reason is Reason.CHECKPOINT_CORRUPT


def test_more_parameters_than_can_be_counted_are_refused(folder: Path) -> None:
    large = 2**31 - 2
    said("config.json", {"hidden_size": large, "intermediate_size": large})(folder)
    assert "2^56 parameters" in refusal(lambda: open_folder(folder)).message


def test_a_difference_from_the_preset_is_short() -> None:
    layers = {"num_hidden_layers": 2000, "layer_types": ["full_attention"] * 2000}
    config = read_config(golden_config("gemma3_text_mqa") | layers)
    found = config.differences(preset_for("gemma3_1b"))
    assert any(text.startswith(f"pattern: {'G' * 200}, ") for text in found)
    assert max(map(len, found)) < 500
