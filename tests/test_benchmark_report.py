"""Tables and plots from made-up results."""

from __future__ import annotations

import json

import pytest

from benchmarks.report import block, page, with_block
from benchmarks.report.limits import achieved
from benchmarks.report.markdown import duration, percent, significant, table, times
from benchmarks.report.readme import BEGIN, END
from benchmarks.report.speed import ahead_of_us, speed_up_table, speed_ups
from benchmarks.results import Measurement, load, save

from benchmark_fakes import made_up_results


@pytest.fixture
def results():
    return made_up_results()


def test_results_come_back_as_they_were(results, tmp_path):
    path = tmp_path / "folder" / "machine.json"
    save(results, path)
    assert load(path) == results
    assert [one.name for one in path.parent.iterdir()] == ["machine.json"]


def test_results_of_another_format_are_refused(results, tmp_path):
    path = tmp_path / "machine.json"
    save(results, path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "format": 0}))
    with pytest.raises(ValueError, match="machine.json has the format 0, expected 2"):
        load(path)


def test_speed_ups_are_of_rounds(results):
    ratios = speed_ups(results, ("encoder", "tiny"))
    assert ratios["whisper_max-high"].median == 4.0  # of 2, 4 and 4
    assert ratios["faster-whisper-int8"].median == 1.0


def test_table_marks_the_fastest_whoever_it_is(results):
    rows = speed_up_table(results, "tiny")
    assert rows[2] == "| encoder, 30 s window | 200 ms | **4.00×** | 1.00× |"
    assert rows[3] == "| 30 s window, 100 tokens, greedy | 1.00 s | 2.00× | **4.00×** |"


def test_cases_that_another_peer_wins_are_told(results):
    (line,) = ahead_of_us(results)
    assert line == (
        "30 s window, 100 tokens, greedy, tiny: faster-whisper int8 is 2.00× as fast as "
        "whisper_max high"
    )
    assert f"- {line}" in page({"machine": results})


def test_unpatched_whisper_can_win_too(results):
    for one in results.measurements:
        if one.peer != "whisper" and one.samples:
            one.samples = [10 * seconds for seconds in one.samples]
    assert any("openai-whisper is" in line for line in ahead_of_us(results))


def test_each_precision_is_compared_with_the_same_arithmetic(results):
    for peer, seconds in (("medium", 0.1), ("int8", 0.02)):
        name = f"whisper_max-{peer}"
        results.measurements.append(Measurement("encoder", "tiny", name, 2, [seconds] * 3))
    results.measurements.append(Measurement("encoder", "tiny", "torch-bf16", 2, [0.04] * 3))
    slower = [line for line in ahead_of_us(results) if line.startswith("encoder")]
    assert slower == [
        "encoder, 30 s window, tiny: torch bf16 autocast is 1.25× as fast as whisper_max high",
        "encoder, 30 s window, tiny: torch bf16 autocast is 2.50× as fast as whisper_max medium",
    ]


def test_page_has_what_is_absent_failed_and_different(results):
    text = page({"some-machine": results})
    assert "## some-machine" in text
    assert "- OpenVINO fp32: not installed: openvino" in text
    assert "transformers: failed: out / of memory" in text
    assert "| transformers | failed | – |" in text
    assert "| whisper_max high | 500 ms | 500 ms to 500 ms | 2.00× |" in text
    assert "| 0.0167 | 200 | differ |" in text
    assert "1.20 times as long (1.15 to 1.25)" in text
    assert "3.20 s after the start" in text
    assert "| whisper_max high, tiny | 2.50 s | 800 ms | 300 ms | 350 | 500 | 1.25× |" in text
    assert "| encoder, 30 s window, tiny: openai-whisper | 400 ms | 200 ms | 2.00× |" in text
    assert "| whisper_max high, tiny | 0.20 ms | – |" in text
    assert "| whisper_max high | greedy | 12.5 % | 2 of 16 | 3 of 3 |" in text
    assert "| openai-whisper | greedy | 12.5 % | – | – |" in text  # of results without it
    assert "A script of 2 transcriptions (micro) takes" in text


def test_page_without_results_says_so():
    assert "Nothing has been measured yet." in page({})
    assert "Not measured yet" in block({})


def test_readme_shows_the_machine_measured_last(results):
    newer = made_up_results()
    newer.measured, newer.machine["cpu_model"] = "2026-02-01T00:00:00+00:00", "Newer CPU"
    assert "Newer CPU" in block({"a": newer, "b": results})
    assert "4.00× faster-whisper int8" in block({"a": newer, "b": results})


@pytest.mark.parametrize(
    "level, needed", [("amx", "encoder needs AMX "), ("avx512", "int8 needs AVX512-BF16 and ")]
)
def test_readme_says_what_the_encoder_needs(results, level, needed):
    results.machine["cpu_level"] = level
    assert needed in block({"machine": results})


def test_readme_shows_windows_of_the_largest_model_too(results):
    for group in (("step", "tiny"), ("encoder", "turbo"), ("window", "turbo")):
        for peer, seconds in (("whisper", 20.0), ("whisper_max-high", 10.0)):
            results.measurements.append(Measurement(*group, peer, 2, [seconds] * 3))
    rows = block({"machine": results}).splitlines()
    shown = [row.split(" | ")[0] for row in rows if row.startswith("| ") and "(" in row]
    assert [name.rpartition("(")[2] for name in shown] == ["tiny)"] * 3 + ["turbo)"]
    assert "| 30 s window, 100 tokens, greedy (turbo) | 20.0 s | 2.00× | – | – | – |" in rows


def test_block_replaces_what_is_between_the_marks_and_nothing_else():
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert with_block(text, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    assert with_block("text\n", "new") == f"text\n\n{BEGIN}\nnew\n{END}\n"
    assert with_block("", "new") == f"{BEGIN}\nnew\n{END}\n"


def test_achieved_is_work_over_time_beside_the_ceiling(results):
    ours = [one for one in achieved(results) if one.peer == "whisper_max-high"]
    (encoder,) = ours
    assert encoder.unit == "GFLOP/s"
    assert encoder.part == pytest.approx(encoder.amount / 300.0)
    quantized = next(one for one in achieved(results) if one.peer == "faster-whisper-int8")
    assert quantized.ceiling is None and quantized.part is None  # not measured on this machine
    results.ceilings["int8_gflops"] = 1000.0
    quantized = next(one for one in achieved(results) if one.peer == "faster-whisper-int8")
    assert quantized.part == pytest.approx(quantized.amount / 1000.0)
    plain = next(one for one in achieved(results) if one.peer == "whisper")
    assert encoder.amount == pytest.approx(2 * plain.amount)  # medians 0.1 and 0.2 s


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (duration(0.0012345), "1.23 ms"),
        (duration(0.98765), "988 ms"),
        (duration(12.345), "12.3 s"),
        (times(3.14159), "3.14×"),
        (times(31.4159), "31.4×"),
        (significant(1234.5), "1234"),
        (percent(0.1234), "12.3 %"),
    ],
)
def test_numbers_have_three_digits(shown, expected):
    assert shown == expected


def test_table_has_one_cell_for_each_column():
    assert table(["", "a"], [["x", "1"]]) == ["|  | a |", "| --- | ---: |", "| x | 1 |", ""]


def test_plots_are_drawn_as_png_and_svg(results, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.report.plots import draw

    drawn = {path.name for path in draw(results, tmp_path)}
    assert drawn == {
        f"{name}.{form}"
        for name in ("speed-up", "roofline", "first-run")
        for form in ("png", "svg")
    }
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    draw(results, tmp_path)
    assert first == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
