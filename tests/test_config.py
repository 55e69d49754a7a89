"""What a YAML file or a command line may say, and how everything that is wrong is named at once."""

import dataclasses
import math
import re
import shlex
from pathlib import Path

import pytest
from simulated import calibration

from memfilter.agc import LossRule
from memfilter.arguments import parse
from memfilter.config import Config, ConfigError, FilterConfig, check, make_filter
from memfilter.evidence import Evidence
from memfilter.keys import Census, Sightings
from memfilter.threshold import FixedThreshold, TimestepThreshold

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

# setting: (values that must be refused, values that must pass), written down from what each of them means
COUNT = ((0, -1), (1, 8))
NATURAL = ((-1,), (0, 8))
FACTOR = ((0.0, -1e-9, -1.0, math.inf, math.nan), (1e-9, 3.0))
AMOUNT = ((-1e-9, -1.0, math.inf, math.nan), (0.0, 3.0))
SHARE = ((-0.01, 1.0, 1.5, math.nan), (0.0, 0.99))
RATE = ((-0.01, 0.0, 1.0, 1.5, math.nan), (0.01, 0.99))
PART = ((-0.01, 0.0, 1.01, math.inf, math.nan), (0.01, 1.0))
RANGES = {
    "model.lora_rank": COUNT,
    "model.lora_alpha": FACTOR,
    "data.shuffle_buffer": COUNT,
    "data.resolution": COUNT,
    "data.caption_dropout": SHARE,
    "data.max_bad_share": SHARE,
    "data.cache_gb": AMOUNT,
    "data.workers": NATURAL,
    "filter.tau": ((0.0, -1.0, -math.inf, math.nan), (1e-9, 4.0, math.inf)),
    "filter.max_empty_steps": COUNT,
    "filter.false_positive_rate": RATE,
    "filter.false_flag_rate": RATE,
    "filter.half_life": FACTOR,
    "filter.gate": ((math.nan,), (-math.inf, 0.5, math.inf)),
    "filter.below": PART,
    "filter.window": COUNT,
    "filter.reference_share": PART,
    "filter.reference_size": COUNT,
    "filter.table_size": COUNT,
    "filter.sightings": COUNT,
    "filter.loss_ratio": FACTOR,
    "filter.loss_decay": SHARE,
    "mitigation.random_tokens": NATURAL,
    "mitigation.repeated_words": NATURAL,
    "mitigation.random_caption": ((-0.1, 1.1, math.nan), (0.0, 0.4, 1.0)),
    "mitigation.embedding_noise": AMOUNT,
    "train.samples": ((-1,), (0, 8)),
    "train.batch_size": COUNT,
    "train.accumulation": COUNT,
    "train.learning_rate": FACTOR,
    "train.warmup_samples": NATURAL,
    "train.lr_cycles": COUNT,
    "train.lr_power": FACTOR,
    "train.adam_beta1": SHARE,
    "train.adam_beta2": SHARE,
    "train.adam_eps": FACTOR,
    "train.weight_decay": AMOUNT,
    "train.max_grad_norm": FACTOR,
    "train.snr_gamma": FACTOR,
    "train.noise_offset": AMOUNT,
    "train.ema_half_life": AMOUNT,
    "train.seed": NATURAL,
    "checkpoint.every": NATURAL,
    "checkpoint.keep": COUNT,
    "log.every": COUNT,
    "log.validation_every": NATURAL,
    "log.validation_prompts": COUNT,
    "log.validation_steps": COUNT,
    "log.validation_guidance_scale": AMOUNT,
    "log.gallery": NATURAL,
}


def refusal(what) -> list[str]:
    """Lines of the error that parsing these arguments, or checking this configuration, ends in."""
    with pytest.raises(ConfigError) as error:
        check(what) if isinstance(what, Config) else parse(what)
    return str(error.value).splitlines()


