"""Every launch script and accelerate configuration, run as a user would run it, on CPUs: two processes over gloo."""

import json
import os
import shlex
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import launching
import psutil
import pytest
import tiny
import torch
from accelerate import PartialState, debug_launcher
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from diffusers import DDPMScheduler, UNet2DConditionModel

from memfilter import MemFilter
from memfilter.arguments import parse
from memfilter.config import check
from memfilter.train import engine
from memfilter.train.export import with_weights

CONFIGS = launching.ROOT / "configs" / "accelerate"
CPU = {"ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory, scenes_dir):
    """Factory: command line of a run of two steps, or of as many as it takes to be interrupted in."""
    base = tiny.save_pipeline(tmp_path_factory.mktemp("base") / "sd1", "sd1")

    def make(run, *more, samples=16):
        return [
            f"--run_dir={run}", f"--model.path={base}", f"--data.path={scenes_dir}", f"--train.samples={samples}",
            "--train.batch_size=4", "--filter.tau=2.5", "--log.every=8", "--checkpoint.every=8", *more,
        ]  # fmt: skip

    return make


@contextmanager
def started(command, where, **environment):
    """A command started in a directory, of which nothing is left afterwards."""
    fresh = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "WANDB"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=where,
        env=fresh | {"PATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        for left in (*(psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ()), process):
            left.kill()
        process.communicate()


def run(command, where, code=0, seconds=launching.PATIENCE, **environment) -> str:
    """What the command prints until it exits with this code."""
    with started(command, where, **environment) as process:
        output, _ = process.communicate(timeout=seconds)
        assert process.returncode == code, output
        return output


def script(name, *arguments):
    return ["bash", launching.ROOT / "launch" / name, *arguments]


def accelerate_launch(name):
    port = launching.free_port()
    return ["accelerate", "launch", "--config_file", CONFIGS / name, "--num_processes", 2, "--main_process_port", port]


def world_of_checkpoint(run_dir) -> tuple:
    """Kind and number of the processes that made the newest one."""
    state = json.loads(max((run_dir / "checkpoints").glob("*/state.json")).read_text())
    return state["kind"], state["processes"]


def world(run_dir) -> tuple:
    """The same of a run that ended, and the samples it trained on."""
    assert (run_dir / "pipeline" / "model_index.json").exists()
    return *world_of_checkpoint(run_dir), json.loads((run_dir / "summary.json").read_text())["samples"]


def has_begun(run_dir):
    """Condition: the first step is reported."""
    return lambda: (run_dir / "metrics.jsonl").exists() and (run_dir / "metrics.jsonl").read_text().endswith("\n")


def test_one_process(settings, tmp_path):
    run(script("single_gpu.sh", *settings(tmp_path / "run")), tmp_path, **CPU)
    assert world(tmp_path / "run") == ("DDP or one process", 1, 16)


def test_several_processes_are_asked_to_stop_and_go_on_under_accelerate_launch(settings, tmp_path):
    there = tmp_path / "run"
    with started(script("multi_gpu.sh", *settings(there, samples=80_000)), tmp_path, NPROC="2", **CPU) as process:
        launching.wait_until(has_begun(there), process)
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=launching.PATIENCE)
    assert process.returncode == 1  # of torchrun
    stopped = json.loads(max((there / "checkpoints").glob("*/state.json")).read_text())["samples"]
    assert f" after {stopped} samples: go on from" in output  # whichever rank heard it
    assert world_of_checkpoint(there) == ("DDP or one process", 2)
    going_on = settings(there, "--checkpoint.resume=true", samples=stopped + 16)
    run([*accelerate_launch("ddp.yaml"), "train_filtered.py", *going_on], launching.ROOT, **CPU)
    assert world(there) == ("DDP or one process", 2, stopped + 16)
    seen = [row["samples"] for row in launching.lines(there / "metrics.jsonl")]
    assert seen == list(range(8, stopped + 17, 8))


def test_two_nodes_of_one_process_each(settings, tmp_path):
    node = {**CPU, "NPROC": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launching.free_port()), "NNODES": "2"}
    command = script("multi_node.sh", *settings(tmp_path / "run"))
    with started(command, tmp_path, NODE_RANK="1", **node) as second:
        run(command, tmp_path, NODE_RANK="0", **node)
        output, _ = second.communicate(timeout=launching.PATIENCE)
    assert second.returncode == 0, output
    assert world(tmp_path / "run") == ("DDP or one process", 2, 16)


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK"])
def test_a_node_says_what_it_lacks(missing, tmp_path):
    names = {"MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK"} - {missing}
    output = run(script("multi_node.sh"), tmp_path, code=1, **{missing: ""}, **dict.fromkeys(names, "1"))
    assert f"error: {missing} is not set" in output


