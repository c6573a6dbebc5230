"""The trained part: shipped classes, their plain values, and what older versions wrote."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from runs import final
from safetensors.torch import load_file
from torch import nn

from lightning_limber import load
from lightning_limber.models.adapters import MLP, Adapter, Linear, PixelShuffle, Resampler
from lightning_limber.models.adapters.spec import adapter_from_spec, adapter_spec
from lightning_limber.tools.report import summary
from lightning_limber.utils.adapter_config import upgrade_adapter, upgrade_args, upgrade_config
from lightning_limber.utils.checkpoints import read_checkpoint

OLD = Path(__file__).parent / "run_of_b3a4401"
"""A run of 12 steps by the last commit before class paths: its checkpoint after 6, and its export."""


@pytest.mark.parametrize("adapter", [Linear, MLP, PixelShuffle, Resampler])
@pytest.mark.parametrize("input_norm", ["none", "layer", "channel"])
def test_calibrated_output_has_the_norm_of_token_embeddings(adapter, input_norm):
    torch.manual_seed(0)
    made = adapter(24, 32, input_norm=input_norm, dropout=0.5)
    features = 50 * torch.randn(4, 16, 24) + 7
    made.calibrate(features, torch.tensor(3.2))
    assert made.training
    made.eval()
    tokens = made(features)
    assert tokens.shape == (4, 4 if adapter is PixelShuffle else 16, 32)
    assert made.count_tokens(features) == tokens.shape[1]
    assert tokens.norm(dim=-1).mean().item() == pytest.approx(3.2, rel=1e-5)
    if input_norm == "channel":
        normed = made.input_norm(features).flatten(0, 1)
        torch.testing.assert_close(normed.mean(0), torch.zeros(24), atol=1e-4, rtol=0)
        torch.testing.assert_close(normed.std(0), torch.ones(24), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("adapter", "layers"), [(Linear, [""]), (MLP, ["0.", "2."]), (PixelShuffle, ["1."])]
)
def test_names_of_weights_are_frozen(adapter, layers):
    """Checkpoints and exports are read by them."""
    weights = {f"project.{layer}{name}" for layer in layers for name in ("weight", "bias")}
    norm = {"input_norm.mean", "input_norm.std"}
    assert adapter(24, 32, input_norm="channel").state_dict().keys() == weights | norm | {"calibrated"}


def test_pixel_shuffle_merges_neighbours():
    adapter = PixelShuffle(1, 8)
    merged = adapter.project[0](torch.arange(16.0).view(1, 16, 1))
    assert merged[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    with pytest.raises(ValueError, match=r"divides by model.adapter\.shuffle=2; the encoder gives 9"):
        adapter(torch.zeros(1, 9, 1))


def test_a_resampler_reads_any_number_of_patches_in_any_order():
    torch.manual_seed(0)
    adapter = Resampler(24, 32, queries=5, layers=2, heads=4)
    for patches in (9, 16):
        features = torch.randn(2, patches, 24)
        tokens = adapter(features)
        assert tokens.shape == (2, 5, 32)
        torch.testing.assert_close(adapter(features.flip(1)), tokens)
    # Every query reads every patch of its own image, and says something of its own.
    features.requires_grad_()
    for query in adapter(features)[0]:
        (gradient,) = torch.autograd.grad(query.sum(), features, retain_graph=True)
        assert gradient[0].abs().sum(-1).min() > 0
        assert not gradient[1].any()
    assert torch.cdist(tokens[0], tokens[0]).fill_diagonal_(1).min() > 0.1
    assert adapter(features[:0]).shape == (0, 5, 32)


def test_a_resamplers_heads_divide_the_width():
    with pytest.raises(ValueError, match="heads=5 does not divide the encoder's width 24"):
        Resampler(24, 32, heads=5)


def test_grid_of_tokens():
    assert Linear(1, 1).token_grid((4, 6)) == MLP(1, 1).token_grid((4, 6)) == (4, 6)
    assert PixelShuffle(1, 1, shuffle=2).token_grid((4, 6)) == (2, 3)
    assert Adapter(1, 1).token_grid((4, 6)) is Resampler(8, 1).token_grid((4, 6)) is None


def test_wrong_input_norm():
    with pytest.raises(ValueError, match="input_norm='batch': allowed are none, layer, channel"):
        Linear(1, 1, input_norm="batch")


class Ends(Adapter):
    """Ends with something else than a linear layer."""

    def __init__(self, vision_size: int, llm_size: int, last: nn.Module) -> None:
        super().__init__(vision_size, llm_size)
        self.project = nn.Sequential(nn.Linear(vision_size, llm_size), last)


@pytest.mark.parametrize("last", [nn.LayerNorm(8), nn.Tanh()])
def test_an_output_that_no_layer_scales_is_named(last):
    with pytest.raises(ValueError, match="Ends: scaling the last nn.Linear of `project`"):
        Ends(4, 8, last).calibrate(torch.randn(2, 3, 4), torch.tensor(50.0))


def test_an_output_of_the_wrong_shape_is_named():
    with pytest.raises(
        ValueError, match=r"Ends turns features \[2, 3, 4\] into \[2, 24\]; .* \[2, P', 8\]"
    ):
        Ends(4, 8, nn.Flatten()).count_tokens(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"into \[2, 3, 5\]"):
        Ends(4, 8, nn.Linear(8, 5)).count_tokens(torch.zeros(2, 3, 4))


# -- plain values -----------------------------------------------------------------------------------


def test_an_adapter_as_plain_values():
    spec = adapter_spec(partial(PixelShuffle, shuffle=3, input_norm="layer"))
    expected = {"shuffle": 3, "input_norm": "layer"}
    assert spec == {"class_path": "lightning_limber.models.adapters.PixelShuffle", "init_args": expected}
    assert adapter_spec(adapter_from_spec(json.loads(json.dumps(spec)))) == spec
    assert adapter_from_spec(spec)(2, 5).project[1].weight.shape == (5, 18)
    with pytest.raises(ValueError, match="must be a subclass of Adapter"):
        adapter_spec(nn.Linear)
    with pytest.raises(ValueError, match="settings must be plain values"):
        adapter_spec(partial(Ends, last=nn.Tanh()))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.Own", "give the flag --model.adapter nowhere.Own. In Python, import it first"),
        ("lightning_limber.models.adapters.Own", "does not exist"),
        ("lightning_limber.models.adapters.base.linear", "A file may not choose"),
    ],
)
def test_stored_classes_of_others_are_not_imported(path, message):
    with pytest.raises(ValueError, match=message):
        adapter_from_spec({"class_path": path, "init_args": {}})


# -- flags ------------------------------------------------------------------------------------------

ADAPTERS = "lightning_limber.models.adapters"


@pytest.mark.parametrize(
    ("flags", "name", "settings"),
    [
        ([], "Linear", {"input_norm": "channel"}),  # default.yaml
        (["--model.adapter.dropout=0.1"], "Linear", {"input_norm": "channel", "dropout": 0.1}),
        (["--model.adapter", "Linear"], "Linear", {"input_norm": "channel"}),
        (["--model.adapter=MLP"], "MLP", {}),
        (["--model.adapter=Vocabulary", "--model.adapter.words=whole"], "Vocabulary", {"words": "whole"}),
        (["--model.adapter=Resampler", "--model.adapter.queries=8"], "Resampler", {"queries": 8}),
        (["--model.adapter", "MLP", "--model.adapter.input_norm", "layer"], "MLP", {"input_norm": "layer"}),
        (["--config=new.yaml"], "PixelShuffle", {"shuffle": 4}),
        (["--config=new.yaml", f"--model.adapter={ADAPTERS}.PixelShuffle"], "PixelShuffle", {"shuffle": 4}),
        (["--config=new.yaml", "--model.adapter=MLP"], "MLP", {}),
        # As before class paths: what the kinds share stays.
        (["--model.adapter.kind", "mlp"], "MLP", {"input_norm": "channel"}),
        (["--model.adapter.kind=mlp", "--model.adapter.input_norm=none"], "MLP", {}),
        (
            ["--model.adapter.kind=pixel_shuffle", "--model.adapter.shuffle=4"],
            "PixelShuffle",
            {"shuffle": 4, "input_norm": "channel"},
        ),
        (["--config=old.yaml"], "PixelShuffle", {"shuffle": 4, "input_norm": "layer"}),
        (["--config=part.yaml"], "Linear", {"input_norm": "layer"}),
        (["--config=old.yaml", "--config=new.yaml"], "PixelShuffle", {"shuffle": 4, "input_norm": "layer"}),
        (["--config=same.yaml"], "Linear", {"input_norm": "channel", "dropout": 0.2}),
        (["--config=switch.yaml"], "MLP", {"input_norm": "channel"}),
        (["--config=old.yaml", "--model.adapter=MLP"], "MLP", {}),
    ],
)
def test_flags_and_configs(flags, name, settings, fit, capsys):
    configs = {
        "new": {"class_path": "PixelShuffle", "init_args": {"shuffle": 4}},
        "old": {"kind": "pixel_shuffle", "shuffle": 4, "input_norm": "layer"},
        "part": {"input_norm": "layer"},
        "same": {"class_path": "Linear", "init_args": {"dropout": 0.2}},
        "switch": {"kind": "mlp"},
    }
    for file, adapter in configs.items():
        Path(f"{file}.yaml").write_text(yaml.safe_dump({"model": {"adapter": adapter}}))
    with pytest.raises(SystemExit) as stop:
        fit(*flags, "--print_config", base=False)
    assert not stop.value.code
    output = capsys.readouterr().out
    adapter = yaml.safe_load(output[output.index("# lightning") :])["model"]["adapter"]
    own = {
        "PixelShuffle": {"shuffle": 2},
        "Resampler": {"queries": 16, "layers": 2, "heads": 8},
        "Vocabulary": {"words": "all", "perplexity": 50.0},
    }
    defaults = {"input_norm": "none", "dropout": 0.0} | own.get(name, {})
    assert adapter == {"class_path": f"{ADAPTERS}.{name}", "init_args": defaults | settings}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model.adapter.kind=conv", "model.adapter.kind='conv': known are linear, mlp, pixel_shuffle"),
        (
            "--model.adapter=Conv",
            "model.adapter is Conv: it must be Linear, MLP, PixelShuffle, Resampler, Vocabulary or the",
        ),
        ("--model.adapter=torch.nn.Linear", "to be a subclass of <class 'Adapter'>"),
        ("--model.adapter=nowhere.Own", "No module named 'nowhere'"),
        ("--model.adapter.shuffle=3", "'shuffle' is not known"),
    ],
)
def test_wrong_adapters_are_named(flag, message, fit, capsys):
    with pytest.raises(SystemExit) as stop:
        fit(flag, "--print_config", base=False)
    assert stop.value.code
    assert message in capsys.readouterr().err


def test_a_setting_that_is_called_kind():
    """Of a class of one's own it is no kind of ours."""
    flags = ["--model.adapter=my.Own", "--model.adapter.kind=mlp"]
    assert upgrade_args(flags) == flags


