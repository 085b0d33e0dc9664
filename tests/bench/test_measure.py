"""What benchmarks say of their timings, and that they run."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from bench import measure, report
from gist import cli

CPU = torch.device("cpu")


def case(**changes) -> measure.Case:
    settings = {
        "sizes": {"B": 2},
        "dtype": torch.float32,
        "calls": {"ours": lambda: time.sleep(1e-3), "theirs": lambda: time.sleep(3e-3)},
        "parity": lambda: None,
    }
    return measure.Case(**(settings | changes))


def test_ratios_and_shares_of_a_floor_are_what_the_clock_says(monkeypatch):
    now = [0.0]

    def taking(seconds):
        def call():
            now[0] += seconds

        return call

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    calls = {"ours": taking(20e-3), "least": taking(5e-3)}
    found = measure.run(case(calls=calls, floors={"ours": ("least", 2.0)}), CPU, seconds=0.2)
    ours, least = found["results"]["ours"], found["results"]["least"]
    assert found["parity"] == "ok"
    for quantile in ("q20", "median", "q80"):
        assert ours[quantile] == pytest.approx(20e-3)
        assert least[quantile] == pytest.approx(5e-3)
    assert ours["times_ours"] == 1
    assert least["times_ours"] == pytest.approx(1 / 4)
    assert ours["of_floor"] == pytest.approx(2 / 4)


def test_no_ratio_where_results_are_wrong(capsys):
    found = measure.run(case(parity=lambda: "d_cls is off by 3"), CPU, seconds=0.05)
    assert not any("times_ours" in result for result in found["results"].values())
    report.print_case(found)
    assert "d_cls is off by 3; hence no ratios" in capsys.readouterr().out
    run = {"benchmark": "b", "machine": {"device": "d"}, "limits": {}, "absent": {}}
    assert "no parity" in report.markdown([run | {"cases": [found]}])


def test_a_contender_that_fails_is_named_and_ours_is_an_error(capsys):
    def fails() -> None:
        raise RuntimeError("no compiler\nand more")

    calls = {"ours": lambda: None, "theirs": fails, "least": fails}
    found = measure.run(case(calls=calls, floors={"ours": ("least", 1.0)}), CPU, seconds=0.01)
    assert set(found["results"]) == {"ours"}
    assert "of_floor" not in found["results"]["ours"]
    report.print_case(found)
    assert "B 2: theirs failed: RuntimeError: no compiler\n" in capsys.readouterr().out
    run = {"benchmark": "b", "machine": {"device": "d"}, "limits": {}, "absent": {}}
    assert "B 2: least failed: RuntimeError" in report.markdown([run | {"cases": [found]}])
    with pytest.raises(RuntimeError, match="no compiler"):
        measure.run(case(calls={"ours": fails, "theirs": calls["ours"]}), CPU, seconds=0.01)


def test_graphs_are_held_against_the_graph_of_their_floor(monkeypatch):
    """What a GPU's figures go through, with times that are given in the place of its clock."""
    calls = {name: lambda name=name: None for name in ("ours", "theirs", "least")}
    seconds = dict(zip(calls.values(), (20e-3, 30e-3, 10e-3), strict=True))

    def graphed(call):
        if call is calls["theirs"]:
            raise RuntimeError("not captured")

        def replay() -> None: ...

        seconds[replay] = 2e-3 if call is calls["least"] else 8e-3
        return replay

    monkeypatch.setattr(measure, "_on_device", lambda call, repeats: seconds[call])
    monkeypatch.setattr(measure, "peak_bytes", lambda call, device: 0)
    monkeypatch.setattr(measure, "graphed", graphed)
    of_ours = {"floors": {"ours": ("least", 1.0)}, "graphs": ("ours", "theirs")}
    found = measure.run(case(calls=calls, **of_ours), torch.device("cuda"), seconds=0.1)
    assert found["failed"] == {"theirs, graph": "RuntimeError: not captured"}
    results = found["results"]
    assert set(results) == {"ours", "theirs", "least", "ours, graph", "least, graph"}
    assert results["ours"]["of_floor"] == pytest.approx(1 / 2)
    assert results["theirs"]["times_ours"] == pytest.approx(3 / 2)
    assert results["ours, graph"]["of_floor"] == pytest.approx(1 / 4)
    assert results["least, graph"]["times_ours"] == pytest.approx(1 / 4)


