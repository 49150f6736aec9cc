"""The command line against a server in this process that answers by script."""

import importlib.machinery
import io
import json
import os
import socket
import subprocess
import sys
import types
from datetime import UTC, datetime, timedelta

import grpc
import numpy as np
import pytest

from moorage import cli, commands, render
from moorage.v1 import moorage_pb2 as pb
from test_client import CONFIG, MODEL, fail, forward, load_model, parts, serving

MODELS = pb.ListModelsResponse(models=[MODEL])


@pytest.fixture
def run(capsys):
    """Runs one command; gives its exit code, stdout and stderr."""

    def run(*argv):
        code = cli.main(argv)
        return code, *capsys.readouterr()

    return run


def test_resolve(run):
    response = pb.ResolveNameResponse(
        name=pb.ModelName(model_id="gemma2_2b", model_name="gemma-2-2b"),
        checked=["name", "preset"],
        loadable=True,
        config=CONFIG,
        device_bytes=[pb.DeviceBytes(device_id=0, bytes=3 << 30)],
        budget=pb.BudgetEstimate(
            needed_bytes=4 << 30, free_bytes=1 << 30, fits=True, evicted=["c3"]
        ),
    )
    with serving(ResolveName=lambda *_: response) as fake:
        code, out, err = run(
            "resolve", "gemma2_2b", "--source", "GCS", "--path", "gs://b", "--estimate",
            "--server", fake.address,
        )  # fmt: skip
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "model id       gemma2_2b",
        "name           gemma-2-2b",
        "config         gemma2, 26 layers, 2,614,341,888 parameters",
        "checked        name, preset",
        "loadable       yes",
        "device memory  3.0 GiB on one device",
        "needed         4.0 GiB on each device",
        "free           1.0 GiB on each device",
        "fits           yes, after evicting c3",
    ]
    assert fake.requests[0] == pb.ResolveNameRequest(
        model=pb.ModelSpec(
            model_id="gemma2_2b", source=pb.MODEL_SOURCE_GCS, model_path="gs://b", revision=""
        ),
        check_source=True,
        estimate=True,
    )


@pytest.mark.parametrize(("fits", "text"), [(True, "fits      yes"), (False, "fits      no")])
def test_resolve_says_whether_a_model_fits_as_it_is(run, fits, text):
    response = pb.ResolveNameResponse(loadable=True, budget=pb.BudgetEstimate(fits=fits))
    with serving(ResolveName=lambda *_: response) as fake:
        _, out, _ = run("resolve", "gemma2_2b", "--estimate", "--server", fake.address)
    assert text in out.splitlines()


def test_resolve_of_what_cannot_be_loaded_exits_with_1(run):
    response = pb.ResolveNameResponse(reason="CONFIG_UNKNOWN", message="try gemma2_2b")
    with serving(ResolveName=lambda *_: response) as fake:
        code, out, _ = run("resolve", "gemma9", "--json", "--server", fake.address)
    assert code == 1
    found = json.loads(out)
    assert (found["loadable"], found["reason"], found["config"]) == (False, "CONFIG_UNKNOWN", None)


def test_load(run):
    with serving(LoadModel=load_model) as fake:
        code, out, err = run(
            "load", "google/gemma-2-2b", "--source", "kaggle", "--dtype", "bfloat16",
            "--compute-dtype", "float32", "--revision", "2", "--server", fake.address,
        )  # fmt: skip
    assert (code, err) == (0, "")
    assert "handle         a1b2\n" in out
    assert "loaded in      12 s\n" in out
    assert fake.requests[0].model == pb.ModelSpec(
        model_id="google/gemma-2-2b",
        source=pb.MODEL_SOURCE_KAGGLE,
        revision="2",
        dtype="bfloat16",
        compute_dtype="float32",
    )


def test_load_json(run):
    with serving(LoadModel=load_model) as fake:
        _, out, _ = run("load", "google/gemma-2-2b", "--json", "--server", fake.address)
    found = json.loads(out)
    assert fake.requests[0].model.source == pb.MODEL_SOURCE_HUGGINGFACE
    assert found["handle"] == "a1b2"
    assert found["device_bytes"] == {"0": 3221225472, "1": 7}
    assert found["load_time"] == "2026-01-02T03:04:05+00:00"
    assert found["config"]["num_layers"] == 26
    assert "client" not in found