def with_setting(name, value) -> Config:
    config = Config()
    config.train.samples, config.train.batch_size, config.train.lr_schedule = 80, 1, "linear"
    config.model.lora_rank = 4
    section, key = name.split(".")
    setattr(getattr(config, section), key, value)
    return config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_file_is_read_and_its_first_line_is_the_command_for_it(path):
    prefix, *command = shlex.split(path.read_text().splitlines()[0])
    assert prefix == "#"
    script = command.index("train_filtered.py")
    assert command[:script] == ["python"] or command[:2] == ["accelerate", "launch"]
    assert command[script + 1 : script + 3] == ["--config", f"configs/{path.name}"]
    arguments = [argument.replace("configs/", f"{CONFIGS}/") for argument in command[script + 1 :]]
    check(parse(arguments))
    check(parse([f"--config={path}"]))


def test_printed_configuration_is_read_back_as_the_same(tmp_path, capsys):
    arguments = [
        "--run_dir=runs/a b", "--model.lora_rank=4", '--model.lora_targets=["to_q", "off"]', "--data.resolution=24",
        "--filter.tau=inf", "--filter.unit=rms", "--train.learning_rate=3e-5", "--train.mixed_precision=no",
        "--train.lr_schedule=piecewise_constant", "--train.lr_rules=1:8000,0.1", "--train.snr_gamma=5",
        "--data.random_flip=true", "--log.wandb=offline",
    ]  # fmt: skip
    expected = parse(arguments)
    assert expected.model.lora_targets == ["to_q", "off"] and expected.train.lr_rules == "1:8000,0.1"
    with pytest.raises(SystemExit) as stop:
        parse([*arguments, "--print_config"])
    assert stop.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert parse(["--config", str(printed)]) == expected != Config()


def test_command_line_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("train:\n  samples: 80\n  batch_size: 4\n")
    config = parse([f"--config={file}", "--train.batch_size=2"])
    assert (config.train.samples, config.train.batch_size, config.train.accumulation) == (80, 2, 1)


def test_everything_that_is_wrong_in_a_file_and_on_the_command_line_is_named_at_once(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "filter:\n  taau: 3\n  unit: l3\ntrain:\n  samples: many\n  adam_beta1: 2\nnonsense: 1\nlog:\n  every: 0\n"
    )
    lines = refusal([
        f"--config={file}", "--train.learnin_rate=1", "--train.batch_size", "x", "--data.caption_dropout=2",
        "--filter.tau=-1", "--log.project=a b", "stray",
    ])  # fmt: skip
    wrong = {
        f"{file}: filter.taau is no setting: did you mean filter.tau?",
        f"{file}: filter.unit='l3': ",
        f"{file}: train.samples='many': ",
        "train.adam_beta1 must be ",
        f"{file}: nonsense is no setting",
        "log.every must be ",
        "train.learnin_rate is no setting: did you mean train.learning_rate?",
        "train.batch_size='x': ",
        "data.caption_dropout must be ",
        "filter.tau must be ",
        "log.project must ",
        "'stray' is no setting",
    }
    assert len(lines) == len(wrong)
    assert {start for start in wrong for line in lines if line.startswith(start)} == wrong


@pytest.mark.parametrize("text", ["filter:\n  tau: .inf\n", "run_dir: 2026-01-31\n", "data:\n  index: null\n"])
def test_setting_that_is_right_is_not_complained_about_beside_one_that_is_wrong(tmp_path, text):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    parse([f"--config={file}"])
    assert refusal([f"--config={file}", "--train.sampels=3"]) == [
        "train.sampels is no setting: did you mean train.samples?"
    ]


@pytest.mark.parametrize("arguments", [["--filter.tau=inf"], ["--filter.tau", "inf"], ["--filter.tau=.inf"]])
def test_infinite_tau_is_read_however_it_is_written(arguments, tmp_path):
    assert parse(arguments).filter.tau == math.inf
    file = tmp_path / "a.yaml"
    file.write_text("filter:\n  tau: .inf\n")
    assert parse([f"--config={file}"]).filter.tau == math.inf


