"""Flags become one config, or one sentence that names the flag to change."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from lofi_fast.budget import Budget, parse_bytes
from lofi_fast.config import STAGES, Config
from lofi_fast.encoder.resnet import TSMResNet
from lofi_fast.errors import InputError
from lofi_fast.fidelity import Fidelity, Pattern
from lofi_fast.head.gtad import GTAD
from lofi_fast.presets import PRESETS
from lofi_fast.train import main, read_flags

OWN = ["--annotations", "a.json", "--videos", "v"]


def config_of(*argv: str, cuda: bool = False) -> Config:
    return read_flags(argv, cuda=lambda: cuda)[0]


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("11GB", 11_000_000_000),
        ("11GiB", 11_811_160_064),
        ("11gb", 11_000_000_000),
        (" 11 GB ", 11_000_000_000),
        ("11G", 11_000_000_000),
        ("11Gi", 11_811_160_064),
        ("1.5GB", 1_500_000_000),
        (".5GiB", 536_870_912),
        ("512MB", 512_000_000),
        ("512MiB", 536_870_912),
        ("64KB", 64_000),
        ("64KiB", 65_536),
        ("2TB", 2_000_000_000_000),
        ("2000000000", 2_000_000_000),
        ("100B", 100),
    ],
)
def test_bytes_by_hand(text: str, amount: int) -> None:
    assert parse_bytes(text) == amount
    assert Budget.parse(text) == Budget(text, amount=amount)


@pytest.mark.parametrize(
    "text",
    ["", "GB", "11 apples", "-3GB", "+3GB", "0", "0GB", "0.0GiB", "11iB", "1e9", "11,5GB", "11GBB", "1 1GB", "nan",
     "inf", "0x10", "11PB", "1/2GB", "11\u212aB", "9" * 400 + "GB"],
)  # fmt: skip
def test_what_is_no_amount_of_memory(text: str) -> None:
    for parse in (parse_bytes, Budget.parse):
        with pytest.raises(InputError, match="--mem-budget"):
            parse(text)


@pytest.mark.parametrize(("text", "share"), [("80%", 0.8), ("100%", 1.0), ("12.5%", 0.125), (" 80 % ", 0.8)])
def test_a_share_of_the_device(text: str, share: float) -> None:
    budget = Budget.parse(text)
    assert (budget.amount, budget.share) == (None, pytest.approx(share))


@pytest.mark.parametrize("text", ["120%", "0%", "-5%", "%", "nan%", "inf%", "eighty%", "8 0%"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(InputError, match="--mem-budget"):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["auto", "AUTO", " auto "])
def test_auto_is_neither_amount_nor_share(text: str) -> None:
    assert (Budget.parse(text).amount, Budget.parse(text).share) == (None, None)


def test_no_flags_train_the_demo() -> None:
    config, resume = read_flags([], cuda=lambda: True)
    assert config == PRESETS["demo"]()
    assert resume is False
    assert config.stages == STAGES
    assert (config.budget.amount, config.budget.share) == (None, None)


@pytest.mark.parametrize(
    ("flags", "cuda", "preset"),
    [
        ([], True, "activitynet"),
        ([], False, "small"),
        (["--device", "cpu"], True, "small"),
        (["--preset", "thumos"], False, "thumos"),
    ],
)
def test_own_data_chooses_the_preset(flags: list[str], cuda: bool, preset: str) -> None:
    config = config_of(*OWN, *flags, cuda=cuda)
    assert (config.preset, config.out) == (preset, "")
    assert (config.data.annotations, config.data.videos) == ("a.json", "v")


def test_every_flag_reaches_its_setting() -> None:
    config, resume = read_flags(
        [*OWN, "--preset", "activitynet", "--mem-budget", "11GB", "--out", "o", "--stages", "head,joint", "--resume",
         "--encoder", "tsm_r34", "--width", "48", "--encoder-weights", "w.pth", "--fidelity", "64x160",
         "--pattern", "cyclic", "--short-cycle", "16", "--min-cut", "2", "--max-cut", "8", "--window", "51.2",
         "--frame-stride", "4", "--resize", "squash", "--no-flip", "--cache", "c", "--video-scores", "s.json",
         "--pretrain-epochs", "0", "--pretrain-lr", "0.2", "--joint-epochs", "3", "--joint-lr", "0.3",
         "--head-epochs", "5", "--head-lr", "0.4", "--batch", "6", "--tiou", "0.3:0.1:0.7", "--seed", "0",
         "--device", "cpu", "--optimizer-impl", "torch", "--threads", "1"],
        cuda=lambda: True,
    )  # fmt: skip
    base = PRESETS["activitynet"]()
    assert resume is True
    assert config == dataclasses.replace(
        base,
        full=Fidelity(64, 160),
        data=dataclasses.replace(
            base.data, annotations="a.json", videos="v", cache="c", video_scores="s.json", window=51.2,
            frame_stride=4, resize="squash", flip=False,
        ),
        encoder=dataclasses.replace(base.encoder, name="tsm_r34", width=48, weights="w.pth"),
        pretrain=dataclasses.replace(base.pretrain, epochs=0, lr=0.2),
        joint=dataclasses.replace(base.joint, epochs=3, lr=0.3, batch=6),
        head_stage=dataclasses.replace(base.head_stage, epochs=5, lr=0.4),
        detect=dataclasses.replace(base.detect, tious="0.3:0.1:0.7"),
        stages=("joint", "head"),
        pattern=Pattern.CYCLIC,
        short_cycle=16,
        min_cut=2.0,
        max_cut=8.0,
        budget=Budget("11GB", amount=11 * 10**9),
        optimizer_impl="torch",
        out="o",
        seed=0,
        device="cpu",
        threads=1,
    )  # fmt: skip


def test_a_flag_that_is_not_given_leaves_the_preset_alone() -> None:
    config = config_of(*OWN, "--preset", "thumos", "--joint-epochs", "2")
    base = PRESETS["thumos"]()
    assert config.joint == dataclasses.replace(base.joint, epochs=2)
    assert (config.head, config.detect, config.data.window) == (base.head, base.detect, base.data.window)


def test_whole_videos_can_be_asked_of_a_preset_with_windows() -> None:
    assert PRESETS["small"]().data.window == 32.0
    assert config_of(*OWN, "--preset", "small", "--window", "video").data.window is None


def test_a_min_cut_above_the_usual_max_raises_it() -> None:
    assert config_of("--min-cut", "20").max_cut == 20.0
    assert config_of("--min-cut", "20", "--max-cut", "30").max_cut == 30.0


def test_stages_are_put_in_order_once() -> None:
    assert config_of("--stages", "eval, pretrain,eval").stages == ("pretrain", "eval")


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--videos", "v"], "--videos is given without --annotations"),
        (["--annotations", "a.json"], "--annotations is given without --videos"),
        (["--preset", "thumos"], "--preset thumos needs your data"),
        (["--preset", "activitynet", "--videos", "v"], "--annotations"),
        (["--mem-budget", "11 apples"], "11 apples"),
        (["--mem-budget=-3GB"], "--mem-budget"),
        (["--mem-budget", "0"], "--mem-budget"),
        (["--mem-budget", "120%"], "80%"),
        (["--stages", "joint,dance"], '--stages "joint,dance"'),
        (["--stages", ""], "--stages"),
        (["--stages", ","], "--stages"),
        (["--fidelity", "100"], "--fidelity"),
        (["--fidelity", "100x225"], "even side"),
        (["--fidelity", "3x224"], "at least 4 snippets"),
        (["--fidelity", "100x14"], "16 px"),
        (["--fidelity", "-100x224"], "--fidelity"),
        (["--fidelity", "100x224x3"], "--fidelity"),
        (["--window", "soon"], '--window "soon"'),
        (["--window", "0"], "--window"),
        (["--window", "-5"], "--window"),
        (["--window", "nan"], "--window"),
        (["--window", "inf"], "--window"),
        (["--batch", "0"], "--batch 0"),
        (["--batch", "-2"], "--batch -2"),
        (["--width", "0"], "--width 0"),
        (["--threads", "0"], "--threads 0"),
        (["--frame-stride", "0"], "--frame-stride 0"),
        (["--short-cycle", "0"], "--short-cycle 0"),
        (["--joint-lr", "nan"], "--joint-lr nan"),
        (["--joint-lr", "inf"], "--joint-lr inf"),
        (["--head-lr", "0"], "--head-lr 0"),
        (["--joint-epochs", "-1"], "--joint-epochs -1"),
        (["--seed", "-1"], "--seed -1"),
        (["--batch", str(10**30)], "--batch"),
        (["--threads", "100000"], "--threads 100000"),
        (["--min-cut", "0.5"], "1 <= min"),
        (["--min-cut", "nan"], "--min-cut nan"),
        (["--min-cut", "8", "--max-cut", "4"], "min <= max"),
        (["--max-cut", "100"], "64"),
    ],
)
def test_errors_name_the_flag(argv: list[str], part: str) -> None:
    if "--fidelity" in argv and argv[-1].startswith("-"):
        argv = [f"--fidelity={argv[-1]}"]
    with pytest.raises(InputError) as error:
        config_of(*argv)
    assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "argv",
    [
        ["--pattern", "sideways"],
        ["--batch", "many"],
        ["--optimizer-impl", "nvidia"],
        ["--mem-budget"],
        ["--unknown", "1"],
    ],
)
def test_a_mistyped_command_ends_with_status_2_and_one_sentence(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert argv[0] in error and error.startswith("error: ") and error.count("\n") == 1


def test_help_lists_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        config_of("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--mem-budget 11GB" in text and "80% (of the device)" in " ".join(text.split())


def test_config_is_frozen_and_saved_whole() -> None:
    config = config_of("--mem-budget", "80%", "--pattern", "spatial")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    saved = json.loads(config.to_json())
    assert set(saved) == {"lofi_fast", *(f.name for f in dataclasses.fields(Config))}
    assert saved["full"] == {"num_snippets": 32, "side": 64}
    assert saved["budget"] == {"text": "80%", "amount": None, "share": 0.8}
    assert saved["pattern"] == "spatial"
    assert saved["joint"]["epochs"] == config.joint.epochs


def test_activitynet_is_the_papers_setting() -> None:
    config = PRESETS["activitynet"]()
    assert (config.full, config.encoder.name, config.encoder.width) == (Fidelity(100, 224), "tsm_r18", 64)
    assert (config.data.window, config.data.frame_stride) == (None, 8)
    joint, head = config.joint, config.head_stage
    assert (joint.optimizer, joint.lr, joint.weight_decay, joint.batch, joint.epochs) == ("sgd", 0.1, 1e-4, 16, 15)
    assert (joint.schedule, joint.decay, joint.decay_every, joint.class_loss) == ("step", 0.5, 5, 0.0)
    assert (head.optimizer, head.weight_decay, head.batch, head.epochs) == ("adam", 1e-4, 16, 10)
    assert (head.schedule, head.decay, head.decay_every) == ("step", 0.1, 5)
    assert head.lr in (2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
    gtad = config.head
    assert (gtad.hidden, gtad.groups, gtad.inner_bins, gtad.context_bins, gtad.map_channels) == (256, 32, 32, 4, 512)
    assert (gtad.max_duration, gtad.middle_kernel, gtad.positive_iou) == (None, 1, 0.9)
    assert (config.detect.sigma, config.detect.top_k, config.pattern) == (0.84, 100, Pattern.CYCLIC)
    assert dataclasses.replace(PRESETS["hacs"](), preset="activitynet") == config


def test_thumos_is_gtads_setting() -> None:
    config = PRESETS["thumos"]()
    gtad = config.head
    assert (config.full.num_snippets, gtad.max_duration, gtad.middle_kernel) == (256, 64, 3)
    assert (gtad.inner_bins, gtad.context_bins, config.detect.tious) == (16, 16, "thumos")


@pytest.mark.parametrize("encoder", ["tsm_r18", "tsm_r50"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_its_models(name: str, encoder: str) -> None:
    config = config_of(*([] if name == "demo" else OWN), "--preset", name, "--encoder", encoder)
    assert config.preset == name
    with torch.device("meta"):
        model = TSMResNet(config.encoder.name, config.encoder.width)
        head = GTAD(config.head, model.num_features, 20, config.full.num_snippets)
    expected = config.encoder.width * (32 if encoder == "tsm_r50" else 8)
    assert model.num_features == expected
    assert head.base[0].in_channels == expected