def leased(model: pb.Model, **seconds_left: float) -> pb.Model:
    """The same model with leases, by client."""
    model = pb.Model.FromString(model.SerializeToString())
    for client, seconds in seconds_left.items():
        model.leases.add(client=client).time_left.FromMilliseconds(int(seconds * 1000))
    return model


PS = """\
HANDLE  MODEL              STATE        DTYPE  EACH/ALL     LEASES     USED   RUN  FWDS    TOKENS
a1b2    google/gemma-2-2b  ready        bf16   3.0/3.0 GiB  2          -        0  4       99
c3                         loading 43%         -            -          -        0  0       0
a1b2    google/gemma-2-2b  ready        bf16   3.0/3.0 GiB  run7 42 s  2 min    3  104.2k  123.5M
"""


def test_ps(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    loading = pb.Model(handle="c3", state=pb.MODEL_STATE_LOADING)
    loading.progress.stages.add(stage="place", done=43, total=100)
    busy = leased(MODEL, run7=42.4)
    busy.running_count, busy.forward_count, busy.token_count = 3, 104_233, 123_456_789
    busy.last_use_time.FromDatetime(datetime.now(UTC) - timedelta(seconds=125))
    models = [leased(MODEL, a=1, b=2), loading, busy]
    with serving(ListModels=lambda *_: pb.ListModelsResponse(models=models)) as fake:
        code, out, _ = run("ps", "--server", fake.address)
    assert code == 0
    assert out == PS


def no_terminal(_):
    raise OSError("not a terminal")


@pytest.mark.parametrize(("columns", "width"), [("", 100), ("90", 90), ("20", 84), ("300", 130)])
def test_ps_is_as_wide_as_the_terminal(run, monkeypatch, columns, width):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(os, "get_terminal_size", no_terminal)
    model = leased(MODEL, somebody_with_a_long_name=42.4)
    model.handle = "7b05dfd52e9b"
    model.spec.model_id = "meta-llama/Llama-3.1-8B-Instruct"
    with serving(ListModels=lambda *_: pb.ListModelsResponse(models=[model])) as fake:
        _, out, _ = run("ps", "--server", fake.address)
    title, line = out.splitlines()
    assert len(title) == width
    assert "B-Instruct" in line or width == 84
    assert "me 42 s" in line


def test_ps_json_has_everything(run):
    model = leased(MODEL, run7=42.5)
    model.running_count, model.reserved_bytes = 3, 5
    model.history.add(state=pb.MODEL_STATE_READY).time.FromSeconds(0)
    with serving(ListModels=lambda *_: pb.ListModelsResponse(models=[model])) as fake:
        (found,) = json.loads(run("ps", "--json", "--server", fake.address)[1])
    assert found["leases"] == [{"id": "", "client": "run7", "seconds": 0.0, "seconds_left": 42.5}]
    assert found["history"] == {"ready": "1970-01-01T00:00:00+00:00"}
    assert (found["running_count"], found["reserved_bytes"]) == (3, 5)


def test_ps_of_an_empty_server(run, monkeypatch):
    with serving(ListModels=lambda *_: pb.ListModelsResponse()) as fake:
        monkeypatch.setenv("MOORAGE_SERVER", fake.address)
        assert run("ps", "--json")[1] == "[]\n"
        assert len(run("ps")[1].splitlines()) == 1


IDS = "[[2, 651, 5277], [2, 1841]]"


@pytest.mark.parametrize("name", ["a1b2", "google/gemma-2-2b"])
def test_forward(run, name):
    with serving(ListModels=lambda *_: MODELS, Forward=forward) as fake:
        code, out, err = run("forward", name, "--ids", IDS, "--server", fake.address)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "ROW  POSITION    ID  LOGPROBS",
        "  0         0     2       nan",
        "  0         1   651   -1.5000",
        "  0         2  5277   -0.2500",
        "  1         0     2       nan",
        "  1         1  1841   -3.0000",
    ]


