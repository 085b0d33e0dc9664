"""The report: its numbers by hand, and what it refuses to put side by side."""

from __future__ import annotations

import copy
import csv
import io
import json
import math

import pytest
from PIL import Image

import gist
from gist import cli
from gist.files import write_json
from gist.suites.interval import Interval, t_quantile
from gist.suites.report import Report, report, variant

ADAPTER = {"name": "adapter", "rank": 4, "scale": 0.1}


def record(task="cifar", group="natural", seed=0, accuracy=0.5, gist=False, **config):
    return {
        "config": {
            "suite": "vtab-1k", "task": task, "group": group, "seed": seed, "recipe": "clean",
            "stop": "best", "model": "vit", "weights": "w.npz", "pretrained": False,
            "img_size": None, "gist": {"method": ADAPTER, "gist": gist, "token_dropout": 0.1},
            "train": {"epochs": 100, "batch_size": 64},
            "task_settings": {
                "lr": [1e-3], "weight_decay": 0.0, "drop_path": 0.0, "data_fingerprint": task,
            },
            **config,
        },
        "test": {"accuracy": accuracy, "loss": 1.0, "images": 10},
        "selection": {"on": None, "lr": 1e-3, "epoch": 100, "candidates": []},
        "parameters": {"method": 100, "token": 8 * gist, "head": len(task), "frozen": 1000},
        "seconds": 30.0,
    }  # fmt: skip


# Two tasks of one group and one of another; three seeds.
PLAIN = {"cifar": (0.50, 0.52, 0.54), "dtd": (0.60, 0.60, 0.66), "kitti": (0.80, 0.70, 0.75)}
GIST = {"cifar": (0.53, 0.53, 0.57), "dtd": (0.61, 0.58, 0.69), "kitti": (0.79, 0.74, 0.76)}
GROUPS = {"cifar": "natural", "dtd": "natural", "kitti": "structured"}


def records():
    return [
        record(task, GROUPS[task], seed, accuracy, gist)
        for gist, table in ((False, PLAIN), (True, GIST))
        for task, accuracies in table.items()
        for seed, accuracy in enumerate(accuracies)
    ]


def test_quantiles_of_students_t():
    # Tables of the distribution: degrees of freedom, 97.5 % and 99.5 %.
    for dof, two_sided_95, two_sided_99 in (
        (1, 12.7062, 63.6567), (2, 4.30265, 9.92484), (3, 3.18245, 5.84091), (4, 2.77645, 4.60409),
        (5, 2.57058, 4.03214), (9, 2.26216, 3.24984), (10, 2.22814, 3.16927),
        (30, 2.04227, 2.75000), (120, 1.97993, 2.61742),
    ):  # fmt: skip
        assert t_quantile(0.975, dof) == pytest.approx(two_sided_95, rel=5e-6)
        assert t_quantile(0.995, dof) == pytest.approx(two_sided_99, rel=5e-6)
        assert t_quantile(0.025, dof) == -t_quantile(0.975, dof)
    for p, dof in ((0.5, 0), (0.0, 3), (1.0, 3)):
        with pytest.raises(ValueError, match="must be"):
            t_quantile(p, dof)


def test_an_interval_needs_two_seeds():
    # 1, 2, 3: standard deviation 1, and t of two degrees of freedom.
    found = Interval.of([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)
    assert (found.mean, found.n) == (2.0, 3)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), rel=1e-6)
    one = Interval.of([0.25])
    assert (one.mean, one.n) == (0.25, 1)
    assert math.isnan(one.low)
    assert math.isnan(one.high)


