"""`md4 render kuberay`: manifests that the schemas take, that say what the configuration says, and one message else."""

import copy
import re
import sys
from datetime import UTC, datetime
from typing import Any

import pytest
import yaml

from infra.kuberay.examples.__main__ import COMMANDS, CRON, FOLDER, NIGHTLY, cron, write
from infra.kuberay.options import Options
from infra.render import render
from md4.errors import UserError
from orchestration.cli import app, main
from orchestration.config import load, read_yaml, validate
from orchestration.cron import Store
from orchestration.jobs import Job
from orchestration.memory_plan import read_size
from orchestration.suites.settings import suite_names
from tests.infra.schemas import check, pod_templates

IMAGE = "registry.example/md4:0.1.0"


def rendered(*overrides: str, preset: str = "pydocs-tiny", **options: Any) -> list[dict[str, Any]]:
    """The objects of a manifest; a CPU job on a volume where nothing else is said."""
    given: dict[str, Any] = {"kind": "job", "image": IMAGE, "storage": "pvc:md4"} | options
    config = load(preset, ["train.device=cpu", *overrides])
    return list(yaml.safe_load_all(render(config, Options(**given), ["render"])))


def one(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next(item for item in objects if item["kind"] == kind)


def cluster_of(objects: list[dict[str, Any]]) -> dict[str, Any]:
    found = next(item for item in objects if item["apiVersion"] == "ray.io/v1")["spec"]
    return found.get("rayClusterSpec") or found.get("rayClusterConfig") or found


def group_of(objects: list[dict[str, Any]]) -> dict[str, Any]:
    [group] = cluster_of(objects)["workerGroupSpecs"]
    return group


def container_of(template: dict[str, Any]) -> dict[str, Any]:
    [container] = template["spec"]["containers"]
    return container


@pytest.fixture(scope="module")
def examples() -> dict[str, list[dict[str, Any]]]:
    """All that have pods of workers."""
    return {name: list(yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text())) for name in COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_example_is_what_its_command_writes_now(name, tmp_path, capsys):
    write(name, tmp_path / "now.yaml")
    now = (tmp_path / "now.yaml").read_text()
    assert now == (FOLDER / f"{name}.yaml").read_text(), "write them again: python -m infra.kuberay.examples"
    assert now.startswith(f"# md4 render kuberay {COMMANDS[name]}\n")


@pytest.mark.parametrize("name", [*COMMANDS, "cron"])
def test_an_example_satisfies_the_schemas(name):
    documents = list(yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text()))
    assert documents
    for document in documents:
        check(document)


def _misspelt_in_the_cluster(tree):
    tree["spec"]["rayClusterSpec"]["headGroupSpecs"] = tree["spec"]["rayClusterSpec"].pop("headGroupSpec")


def _misspelt_in_the_job(tree):
    tree["spec"]["ttlSecondsAfterFinish"] = tree["spec"].pop("ttlSecondsAfterFinished")


def _misspelt_in_a_container(tree):
    tree["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMount"] = []


def _misspelt_in_the_submitter(tree):
    tree["spec"]["submitterPodTemplate"]["spec"]["restartsPolicy"] = "Never"


def _text_for_a_number(tree):
    tree["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"] = "four"