def test_forward_reads_ids_from_stdin_and_prints_json(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(IDS))
    with serving(ListModels=lambda *_: MODELS, Forward=forward) as fake:
        _, out, _ = run("forward", "a1b2", "--ids", "-", "--json", "--server", fake.address)
    found = json.loads(out)
    assert found["rows"] == [[2, 651, 5277], [2, 1841]]
    assert found["tokens"] is None
    assert found["scores"]["tensors"] == {"logprobs": [[None, -1.5, -0.25], [None, -3.0]]}
    assert found["scores"]["times"]["execute"] == 1.75
    assert found["scores"]["semantics"]["first_token"] == "nan"


TOP_K = """\
ROW  POSITION    ID  LOGPROBS  TOP_K_IDS  TOP_K_LOGPROBS
  0         1   651   -1.5000  7 651      -0.5000 -1.5000
  0         2  5277   -0.2500  5277 9     -0.2500 -4.0000
  1         1  1841   -3.0000  2 3        -1.0000 -2.0000

ROW   SCORE
  0  0.2500
  1  0.5000
  1  0.7500

logits: float32 [2, 33], [1, 33]; --json prints it
"""


def test_forward_of_other_outputs(run):
    answer = parts(
        lengths=(2, 1),
        logprobs=np.array([-1.5, -0.25, -3.0], np.float32),
        top_k_ids=np.array([[7, 651], [5277, 9], [2, 3]], np.int32),
        top_k_logprobs=-np.array([[0.5, 1.5], [0.25, 4.0], [1.0, 2.0]], np.float32),
        score=np.array([0.25, 0.5, 0.75], np.float32),
        logits=np.zeros((3, 33), np.float32),
    )
    answer[0].header.tensors[3].row_lengths[:] = [1, 2]
    with serving(ListModels=lambda *_: MODELS, Forward=lambda *_: iter(answer)) as fake:
        code, out, err = run(
            "forward", "a1b2", "--ids", IDS, "--outputs", "logprobs, score,logits",
            "--top-k", "2", "--temperature", "0.5", "--from-position", "1",
            "--server", fake.address,
        )  # fmt: skip
    request = fake.requests[1]
    assert list(request.outputs.names) == ["logprobs", "score", "logits", "top_k"]
    assert (request.outputs.top_k, request.semantics.temperature) == (2, 0.5)
    assert list(request.from_positions) == [1, 1]
    assert (code, err) == (0, "")
    assert out == TOP_K


def test_forward_of_what_has_no_positions(run):
    answer = parts(score=np.array([[1, 2], [3, 4]], np.float32), lengths=(1, 1))
    with serving(ListModels=lambda *_: MODELS, Forward=lambda *_: iter(answer)) as fake:
        _, out, _ = run(
            "forward", "a1b2", "--ids", IDS, "--outputs", "score", "--server", fake.address
        )
    assert out.splitlines() == ["ROW  SCORE", "  0  1.0000 2.0000", "  1  3.0000 4.0000"]


@pytest.mark.parametrize("suffix", ["", "tokenizer.json"])
def test_forward_of_text(run, tmp_path, suffix):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"[UNK]": 0, "a": 5, "b": 6, "\n": 7}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "removed")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with serving(ListModels=lambda *_: MODELS, Forward=forward) as fake:
        code, out, _ = run(
            "forward", "a1b2", "--text", "a b \n", "--text", "b a", "--server", fake.address,
            "--tokenizer", str(tmp_path / suffix),
        )  # fmt: skip
    assert code == 0
    assert list(fake.requests[1].token_ids) == [5, 6, 7, 6, 5]
    assert out.splitlines()[:4] == [
        "ROW  POSITION  TOKEN  ID  LOGPROBS",
        '  0         0  "a"     5       nan',
        '  0         1  "b"     6   -1.5000',
        '  0         2  "\\n"    7   -0.2500',
    ]