def test_deepspeed(settings, tmp_path):
    whole = settings(tmp_path / "run", "--train.ema_half_life=0")
    run(script("deepspeed.sh", "3", *whole), tmp_path, NPROC="2", DS_ACCELERATOR="cpu")
    assert world(tmp_path / "run") == ("DeepSpeed ZeRO-3", 2, 16)


@pytest.mark.parametrize(("stage", "environment", "expected"), [
    ("1", {}, "--standalone --nproc-per-node=gpu"),
    ("2", {"NPROC": "4"}, "--standalone --nproc-per-node=4"),
    ("2_offload", {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"},
     "--nnodes=2 --node-rank=1 --master-addr=node0 --master-port=29500 --nproc-per-node=gpu"),
])  # fmt: skip
def test_deepspeed_of_any_stage_on_one_machine_or_several(stage, environment, expected, tmp_path):
    stand_in(tmp_path / "torchrun", 'echo "$ACCELERATE_USE_DEEPSPEED $ACCELERATE_DEEPSPEED_CONFIG_FILE"; echo "$@"')
    environment = environment | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    first, second = run(script("deepspeed.sh", stage, "--a=b c"), tmp_path, **environment).splitlines()
    use, file = first.split(" ", 1)
    assert use == "true" and Path(file).samefile(launching.ROOT / "configs" / "deepspeed" / f"zero{stage}.json")
    trainer = f"{launching.ROOT}/launch/../train_filtered.py"
    assert second == f"{expected} {trainer} --a=b c"


@pytest.mark.parametrize("stage", [[], ["0"], ["--config"]])
def test_deepspeed_of_no_such_stage_is_refused(stage, tmp_path):
    assert "usage: " in run(script("deepspeed.sh", *stage), tmp_path, code=1)


# ---- accelerate launch


def test_accelerate_launch_with_deepspeed(settings, tmp_path):
    command = [*accelerate_launch("zero2.yaml"), "train_filtered.py", *settings(tmp_path / "run")]
    run(command, launching.ROOT, DS_ACCELERATOR="cpu")
    assert world(tmp_path / "run") == ("DeepSpeed ZeRO-2", 2, 16)


@pytest.fixture
def opened(monkeypatch):
    """Factory: (environment that accelerate launch makes of a file, configuration that the script makes) of the command
    that the file opens with."""
    monkeypatch.chdir(launching.ROOT)

    def open_file(path):
        head = []
        for line in path.read_text().splitlines():
            head.append(line.removeprefix("#").strip())
            if not line.endswith("\\"):
                break
        accelerate, launch, *words = shlex.split(" ".join(line.removesuffix("\\") for line in head))
        assert (accelerate, launch) == ("accelerate", "launch")
        assert words[words.index("--config_file") + 1] == str(path.relative_to(launching.ROOT))
        args, defaults, precision_of_file = _validate_launch_command(launch_command_parser().parse_args(words))
        assert args.training_script == "train_filtered.py" and args.num_processes == 8
        args.main_process_port = 0
        if args.use_deepspeed:
            fields = [*defaults.deepspeed_config, *["mixed_precision"] * precision_of_file]
            args.deepspeed_fields_from_accelerate_config = ",".join(fields)
        _, environment = prepare_deepspeed_cmd_env(args) if args.use_deepspeed else (None, prepare_multi_gpu_env(args))
        config = parse(args.training_script_args)
        check(config)
        assert config.train.batch_size * args.num_processes == 8  # as the paper's one process
        return {name: value for name, value in environment.items() if os.environ.get(name) != value}, config

    return open_file


def refusals(config, kind, **facts) -> list[str]:
    """Of the script on GPUs."""
    facts = {"device": SimpleNamespace(type="cuda"), "is_fsdp2": True} | facts
    return list(engine._refusals(config, SimpleNamespace(distributed_type=kind, **facts)))


def test_file_for_ddp_is_read(opened):
    environment, config = opened(CONFIGS / "ddp.yaml")
    assert "ACCELERATE_USE_DEEPSPEED" not in environment and "ACCELERATE_USE_FSDP" not in environment
    assert refusals(config, DistributedType.MULTI_GPU) == []


@pytest.mark.parametrize(("name", "stage", "offload"), [
    ("zero1", 1, None), ("zero2", 2, None), ("zero2_offload", 2, "cpu"), ("zero3", 3, None)
])  # fmt: skip
def test_file_for_deepspeed_is_read_and_what_it_points_to_accepted(name, stage, offload, opened, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    environment, config = opened(CONFIGS / f"{name}.yaml")
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    plugin = DeepSpeedPlugin()
    assert not plugin.zero3_init_flag
    assert refusals(config, DistributedType.DEEPSPEED, deepspeed_plugin=plugin) == []
    plugin.set_mixed_precision(config.train.mixed_precision)
    engine._configure_deepspeed(config, plugin)
    accepted = DeepSpeedConfig(plugin.deepspeed_config)
    assert accepted.zero_optimization_stage == stage
    offloaded = accepted.zero_config.offload_optimizer
    assert (offloaded and offloaded.device) == offload
    assert accepted.float16_config.enabled and not accepted.bfloat16_config.enabled  # train.mixed_precision
    assert accepted.gradient_clipping == config.train.max_grad_norm


def fsdp_step(environment):
    """One process of two: accelerate shards a filtered denoiser as the file says, and a step is that of DDP."""
    os.environ.update(environment)
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    torch.manual_seed(0)
    unets = [UNet2DConditionModel(**tiny.UNET).train() for _ in range(2)]
    unets[1].load_state_dict(unets[0].state_dict())
    plugin = FullyShardedDataParallelPlugin()
    # accelerate itself does not shard on CPUs
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=False)
    filters = [MemFilter(tau=float("inf")) for _ in unets]
    models = [f.wrap(u, null=torch.zeros(5, 16), scheduler=DDPMScheduler()) for f, u in zip(filters, unets, strict=True)]
    models = [torch.nn.parallel.DistributedDataParallel(models[0]), fsdp2_prepare_model(accelerator, models[1])]
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward and not plugin.cpu_ram_efficient_loading
    wrapped = {type(module).__name__ for module in models[1].modules() if hasattr(module, "unshard")}
    assert {name.removeprefix("FSDP") for name in wrapped} == {"BasicTransformerBlock", "ResnetBlock2D", "FilteredUNet"}
    g = torch.Generator().manual_seed(state.process_index)
    latents, target = torch.randn(2, 4, 4, 8, 8, generator=g)
    timesteps, embeddings = torch.randint(1000, (4,), generator=g), torch.randn(4, 5, 16, generator=g)
    for model, mem_filter in zip(models, filters, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        mem_filter.loss(model(latents, timesteps, embeddings).sample, target).backward()
        assert mem_filter.before_step(optimizer)
        optimizer.step()
    for whole, shard in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(shard.full_tensor(), whole.data)
    # what is exported is whole, also when the last forward left the root's weights gathered
    trained = dict(unets[1].named_parameters())
    models[1].eval()
    with torch.no_grad():
        models[1](latents, timesteps, embeddings)
    gathered = {name: p.full_tensor() for name, p in trained.items()}
    exported = with_weights(unets[1], gathered).state_dict()
    assert all(torch.equal(exported[name], whole) for name, whole in gathered.items()) and exported.keys() == gathered.keys()


def fsdp_in_bf16(environment):
    """One process of two: inputs come as they are, outputs have what the filter found, and a pipeline hears of no cast."""
    os.environ.update(environment)
    assert PartialState(cpu=True).num_processes == 2
    torch.manual_seed(0)
    plugin = FullyShardedDataParallelPlugin()
    plugin.set_mixed_precision("bf16")
    engine.leave_inputs(plugin)
    assert plugin.mixed_precision_policy.reduce_dtype == torch.float32
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="bf16", is_main_process=False)
    unet, seen = UNet2DConditionModel(**tiny.UNET), []
    mem_filter = MemFilter(tau=float("inf"))
    model = fsdp2_prepare_model(accelerator, mem_filter.wrap(unet.train(), null=torch.zeros(5, 16), scheduler=DDPMScheduler()))
    unet.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["sizes"].dtype) or (args, {
        name: value for name, value in kwargs.items() if name != "sizes"}), with_kwargs=True)  # fmt: skip
    latents, embeddings, sizes = torch.randn(4, 4, 8, 8), torch.randn(4, 5, 16), torch.tensor([[1333.0]] * 4)
    timesteps = torch.full((4,), 500)
    out = model(latents.bfloat16(), timesteps, embeddings.bfloat16(), sizes=sizes)
    mem_filter.loss(out.sample, latents).backward()
    assert set(seen) == {torch.float32} and out.keep.all() and out.text_norm.isfinite().all()
    denoiser = engine.CastingDenoiser(model.eval(), model, torch.bfloat16)
    with torch.no_grad():
        (sample,) = denoiser(latents, timesteps, embeddings, sizes=sizes, return_dict=False)
    assert sample.dtype == torch.float32 and denoiser.config is unet.config