def test_tau_of_null_is_none(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("filter:\n  tau: null\n")
    assert parse([f"--config={file}"]).filter.tau is parse(["--filter.tau=null"]).filter.tau is None


@pytest.mark.parametrize("tau", ["nan", ".nan", "0", "-1", "-inf", "-.inf"])
def test_tau_that_is_no_positive_number_is_refused_with_what_to_write_instead(tau):
    (line,) = refusal([f"--filter.tau={tau}"])
    assert line.startswith("filter.tau must be a positive number") and "inf to measure only" in line


def test_name_is_taken_as_it_stands_even_if_it_reads_like_a_number():
    config = parse(["--run_dir=inf", "--data.path", "nan"])
    assert (config.run_dir, config.data.path) == ("inf", "nan")


def test_part_of_a_name_is_no_setting():
    (line,) = refusal(["--filter.t=3"])
    assert line.startswith("filter.t is no setting")


def test_every_number_in_the_configuration_has_a_range():
    numbers = {
        f"{section.name}.{setting.name}"
        for section in dataclasses.fields(Config)
        if dataclasses.is_dataclass(section.default_factory)
        for setting in dataclasses.fields(section.default_factory)
        if re.match(r"(int|float)\b", setting.type)
    }
    assert numbers == RANGES.keys()


@pytest.mark.parametrize("name", RANGES)
def test_number_out_of_its_range_is_named_and_one_within_passes(name):
    refused, allowed = RANGES[name]
    for value in refused:
        lines = refusal(with_setting(name, value))
        assert any(line.startswith(f"{name} must be ") and str(value) in line for line in lines), value
    for value in allowed:
        check(with_setting(name, value))


def test_values_out_of_range_are_named_all_in_one_call():
    config = Config()
    for name, (refused, _) in RANGES.items():
        section, key = name.split(".")
        setattr(getattr(config, section), key, refused[0])
    lines = refusal(config)
    # tau and max_empty_steps are one object's: its first complaint is enough
    assert {line.split()[0] for line in lines} >= RANGES.keys() - {"filter.tau", "filter.max_empty_steps"}
    assert any(line.startswith("filter.") for line in lines)


@pytest.mark.parametrize("rules", ["0.5", "1:8,0.1", "1:80000,0.1:120000,0.01", "1e-1:8,1"])
def test_learning_rate_rules_of_factors_and_samples_pass(rules):
    config = Config()
    config.train.lr_schedule, config.train.lr_rules = "piecewise_constant", rules
    check(config)


@pytest.mark.parametrize(
    "rules",
    ["", "1:8", "1:8,", ",1", "1:8;0.1", "a:8,1", "1:x,1", "1:8.5,1", "1:8:9,1", "1:-8,1", "1:8,e", "..:8,1", "-1:8,1"],
)  # fmt: skip
def test_learning_rate_rules_of_another_form_are_refused(rules):
    config = Config()
    config.train.lr_schedule, config.train.lr_rules = "piecewise_constant", rules
    (line,) = refusal(config)
    assert line.startswith("train.lr_rules must look like")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--train.samples=30", "--train.batch_size=8"], "train.samples must be a multiple of .* = 8"),
        (["--train.samples=8", "--train.batch_size=8", "--train.accumulation=2"], "must be a multiple of .* = 16"),
        (["--train.warmup_samples=8"], "use train.lr_schedule=constant_with_warmup"),
        (["--train.lr_schedule=cosine", "--train.samples=8", "--train.warmup_samples=8"], "must be below train.samples=8"),
        (["--model.lora_alpha=16"], "model.lora_alpha has no effect without model.lora_rank"),
        (["--model.lora_targets=[to_k]"], "model.lora_targets has no effect without model.lora_rank"),
        (["--train.lr_rules=1:8,0.1"], "need each other"),
        (["--train.lr_schedule=piecewise_constant"], "need each other"),
        (["--model.lora_rank=4", "--model.lora_targets=[]"], "model.lora_targets must name at least one layer"),
        (["--log.project=a/b"], "log.project must consist of"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    (line,) = refusal(settings)
    assert re.search(message, line)


@pytest.mark.parametrize(
    "content",
    [b"run_dir: \xff\xfe\n", b"- 3\n", b"3\n", b"", b"a: [\n", b"filter: 3\n", b"filter:\n- 3\n",
     b"model: !!python/name:os.system\n"],
)  # fmt: skip
def test_file_that_holds_no_settings_is_an_error_that_names_it(tmp_path, content):
    file = tmp_path / "a.yaml"
    file.write_bytes(content)
    (line,) = refusal([f"--config={file}"])
    assert str(file) in line


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_file_that_cannot_be_opened_is_an_error_that_names_it(tmp_path, name):
    (line,) = refusal([f"--config={tmp_path / name}"])
    assert str(tmp_path) in line


@pytest.mark.parametrize(
    ("name", "value"),
    [("train.samples", "1.5"), ("train.samples", "true"), ("data.random_crop", "3"),
     ("train.optimizer", "sgd"), ("train.lr_schedule", "exponential"), ("filter.tau", "four"), ("data.path", 12),
     ("model.lora_targets", "to_q")],
)  # fmt: skip
def test_value_of_another_type_is_named_in_one_line_with_where_it_stands(tmp_path, name, value):
    section, key = name.split(".")
    file = tmp_path / "a.yaml"
    file.write_text(f"{section}:\n  {key}: {value}\n")
    (line,) = refusal([f"--config={file}"])
    assert line.startswith(f"{file}: {name}=")


def test_null_is_refused_where_nothing_says_that_it_may_stand(tmp_path):
    file, passed = tmp_path / "a.yaml", []
    for section in dataclasses.fields(Config)[1:]:
        for setting in dataclasses.fields(section.default_factory):
            file.write_text(f"{section.name}:\n  {setting.name}: null\n")
            try:
                config = parse([f"--config={file}"])
                assert getattr(getattr(config, section.name), setting.name) is None
                passed.append(f"{section.name}.{setting.name}")
            except ConfigError as error:
                assert f"{section.name}.{setting.name}" in str(error)
    assert passed == [
        "model.variant", "model.revision", "model.lora_rank", "model.lora_alpha", "data.streaming", "data.index",
        "data.resolution", "data.cache", "filter.tau", "filter.calibration", "filter.window", "train.lr_rules",
        "train.snr_gamma", "train.compile",
    ]  # fmt: skip


@pytest.mark.parametrize(("content", "said"), [
    ("train: {mixed_precision: no}", "train.mixed_precision=False: expected text, so write it in quotes"),
    ("filter:\n  # tau: 3\n", "filter is empty: leave it out, or say what is set"),
])  # fmt: skip
def test_what_yaml_takes_for_something_else_is_told(tmp_path, content, said):
    (tmp_path / "a.yaml").write_text(content)
    assert refusal([f"--config={tmp_path / 'a.yaml'}"]) == [f"{tmp_path / 'a.yaml'}: {said}"]


def test_section_on_the_command_line_is_no_error_of_its_own():
    assert parse(['--train={"samples": 8}']).train.samples == 8
    wrong = "filter.taau is no setting: did you mean filter.tau?"
    assert refusal(['--train={"samples": 8}', "--run_dir={seed}", "--filter.taau=3"]) == [wrong]
    assert refusal(['--train={"sampels": 8}']) == ["train.sampels is no setting: did you mean train.samples?"]


def test_run_without_a_place_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("run_dir: null\n")
    assert refusal([f"--config={tmp_path / 'a.yaml'}"]) == ["run_dir=null: expected text"]


def test_print_config_does_not_hide_what_is_wrong(capsys):
    assert refusal(["--print_config", "--filter.tau=-1", "--train.sampels=3"]) == [
        "train.sampels is no setting: did you mean train.samples?",
        "filter.tau must be a positive number, found -1.0: give one such as 4.0, inf to measure only, or null for no "
        "extra pass",
    ]
    assert capsys.readouterr().out == ""


def test_value_is_not_taken_from_the_next_setting():
    assert refusal(["--qqqq", "--train.sampels=3"]) == [
        "qqqq is no setting, see --help",
        "train.sampels is no setting: did you mean train.samples?",
    ]


# what a configuration makes

CLEAN = calibration(148, 20)  # 49 keys for the reference, 99 for the bar


def share_over_the_bar(made) -> float:
    """p of a clean key that just reaches the bar: (1 + keys over it) / (1 + keys)."""
    largest = CLEAN.largest_evidence(made.evidence)
    assert len(largest) == 99
    return (1 + int((largest >= made.evidence.flag_at).sum())) / 100


EACH = ("tau", "timestep", "evidence", "agc", "sightings", "oracle")
# setting: (another value than its default, the methods that use it, where the filter that is made holds it)
HELD = {
    "tau": (2.5, ("tau",), lambda made: made.threshold.tau),
    "unit": ("rms", EACH, lambda made: made.unit),
    "reduction": ("batch", EACH, lambda made: made.reduction),
    "max_empty_steps": (7, EACH, lambda made: made.max_empty_steps),
    "false_positive_rate": (0.11, ("timestep",), lambda made: made.threshold.false_positive_rate),
    "false_flag_rate": (0.3, ("evidence",), share_over_the_bar),
    "signals": (["loss", "gain"], ("evidence",), lambda made: list(made.evidence.weighing.strengths)),
    "half_life": (3.0, ("evidence",), lambda made: made.evidence.weighing.half_life),
    "gate": (0.9, ("evidence",), lambda made: made.evidence.gate),
    "below": (0.8, ("evidence",), lambda made: made.evidence.below),
    "replace": (False, ("evidence",), lambda made: made.evidence.replace),
    "window": (123, ("timestep", "evidence"), lambda made: made.evidence.window),
    "reference_share": (0.6, ("evidence",), lambda made: made.evidence.reference_share),
    "reference_size": (33, ("timestep", "evidence"), lambda made: made.evidence.reference.size),
    "table_size": (512, ("timestep", "evidence", "sightings"), lambda made: made.evidence.table_size),
    "sightings": (5, ("sightings",), lambda made: made.evidence.k),
    "loss_ratio": (1.7, ("agc",), lambda made: made.evidence.ratio),
    "loss_decay": (0.6, ("agc",), lambda made: made.evidence.decay),
}
ELSEWHERE = {"method", "calibration", "key"}  # which filter is made; what is read before it; what the data is asked for


def test_every_setting_of_the_filter_is_read_back_from_what_is_made():
    settings = {setting.name for setting in dataclasses.fields(FilterConfig)}
    assert HELD.keys() | ELSEWHERE == settings and not HELD.keys() & ELSEWHERE
    defaults = FilterConfig()
    assert all(getattr(defaults, name) != value for name, (value, _, _) in HELD.items())


@pytest.mark.parametrize("method", EACH)
def test_settings_reach_the_method_that_uses_them(method):
    config = Config(filter=FilterConfig(method=method, **{name: value for name, (value, _, _) in HELD.items()}))
    check(config)
    made = make_filter(config, CLEAN, num_train_timesteps=500)
    used = {name: (value, held(made)) for name, (value, methods, held) in HELD.items() if method in methods}
    assert {name: found for name, (_, found) in used.items()} == {name: value for name, (value, _) in used.items()}
    rules = {
        "tau": (FixedThreshold, type(None)),
        "timestep": (TimestepThreshold, Census),
        "evidence": (FixedThreshold, Evidence),
        "agc": (FixedThreshold, LossRule),
        "sightings": (FixedThreshold, Sightings),
        "oracle": (FixedThreshold, type(None)),
    }
    assert (type(made.threshold), type(made.evidence)) == rules[method]
    assert made.judges_all == (method == "oracle") and made.active == (method != "oracle")
    if method == "timestep":
        assert made.threshold.reference is made.evidence.reference
    elif method != "tau":
        assert made.threshold.tau == math.inf  # tau has no effect
    if method == "agc":
        assert len(made.evidence.means) == 500


@pytest.mark.parametrize(
    ("method", "samples", "window"),
    [("evidence", 16_000, 1600), ("timestep", 16_000, 1600), ("timestep", 9, 1), ("timestep", 0, 1)],
)
def test_window_is_a_tenth_of_the_samples_unless_it_is_given(method, samples, window):
    config = Config(filter=FilterConfig(method=method, table_size=64))
    config.train.samples = samples
    assert make_filter(config, CLEAN).evidence.window == window


@pytest.mark.parametrize(("method", "gate", "share"), [("evidence", 0.5, 0.3), ("evidence", -math.inf, 1), ("timestep", 0.5, 1)])
def test_all_keys_pay_for_the_reference_where_the_null_pass_is_made_for_all(method, gate, share):
    config = Config(filter=FilterConfig(method=method, gate=gate, reference_share=0.3, table_size=64))
    assert make_filter(config, CLEAN).evidence.reference_share == share