def test_forward_of_text_needs_the_tokenizers_package(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with serving(ListModels=lambda *_: MODELS) as fake:
        code, out, err = run("forward", "a1b2", "--text", "a", "--server", fake.address)
    assert (code, out) == (1, "")
    assert 'pip install "moorage[text]"' in err


def test_forward_of_text_without_a_tokenizer(run, tmp_path):
    pytest.importorskip("tokenizers")
    with serving(ListModels=lambda *_: MODELS) as fake:
        code, _, err = run(
            "forward", "a1b2", "--text", "a", "--tokenizer", str(tmp_path), "--server", fake.address
        )
    assert code == 1
    assert "--tokenizer" in err


@pytest.mark.parametrize(
    ("models", "name", "message"),
    [
        ([MODEL], "c3", "loaded: a1b2 (google/gemma-2-2b)"),
        ([], "a1b2", "loaded: none"),
        ([MODEL, MODEL], "google/gemma-2-2b", "name one of a1b2, a1b2"),
    ],
)
def test_a_model_that_is_not_told_apart(run, models, name, message):
    with serving(ListModels=lambda *_: pb.ListModelsResponse(models=models)) as fake:
        code, _, err = run("unload", name, "--server", fake.address)
    assert code == 1
    assert message in err


def test_unload(run):
    freed = pb.UnloadModelResponse(device_bytes=MODEL.device_bytes)
    with serving(ListModels=lambda *_: MODELS, UnloadModel=lambda *_: freed) as fake:
        _, out, _ = run("unload", "google/gemma-2-2b", "--server", fake.address)
        _, document, _ = run("unload", "a1b2", "--json", "--server", fake.address)
    assert out == (
        "google/gemma-2-2b (a1b2) is unloaded; freed 3.0 GiB on 2 devices, at most 3.0 GiB on one\n"
    )
    assert json.loads(document) == {"handle": "a1b2", "device_bytes": {"0": 3221225472, "1": 7}}
    assert not fake.requests[1].force


def test_unload_of_what_others_lease(run):
    def unload(request, context):
        if not request.force:
            fail(context, grpc.StatusCode.FAILED_PRECONDITION, "leased by run 7", "MODEL_LEASED")
        return pb.UnloadModelResponse()

    with serving(ListModels=lambda *_: MODELS, UnloadModel=unload) as fake:
        refused = run("unload", "a1b2", "--server", fake.address)
        code, out, _ = run("unload", "a1b2", "--force", "--server", fake.address)
    assert refused == (1, "", "moorage: MODEL_LEASED: leased by run 7\n")
    assert (code, out) == (0, "google/gemma-2-2b (a1b2) is unloaded; freed 0 B\n")


def test_status(run):
    response = pb.GetServerInfoResponse(
        version="0.1.0",
        platform="cpu",
        devices=[pb.Device(id=0, kind="cpu", model_bytes=1536)],
        mesh=[pb.MeshAxis(name="fsdp", size=1), pb.MeshAxis(name="tp", size=8)],
        buckets=[pb.Bucket(rows=4, length=512)],
        limits=pb.Limits(
            max_message_bytes=4 << 20,
            max_sequence_length=512,
            max_queued_tokens=65_536,
            answer_retention={"seconds": 90},
            max_retained_bytes=1 << 30,
        ),
        profiles=[
            pb.OutputProfile(outputs=["logits"]),
            pb.OutputProfile(outputs=["logprobs", "top_k"], size=32),
        ],
        memory=pb.Memory(
            budget_bytes=8 << 30,
            reserved_bytes=5 << 20,
            live_bytes=[pb.DeviceBytes(device_id=0, bytes=2560)],
            host_pool_bytes=3 << 10,
        ),
    )
    with serving(GetServerInfo=lambda *_: response) as fake:
        code, out, _ = run("status", "--server", fake.address)
        _, document, _ = run("status", "--json", "--server", fake.address)
    assert code == 0
    assert "mesh              fsdp=1, tp=8\n" in out
    assert "programs          logits, logprobs+top_k of 32\n" in out
    assert "largest request   4.0 MiB\n" in out
    assert "may wait          65.5k tokens\n" in out
    assert "answers are kept  for 1 min 30 s, 1.0 GiB at most\n" in out
    assert "models may take   8.0 GiB of each device\n" in out
    assert "reserved          5.0 MiB of each device\n" in out
    assert "host memory kept  3.0 KiB\n" in out
    assert out.endswith("DEVICE  KIND  MODELS   ARRAYS\n     0  cpu   1.5 KiB  2.5 KiB\n")
    assert json.loads(document)["buckets"] == [[4, 512]]


def test_an_error_is_one_line_on_stderr(run):
    def failing(request, context):
        fail(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "too much is waiting", "QUEUE_FULL")

    with serving(ListModels=failing) as fake:
        code, out, err = run("ps", "--json", "--server", fake.address)
    assert (code, out, err) == (1, "", "moorage: QUEUE_FULL: too much is waiting\n")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["moor"],
        ["resolve"],
        ["load", "id", "--source", "s3"],
        ["forward", "a1b2"],
        ["forward", "a1b2", "--ids", "[[1"],
        ["forward", "a1b2", "--ids", "[[1]]", "--text", "a"],
    ],
)
def test_wrong_usage_exits_with_2(run, argv):
    with pytest.raises(SystemExit) as caught:
        run(*argv)
    assert caught.value.code == 2


