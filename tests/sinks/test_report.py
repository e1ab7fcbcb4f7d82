"""The sink measurement on a toy model: the model's inputs, and the resulting files."""

import json
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from sinkprune_plugin.diffusion import families
from sinkprune_plugin.diffusion.families import DiffusionSpec
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.sinks import (
    SinkObservation,
    SinkSettings,
    find_spec,
    observe_sinks,
    print_sink_report,
    sink_dynamics,
    sink_report,
    soft_sink_mask,
)
from sinkprune_plugin.sinks.plot import plot_sinks

MASK = 31


class ToyModel(nn.Module):
    """One attention layer over an embedding; records its inputs."""

    def __init__(self, model_type="llada", causal=False, broken=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(32, 16)
        self.config = SimpleNamespace(model_type=model_type, mask_token_id=MASK, vocab_size=32)
        self.causal, self.broken = causal, broken
        self.shown = []

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.shown.append(input_ids)
        x = self.embedding(input_ids).unflatten(-1, (2, 8)).transpose(1, 2)
        x = x * torch.nan if self.broken else x
        return F.scaled_dot_product_attention(x, x, x, is_causal=self.causal)


@pytest.fixture
def windows():
    return torch.randint(0, 31, (3, 40), generator=torch.Generator().manual_seed(0))


FEW_STEPS = SinkSettings(diffusion_steps=10, sample_interval=2)


def test_diffusion_model_sees_corrupted_windows(windows):
    model = ToyModel().train()
    observation = observe_sinks(model, windows, find_spec(model.config), FEW_STEPS)
    assert observation.axis == "timestep"
    assert observation.steps == (0.2, 0.4, 0.6, 0.8, 1.0)
    assert observation.lengths == (40,) * 5
    assert len(model.shown) == 5
    for step, shown in zip(observation.steps, model.shown, strict=True):
        masked = shown == MASK
        assert torch.equal(shown[~masked], windows[~masked])
        # 120 draws; five standard deviations of the share are 0.23 at most.
        assert masked.float().mean().item() == pytest.approx(step, abs=0.23)
    assert (model.shown[-1] == MASK).all()
    # Two heads of 40 queries hand out 1 each; float32 sums of 40 positions.
    torch.testing.assert_close(observation.mass.sum(dim=2), torch.full((3, 5), 80.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(observation.masks, soft_sink_mask(observation.mass))
    assert model.training


def test_batch_size_changes_nothing(windows, monkeypatch):
    model = ToyModel()
    whole = observe_sinks(model, windows, find_spec(model.config), FEW_STEPS)
    monkeypatch.setattr("sinkprune_plugin.sinks.observe._TOKENS_PER_PASS", 1)
    single = observe_sinks(model, windows, find_spec(model.config), FEW_STEPS)
    torch.testing.assert_close(whole.mass, single.mass, rtol=1e-5, atol=1e-5)  # float32 rounding of other batch shapes


def test_other_model_sees_growing_prefixes(windows):
    model = ToyModel("llama", causal=True)
    observation = observe_sinks(model, windows, find_spec(model.config), FEW_STEPS)
    assert observation.axis == "prefix"
    assert observation.lengths == (8, 16, 24, 32, 40)
    for length, shown in zip(observation.lengths, model.shown, strict=True):
        assert torch.equal(shown, windows[:, :length])
    assert torch.equal(observation.present.sum(dim=1), torch.tensor(observation.lengths))
    assert (observation.mass * ~observation.present == 0).all()
    assert (observation.masks * ~observation.present == 0).all()
    torch.testing.assert_close(observation.masks[:, 1, :16], soft_sink_mask(observation.mass[:, 1, :16]))


def test_family_decides_what_a_model_is():
    assert find_spec(ToyModel("LLaDA").config).name == "llada"
    assert find_spec(ToyModel("llama").config) is None
    with pytest.raises(UsageError, match="mask token id"):
        find_spec(SimpleNamespace(model_type="llada", vocab_size=32))


def test_files_and_table(windows, tmp_path):
    model = ToyModel()
    output = tmp_path / "sinks"
    report = sink_report(model, None, windows, output, seed=5, settings=FEW_STEPS, model_name="toy")
    assert sorted(file.name for file in output.iterdir()) == ["sinks.json", "sinks.png"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["sinks"]

    written = json.loads((output / "sinks.json").read_text())
    assert (written["schema"], written["schema_version"]) == ("sinkprune.sinks", 1)
    assert written["model"] == {"name": "toy", "model_type": "llada", "family": "llada"}
    assert written["settings"]["seed"] == 5
    assert written["settings"]["windows"] == 3
    assert written["settings"]["seq_len"] == 40
    assert [step["step"] for step in written["steps"]] == [0.2, 0.4, 0.6, 0.8, 1.0]
    dynamics = sink_dynamics(report.observation.mass, report.observation.masks)
    assert written["dynamics"]["dominant_variance"] == dynamics.dominant_variance
    for index, step in enumerate(written["steps"]):
        assert step["sinks"] == pytest.approx(sum(map(len, step["sink_positions"])) / 3)
        assert step["dominant_positions"] == report.observation.mass[:, index].argmax(dim=1).tolist()

    picture = matplotlib.image.imread(output / "sinks.png")
    assert picture.shape[0] > 400
    assert picture.shape[1] > 1200
    assert len(set(picture.reshape(-1, picture.shape[2])[::97].sum(axis=1).tolist())) > 20  # not blank

    console = Console(width=100, record=True, quiet=False, file=(tmp_path / "console.txt").open("w"))
    print_sink_report(report, console)
    text = console.export_text()
    assert "toy" in text
    assert "variance" in text
    assert len(text.splitlines()) < 20


def test_a_spec_overrules_the_family(windows, tmp_path):
    family = next(family for family in families() if family.name == "llada")
    report = sink_report(
        ToyModel("anything"), DiffusionSpec(family, MASK, 32), windows, tmp_path / "sinks", settings=FEW_STEPS
    )
    assert report.family == "llada"
    assert report.observation.axis == "timestep"


def test_same_seed_same_numbers(windows, tmp_path):
    reports = [
        sink_report(ToyModel(), None, windows, tmp_path / str(number), seed=seed, settings=FEW_STEPS)
        for number, seed in enumerate((1, 1, 2))
    ]
    assert torch.equal(reports[0].observation.mass, reports[1].observation.mass)
    assert not torch.equal(reports[0].observation.mass, reports[2].observation.mass)


def test_taken_output_is_refused_before_the_model_runs(windows, tmp_path):
    (tmp_path / "kept.txt").write_text("kept")
    model = ToyModel()
    with pytest.raises(UsageError, match="overwrite"):
        sink_report(model, None, windows, tmp_path, settings=FEW_STEPS)
    assert model.shown == []
    output = tmp_path / "sinks"
    for overwrite in (False, True):
        sink_report(model, None, windows, output, settings=FEW_STEPS, overwrite=overwrite)


def test_a_failure_leaves_nothing_behind(windows, tmp_path):
    with pytest.raises(UsageError, match=r"windows 0 to 2 at step 0.2 is not finite"):
        sink_report(ToyModel(broken=True), None, windows, tmp_path / "sinks", settings=FEW_STEPS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (torch.zeros(2, 7, dtype=torch.int64), "7 tokens; at least 8"),
        (torch.zeros(8, dtype=torch.int64), "windows, tokens"),
        (torch.zeros(0, 8, dtype=torch.int64), "at least one"),
        (torch.full((1, 8), 99), "99 and the model 32 embeddings"),
    ],
)
def test_windows_that_do_not_fit(windows, message):
    model = ToyModel()
    with pytest.raises(UsageError, match=message):
        observe_sinks(model, windows, find_spec(model.config))


@pytest.mark.parametrize(("steps", "tokens", "windows"), [(1, 8, 1), (10, 3000, 1), (25, 60, 2)])
def test_plot_of_any_size(steps, tokens, windows, tmp_path):
    mass = torch.rand(windows, steps, tokens, generator=torch.Generator().manual_seed(0))
    lengths = tuple(max(tokens * (step + 1) // steps, 1) for step in range(steps))
    mass = mass * (torch.arange(tokens) < torch.tensor(lengths)[:, None])
    masks = soft_sink_mask(mass)
    observation = SinkObservation("prefix", tuple((step + 1) / steps for step in range(steps)), lengths, mass, masks)
    plot_sinks(observation, sink_dynamics(mass, masks), tmp_path / "sinks.png", title="toy")
    assert (tmp_path / "sinks.png").stat().st_size > 10_000