def test_file_for_fsdp_is_read_and_shards_the_denoiser(opened):
    environment, config = opened(CONFIGS / "fsdp2.yaml")
    assert config.train.mixed_precision == "bf16"
    assert refusals(config, DistributedType.FSDP) == []
    assert environment["FSDP_STATE_DICT_TYPE"] == "SHARDED_STATE_DICT"
    environment = {name: value for name, value in environment.items() if "FSDP" in name}
    debug_launcher(fsdp_step, (environment,), 2)
    debug_launcher(fsdp_in_bf16, (environment,), 2)


# ---- Slurm


def stand_in(path, body):
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def slurm(tmp_path):
    """What a job sees of Slurm: srun and scontrol, which writes down its calls, and the variables of two tasks on a node."""
    commands = tmp_path / "bin"
    commands.mkdir()
    stand_in(commands / "srun", """
while [[ $1 == -* ]]; do shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!); done
highest=0
for pid in "${pids[@]}"; do
    code=0; wait "$pid" || code=$?
    [ "$code" -le "$highest" ] || highest=$code
done
exit "$highest" """)  # fmt: skip
    stand_in(commands / "scontrol", f"""
echo "$*" >> {shlex.quote(str(tmp_path / "calls"))}
case "$1 $2" in
    "show hostnames") echo 127.0.0.1; echo node2 ;;
    "show job") echo "JobId=$3 JobState=${{JOB_STATE:-RUNNING}} Reason=None" ;;
esac""")  # fmt: skip
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {"PATH": path, "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_CPUS_PER_TASK": "1", "MASTER_PORT": str(launching.free_port())}  # fmt: skip


