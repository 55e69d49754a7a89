"""Evidence on several ranks: who is looked at, left out and passed over does not depend on how a step is split."""

import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import launching
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from accelerate import debug_launcher
from safetensors.torch import load_file, save_file
from torch import nn

from memfilter import MemFilter
from memfilter.arguments import parse
from memfilter.cli import main as command
from memfilter.data.experiment import prepare_scenes
from memfilter.data.feed import Feed
from memfilter.evidence import Evidence, Weighing
from memfilter.keys import Decisions, Step
from memfilter.reference import SIGNALS, Reference
from memfilter.train.loop import train

# a replayed recording

STEPS, STEP, KILLED = 100, 8, 47  # of so many steps, after so many
# processes, batch size, micro-batches
LAYOUTS = {"1 x 8": (1, 8, 1), "2 x 4": (2, 4, 1), "2 x 2 x 2": (2, 2, 2), "2 x 1 x 4": (2, 1, 4)}
# batches drawn ahead: none without worker processes, else two for each; of four micro-batches they end amidst a step
AHEAD = {"1 x 8": (0, 2), "2 x 4": (0, 4), "2 x 2 x 2": (0, 4), "2 x 1 x 4": (2,)}
CASES = [(layout, ahead) for layout, several in AHEAD.items() for ahead in several]
SIZE = 8  # of a prediction
BELOW, WINDOW = 0.7, 60


@dataclass
class Recording:
    """What a model said of every position of a stream; predictions, targets and signals in fp64."""

    keys: list[str]
    timesteps: np.ndarray  # [P]
    cond: np.ndarray  # [P, SIZE]
    null: np.ndarray
    target: np.ndarray
    caption_dropped: np.ndarray  # bool [P]
    excluded: np.ndarray

    def signals(self) -> np.ndarray:
        """[P, 4] in fp32, by their formulas."""
        difference = self.cond - self.null
        norm, null_norm = (np.sqrt((x**2).sum(1)) for x in (difference, self.null))
        loss, null_loss = (((x - self.target) ** 2).mean(1) for x in (self.cond, self.null))
        found = {
            "norm": norm,
            "loss": loss,
            "cosine": (difference * self.null).sum(1) / (norm * null_norm),
            "gain": np.log(null_loss) - np.log(loss),
        }
        return np.stack([found[name] for name in SIGNALS], 1).astype(np.float32)


def record(positions: int, keys: list[str], memorized: np.ndarray, seed: int) -> Recording:
    """Predictions such that the memorized positions have large norms and gains, and small losses."""
    rng = np.random.default_rng(seed)

    def directions() -> np.ndarray:
        drawn = rng.standard_normal((positions, SIZE))
        return drawn / np.sqrt((drawn**2).sum(1, keepdims=True))

    def sizes(times: float) -> np.ndarray:
        return np.exp(0.3 * rng.standard_normal(positions) + np.log(times) * memorized)[:, None]

    null, timesteps = directions(), rng.integers(1000, size=positions)
    cond = null + sizes(2.5) * (directions() + 0.3 * memorized[:, None] * null)
    target = cond + sizes(0.4) * directions()
    dropped, excluded = rng.random(positions) < 0.05, rng.random(positions) < 0.03
    return Recording(keys, timesteps, cond, null, target, dropped, excluded)


@pytest.fixture(scope="module")
def recording() -> Recording:
    """40 keys, of which 8 come often and are memorized for a while."""
    positions, rng = 1600, np.random.default_rng(1)
    often = rng.random(positions) < 0.5
    numbers = np.where(often, rng.integers(8, size=positions), rng.integers(8, 40, size=positions))
    time = np.arange(positions)
    return record(positions, [f"key {n}" for n in numbers], (numbers < 8) & (time > 100) & (time < 700), seed=2)


def make_evidence(kind: type[Evidence] = Evidence) -> Evidence:
    ordinary = record(600, [""] * 600, np.zeros(600, bool), seed=3)
    reference = Reference(40)
    reference.add(torch.tensor(ordinary.timesteps), torch.tensor(ordinary.signals()))
    settings = {"below": BELOW, "window": WINDOW, "table_size": 4096, "reference_share": 0.5}
    return kind(reference, torch.full((4,), 0.1), 2.5, weighing=Weighing(half_life=4, first=3), **settings)


