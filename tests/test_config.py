"""Flags become one config, or one sentence that names the flag to change."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lofi_fast import __main__ as program
from lofi_fast import plan
from lofi_fast.budget import Budget, parse_bytes, show_time
from lofi_fast.config import MAY_CHANGE, PLANNED_FOR, STAGES, Config, PresetName, memory_settings
from lofi_fast.encoder.resnet import TSMResNet
from lofi_fast.errors import InputError
from lofi_fast.fidelity import Fidelity, Pattern
from lofi_fast.head.gtad import GTAD
from lofi_fast.presets import (
    MANY_VIDEOS,
    PRESETS,
    configured,
    preset,
    preset_note,
    unread_settings,
    weights_warning,
)  # fmt: skip
from lofi_fast.settings import Leaf, leaves, negated, read
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
        ([], True, "small"),
        ([], False, "small"),
        (["--encoder-weights", "w.pth"], True, "activitynet"),
        (["--encoder-weights", "w.pth"], False, "small"),
        (["--encoder-weights", "w.pth", "--device", "cpu"], True, "small"),
        (["--device", "cpu"], True, "small"),
        (["--preset", "thumos"], False, "thumos"),
    ],
)
def test_own_data_chooses_the_preset(flags: list[str], cuda: bool, preset: str) -> None:
    config = config_of(*OWN, *flags, cuda=cuda)
    assert (config.preset, config.out) == (preset, "")
    assert (config.data.annotations, config.data.videos) == ("a.json", "v")


@pytest.mark.parametrize(("count", "preset"), [(MANY_VIDEOS - 1, "small"), (MANY_VIDEOS, "activitynet")])
def test_many_videos_on_a_gpu_are_for_the_papers_preset(count: int, preset: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("\n".join(["video,start,end,label", *(f"v{i},1,2,run" for i in range(count))]))
    flags = ["--annotations", str(path), "--videos", "v"]
    config = config_of(*flags, cuda=True)
    assert config.preset == preset and config_of(*flags, cuda=False).preset == "small"
    words = {"annotations": str(path), "videos": "v"}
    (note,) = preset_note(words, None, config)
    assert note.startswith(f"preset {preset}, ") and str(MANY_VIDEOS) in note
    assert preset_note(words | {"preset": preset}, None, config) == preset_note({}, None, config) == []


def test_every_flag_reaches_its_setting() -> None:
    config, resume = read_flags(
        [*OWN, "--preset", "activitynet", "--mem-budget", "11GB", "--out", "o", "--stages", "head,joint", "--resume",
         "--encoder", "tsm_r34", "--width", "48", "--encoder-weights", "w.pth", "--fidelity", "64x160",
         "--pattern", "cyclic", "--short-cycle", "16", "--min-cut", "2", "--max-cut", "8", "--window", "51.2",
         "--frame-stride", "4", "--resize", "squash", "--no-flip", "--cache", "c", "--video-scores", "s.json",
         "--pretrain-epochs", "0", "--pretrain-lr", "0.2", "--joint-epochs", "3", "--joint-lr", "0.3",
         "--head-epochs", "5", "--head-lr", "0.4", "--batch", "6", "--tiou", "0.3:0.1:0.7", "--seed", "0",
         "--sigma", "0.4", "--top-k", "500",
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
        detect=dataclasses.replace(base.detect, tious="0.3:0.1:0.7", sigma=0.4, top_k=500),
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
    assert config_of(*OWN, "--preset", "thumos", "--window", "video").data.window is None
    assert config_of(*OWN, "--preset", "small", "--window", "video").data.window is None


def test_small_chooses_its_window_from_the_labels_and_others_can() -> None:
    small = config_of(*OWN, "--preset", "small")
    assert small.data.window == "labels" and Config.from_json(small.to_json(), "config.json") == small
    with pytest.raises(ValueError, match="not chosen"):
        _ = small.data.window_seconds
    assert config_of(*OWN, "--preset", "small", "--window", "12").data.window_seconds == 12.0
    assert config_of(*OWN, "--preset", "thumos", "--window", "labels").data.window == "labels"


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


@pytest.mark.parametrize("name", ["activitynet", "hacs", "thumos"])
def test_the_papers_presets_pretrain_with_momentum_and_learn_jointly_without(name: PresetName) -> None:
    config = PRESETS[name]()
    assert (config.pretrain.optimizer, config.pretrain.momentum) == ("sgd", 0.9)
    assert (config.joint.optimizer, config.joint.momentum) == ("sgd", 0.0)


def test_a_paper_preset_without_weights_is_warned_of() -> None:
    for name in PRESETS:
        warning = weights_warning(config_of(*([] if name == "demo" else OWN), "--preset", name))
        assert (warning is None) == (name in ("demo", "small"))
        assert warning is None or ("random weights" in warning and "--encoder-weights" in warning)
    assert weights_warning(config_of(*OWN, "--preset", "thumos", "--encoder-weights", "w.pth")) is None


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


@pytest.mark.parametrize("name", ["demo", "small"])
def test_actionformer_learns_from_scratch_by_gentler_steps(
    name: PresetName, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*([] if name == "demo" else OWN), "--preset", name, "--head", "actionformer"]
    config, gtad = config_of(*flags), PRESETS[name]()
    assert dataclasses.replace(config, data=gtad.data) == preset(name, "actionformer") and not unread_settings(config)
    assert (config.actionformer.hidden, config.actionformer.levels) == (128, 4)
    assert (config.joint.lr, config.joint.clip, config.head_stage.clip) == (2e-4, 1.0, 1.0)
    assert dataclasses.replace(config.joint, lr=gtad.joint.lr, clip=gtad.joint.clip) == gtad.joint
    assert config_of(*flags, "--joint-lr", "0.25").joint.lr == 0.25
    with pytest.raises(SystemExit):
        program.main(["train", "--help", *flags])
    assert "(default: 0.0002)" in capsys.readouterr().out
    assert preset("thumos", "actionformer").joint == PRESETS["thumos"]().joint
    assert preset(name, "gtad") == gtad and preset(name, "bmn").joint == gtad.joint


# Every setting, by every way in

LEAVES = leaves(Config)
OTHER: dict[str, Any] = {  # values unlike the small preset's, where the type alone does not give one
    "preset": "thumos", "full": "16x32", "data.window": 12.5, "stages": "joint,eval", "budget": "3GB", "threads": 1,
    "short_cycle": 3, "epoch_time": "90s", "min_cut": 2.5, "max_cut": 9.5, "head.hidden": 64, "head.map_channels": 64,
    "encoder.train": "adapters",
}  # fmt: skip
WITH: dict[str, dict[str, Any]] = {"encoder.train": {"encoder.name": "vit_b16"}}  # what a setting goes with


def other(leaf: Leaf, config: Config) -> Any:
    """A value of a setting that `config` does not have, as JSON, TOML and Python have it."""
    if leaf.name in OTHER:
        return OTHER[leaf.name]
    now = leaf.of(config)
    if leaf.choices:
        chosen = next(choice for choice in leaf.choices if choice != leaf.text(now))
        return int(chosen) if isinstance(now, int) else chosen
    if isinstance(now, bool):
        return not now
    if isinstance(now, int) or leaf.type == int | None:
        return (now or 3) * 2
    if isinstance(now, float) or leaf.type == float | None:
        return (now or 0.5) / 2
    return f"another {leaf.path[-1]}"


def given_as(way: str, name: str, value: Any, leaf: Leaf, folder: Path) -> Config:
    """The config of own data in the small preset, with one setting more, given as `way` says."""
    rest: dict[str, Any] = {"annotations": "a.json", "videos": "v", "preset": "small", **WITH.get(name, {})}
    section, _, last = name.rpartition(".")
    nested: dict[str, Any] = {section: {last: value}} if section else {name: value}
    if way in ("flags", "short flags"):
        words = [f"--{key}={one}" for key, one in rest.items()]
        flag = leaf.flag if way == "short flags" else leaf.long
        more = [flag if value else negated(flag)] if isinstance(value, bool) else [f"{flag}={value}"]
        return config_of(*words, *more)
    if way == "keywords":
        return configured(rest | nested, cuda=lambda: False)
    path = folder / f"settings.{way}"
    if way == "toml":  # scalars of JSON are TOML too
        path.write_text(f"{name} = {json.dumps(value)}\n")
    else:
        path.write_text(json.dumps(nested))
    rest = {key: one for key, one in rest.items() if key != last}
    return configured(rest, file=path, cuda=lambda: False)


WAYS = ("flags", "short flags", "toml", "json", "keywords")


@pytest.mark.parametrize(
    ("way", "leaf"),
    [
        pytest.param(way, leaf, id=f"{leaf.name}, {way}")
        for leaf in LEAVES
        for way in WAYS
        if (leaf.short or way != "short flags") and leaf.name != "cut"  # which sets two others; see below
    ],
)
def test_every_setting_can_be_given_in_every_way(way: str, leaf: Leaf, tmp_path: Path) -> None:
    small = configured({"annotations": "a.json", "videos": "v", "preset": "small"}, cuda=lambda: False)
    value = other(leaf, small)
    config = given_as(way, leaf.name, value, leaf, tmp_path)
    expected = read(Config, {leaf.name: value})[leaf.name]
    assert leaf.of(config) == expected != leaf.of(small)
    if leaf.name != "preset":
        for one in LEAVES:
            unchanged = one.of(config) == WITH.get(leaf.name, {}).get(one.name, one.of(small))
            assert one is leaf or unchanged, "no other setting is changed"
    assert Config.from_json(config.to_json(), "config.json") == config


def test_a_cut_is_both_bounds_at_once() -> None:
    config = config_of("--cut", "4")
    assert (config.min_cut, config.max_cut, config.cut) == (4, 4, None)
    assert config == config_of("--min-cut", "4", "--max-cut", "4")
    assert configured({"cut": 4, "mem_budget": "1GB"}, cuda=lambda: False).max_cut == 4
    assert config_of("--cut", "none") == config_of()
    with pytest.raises(InputError, match="--cut 4 goes without --max-cut"):
        config_of("--cut", "4", "--max-cut", "8")
    with pytest.raises(InputError, match=r"--min-cut 0\.5"):
        config_of("--cut", "0.5")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30min", 1800), ("90s", 90), ("1h30min", 5400), ("0.5h", 1800), ("1h 2min 3s", 3723), ("1.5min", 90)],
)
def test_times_of_an_epoch(text: str, seconds: float) -> None:
    assert config_of("--epoch-time", text).epoch_time == seconds
    assert config_of(f"--epoch-time={show_time(seconds)}").epoch_time == seconds


@pytest.mark.parametrize("text", ["30", "", "-3min", "min", "30 apples", "0s", "5min3h", "nan s", "1e3s"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(InputError, match="write a time like 30min"):
        config_of(f"--epoch-time={text}")


def test_a_setting_that_is_gone_says_what_to_do_without(tmp_path: Path) -> None:
    for words in (["--policy", "fidelity"], ["--policy=batch"]):
        with pytest.raises(InputError, match="--policy is gone: every step takes the highest fidelity that fits"):
            config_of(*words)
    with pytest.raises(InputError, match='"policy" is gone'):
        configured({"policy": "batch"}, cuda=lambda: False)
    path = tmp_path / "mine.toml"
    path.write_text('policy = "batch"\n')
    with pytest.raises(InputError, match=r'mine.toml: "policy" is gone'):
        config_of("--config", str(path))


def test_a_file_goes_before_the_preset_and_flags_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('preset = "demo"\nmem_budget = "5GB"\nno_flip = true\n[joint]\nlr = 0.25\nepochs = 9\n')
    config, base = config_of("--config", str(path), "--joint-lr", "0.5"), PRESETS["demo"]()
    assert config.joint == dataclasses.replace(base.joint, lr=0.5, epochs=9)
    assert (config.budget.text, config.data.flip) == ("5GB", False)
    assert config_of("--config", str(path), "--flip").data.flip is True


def test_a_runs_own_config_is_a_file_of_settings(tmp_path: Path) -> None:
    config = config_of("--width", "8", "--fidelity", "8x32", "--mem-budget", "80%", "--joint.weight-decay", "0.5")
    saved = json.loads(config.to_json())
    del saved["lofi_fast"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(saved))
    assert config_of("--config", str(path)) == config


@pytest.mark.parametrize(("name", "text"), [("x.toml", "width = 8\r\n"), ("x.json", '{"width": 8}')])
def test_a_byte_order_mark_before_settings_is_passed_over(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert config_of("--config", str(tmp_path / name)).encoder.width == 8


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("x.toml", "joint.weigth_decay = 0.1", ['"joint.weigth_decay"', '"joint.weight_decay"']),
        ("x.json", '{"wdith": 8}', ['"wdith" is no setting', '"width"']),
        ("x.toml", "joint = 3", ['"joint" is a section']),
        ("x.json", '{"joint": {"lr": 1}, "joint": {"epochs": 3}}', ["'joint' appears twice in one object"]),
        ("x.json", '{"width": 8, "wid-th": 9, "width": 9}', ["'width' appears twice in one object"]),
        ("x.json", '{"joint_lr": 0.1, "joint": {"lr": 0.2}}', ['"joint_lr" and "joint.lr" are one setting with two']),
        ("x.toml", 'mem_budget = "4GB"\nmem-budget = "5GB"', ['"mem_budget" and "mem-budget" are one setting']),
        ("x.toml", "no_flip = true\n[data]\nflip = true", ['"no_flip" and "data.flip" are one setting']),
        ("x.toml", "width = 0", ["--width 0", "positive"]),
        ("x.toml", 'width = "wide"', ["--width 'wide'", "whole number"]),
        ("x.toml", "[full]\nnum_snippets = 3\nside = 32", ["--fidelity", "at least 4 snippets"]),
        ("x.toml", "width = ", ["not readable as TOML"]),
        ("x.json", "[3]", ["not settings by name"]),
        ("x.yaml", "width: 3", ["TOML or JSON"]),
        ("none.toml", None, ["No such file"]),
    ],
)
def test_a_bad_file_of_settings_is_one_sentence(tmp_path: Path, name: str, text: str | None, parts: list[str]) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as error:
        config_of("--config", str(path))
    for part in (str(path), *parts):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda content: content.pop("lofi_fast"), "before 0.2.0"),
        (lambda content: content["joint"].update(nesterov=True), '"joint.nesterov" is no setting'),
        (lambda content: content["joint"].pop("lr"), "--joint-lr is missing"),
        (lambda content: content["joint"].update(lr="much"), "--joint-lr 'much': must be a number"),
        (lambda content: content.update(budget={"text": "11 apples"}), "11 apples"),
    ],
    ids=["of the version before", "unknown", "missing", "of another type", "of no meaning"],
)
def test_a_config_that_this_version_did_not_write_is_refused(tmp_path: Path, change: Any, part: str) -> None:
    content = json.loads(PRESETS["thumos"]().to_json())
    change(content)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        Config.read(path)
    assert str(path) in str(error.value) and part in str(error.value)


def test_what_a_resumed_run_may_change_and_what_readings_of_memory_depend_on() -> None:
    planned = {"budget", "min_cut", "max_cut", "cut", "epoch_time", "micro_batch", "recompute", "replay"}
    assert set(PLANNED_FOR) == planned
    longer = {"pretrain.epochs", "joint.epochs", "head_stage.epochs", "detect.tious", "detect.tolerances"}
    assert set(MAY_CHANGE) == planned | longer | {
        "stages", "threads", "device", "optimizer_impl", "out", "data.cache", "data.annotations", "data.videos",
        "data.video_scores", "encoder.weights",  # which are compared by content
        "data.decoder", "precision",  # without which a resumed run keeps its own
        "tensorboard",
    }  # fmt: skip
    config = config_of()
    key = memory_settings(config)
    for changed in ("--width=9", "--encoder=tsm_r50", "--kept-maps=8bit", "--fidelity=16x32", "--batch=9",
                    "--joint.optimizer=sgd", "--head.hidden=64", "--head.middle-kernel=3", "--head=actionformer",
                    "--actionformer.levels=3", "--head=bmn", "--bmn.samples=2", "--bmn.definition=paper",
                    "--spotting.layers=2", "--encoder=r2plus1d_18", "--encoder=vit_b16"):  # fmt: skip
        assert memory_settings(config_of(changed)) != key, changed
    for same in ("--seed=5", "--joint-lr=1", "--pretrain.batch=3", "--mem-budget=3GB", "--data.overlap=0"):
        assert memory_settings(config_of(same)) == key, same


# Help and typos


@pytest.mark.parametrize("command", ["train", "plan"])
def test_help_shows_every_setting_with_its_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        program.main([command, "--help", "--preset", "thumos"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    thumos = PRESETS["thumos"]()
    for leaf in LEAVES:
        assert f"{leaf.long} " in text or f"{leaf.long}," in text, leaf.name
        assert leaf.setting.help in text, leaf.name
        if not leaf.setting.parse:
            assert f"(default: {leaf.shown(leaf.of(thumos))})" in text.replace("joint, head", "joint,head"), leaf.name
    assert "(default: 256x112)" in text


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["train", "--joint-lrs", "3"], "perhaps you meant --joint-lr;"),
        (["train", "--mem_budgte=3GB"], "perhaps you meant --mem-budget;"),
        (["train", "--noflip"], "perhaps you meant --no-flip;"),
        (["plan", "--crad", "2080ti"], "perhaps you meant --card;"),
        (["plan", "--joint.weight-decya", "3"], "perhaps you meant --joint.weight-decay;"),
        (["evaluate", "--prediction", "p.json"], "perhaps you meant --predictions;"),
        (["trian"], "perhaps you meant train;"),
        (["train", "--resume=yes"], "takes no value"),
        (["train", "--seed"], "--seed needs a value, N"),
        (["train", "--seed", "--batch", "3"], "--seed needs a value"),
        (["train", "runs/x"], "'runs/x' is no flag"),
        (["evaluate", "--tiou", "thumos"], "--ground-truth is missing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_typo_is_one_sentence_that_says_what_may_be_meant(
    argv: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and meant in error and error.count("\n") == 1


def test_the_program_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--help"]) == 0
    listed = capsys.readouterr().out
    for name in ("train", "plan", "detect", "evaluate", "report"):
        assert f"\n  {name} " in listed
    assert program.main([]) == 2
    assert capsys.readouterr().out == listed


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["plan", "--help"], 0),
        (["evaluate", "--help"], 0),
        (["train", "--joint-lrs", "3"], 2),
        (["train", "--width", "wide"], 2),
        (["plan", "--mem-budget", "11GB"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_typos_and_plans_come_without_torch(argv: list[str], status: int) -> None:
    code = (
        "import sys; from lofi_fast.__main__ import main\n"
        "try: status = main(sys.argv[1:])\nexcept SystemExit as stop: status = stop.code\n"
        "assert not {'torch', 'triton', 'matplotlib', 'nvidia'} & sys.modules.keys()\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.returncode == status, done.stderr


def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "lofi_fast", "plan", "--mem-budget", "11GB", "--json", "--all"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_plan_takes_no_share_of_an_unknown_card_and_no_negative_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--mem-budget", "80%"]) == 2
    assert "--card" in capsys.readouterr().err
    assert plan.main(["--mem-budget", "11GB", "--classes", "-3"]) == 2
    assert "--classes -3" in capsys.readouterr().err
    assert plan.main(["--mem-budget", "80%", "--card", "4090"]) == 0