def requeued(tmp_path) -> list[str]:
    calls = tmp_path / "calls"
    return [call for call in calls.read_text().splitlines() if call.startswith("requeue")] if calls.exists() else []


def test_slurm_job_is_requeued_before_its_time_is_up_and_goes_on_to_its_end(settings, slurm, tmp_path):
    there = tmp_path / "run"
    more = ("--data.workers=1", "--log.wandb=offline", "--checkpoint.every=16000")  # the signal makes one of its own
    command = script("slurm.sbatch", *settings(there, *more, samples=80_000))
    with started(command, launching.ROOT, **CPU, **slurm) as process:
        launching.wait_until(has_begun(there), process)
        job_step = [p for p in psutil.Process(process.pid).children(recursive=True) if p.name() not in ("bash", "srun")]
        assert {"pt_data_worker", "wandb-core"} < {p.name() for p in job_step}
        for each in job_step:  # Slurm signals all there is in the step
            each.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=launching.PATIENCE)
    assert process.returncode == 75, output
    assert " samples: go on from" in output and requeued(tmp_path) == ["requeue 7"]
    stopped = launching.lines(there / "metrics.jsonl")[-1]["samples"]
    assert 8 <= stopped < 80_000
    command = script("slurm.sbatch", *settings(there, *more, samples=stopped + 16))
    output = run(command, launching.ROOT, **CPU, **slurm)
    assert f"goes on from {there}/checkpoints/{stopped:012d}" in output and requeued(tmp_path) == ["requeue 7"]
    assert world(there) == ("DDP or one process", 2, stopped + 16)
    assert [row["samples"] for row in launching.lines(there / "metrics.jsonl")] == list(range(8, stopped + 17, 8))


