"""docs/kubernetes/*.yaml: fields that Kubernetes and LeaderWorkerSet have, and words that the programs take."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
jsonschema = pytest.importorskip("jsonschema")

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "kubernetes"
TEXT = {"type": "string"}
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
LABELS = {"type": "object", "additionalProperties": TEXT, "minProperties": 1}
WHOLE = {"type": "integer", "minimum": 1}


def record(needed: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An object with these fields and no other."""
    fields = {**needed, **more}
    return {"type": "object", "properties": fields, "required": list(needed), "additionalProperties": False}


def every(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


FROM_FIELD = record({"fieldRef": record({"fieldPath": {"enum": ["status.podIP", "metadata.name"]}})})
VARIABLE = {"oneOf": [record({"name": TEXT, "value": TEXT}), record({"name": TEXT, "valueFrom": FROM_FIELD})]}
PROBE = record({"httpGet": record({"path": TEXT, "port": PORT}), "periodSeconds": WHOLE})
LIFECYCLE = record({"preStop": record({"exec": record({"command": every(TEXT)})})})
CONTAINER = record(
    {
        "name": NAME,
        "image": TEXT,
        "command": every(TEXT),
        "args": every(TEXT),
        "ports": every(record({"containerPort": PORT})),
    },
    env=every(VARIABLE),
    lifecycle=LIFECYCLE,
    readinessProbe=PROBE,
    resources=record({"limits": {"type": "object", "additionalProperties": TEXT}}),
    volumeMounts=every(record({"name": NAME, "mountPath": TEXT})),
)
MEMORY = record({"medium": {"const": "Memory"}, "sizeLimit": TEXT})
VOLUME = record({"name": NAME, "emptyDir": {"oneOf": [MEMORY, record({})]}})
USER = record({"runAsUser": WHOLE, "runAsGroup": WHOLE, "fsGroup": WHOLE})
ROLLING = record(
    {
        "type": {"const": "RollingUpdate"},
        "rollingUpdate": record({"maxSurge": WHOLE, "maxUnavailable": {"type": "integer", "minimum": 0}}),
    }
)
POD = record(
    {
        "metadata": record({"labels": LABELS}),
        "spec": record(
            {"containers": every(CONTAINER)},
            volumes=every(VOLUME),
            shareProcessNamespace={"type": "boolean"},
            securityContext=USER,
            terminationGracePeriodSeconds=WHOLE,
        ),
    }
)
KINDS = {
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): record(
        {
            "replicas": WHOLE,
            "leaderWorkerTemplate": record(
                {"workerTemplate": POD},
                size=WHOLE,
                restartPolicy={"enum": ["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]},
                leaderTemplate=POD,
            ),
        },
        startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
    ),
    ("apps/v1", "Deployment"): record(
        {"replicas": WHOLE, "selector": record({"matchLabels": LABELS}), "template": POD}, strategy=ROLLING
    ),
    ("v1", "Service"): record({"selector": LABELS, "ports": every(record({"port": PORT, "targetPort": PORT}))}),
}


def read(name: str) -> dict[str, dict[str, Any]]:
    """Kind and name to what stands there."""
    return {
        f"{each['kind']}/{each['metadata']['name']}": each for each in yaml.safe_load_all((FOLDER / name).read_text())
    }


@pytest.fixture(scope="module")
def documents() -> dict[str, dict[str, Any]]:
    return read("disaggregated.yaml")


@pytest.fixture(scope="module")
def apart() -> dict[str, dict[str, Any]]:
    return read("ranks_apart.yaml")


def container(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    pod = spec["leaderWorkerTemplate"]["workerTemplate"] if "leaderWorkerTemplate" in spec else spec["template"]
    [only] = pod["spec"]["containers"]
    return dict(only)


@pytest.mark.parametrize(("name", "count"), [("disaggregated.yaml", 4), ("ranks_apart.yaml", 2)])
def test_fields(name: str, count: int) -> None:
    documents = read(name)
    assert len(documents) == count
    for document in documents.values():
        head = {"apiVersion": TEXT, "kind": TEXT, "metadata": record({"name": NAME})}
        spec = KINDS[document["apiVersion"], document["kind"]]
        jsonschema.validate(document, record({**head, "spec": spec}), jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    ("where", "value"), [("size", 0), ("restartPolicy", "Always"), ("restartPolcy", "None"), ("workerTemplate", {})]
)
def test_fields_that_there_are_not(where: str, value: object, documents: dict[str, dict[str, Any]]) -> None:
    """The schema is one that refuses."""
    spec = json.loads(json.dumps(documents["LeaderWorkerSet/prefill"]["spec"]))
    spec["leaderWorkerTemplate"][where] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(spec, KINDS["leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"])


@pytest.mark.parametrize(("name", "role", "size"), [("prefill", "kv_producer", 4), ("decode", "kv_consumer", 4)])
def test_words_of_vllm(name: str, role: str, size: int, documents: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """As many ranks, or shards, as GPUs; and the side channel at an address that other pods reach."""
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    this = container(documents[f"LeaderWorkerSet/{name}"])
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    assert this["command"][:2] == ["vllm", "serve"] and this["command"][2]
    # A folder, since vLLM looks for the model's name in its cache where it is told to stay offline.
    options = EngineArgs.from_cli_args(parser.parse_args(["--model", str(tmp_path), *this["args"]]))
    assert options.kv_transfer_config.kv_connector == "NixlConnector" and options.kv_transfer_config.kv_role == role
    assert (options.distributed_executor_backend == "dwdp") == (name == "prefill")
    assert options.data_parallel_size * options.tensor_parallel_size == size
    assert this["resources"]["limits"]["nvidia.com/gpu"] == str(size)
    assert this["env"][0] == {
        "name": "VLLM_NIXL_SIDE_CHANNEL_HOST",
        "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}},
    }


def test_the_router_names_every_pod(documents: dict[str, dict[str, Any]]) -> None:
    words = container(documents["Deployment/router"])["args"]
    for name in ("prefill", "decode"):
        replicas = documents[f"LeaderWorkerSet/{name}"]["spec"]["replicas"]
        expected = [f"--{name}=http://{name}-{i}.{name}:8000" for i in range(replicas)]
        assert [word for word in words if word.startswith(f"--{name}=")] == expected
    router = documents["Deployment/router"]["spec"]
    assert router["template"]["metadata"]["labels"] == router["selector"]["matchLabels"]
    assert documents["Service/router"]["spec"]["selector"] == router["selector"]["matchLabels"]
    # Its /health is bad as soon as one server is gone.
    assert container(documents["Deployment/router"])["readinessProbe"]["httpGet"]["path"] == "/readiness"


@pytest.mark.skipif(importlib.util.find_spec("vllm_router") is None, reason="needs the extra `disaggregated`")
def test_words_of_the_router(documents: dict[str, dict[str, Any]]) -> None:
    from vllm_router.launch_router import parse_router_args

    told = parse_router_args(container(documents["Deployment/router"])["args"])
    assert told.vllm_pd_disaggregation and told.policy == "round_robin"
    assert len(told.prefill_urls) == len(told.decode_urls) == 2
    assert (told.host, told.port) == ("0.0.0.0", 8000)
    assert told.health_check_interval_secs == 5


def replaced(words: list[str], env: list[dict[str, str]]) -> list[str]:
    """Words as Kubernetes gives them to a container: with the values of its variables in them."""
    for variable in env:
        words = [word.replace(f"$({variable['name']})", variable["value"]) for word in words]
    return words


def test_ranks_in_one_pod(apart: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """Each at a port of its own with cores of its own; all of one group, which meet in a folder of the pod."""
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_dwdp.config import DwdpConfig

    spec = apart["Deployment/moe"]["spec"]["template"]["spec"]
    assert spec["shareProcessNamespace"]
    *ranks, router = spec["containers"]
    parser, cores = make_arg_parser(FlexibleArgumentParser()), set()
    for rank, this in enumerate(ranks):
        env = {variable["name"]: variable["value"] for variable in this["env"]}
        # A folder, since vLLM looks for the model's name in its cache where it is told to stay offline.
        told = parser.parse_args(["--model", str(tmp_path), *replaced(this["args"], this["env"])])
        options = EngineArgs.from_cli_args(told)
        assert options.distributed_executor_backend == "dwdp" and options.data_parallel_size == 1
        settings = options.additional_config["dwdp"]
        config = DwdpConfig.parse(settings)
        assert (config.group, config.rank, config.ranks) == ("moe", rank, len(ranks))
        assert {"name": "meet", "mountPath": settings["meet"]} in this["volumeMounts"]
        assert f"http://127.0.0.1:{told.port}" in router["args"] and this["ports"] == [{"containerPort": told.port}]
        first, last = map(int, env["VLLM_CPU_OMP_THREADS_BIND"].split("-"))
        assert last + 1 - first == int(this["resources"]["limits"]["cpu"]) and not cores & set(range(first, last + 1))
        cores |= set(range(first, last + 1))
        # One dead rank takes the pod out of no service, and what is asked already ends before a rank does.
        assert "readinessProbe" not in this
        waits = [int(each["lifecycle"]["preStop"]["exec"]["command"][1]) for each in (router, this)]
        assert waits[0] < waits[1] and waits[1] + options.shutdown_timeout < spec["terminationGracePeriodSeconds"]
    assert {mount["name"] for this in ranks for mount in this["volumeMounts"]} == {
        each["name"] for each in spec["volumes"]
    }


@pytest.mark.skipif(importlib.util.find_spec("vllm_router") is None, reason="needs the extra `disaggregated`")
def test_words_of_the_router_of_ranks(apart: dict[str, dict[str, Any]]) -> None:
    """Those of examples/behind_router.py."""
    from vllm_router.launch_router import parse_router_args

    sys.path.insert(0, str(FOLDER.parents[1] / "examples"))
    from behind_router import WORDS

    spec = apart["Deployment/moe"]["spec"]
    *ranks, router = spec["template"]["spec"]["containers"]
    told, ours = parse_router_args(router["args"]), parse_router_args(WORDS)
    assert (told.host, told.port, len(told.worker_urls)) == ("0.0.0.0", 8000, len(ranks))
    changed = {name: value for name, value in vars(ours).items() if value != getattr(parse_router_args([]), name)}
    assert changed and {name: getattr(told, name) for name in changed} == changed
    assert router["readinessProbe"]["httpGet"] == {"path": "/readiness", "port": told.port}
    assert spec["template"]["metadata"]["labels"] == spec["selector"]["matchLabels"]
    assert apart["Service/moe"]["spec"]["selector"] == spec["selector"]["matchLabels"]
    assert apart["Service/moe"]["spec"]["ports"][0]["targetPort"] == told.port