def _number_for_a_text(tree):
    tree["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def _no_name_of_the_group(tree):
    del tree["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["groupName"]


def _no_containers(tree):
    del tree["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]


def _unknown_mode(tree):
    tree["spec"]["rayClusterSpec"]["authOptions"]["mode"] = "tokens"


def _memory_that_is_none(tree):
    container = tree["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    container["resources"]["limits"]["memory"] = "4 GB"


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (_misspelt_in_the_cluster, "headGroupSpecs"),
        (_misspelt_in_the_job, "ttlSecondsAfterFinish"),
        (_misspelt_in_a_container, "volumeMount"),
        (_misspelt_in_the_submitter, "restartsPolicy"),
        (_text_for_a_number, "four"),
        (_number_for_a_text, "num-cpus"),
        (_no_name_of_the_group, "groupName"),
        (_no_containers, "containers"),
        (_unknown_mode, "tokens"),
        (_memory_that_is_none, "4 GB"),
    ],
)
def test_a_wrong_manifest_fails(examples, break_it, said):
    tree = copy.deepcopy(one(examples["multi-node"], "RayJob"))
    break_it(tree)
    with pytest.raises(AssertionError, match=re.escape(said)):
        check(tree)


def test_a_wrong_config_map_fails(examples):
    tree = copy.deepcopy(one(examples["small"], "ConfigMap"))
    tree["data"]["steps"] = 800
    with pytest.raises(AssertionError, match="data"):
        check(tree)


def test_elastic_workers_are_pods_that_come_and_go(examples):
    group, spec = group_of(examples["multi-node"]), cluster_of(examples["multi-node"])
    assert [group["minReplicas"], group["replicas"], group["maxReplicas"]] == [2, 2, 4]
    assert spec["enableInTreeAutoscaling"] is True
    container = container_of(group["template"])
    for kind in ("requests", "limits"):
        assert container["resources"][kind]["nvidia.com/gpu"] == 1
    assert "enableInTreeAutoscaling" not in cluster_of(examples["small"])


def test_a_pod_has_room_for_one_worker_alone():
    """Ray Train takes one CPU a worker: with two on a pod it would put two there, and elastic runs would count them."""
    assert group_of(rendered("train.workers=2..4", "train.threads=3"))["rayStartParams"]["num-cpus"] == "1"
    group = group_of(rendered("train.workers=2..8", workers_per_pod=2))
    assert [group["minReplicas"], group["maxReplicas"], group["rayStartParams"]["num-cpus"]] == [1, 4, "2"]
    gpus = container_of(group_of(rendered("train.device=cuda", "train.workers=8", workers_per_pod=4))["template"])
    assert gpus["resources"]["limits"]["nvidia.com/gpu"] == 4


def test_the_head_computes_nothing_and_stays(examples):
    for name, objects in examples.items():
        head = cluster_of(objects)["headGroupSpec"]
        assert head["rayStartParams"]["num-cpus"] == "0", name
        assert "nodeSelector" not in head["template"]["spec"], name
        assert head["template"]["metadata"]["annotations"]["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"


def test_memory_follows_the_plan_and_holds_the_shared_memory():
    def limit(*overrides: str, **options: Any) -> tuple[int, int]:
        template = group_of(rendered("train.workers=1..2", *overrides, **options))["template"]
        [shared] = [volume["emptyDir"] for volume in template["spec"]["volumes"] if volume["name"] == "shared-memory"]
        assert shared["medium"] == "Memory"
        assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container_of(template)["volumeMounts"]
        resources = container_of(template)["resources"]
        assert resources["limits"]["memory"] == resources["requests"]["memory"]
        return read_size(resources["limits"]["memory"]), read_size(shared["sizeLimit"])

    small, shared = limit()
    assert shared < small
    # Four times the rows: the tensors of the plan grow by a GB, on the fewest workers, and the limit at least as much.
    assert limit("train.batch_size=512")[0] - small > 1e9
    assert limit("train.batch_size=512", "train.micro_batch=128")[0] - small < 0.3e9
    assert limit("data.order=lanes")[0] < small - 0.9e9  # no decoded rows
    assert limit(memory="20GiB")[0] == 20 * 2**30


def test_no_pod_is_root_and_all_have_the_token(examples):
    for name, objects in examples.items():
        assert cluster_of(objects)["authOptions"]["mode"] == "token", name
        for document in objects:
            for template in pod_templates(document):
                assert template["spec"]["securityContext"]["runAsNonRoot"] is True, name
                assert template["spec"]["securityContext"]["runAsUser"] > 0, name
                rights = container_of(template)["securityContext"]
                assert rights["allowPrivilegeEscalation"] is False, name
                assert rights["capabilities"] == {"drop": ["ALL"]}, name
    assert cluster_of(examples["multi-node"])["authOptions"]["secretName"] == "ray-token"


def test_secrets_are_references():
    objects = rendered(storage="s3://bucket/md4", secrets=("s3", "WANDB_API_KEY=k8s:tracking/key"))
    for template in (cluster_of(objects)["headGroupSpec"]["template"], group_of(objects)["template"]):
        container = container_of(template)
        assert container["envFrom"] == [{"secretRef": {"name": "s3"}}]
        reference = {"secretKeyRef": {"name": "tracking", "key": "key"}}
        assert {"name": "WANDB_API_KEY", "valueFrom": reference} in container["env"]
    assert Job.model_validate_json(one(objects, "ConfigMap")["data"]["job.json"]).secrets == (
        "WANDB_API_KEY=k8s:tracking/key",
    )


def test_the_job_is_what_would_run_here_with_its_places_put():
    overrides = ["name=Mine.1", "train.steps=7", "data.source=text", "data.path=corpus", "data.vocabulary=text8"]
    objects = rendered(*overrides, time_limit=600.0, labels={"team": "a"})
    held, job = one(objects, "ConfigMap"), one(objects, "RayJob")
    sent = Job.model_validate_json(held["data"]["job.json"])
    assert (sent.verb, sent.arguments, sent.name) == ("train", ("config.yaml",), "mine.1")
    assert (sent.time_limit_s, sent.labels) == (600, {"team": "a"})
    config = validate(read_yaml(held["data"]["config.yaml"], "config.yaml"))
    here = load("pydocs-tiny", ["train.device=cpu", *overrides])
    put = {"runs": "/storage/runs", "data": {"directory": "/storage/data", "path": "/storage/corpus"}}
    there = here.model_dump(mode="json")
    assert config.model_dump(mode="json") == there | {"runs": put["runs"], "data": there["data"] | put["data"]}
    # The folder of the files is mounted where the entry point looks, from the map of that name.
    assert job["metadata"]["name"] == "mine-1"
    assert job["spec"]["entrypoint"] == "python -m orchestration.jobs.run /etc/md4/job.json"
    for template in (cluster_of(objects)["headGroupSpec"]["template"], group_of(objects)["template"]):
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert volumes["configuration"]["configMap"]["name"] == held["metadata"]["name"]
        assert volumes["storage"]["persistentVolumeClaim"]["claimName"] == "md4"
        mounts = {mount["name"]: mount["mountPath"] for mount in container_of(template)["volumeMounts"]}
        assert (mounts["configuration"], mounts["storage"]) == ("/etc/md4", "/storage")
    assert job["spec"]["activeDeadlineSeconds"] > 600  # the job ends itself before


def test_other_files_are_another_config_map():
    """It can't be changed, and a pod whose template names another one is another pod."""
    first, same, other = (
        one(rendered(text), "ConfigMap") for text in ("train.steps=7", "train.steps=7", "train.steps=8")
    )
    assert first["immutable"] is True
    assert first["metadata"]["name"] == same["metadata"]["name"] != other["metadata"]["name"]


def test_the_same_configuration_gives_the_same_text():
    config, options = load("digits-tiny", ["train.device=cpu"]), Options("job", IMAGE, storage="pvc:md4")
    assert render(config, options, ["x"]) == render(config, options, ["x"])


def test_spot_workers_go_where_machines_may_be_taken_and_say_goodbye(examples):
    template = group_of(examples["spot"])["template"]["spec"]
    assert template["nodeSelector"] == {"cloud.google.com/gke-spot": "true"}
    assert [one["key"] for one in template["tolerations"]] == ["cloud.google.com/gke-spot", "nvidia.com/gpu"]
    program = container_of({"spec": template})["lifecycle"]["preStop"]["exec"]["command"]
    assert program[:3] == ["python", "-m", "orchestration.leaving"]
    assert 0 < float(program[3]) < template["terminationGracePeriodSeconds"]


def test_the_service_answers_at_all_addresses_with_the_run_of_the_volume(examples):
    service = one(examples["serving"], "RayService")["spec"]
    config = yaml.safe_load(service["serveConfigV2"])
    assert config["http_options"] == {"host": "0.0.0.0", "port": 8000}
    assert config["applications"][0]["args"]["models"] == {"pydocs-tiny": "/storage/runs/pydocs-tiny"}
    group = service["rayClusterConfig"]["workerGroupSpecs"][0]
    assert [group["minReplicas"], group["maxReplicas"]] == [1, 3]
    for template in (group["template"], service["rayClusterConfig"]["headGroupSpec"]["template"]):
        assert {"name": "serve", "containerPort": 8000} in container_of(template)["ports"]
    # One replica a pod: it has the CPUs and the GPU that a replica asks for.
    assert group["rayStartParams"]["num-cpus"] == "1"
    assert container_of(group["template"])["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert service["upgradeStrategy"] == {"type": "NewCluster"}
    # The operator refuses steps without an autoscaler.
    stepwise = one(examples["serving-incremental"], "RayService")["spec"]
    assert stepwise["upgradeStrategy"]["clusterUpgradeOptions"]["gatewayClassName"] == "istio"
    assert stepwise["rayClusterConfig"]["enableInTreeAutoscaling"] is True


def test_the_service_of_a_name_knows_its_registry():
    asked = {"kind": "service", "storage": None, "secrets": ("s3",), "model": "small@production"}
    asked |= {"registry": "s3://b/registry"}
    service = one(rendered("runs=s3://b/runs", "serving.canary.texts=s3://b/texts.txt", **asked), "RayService")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert application["args"]["models"] == {"small": "small@production"}
    assert application["args"]["registry"] == "s3://b/registry"
    assert application["args"]["serving"]["canary"] == {"texts": "s3://b/texts.txt"}


def test_a_runs_own_figures_have_a_port(examples):
    ports = container_of(group_of(examples["multi-node"])["template"])["ports"]
    assert {"name": "md4-metrics", "containerPort": 9400} in ports


def test_kuberay_is_only_the_clock_of_an_entry(s3, tmp_path, monkeypatch):
    """Whether a time is run is decided by `md4 cron`, on the cluster that knows of the runs before."""
    store = Store("s3://bucket/cron")
    store.add(NIGHTLY, datetime(2026, 11, 30, tzinfo=UTC))
    monkeypatch.setattr(sys, "argv", ["md4", "render", "kuberay", *CRON.split()])
    app([*sys.argv[1:], "--out", str(tmp_path / "cron.yaml")], standalone_mode=False)
    assert (tmp_path / "cron.yaml").read_text() == cron() == (FOLDER / "cron.yaml").read_text()
    spec = yaml.safe_load(cron())["spec"]
    assert (spec["schedule"], spec["timeZone"], spec["suspend"]) == ("30 2 * * *", "Europe/Berlin", False)
    job = spec["jobTemplate"]
    assert job["clusterSelector"] == {"ray.io/cluster": "pydocs-tiny"}  # the name of `--kind cluster`
    assert "rayClusterSpec" not in job
    # The entry point is a command that there is, with the arguments that it takes.
    words = job["entrypoint"].split()
    assert words == ["md4", "cron", "run", "--once", "--store", "s3://bucket/cron"]


def test_an_entry_that_pods_would_always_miss_is_refused():
    options = Options(kind="cron", image=IMAGE, store="s3://bucket/cron")
    with pytest.raises(UserError, match="catch_up_s=60, but a pod may take 600 s to start"):
        render(load("pydocs-tiny"), options, [], NIGHTLY.model_copy(update={"catch_up_s": 60}))


def test_the_volume_of_the_examples_can_be_mounted_by_all_pods():
    volume = yaml.safe_load((FOLDER.parent / "storage.yaml").read_text())
    check(volume)
    assert volume["spec"]["accessModes"] == ["ReadWriteMany"]
    text = (FOLDER / "small.yaml").read_text()
    assert f"claimName: {volume['metadata']['name']}\n" in text
    assert "# the claim md4 must be ReadWriteMany" in text
    broken = copy.deepcopy(volume)
    broken["spec"]["accessMode"] = broken["spec"].pop("accessModes")
    with pytest.raises(AssertionError, match="accessMode"):
        check(broken)


def cache_of(objects: list[dict[str, Any]]) -> str:
    return next(
        item["value"] for item in container_of(group_of(objects)["template"])["env"] if item["name"] == "MD4_CACHE"
    )


def test_what_is_fetched_lies_where_all_pods_see_it():
    assert cache_of(rendered()) == "/storage/cache"
    # Beside runs in S3 the cache has a copy of each machine's own.
    assert not cache_of(rendered("runs=s3://bucket/runs", secrets=("s3",))).startswith("/storage")
    # Without a volume there is no such place, and the manifest says what to do.
    options = Options("job", IMAGE, storage="s3://bucket/md4", secrets=("s3",))
    text = render(load("pydocs-tiny", ["train.device=cpu", "data.source=text8"]), options, [])
    assert "so prepare it before: md4 prepare ... data.directory=s3://bucket/md4/data\n" in text
    assert "prepare it before" not in render(load("pydocs-tiny", ["train.device=cpu"]), options, [])


def test_labels_of_ones_own_do_not_hide_those_that_pods_are_found_by():
    labels = one(rendered(labels={"team": "a"}), "RayJob")["metadata"]["labels"]
    assert labels["team"] == "a"
    assert labels["app.kubernetes.io/instance"] == "pydocs-tiny"
    with pytest.raises(UserError, match=re.escape("--label app.kubernetes.io/instance=x")):
        rendered(labels={"app.kubernetes.io/instance": "x"})
    assert group_of(rendered(node_selector={"cloud.example/pool": "a"}))["template"]["spec"]["nodeSelector"]


@pytest.mark.parametrize(
    ("overrides", "options", "expected"),
    [
        ([], {"kind": "pod"}, "--kind 'pod' must be one of cluster, job, service, cron"),
        ([], {"image": "registry.example/md4"}, "--image 'registry.example/md4' must name one version"),
        ([], {"image": "registry.example:5000/md4"}, "must name one version"),
        ([], {"image": "registry.example/md4:latest"}, "other than latest"),
        ([], {"image": ""}, "--image '' must name one version"),
        ([], {"storage": None}, "runs=runs is a path of this machine, which pods don't see"),
        (["runs=/home/me/runs"], {}, "runs=/home/me/runs lies outside of the current folder"),
        (["runs=../runs"], {}, "runs=../runs leads out of the current folder"),
        (["data.source=text", "data.path=/home/me/x"], {"storage": "pvc:a"}, "data.path=/home/me/x lies outside"),
        ([], {"storage": "nfs:server"}, "--storage 'nfs:server' must be pvc:NAME"),
        ([], {"storage": "s3://bucket/md4"}, "the run reads or writes S3: say --secret NAME"),
        (["checkpoint.directory=s3://b/c"], {}, "the run reads or writes S3: say --secret NAME"),
        ([], {"secrets": ("AWS_SECRET_ACCESS_KEY=abc123",)}, "--secret AWS_SECRET_ACCESS_KEY=...: pods get secrets by"),
        ([], {"secrets": ("A=env:HOME",)}, "VARIABLE=k8s:SECRET/KEY"),
        ([], {"secrets": ("Not_A_Name",)}, "--secret 'Not_A_Name'"),
        (["tracking.wandb=online"], {}, "WANDB_API_KEY"),
        (["train.device=auto"], {}, "train.device='auto' says nothing of pods"),
        (["train.workers=4"], {"spot": "gke"}, "train.workers=1..4"),
        (["train.workers=1..4"], {"spot": "moon"}, "--spot 'moon' must be one of gke, eks, karpenter, aks"),
        (["train.workers=1..4"], {"workers_per_pod": 2}, "--workers-per-pod 2 must divide train.workers=1..4"),
        ([], {"workers_per_pod": 0}, "--workers-per-pod 0"),
        ([], {"gpu_memory": "80GB"}, "--gpu-memory 80GB: train.device=cpu uses no GPU"),
        (["train.device=cuda"], {"gpu_memory": "100MB"}, "needs"),
        ([], {"memory": "1GiB"}, "--memory 1GiB is less than a pod needs"),
        ([], {"memory": "much"}, "memory 'much' must be a size"),
        (["name=8gpus"], {}, "name=8gpus: KubeRay's names begin with a letter"),
        ([f"name={'a' * 48}"], {}, "47 characters at most"),
        ([], {"storage": "pvc:My_Claim"}, "--storage pvc 'My_Claim': a name in Kubernetes"),
        ([], {"namespace": "My_Space"}, "--namespace 'My_Space'"),
        ([], {"labels": {"team": "a b"}}, "--label team=a b"),
        ([], {"gateway_class": "istio"}, "--kind job has none"),
        ([], {"time_limit": 0.0}, "--time-limit 0 must be above 0"),
        ([], {"kind": "cron"}, "--kind cron needs --store"),
        ([], {"kind": "cron", "store": "cron"}, "--store cron must be s3://bucket/prefix"),
        (["serving.rate_storage=async+redis://u:abc123@host"], {}, "serving.rate_storage looks like a secret"),
        (["serving.port=0"], {"kind": "service"}, "serving.port=0"),
        ([], {"model": "small@production", "registry": "s3://b/r"}, "--kind job serves nothing"),
        ([], {"kind": "service", "model": "small@production"}, "go together"),
        ([], {"kind": "service", "model": "small", "registry": "s3://b/r"}, "must be MODEL@NAME"),
        ([], {"kind": "service", "model": "small@production", "registry": "s3://b/r"}, "say --secret NAME"),
        (["serving.num_gpus=0.5"], {"kind": "service"}, "serving.num_gpus=0.5: a pod has whole GPUs"),
        (["serving.keys=keys"], {"kind": "service", "storage": "s3://b/m", "secrets": ("s3",)}, "serving.keys=keys"),
    ],
)
def test_mistakes_are_one_message(overrides, options, expected):
    with pytest.raises(UserError, match=re.escape(expected)) as raised:
        rendered(*overrides, **options)
    assert "abc123" not in str(raised.value)


def test_the_command_says_it_and_ends_with_2(monkeypatch, capsys, tmp_path):
    out = tmp_path / "job.yaml"
    monkeypatch.setattr(sys, "argv", ["md4", "render", "kuberay", "pydocs-tiny", "--image", "md4", "--out", str(out)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("md4: --image 'md4' must name one version")
    assert not out.exists()


def test_a_job_too_large_for_a_config_map_is_refused():
    from infra.kuberay.kinds import Frame, files

    with pytest.raises(UserError, match="1,000,001 bytes"):
        files(Frame("a", Options("job", IMAGE), {}, None), {"a.txt": "x" * 1_000_001})


def test_the_table_of_a_suite_lies_where_pods_see_it(monkeypatch):
    monkeypatch.delenv("MD4_RESULTS", raising=False)
    name = suite_names()[0]
    (held, *_) = rendered(f"evaluation.suite={name}")
    evaluation = yaml.safe_load(held["data"]["config.yaml"])["evaluation"]
    assert (evaluation["suite"], evaluation["suite_results"]) == (name, "/storage/results")