def test_mismatch_names_what_differs():
    exact = torch.tensor([1.0, -4.0], dtype=torch.float64)
    close = exact.float() + 1e-6
    assert measure.mismatch({"x": (close, exact)}, relative=1e-5) is None
    assert "y is off by" in measure.mismatch({"x": (close, exact), "y": (close, -exact)}, 1e-5)
    assert "x is off by nan" in measure.mismatch({"x": (close * torch.nan, exact)}, 1e-5)
    assert measure.mismatch({"x": (exact.bfloat16() * 1.004, exact)}, 1e-5) is None
    off = exact.float() + 1e-2
    assert "x is off by 0.01" in measure.mismatch({"x": (off, exact)}, 1e-5)
    assert measure.mismatch({"x": (off, exact, exact.float() + 6e-3)}, 1e-5) is None
    assert "x is off by" in measure.mismatch({"x": (off, exact, exact.float() + 4e-3)}, 1e-5)
    assert "x is off by" in measure.mismatch({"x": (off, exact, exact.float() * torch.nan)}, 1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_peak_memory_is_that_of_the_call():
    peak = measure.peak_bytes(lambda: torch.ones(64 << 20, dtype=torch.int8), CPU)
    assert 60e6 < peak < 90e6


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_peak_memory_counts_what_was_freed_and_is_used_again():
    def call():
        kept = [torch.ones(1 << 20, dtype=torch.int8) for _ in range(64)]
        return len(kept)

    call()
    assert 60e6 < measure.peak_bytes(call, CPU) < 90e6


@pytest.mark.parametrize("varied", ["N", "r"])
def test_a_sublayers_case_measures_what_it_says(varied):
    from bench import scaling

    small = scaling.sublayers(varied, {"B": 2, "N": 5, "D": 128, "r": 3}, torch.float32, CPU)
    assert small.parity() is None
    for call in small.calls.values():
        d_x, d_down, *_ = call()
        assert (d_x.shape, d_down.shape) == ((2, 5, 128), (3, 128))


@pytest.mark.parametrize("trained", [True, False])
def test_a_linear_heads_case_compares_what_computes_the_same(trained):
    from bench import linear_loss

    others = linear_loss.peers()
    others = {
        name: others[name] for name in others if name != "torch.compile" and "no KL" not in name
    }
    small = linear_loss.case(200, 6, 11, trained, torch.float32, CPU, others)
    assert small.parity() is None
    assert small.calls.pop("matmuls alone")() is None
    ours = small.calls.pop("ours")()
    assert len(ours) == (4 if trained else 2)
    for name, call in small.calls.items():
        for x, y in zip(call(), ours, strict=True):
            torch.testing.assert_close(x, y, msg=name)


def test_slopes_find_overhead_and_cost():
    cases = [
        {
            "sizes": {"B": n, "C": 1000},
            "varied": "B",
            "results": {"ours": {"median": 2e-5 + 3e-9 * n}, "theirs": {"median": 1e-9 * n**2}},
        }
        for n in (1, 10, 1000, 10**5, 10**7)
    ]
    slope, square = report.slopes({"cases": [*cases, {"sizes": {"B": 3}, "results": {}}]})
    assert (square["contender"], slope["contender"]) == ("theirs", "ours")
    assert square["exponent_at_the_end"] == pytest.approx(2)
    assert "20.0 us + 3 ns each; the size takes over at 6.67e+03" in report.slope_text(slope)
    assert report.slope_text(square) == (
        "theirs against B (C 1000): at the end, time grows with its power 2.00."
    )
    assert slope["axis"] == "B (C 1000)"
    assert slope["overhead_seconds"] == pytest.approx(2e-5)
    assert slope["seconds_per_unit"] == pytest.approx(3e-9)
    assert slope["takes_over_at"] == pytest.approx(2e-5 / 3e-9)
    assert slope["exponent_at_the_end"] == pytest.approx(1, abs=0.02)


def test_the_command_leaves_json_plots_and_a_report(tmp_path, monkeypatch, capsys):
    from bench import __main__, loss

    monkeypatch.setitem(loss.SHAPES, "cpu", ((4, 10), (8, 20)))
    monkeypatch.setattr(loss, "peers", lambda device: ({"released": loss.released}, {"X": "no"}))
    __main__.main(["loss", "--device", "cpu", "--seconds", "0.01", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "X takes no part: no" in printed
    run = json.loads((tmp_path / "loss.json").read_text())
    assert [case["sizes"] for case in run["cases"]] == [{"B": 4, "C": 10}, {"B": 8, "C": 20}]
    assert set(run["cases"][0]["results"]) == {
        "ours",
        "ours, no autograd",
        "released",
        "empty autograd.Function",
        "copy of both",
    }
    assert {"device", "torch", "revision"} <= set(run["machine"])
    assert all(value > 0 for value in run["limits"].values())
    assert (tmp_path / "loss-time.png").stat().st_size > 1000
    __main__.main(["report", str(tmp_path)])
    assert "| B 4, C 10 | float32 | released |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "los"], "no benchmark los; there are loss"),
        (["bench", "report", "nowhere"], "nowhere holds no results"),
        (["bench", "loss", "--dtype", "float8"], "take float32"),
    ],
)
def test_the_command_says_what_it_takes(arguments, message, capfd):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code not in (0, None)
    assert message in capfd.readouterr().err


def test_the_command_needs_the_repository(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("gist.cli.results.__file__", str(tmp_path / "gist" / "cli" / "results.py"))
    assert cli.main(["bench", "loss"]) == 2
    assert "the benchmarks are in the repository" in capsys.readouterr().err


def test_released_structure_is_ours(monkeypatch):
    from bench import step

    monkeypatch.setitem(step.SIZES, "cpu", (("vit_tiny_patch16_224", 1),))
    monkeypatch.setitem(step.OTHERS, "cpu", ())
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    (small,) = step.cases(CPU)
    assert small.parity() is None
    for call in small.calls.values():
        call()


def test_a_librarys_own_forward_is_ours(monkeypatch):
    from bench import step

    monkeypatch.setitem(step.SIZES, "cpu", ())
    monkeypatch.setitem(step.OTHERS, "cpu", (("eva02_tiny_patch14_224", 1),))
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    (small,) = step.cases(CPU)
    assert small.parity() is None
    assert small.sizes["N"] == 258
    ours, theirs = (small.calls[name]() for name in ("ours", "own forward"))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_gist_loss_case_measures_what_it_says():
    from bench import loss

    small = loss.case(8, 20, torch.float32, CPU, {"log-softmax": loss.log_softmax_form})
    assert small.parity() is None
    ours, theirs = small.calls["ours"](), small.calls["log-softmax"]()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    copied = small.calls["copy of both"]()
    assert sum(x.numel() for x in copied) == 2 * 8 * 20
    assert small.least_bytes["ours"] == 6 * 8 * 20 * 4
    assert Path(loss.__file__).parent.name == "bench"


def test_a_loaders_case_measures_what_it_says(tmp_path):
    from bench import loader

    loader.write_images(tmp_path, 8)
    small = loader.case(tmp_path, "vit_tiny_patch16_224", 32, 4, torch.float32, CPU)
    assert small.parity() is None
    assert small.images == 8
    for name, call in small.calls.items():
        last = call()
        assert name == "training step" or last.shape == (4, 3, 32, 32)


def test_photos_are_loaded_in_turn(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    from bench import loader
    from gist.data import load_folder

    monkeypatch.setattr(loader, "PHOTO_SIZE", (800, 600))
    loader.write_photos(tmp_path, 5)
    files = load_folder(tmp_path).train
    assert len(files) == 5
    assert files[0][0].size == (800, 600)
    seen = []
    monkeypatch.setattr(
        loader.Augmented, "__getitem__", lambda self, draw: seen.append(draw) or (torch.ones(1), 0)
    )
    monkeypatch.setattr(
        loader,
        "DataLoader",
        lambda data, **options: DataLoader(data, batch_sampler=options["batch_sampler"]),
    )
    small = loader.photo_case(tmp_path, "test_vit", 32, 2, torch.float32, CPU)
    assert small.parity() is None
    assert small.images == 8
    first = small.calls["photos, light, 2 workers"]
    first(), first()
    assert [draw[:2] for draw in seen] == [(i % 5, 1 + i // 5) for i in range(16)]
    for name in ("photos, squeezed, 2 workers", "training step"):
        small.calls[name]()


def test_images_a_second_are_those_of_a_call(capsys):
    found = measure.run(case(images=6), CPU, seconds=0.05)
    theirs = found["results"]["theirs"]
    assert theirs["images_per_second"] == 6 / theirs["median"]
    report.print_case(found)
    assert capsys.readouterr().out.split()[-1] == f"{theirs['images_per_second']:.0f}"