def test_interrupt_exits_with_130(run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "ps", interrupted)
    monkeypatch.setattr(cli, "connect", interrupted)
    code, out, err = run("ps")
    assert (code, out, err) == (130, "", "moorage: interrupted\n")


def test_serve_hands_its_arguments_to_the_server(run, monkeypatch):
    seen = []
    for name in ("moorage_server", "moorage_server.main", "jax"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    module = sys.modules["moorage_server.main"]
    module.main = lambda argv: seen.append(argv) or 3
    assert run("serve", "--listen", "127.0.0.1:1", "--help")[0] == 3
    assert seen == [["--listen", "127.0.0.1:1", "--help"]]


def test_serve_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    code, out, err = run("serve")
    assert (code, out) == (2, "")
    assert "jax" in err
    assert 'pip install "moorage[server]"' in err


def test_the_reader_of_a_pipe_may_leave():
    code = "import sys; from moorage import cli; sys.exit(cli.main(sys.argv[1:]))"
    read, write = os.pipe()
    os.close(read)
    with serving(ListModels=lambda *_: MODELS) as fake:
        command = [sys.executable, "-c", code, "ps", "--server", fake.address]
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_grpc_writes_nothing_between_the_lines_of_a_terminal():
    """A server that breaks the connection off is told of by the error alone."""
    settings, goaway = "000000 04 00 00000000", "000008 07 00 00000000 00000000 00000002"
    code = "import moorage; moorage.connect({!r}, timeout=1).info()"
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        command = [sys.executable, "-c", code.format(address)]
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        connection, _ = server.accept()
        connection.sendall(bytes.fromhex(settings + goaway))
        err = child.communicate()[1]
        connection.close()
    assert "moorage.errors." in err
    assert "goaway" not in err


def test_version(run, capsys):
    with pytest.raises(SystemExit):
        run("--version")
    assert capsys.readouterr().out == "moorage 0.1.0\n"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (5 << 20, "5.0 MiB"),
        (3435973837, "3.2 GiB"),
        (2 << 40, "2.0 TiB"),
        (3 << 50, "3072.0 TiB"),
    ],
)
def test_sizes(count, text):
    assert render.size(count) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (3656 << 20, 29248 << 20, "3.6/28.6 GiB"),
        (512 << 20, 4 << 30, "0.5/4.0 GiB"),
        (1 << 20, 3 << 20, "1.0/3.0 MiB"),
        (5 << 20, 5 << 20, "5.0 MiB"),
        (0, 0, "0 B"),
    ],
)
def test_a_part_is_written_in_the_unit_of_the_whole(part, whole, text):
    assert render.sizes(part, whole) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (9_999, "9999"),
        (10_000, "10.0k"),
        (104_233, "104.2k"),
        (123_456_789, "123.5M"),
        (5 * 10**12, "5.0T"),
        (10**16, "10000.0T"),
    ],
)
def test_counts(number, text):
    assert render.count(number) == text


def test_a_duration_in_one_unit():
    assert render.duration(125, units=1) == "2 min"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (9.94, "9.9 s"),
        (42.4, "42 s"),
        (60, "1 min"),
        (125, "2 min 5 s"),
        (3599.7, "1 h"),
        (3 * 86400 + 4 * 3600 + 59 * 60, "3 d 4 h"),
        (86400 + 59 * 60, "1 d"),
    ],
)
def test_durations(seconds, text):
    assert render.duration(seconds) == text


def test_what_is_not_finite_is_null():
    assert render.document({"a": [float("nan"), float("-inf"), 1.5]}) == '{"a": [null, null, 1.5]}'