# -- what older versions wrote ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"), [("linear", "Linear"), ("mlp", "MLP"), ("pixel_shuffle", "PixelShuffle")]
)
def test_kinds_become_classes(kind, name):
    old = {"kind": kind, "input_norm": "channel", "dropout": 0.1, "shuffle": 3}
    settings = {"input_norm": "channel", "dropout": 0.1} | (
        {"shuffle": 3} if name == "PixelShuffle" else {}
    )
    today = {"class_path": f"{ADAPTERS}.{name}", "init_args": settings}
    assert upgrade_adapter(old) == today == upgrade_adapter(today)
    config = {"model": {"adapter": old, "llm": "x"}, "seed_everything": 1}
    assert upgrade_config(config) == {"model": {"adapter": today, "llm": "x"}, "seed_everything": 1}
    for unchanged in ({"model": {"adapter": today}}, {"model": {"adapter": "MLP"}}, {"data": {}}):
        assert upgrade_config(unchanged) is unchanged
    assert summary({"model": {"adapter": old}})["adapter"].startswith(f"{name}, input_norm channel")


@pytest.fixture
def here(models, tmp_path):
    """The old run's frozen models, where its config says."""
    (tmp_path / "models").symlink_to(models)


@pytest.fixture
def expected() -> dict[str, torch.Tensor]:
    """The old run's adapter after its last step."""
    return {f"adapter.{key}": value for key, value in load_file(OLD / "export/adapter.safetensors").items()}


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