def test_the_table_by_hand():
    made = Report(records())
    assert list(made.cells) == ["adapter", "adapter + GIST"]
    cifar, dtd, kitti, over_tasks, over_groups = made.rows()
    assert [row.title for row in (cifar, dtd, kitti)] == ["cifar", "dtd", "kitti"]
    assert cifar.cells["adapter"] == pytest.approx((0.52, 0.02))
    assert dtd.cells["adapter"] == pytest.approx((0.62, 0.0346410))
    # cifar's gains: 0.03, 0.01, 0.03; mean 7/300, standard deviation 0.0115470.
    half = 4.302653 * 0.0115470 / math.sqrt(3)
    gain = cifar.gains["adapter: GIST - plain"]
    assert gain.mean == pytest.approx(7 / 300)
    assert (gain.low, gain.high) == pytest.approx((7 / 300 - half, 7 / 300 + half), rel=1e-5)
    # Seeds' means over the tasks: plain 0.63333, 0.60667, 0.65; GIST 0.64333, 0.61667, 0.67333.
    assert over_tasks.title == "mean of 3 tasks"
    assert over_tasks.cells["adapter"] == pytest.approx((0.63, 0.0218581), rel=1e-5)
    assert over_tasks.cells["adapter + GIST"][0] == pytest.approx(1.93333 / 3, rel=1e-5)
    # Gains of the seeds: 0.01, 0.01, 0.02333; mean 0.0144444, standard deviation 0.00769800.
    gain, half = over_tasks.gains["adapter: GIST - plain"], 4.302653 * 0.00769800 / math.sqrt(3)
    assert gain.mean == pytest.approx(0.0144444, rel=1e-5)
    assert (gain.low, gain.high) == pytest.approx((gain.mean - half, gain.mean + half), rel=1e-4)
    # Groups: natural (0.52 + 0.62) / 2 = 0.57, structured 0.75.
    assert over_groups.title == "mean of 2 groups' means"
    assert over_groups.cells["adapter"][0] == pytest.approx(0.66)
    # Gains: natural 0.02, -0.005, 0.03; structured -0.01, 0.04, 0.01; halves of their sums.
    gain = over_groups.gains["adapter: GIST - plain"]
    assert gain.mean == pytest.approx((0.005 + 0.0175 + 0.02) / 3)
    assert gain.high - gain.mean == pytest.approx(4.302653 * 0.00803638 / math.sqrt(3), rel=1e-5)


def test_markdown_says_what_was_measured():
    text = Report(records()).markdown()
    assert "| cifar | natural | 52.00 (2.00) | 54.33 (2.31) | +2.33 [-0.54, +5.20] (3) |" in text
    assert "| mean of 3 tasks |  | 63.00 (2.19) |" in text
    assert "| parameters: token |  | 0 | 8 |  |" in text
    assert "| parameters: head, mean of the tasks |  | 4 | 4 |  |" in text  # (5 + 3 + 5) / 3
    assert "| time, all seeds |  | 270 s | 270 s |  |" in text
    assert "seeds 0, 1, 2. Recipe clean: epoch chosen on val" in text
    assert "Not among these results: caltech101, oxford_flowers102" in text
    released = Report([record(recipe="released", stop=None)]).markdown()
    assert "EPOCH WAS CHOSEN ON THE TEST IMAGES" in released
    assert "weights RANDOM" in Report([record(weights=None)]).markdown()


def test_of_one_task_methods_are_rows_and_there_is_no_mean():
    ranks = [
        record(accuracy=rank / 100) | {"config": {**record()["config"], "gist": {
            "method": ADAPTER | {"rank": rank}, "gist": False, "token_dropout": 0.1,
        }}}
        for rank in (2, 4, 8, 16, 32)
    ]  # fmt: skip
    table = Report(ranks).markdown()
    assert "| method | cifar | parameters: method | parameters: token |" in table
    assert "| adapter (rank=32) | 32.00 | 100 | 0 | 5 | 30 s |" in table
    assert "mean of" not in table


def test_what_is_missing_gives_no_mean():
    some = [r for r in records() if r["config"]["task"] != "dtd" or not r["config"]["gist"]["gist"]]
    made = Report(some)
    _, dtd, _, over_tasks, over_groups = made.rows()
    for row in (dtd, over_tasks, over_groups):
        assert row.cells["adapter"] is not None
        assert row.cells["adapter + GIST"] is None
        assert row.gains["adapter: GIST - plain"] is None
    assert "adapter + GIST has no result of dtd: no mean." in made.markdown()