def by_hand(recording: Recording) -> tuple[list[dict], list[int], dict[str, torch.Tensor]]:
    """In one process, without filter and feed: what was decided, what was passed over, and the table at the end."""
    evidence, position, rows, passed_over = make_evidence(), 0, [], []
    for _ in range(STEPS):
        shown, gone = [], []
        while len(shown) < STEP:
            skips = evidence.passes_over(evidence.slots([recording.keys[position]])).item()
            (gone if skips else shown).append(position)
            position += 1
        slots = evidence.slots([recording.keys[p] for p in shown])
        drop, look, audit = evidence.decide(slots)
        silent = torch.tensor(recording.caption_dropped[shown] | recording.excluded[shown])
        look &= ~silent & torch.tensor(recording.timesteps[shown] < BELOW * 1000)
        signals = torch.tensor(recording.signals()[shown])
        signals[~look] = torch.where(torch.tensor([name == "loss" for name in SIGNALS]), signals[~look], torch.nan)
        timesteps = torch.tensor(recording.timesteps[shown])
        step = Step(torch.where(silent, -1, slots), timesteps, signals, audit)
        found = evidence.update(step, STEP + len(gone))
        keep = ~drop & ~torch.tensor(recording.excluded[shown])
        rows += as_rows(shown, drop, look, audit, keep, *found)
        passed_over += gone
    return rows, passed_over, evidence.state_dict()


def as_rows(*columns) -> list[dict]:
    names = ("position", "drop", "look", "audit", "keep", "p_value", "evidence")
    # NaN is not NaN
    columns = [[str(v) if v != v else v for v in torch.as_tensor(column).tolist()] for column in columns]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