@pytest.mark.parametrize(("code", "state", "requeues"), [
    (75, "RUNNING", 1), (75, "CANCELLED", 0), (1, "RUNNING", 0), (0, "RUNNING", 0)
])  # fmt: skip
def test_slurm_job_that_failed_ended_or_was_cancelled_is_not_requeued(code, state, requeues, slurm, tmp_path):
    stand_in(tmp_path / "bin" / "srun", f'echo "$MASTER_ADDR $WORLD_SIZE $SRUN_CPUS_PER_TASK $*"; exit {code}')
    output = run(script("slurm.sbatch", "--a=b c"), launching.ROOT, code=code, JOB_STATE=state, **slurm)
    assert output.startswith("127.0.0.1 2 1 --kill-on-bad-exit=0 ")
    assert output.endswith(" --a=b c --checkpoint.every=16000 --checkpoint.resume=true\n")
    assert len(requeued(tmp_path)) == requeues


def test_slurm_job_has_checkpoints_whatever_a_file_says_and_as_the_command_line_says(slurm, tmp_path):
    stand_in(tmp_path / "bin" / "srun", 'while [ "$1" != - ]; do shift; done; shift; for word; do echo "$word"; done')
    (file := tmp_path / "my.yaml").write_text("checkpoint: {every: 0}\n")
    for more, every in (((), 16_000), (("--checkpoint.every=7",), 7), (("--checkpoint.every", "9"), 9)):
        words = run(script("slurm.sbatch", "--config", str(file), *more), launching.ROOT, **slurm).splitlines()
        assert parse(words).checkpoint.every == every


def test_slurm_job_under_deepspeed(slurm, tmp_path):
    stand_in(tmp_path / "bin" / "srun", 'echo "$ACCELERATE_USE_DEEPSPEED"; cat "$ACCELERATE_DEEPSPEED_CONFIG_FILE"')
    output = run(script("slurm.sbatch"), launching.ROOT, ZERO="2_offload", **slurm)
    assert output.startswith("true\n") and "offload_optimizer" in output


def test_slurm_reads_its_settings_before_the_first_command():
    lines = (launching.ROOT / "launch" / "slurm.sbatch").read_text().splitlines()
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert max(directives) < next(number for number, line in enumerate(lines) if not line.startswith("#"))
    asked = [lines[number].removeprefix("#SBATCH ") for number in directives]
    assert {"--requeue", "--signal=USR1@300", "--open-mode=append"} < set(asked)
