import importlib.util
from pathlib import Path

import pytest
import tiny
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_published_configurations_give_the_published_sizes(scaling):
    assert scaling.parameters("SD 1.4") == 859_520_964 and scaling.parameters("SDXL") == 2_567_463_684


def test_states_and_traffic_are_those_of_the_zero_paper(scaling):
    zero = [scaling.SETUPS[f"ZeRO-{stage}"] for stage in range(4)]
    states = [7.5 * (scaling.states(setup, 64) - setup.ema) for setup in zero]
    assert states == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)  # Figure 1, GB for 7.5B parameters
    sent = [scaling.traffic(setup, 10**9, filtered) for filtered in (False, True) for setup in zero]
    assert sent == pytest.approx([4, 4, 4, 6, 4, 4, 4, 8])  # section 7: 2, 2, 2, 3 times the bf16 weights; one pass more


def test_bytes_of_a_layer_are_those_by_hand(scaling):
    layer, rows = torch.nn.Linear(8, 16), torch.zeros(4, 8, requires_grad=True)
    with scaling.gpu_layers(autocast=True) as leave_autocast, scaling.Live([rows, *layer.parameters()]) as live:
        out = layer(rows)
        leave_autocast()
        assert live.now == 2 * (4 * 16 + 16 * 8 + 4 * 8)  # bf16: the output and, for the backward, weight and input
        del out
    assert live.now == 0


def test_filter_adds_at_most_its_null_prediction_to_the_memory(scaling, monkeypatch):
    monkeypatch.setitem(scaling.MODELS, "tiny", tiny.UNET)
    (_, _, plain), (null, _, filtered) = (scaling.step("tiny", 2, True, False, on) for on in (False, True))
    assert 0 < null < plain and plain <= filtered <= plain + 2 * (2 * 4 * 8 * 8)  # bf16 [2, 4, 8, 8]