class Replayed(nn.Module):
    """A denoiser that predicts what was recorded: for a prompt of ones the one, for the empty prompt the other."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=False):
        cond, null = sample.unbind(1)  # [B, 2, SIZE] -> [B, SIZE] twice
        return (self.scale * torch.where(encoder_hidden_states.flatten(1) > 0, cond, null),)


class Watched(Evidence):
    """Remembers its last decisions."""

    def decide(self, slots):
        decisions = super().decide(slots)
        self.decided = Decisions(*(tensor.clone() for tensor in decisions))
        return decisions


def replay(
    recording: Recording, place: Path, layout: str, rank: int = 0, ahead: int = 0, saved: Path | None = None
) -> None:
    """Trains on the recording as the loop does, and leaves at ``place`` what was decided and the table at the end; and
    what to go on from, after `KILLED` steps.

    Args:
        ahead: so many batches are drawn before the one at hand is trained on, as worker processes do.
        saved: what an earlier replay left to go on from.
    """
    place.mkdir(parents=True, exist_ok=True)
    processes, size, micro_batches = LAYOUTS[layout]
    evidence, state = make_evidence(Watched), {"seen": 0, "drawn": []}
    mem_filter = MemFilter(evidence=evidence, reduction="kept_global")
    if saved:
        state = json.loads((saved / "state.json").read_text())
        evidence.load_state_dict(load_file(saved / f"{KILLED}.safetensors"))
    denoiser = mem_filter.wrap(Replayed(), null=torch.zeros(1, 1))
    optimizer = torch.optim.SGD(denoiser.parameters(), lr=0.1)

    def passes_over(positions):
        return evidence.passes_over(evidence.slots([recording.keys[p] for p in positions])).numpy()

    everything = len(recording.keys)
    split = (processes * size, micro_batches, rank, processes)
    feed = Feed(state["seen"], everything, *split, passes_over, pending=state["drawn"])
    drawn, batches, seen, rows, passed_over, verdicts = deque(), iter(feed), state["seen"], [], [], []
    step = KILLED if saved else 0
    while step < STEPS:
        while len(drawn) <= ahead:
            drawn.append(next(batches))
        mine, all_ranks = drawn.popleft(), feed.taken()
        assert len(mine) == size
        mem_filter.batch(
            keys=[recording.keys[p] for p in mine],
            caption_dropped=recording.caption_dropped[mine],
            excluded=recording.excluded[mine],
            timesteps=recording.timesteps[mine],
        )
        sample = torch.tensor(np.stack([recording.cond[mine], recording.null[mine]], 1))
        pred, *_ = denoiser(sample, torch.tensor(recording.timesteps[mine]), torch.ones(size, 1, 1))
        mem_filter.loss(pred, torch.tensor(recording.target[mine])).backward()
        verdicts.append((mine, evidence.decided, mem_filter.verdict))
        seen += len(all_ranks.positions) + len(all_ranks.passed_over)
        if all_ranks.passed_over:
            mem_filter.passed_over(torch.tensor(recording.timesteps[all_ranks.passed_over]))
            passed_over += all_ranks.passed_over
        if all_ranks.ends_step:
            mem_filter.before_step(optimizer)
            optimizer.zero_grad()
            for shown, (drop, _, audit), verdict in verdicts:
                # what was looked at, the loop's other reasons taken into account
                look = torch.tensor([reason is None for reason in verdict.skipped])
                rows += as_rows(shown, drop, look, audit, verdict.keep, verdict.p_value, verdict.evidence)
            verdicts, step = [], step + 1
            if rank == 0 and step in (KILLED, STEPS):
                table = {name: tensor.contiguous() for name, tensor in evidence.state_dict().items()}
                save_file(table, place / f"{step}.safetensors")
                if step == KILLED:
                    (place / "state.json").write_text(json.dumps({"seen": seen, "drawn": feed.state()}))
    found = {"rows": rows, "passed_over": passed_over, "totals": mem_filter.stats.totals()}
    (place / f"rank {rank}.json").write_text(json.dumps(found))


def replayed(place: Path, before: Path | None = None) -> tuple[list[dict], list[int], dict[str, torch.Tensor]]:
    """What all ranks left there, in the form of `by_hand`; with what another replay had done until it was killed."""
    parts = {path.name: json.loads(path.read_text()) for path in place.glob("rank *.json")}
    rows = sorted((row for part in parts.values() for row in part["rows"]), key=lambda row: row["position"])
    passed_over = parts["rank 0.json"]["passed_over"]
    totals = [part["totals"] for part in parts.values()]
    seen, dropped, excluded = (sum(t[f"filter/{name}"] for t in totals) for name in ("seen", "dropped", "excluded"))
    assert seen == len(rows) + len(passed_over)
    assert dropped + excluded == sum(not row["keep"] for row in rows) + len(passed_over)
    if before:
        all_rows, all_passed_over, _ = replayed(before)
        seen = json.loads((before / "state.json").read_text())["seen"]
        rows = [row for row in all_rows if row["position"] < seen] + rows
        passed_over = [p for p in all_passed_over if p < seen] + passed_over
    return rows, passed_over, load_file(place / f"{STEPS}.safetensors")


def assert_same(found, wanted) -> None:
    for name, values in enumerate(("rows", "passed over")):
        different = [pair for pair in zip(found[name], wanted[name], strict=False) if pair[0] != pair[1]]
        assert not different, (values, different[:3])
        assert len(found[name]) == len(wanted[name])
    tables = found[2], wanted[2]
    assert tables[0].keys() == tables[1].keys()
    bits = [{name: tensor.numpy().tobytes() for name, tensor in table.items()} for table in tables]
    assert [name for name in tables[0] if bits[0][name] != bits[1][name]] == []


@pytest.fixture(scope="module")
def expected(recording):
    return by_hand(recording)


def _rank(recording, out: Path) -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    replay_all(recording, out, [layout for layout in LAYOUTS if layout.startswith("2")], dist.get_rank())


def replay_all(recording, out: Path, layouts: list[str], rank: int = 0) -> None:
    """Every layout and every number of batches drawn ahead, to the end and from where it was killed."""
    for layout, ahead in CASES:
        if layout in layouts:
            whole, killed = (out / f"{layout}, {ahead}" / name for name in ("whole", "killed"))
            replay(recording, whole, layout, rank, ahead)
            if dist.is_initialized():
                dist.barrier()  # until the first has written all of it
            replay(recording, killed, layout, rank, ahead, saved=whole)


@pytest.fixture(scope="module")
def replays(recording, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("replays")
    debug_launcher(_rank, args=(recording, out), num_processes=2)
    replay_all(recording, out, ["1 x 8"])
    return out


def test_recording_has_what_could_be_told_apart(recording, expected):
    rows, passed_over, table = expected
    flags, readmissions = table["totals"].tolist()
    assert flags >= 8 and readmissions >= 6 and len(passed_over) > 100
    assert any(row["drop"] and row["audit"] for row in rows)
    look = np.array([row["look"] for row in rows]).reshape(STEPS, 2, 2, 2)  # [steps, micro-batches, ranks, batch size]
    assert (look.any((1, 2, 3)) & ~look.any((1, 3)).all(1)).any()  # a rank with nothing to look at while another has
    keys = np.array([recording.keys[row["position"]] for row in rows]).reshape(STEPS, STEP)
    assert any(set(step[:4]) & set(step[4:]) for step in keys)  # a key on both ranks


@pytest.mark.parametrize("layout", ["1 x 8", "2 x 4", "2 x 2 x 2"])
def test_replayed_norms_give_the_same_decisions_however_a_step_is_split(replays, expected, layout):
    assert_same(replayed(replays / f"{layout}, 0" / "whole"), expected)


@pytest.mark.parametrize(("layout", "ahead"), CASES)
def test_replay_that_is_killed_half_way_ends_in_the_same_decisions(replays, layout, ahead):
    whole, killed = (replays / f"{layout}, {ahead}" / name for name in ("whole", "killed"))
    assert_same(replayed(killed, before=whole), replayed(whole))


@pytest.mark.parametrize("layout", ["2 x 4", "2 x 2 x 2"])
def test_one_process_goes_on_where_two_were_killed(recording, replays, expected, tmp_path, layout):
    whole = replays / f"{layout}, 0" / "whole"
    replay(recording, tmp_path, "1 x 8", saved=whole)
    assert_same(replayed(tmp_path, before=whole), expected)


# real launches

SAMPLES = 120


@pytest.fixture(scope="module")
def few_scenes(tmp_path_factory) -> Path:
    """Four scenes, each 40 times, and 30 others."""
    return prepare_scenes(tmp_path_factory.mktemp("data") / "scenes", seed=5, duplicates=4, repeats=40, distinct=30)


@pytest.fixture(scope="module")
def trained(few_scenes, tiny_base, tmp_path_factory):
    """Factory: trained(model, processes, zero) trains, once, and gives the run's directory. The bar is low.

    The model is scenes or tiny; one process is this one, several are launched."""
    models, calibrations, runs = {"scenes": "scenes", "tiny": tiny_base}, {}, {}

    def calibrated(model: str) -> Path:
        if model not in calibrations:
            out = calibrations[model] = tmp_path_factory.mktemp("calibration") / "calibration.json"
            looks = {"scenes": ("--keys=30", "--looks=20"), "tiny": ("--keys=24", "--looks=20")}[model]
            settings = [f"--model.path={models[model]}", f"--data.path={few_scenes}", f"--out={out}", *looks]
            assert command(["calibrate", *settings]) == 0
        return calibrations[model]

    def trained(model: str, processes: int, zero: str | None = None) -> Path:
        if (model, processes, zero) in runs:
            return runs[model, processes, zero]
        run = runs[model, processes, zero] = tmp_path_factory.mktemp("runs") / "run"
        rate = {"scenes": 0.4, "tiny": 0.6}[model]
        settings = [
            f"--run_dir={run}", f"--model.path={models[model]}", f"--data.path={few_scenes}",
            f"--train.samples={SAMPLES}", f"--train.batch_size={STEP // processes}", "--train.learning_rate=1e-4",
            "--train.ema_half_life=0", "--filter.method=evidence", f"--filter.calibration={calibrated(model)}",
            f"--filter.false_flag_rate={rate}", "--filter.half_life=4", "--filter.window=40",
            "--filter.reduction=kept_global", f"--checkpoint.every={SAMPLES // 2}", f"--log.every={SAMPLES // 2}",
        ]  # fmt: skip
        if processes == 1:
            train(parse(settings), progress=False)
        else:
            launching.run(settings, processes, launching.sharded(run.parent) if zero == "zero3" else zero)
        state = json.loads(max(run.glob("checkpoints/*/state.json")).read_text())
        assert state["processes"] == processes
        assert state["kind"] == (f"DeepSpeed ZeRO-{zero[4]}" if zero else "DDP or one process")
        return run

    return trained


def audit(run: Path) -> list[dict]:
    return pq.read_table(run / "audit.parquet").to_pylist()


def assert_same_verdicts(run: Path, other: Path) -> None:
    """And some keys are flagged, and passed over."""
    rows, others = audit(run), audit(other)
    exact = ("position", "key", "timestep", "keep", "skipped")
    assert [[row[name] for name in exact] for row in rows] == [[row[name] for name in exact] for row in others]
    for name in ("text_norm", "p_value", "evidence", *SIGNALS[1:]):
        values, others_values = (np.array([row[name] for row in each], float) for each in (rows, others))
        np.testing.assert_allclose(values, others_values, rtol=1e-2, atol=1e-3, err_msg=name)
    passed_over = [row["key"] for row in rows if row["skipped"] == "flagged" and row["loss"] is None]
    assert len(passed_over) >= 5 and len(set(passed_over)) >= 2


def test_launched_in_two_processes_the_same_keys_are_flagged_and_passed_over(trained):
    one, two = trained("scenes", 1), trained("scenes", 2)
    assert_same_verdicts(two, one)
    weights = [load_file(run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors") for run in (one, two)]
    assert max((weights[0][name] - weights[1][name]).abs().max() for name in weights[0]) < 2e-4


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_deepspeed_trains_to_the_end_with_ranks_that_look_at_nothing(trained, zero):
    run = trained("tiny", 2, zero)
    shown = [row for row in audit(run) if row["loss"] is not None]
    looked = np.array([row["text_norm"] is not None for row in shown]).reshape(-1, 2, STEP // 2)
    looked = looked.any(2)  # [steps, ranks]
    assert (~looked).all(1).any() and (looked[:, 0] != looked[:, 1]).any()
    assert json.loads((run / "summary.json").read_text())["samples"] == SAMPLES
    assert_same_verdicts(run, trained("tiny", 1))