def test_pairs_use_the_seeds_that_both_have():
    some = [r for r in records() if not (r["config"]["gist"]["gist"] and r["config"]["seed"] == 1)]
    cifar, *_ = Report(some).rows()
    assert cifar.gains["adapter: GIST - plain"].n == 2
    assert cifar.gains["adapter: GIST - plain"].mean == pytest.approx(0.03)
    uneven = [r for r in records() if (r["config"]["task"], r["config"]["seed"]) != ("cifar", 0)]
    *_, over_tasks, _ = Report(uneven).rows()
    assert over_tasks.gains["adapter: GIST - plain"].n == 2
    assert math.isnan(over_tasks.cells["adapter"][1])
    assert over_tasks.cells["adapter"][0] == pytest.approx((0.53 + 0.62 + 0.75) / 3)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"recipe": "released"}, "recipe: 'clean', and 'released'"),
        ({"model": "other"}, "model: 'vit', and 'other'"),
        ({"weights": "x.npz"}, "weights"),
        ({"train": {"epochs": 50, "batch_size": 64}}, "train: .*100.*50"),
        ({"suite": "offline"}, "suite"),
    ],
)
@pytest.mark.parametrize("gist", [False, True])  # in one column, and in a pair
def test_results_that_may_not_stand_together(change, difference, gist):
    with pytest.raises(ValueError, match=f"differ in {difference}"):
        Report([record(), record(seed=1, gist=gist, **change)])


@pytest.mark.parametrize("gist", [False, True])
def test_other_images_or_rates_may_not_stand_together(gist):
    for key, value in (("data_fingerprint", "other"), ("lr", [1e-3, 1e-2])):
        other = record(seed=1, gist=gist)
        other["config"]["task_settings"] = {**other["config"]["task_settings"], key: value}
        said = f"'cifar' of 'adapter' .* differ in {key}"
        if gist and key == "data_fingerprint":
            said = "adapter \\+ GIST, cifar, seed 1 had other images than adapter, cifar, seed 0"
        with pytest.raises(ValueError, match=said):
            Report([record(), other])
    probe = record(gist=False)
    probe["config"]["gist"] = {"method": None, "gist": False, "token_dropout": 0.1}
    probe["config"]["task_settings"]["data_fingerprint"] = "other"
    with pytest.raises(ValueError, match="linear probe.* had other images than adapter"):
        Report([record(), probe])


def test_sides_that_were_tuned_apart_are_paired_and_their_rates_listed():
    apart = records()
    for one in apart:
        if one["config"]["gist"]["gist"] and one["config"]["task"] == "dtd":
            one["config"]["task_settings"]["lr"] = [3e-3]
            one["selection"]["lr"] = 3e-3
    with pytest.raises(ValueError, match="differ in lr"):
        Report(apart)
    printed = Report(apart, tuned_apart=True).markdown()
    assert "adapter: learning rates 0.001 (cifar), 0.001 (dtd), 0.001 (kitti)." in printed
    assert "adapter + GIST: learning rates 0.001 (cifar), 0.003 (dtd), 0.001 (kitti)." in printed
    assert printed.startswith(Report(records()).markdown().partition("- ")[0])
    apart[-1]["config"]["task_settings"]["lr"] = [3e-3]  # of one seed alone
    with pytest.raises(ValueError, match="'kitti' of 'adapter \\+ GIST'.* differ in lr"):
        Report(apart, tuned_apart=True)
    apart = records()
    apart[0]["config"]["task_settings"]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match="weight_decay"):
        Report(apart, tuned_apart=True)


def test_gains_over_a_baseline():
    both = [
        record(seed=seed, accuracy=accuracy, gist=True, loss=loss)
        for loss, accuracies in (({}, (0.5, 0.6)), ({"temperature": 1.0}, (0.51, 0.63)))
        for seed, accuracy in enumerate(accuracies)
    ]
    title = "adapter + GIST (temperature=1.0)"
    (row,) = Report(both, baseline="adapter + GIST").rows()
    gain = row.gains[f"{title} - adapter + GIST"]
    assert (gain.mean, gain.n) == (pytest.approx(0.02), 2)
    t = 12.7062  # of one degree of freedom
    assert gain.high - gain.mean == pytest.approx(0.01 * t, rel=1e-5)
    assert "+2.00 [-10.71, +14.71] (2)" in Report(both, baseline="adapter + GIST").markdown()
    with pytest.raises(ValueError, match="baseline: 'adapter' is not known; did you mean"):
        Report(both, baseline="adapter")
    both[-1]["config"]["task_settings"]["lr"] = both[-2]["config"]["task_settings"]["lr"] = [0.1]
    with pytest.raises(ValueError, match="'cifar' of 'adapter \\+ GIST' .* differ in lr"):
        Report(both, baseline="adapter + GIST")