def test_an_old_run_goes_on_to_where_it_ended(here, fit, expected):
    fit(f"--ckpt_path={OLD / 'step_6.ckpt'}", base=False)
    run = Path("runs/default/version_0")
    assert_close(final(run), expected)
    stored = read_checkpoint(run / "checkpoints/last.ckpt")["hyper_parameters"]["adapter"]
    assert stored["class_path"] == f"{ADAPTERS}.PixelShuffle"
    assert stored["init_args"] == {"shuffle": 2, "input_norm": "channel", "dropout": 0.3}
    assert "kind" not in (run / "config.yaml").read_text().partition("adapter:")[2][:60]


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_an_old_checkpoint_is_evaluated(here, fit, command):
    fit(f"--ckpt_path={OLD / 'step_6.ckpt'}", command=command, base=False)


def test_an_old_export_is_loaded_and_an_old_checkpoint_exported(here, fit, expected):
    model = load(OLD / "export", "cpu").model
    assert type(model.adapter) is PixelShuffle
    assert_close({f"adapter.{key}": value for key, value in model.adapter.state_dict().items()}, expected)
    fit(f"--ckpt_path={OLD / 'step_6.ckpt'}", "--output=new", command="export", base=False)
    adapter = yaml.safe_load(Path("new/config.yaml").read_text())["model"]["adapter"]
    assert adapter["class_path"] == f"{ADAPTERS}.PixelShuffle"
    assert "# PixelShuffle adapter from vision to llm" in Path("new/README.md").read_text()
    weights = read_checkpoint(OLD / "step_6.ckpt")["state_dict"]
    new = load("new", "cpu").model.adapter.state_dict()
    assert all(torch.equal(new[key.removeprefix("adapter.")], value) for key, value in weights.items())


def test_an_old_export_as_config_and_start(here, fit, expected):
    flags = [f"--config={OLD / 'export/config.yaml'}", f"--model.adapter_weights={OLD / 'export'}"]
    cli = fit(*flags, command="predict", base=False)
    assert_close(
        {f"adapter.{key}": value for key, value in cli.model.adapter.state_dict().items()}, expected
    )