def test_augmentation_is_a_column_with_gains_of_its_own():
    both = [
        record(accuracy=accuracy, gist=gist, **augment)
        for augment, accuracies in (({}, (0.5, 0.6)), ({"augment": "light"}, (0.55, 0.7)))
        for gist, accuracy in enumerate(accuracies)
    ]
    (row,) = Report(both).rows()
    assert {title: gain.mean for title, gain in row.gains.items()} == {
        "adapter: GIST - plain": pytest.approx(0.1),
        "augment light: adapter: GIST - plain": pytest.approx(0.15),
    }
    (row,) = Report(both, baseline="adapter + GIST").rows()
    gain = row.gains["augment light: adapter + GIST - adapter + GIST"]
    assert gain.mean == pytest.approx(0.1)


def test_settings_name_the_column_and_one_result_counts_once():
    wide = record()
    wide["config"]["gist"]["method"] = {**ADAPTER, "rank": 8}
    columns = Report([record(gist=True), wide, record()]).cells
    assert list(columns) == ["adapter", "adapter + GIST", "adapter (rank=8)"]
    other = copy.deepcopy(record(seed=1))
    other["config"]["gist"]["token_dropout"] = 0.3
    with pytest.raises(ValueError, match="differ in gist"):
        Report([record(), other])
    with pytest.raises(ValueError, match="two results of adapter, cifar, seed 0"):
        Report([record(), record()])
    with pytest.raises(ValueError, match="no record"):
        Report([])


def test_files(tmp_path, capsys):
    for number, one in enumerate(records()):
        write_json(tmp_path / "runs" / str(number) / "vtab.json", one)
    out = tmp_path / "out"
    # A folder given twice, as itself and below another, counts once.
    runs = [str(tmp_path / "runs"), str(tmp_path / "runs" / "0")]
    assert cli.main(["vtab", "report", *runs, "--out", str(out)]) == 0
    assert (out / "report.md").read_text().strip() in capsys.readouterr().out
    assert json.loads((out / "records.json").read_text()) == report([tmp_path / "runs"]).records
    rows = list(csv.DictReader(io.StringIO((out / "report.csv").read_text())))
    assert [row["task"] for row in rows[:3]] == ["cifar", "dtd", "kitti"]
    assert float(rows[0]["adapter + GIST"]) == pytest.approx(1.63 / 3)
    assert float(rows[3]["adapter: GIST - plain: mean"]) == pytest.approx(0.0144444, rel=1e-5)
    with Image.open(out / "report.png") as picture:
        assert picture.size[0] > 500
    (tmp_path / "empty").mkdir()
    assert cli.main(["vtab", "report", str(tmp_path / "empty")]) == 2
    assert "has no finished result" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "loss", "title"),
    [
        (gist.GistConfig(None, gist=False), {}, "linear probe"),
        (gist.GistConfig(), {}, "adapter + GIST"),
        (gist.GistConfig(gist.LoRA(rank=2), gist=False), {}, "lora (rank=2)"),
        (gist.GistConfig([gist.LoRA(), gist.BitFit()]), {}, "lora + bitfit + GIST"),
        (gist.GistConfig(), {"temperature": 1}, "adapter + GIST (temperature=1)"),
        (
            gist.GistConfig(gist.Adapter(rank=8), num_tokens=2),
            {"kl_weights": [0.75, 0]},
            "adapter (rank=8) + GIST (num_tokens=2, kl_weights=[0.75, 0])",
        ),
    ],
)
def test_columns_are_named_by_what_is_not_the_default(config, loss, title):
    assert variant({"gist": json.loads(json.dumps(config.to_dict())), "loss": loss}) == title
