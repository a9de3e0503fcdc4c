"""The packaging files agree: versions, extras, tasks, and what goes into the wheel."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import zlib
from configparser import ConfigParser
from pathlib import Path

import pytest

import whisper_max
from whisper_max import versions

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
THIRD_PARTY = "testenv:third-party-{stable-ts,whisper-timestamped,speechrecognition,lhotse}"
RECORDING = " -p compat.matrix.recording"
TASKS = ("demo", "test", "bench", "gpu-compile", "lint")


def read_ini(name: str) -> ConfigParser:
    parser = ConfigParser(interpolation=None, delimiters="=", comment_prefixes="#")
    assert parser.read(ROOT / name, encoding="utf-8")
    return parser


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


SETUP = read_ini("setup.cfg")
TOX = read_ini("tox.ini")
PIXI = tomllib.loads((ROOT / "pixi.toml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
CONSTRAINTS = [
    line for line in lines((ROOT / "constraints.txt").read_text()) if not line.startswith("#")
]


def constraint(package: str) -> str:
    """The specifier that constraints.txt gives a package, such as "==2.13.0"."""
    (found,) = [line for line in CONSTRAINTS if line.startswith(package)]
    return found.removeprefix(package)


def extra(name: str) -> set[str]:
    return set(lines(SETUP["options.extras_require"][name]))


def tox_dependencies(section: str = "testenv") -> tuple[set[str], dict[str, set[str]]]:
    """What every environment of the matrix installs, and what each factor adds."""
    common, by_factor = set(), {}
    for line in lines(TOX[section]["deps"]):
        factor, separator, requirement = line.partition(": ")
        if separator:
            by_factor.setdefault(factor, set()).add(requirement)
        else:
            common.add(line)
    return common, by_factor


def expand(pattern: str) -> list[str]:
    """Environment names of a tox pattern: "py{310,311}-max" is py310-max and py311-max."""
    parts = re.split(r"\{([^}]*)\}", pattern)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def recipe(target: str) -> str:
    """The prerequisites and commands of a Makefile target."""
    (found,) = re.findall(rf"^{re.escape(target)}:.*\n(?:\t.*\n)*", MAKEFILE, re.MULTILINE)
    return found


def requirement(entry: object) -> str:
    """A pixi entry as a pip specifier: a bare version, or the version in a table."""
    version = entry["version"] if isinstance(entry, dict) else entry
    return "" if version == "*" else version


# Versions


def test_python_versions_agree():
    short = [version.replace(".", "") for version in versions.SUPPORTED_PYTHON]
    first, last = versions.SUPPORTED_PYTHON[0], versions.SUPPORTED_PYTHON[-1]
    above = f"{last.split('.')[0]}.{int(last.split('.')[1]) + 1}"
    assert SETUP["options"]["python_requires"] == f">={first},<{above}"
    classifiers = lines(SETUP["metadata"]["classifiers"])
    assert [c.split(" :: ")[-1] for c in classifiers if re.search(r":: 3\.\d+$", c)] == list(
        versions.SUPPORTED_PYTHON
    )
    assert sorted(PIXI["feature"]["py" + s]["dependencies"]["python"] for s in short) == sorted(
        f"{version}.*" for version in versions.SUPPORTED_PYTHON
    )


def test_requirements_agree_with_what_the_package_checks_at_run_time():
    assert set(lines(SETUP["options"]["install_requires"])) == {
        f"max=={versions.TESTED_MAX}.*",
        "numpy",
        f"openai-whisper>={versions.TESTED_WHISPER[0]}",
        f"torch>={versions.OLDEST_TORCH}",
    }


def test_version_of_the_package_is_written_once():
    assert SETUP["metadata"]["version"] == "attr: whisper_max.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+", whisper_max.__version__)


def environments() -> list[str]:
    """The default environments of tox.ini."""
    return [name for pattern in lines(TOX["tox"]["env_list"]) for name in expand(pattern)]


def test_matrix_covers_every_combination_that_can_be_installed():
    assert len(environments()) == len(set(environments()))
    expected = {
        f"py{python.replace('.', '')}-whisper{release}-{backend}{double}"
        for python in versions.SUPPORTED_PYTHON
        for release in versions.TESTED_WHISPER
        for backend in ("max", "torch")
        for double in ("", "-double")
        if (python, release) != ("3.13", "20231117")  # needs a triton without such a build
    }
    assert {name for name in environments() if name.startswith("py")} == expected
    assert [name for name in environments() if not name.startswith("py")] == [
        "system-torch",
        *(name.removeprefix("testenv:") for name in expand(THIRD_PARTY)),
        "long",
    ]
    assert TOX["tox"].getboolean("skip_missing_interpreters")
    assert {f"{name}-double" for name in PIXI["environments"] if name != "default"} == {
        name for name in expected if name.endswith("-double")
    }


def test_pixi_environments_are_made_of_the_features_they_are_named_after():
    for name, features in PIXI["environments"].items():
        assert name in ("default", "-".join(features))


def test_matrix_pins_agree():
    common, by_factor = tox_dependencies()
    assert common == extra("test") | {f"torch{constraint('torch')}+cpu"}
    assert by_factor == {
        "max": {f"max=={versions.TESTED_MAX}.*", *extra("matrix")},
        **{f"whisper{r}": {f"openai-whisper=={r}"} for r in versions.TESTED_WHISPER},
    }
    newest = by_factor[f"whisper{versions.TESTED_WHISPER[-1]}"]
    needed = newest | {f"max=={versions.TESTED_MAX}.*", f"torch{constraint('torch')}+cpu"}
    for section in (THIRD_PARTY, "testenv:long"):
        others, pinned = tox_dependencies(section)
        assert needed <= others <= needed | extra("test") | extra("matrix")
        assert all("==" in line for requirements in pinned.values() for line in requirements)
    assert TOX["task"]["deps"] == f"torch{constraint('torch')}+cpu"
    assert TOX["testenv:lint"]["deps"] in extra("dev")
    assert TOX["tox"]["requires"] in extra("dev")

    assert requirement(PIXI["pypi-dependencies"]["torch"]) == constraint("torch")
    assert PIXI["dependencies"]["setuptools"] == constraint("setuptools")
    assert PIXI["feature"]["max"]["pypi-dependencies"]["max"] == f"=={versions.TESTED_MAX}.*"
    for release in versions.TESTED_WHISPER:
        pins = PIXI["feature"][f"whisper{release}"]["pypi-dependencies"]
        assert pins == {"openai-whisper": f"=={release}"}


def test_pixi_installs_what_the_extras_name():
    named = {
        re.split(r"[<>=;]", line)[0]: re.split(r"(?=[<>=])", line.split(";")[0], maxsplit=1)[1:]
        for line in extra("test") | extra("dev") | extra("matrix")
    }
    common = PIXI["pypi-dependencies"]
    for package, specifier in named.items():
        assert requirement(common[package]) == "".join(specifier)
    bench = PIXI["feature"]["bench"]["pypi-dependencies"]
    assert extra("bench") - extra("test") == {
        package + requirement(entry) for package, entry in bench.items()
    }


# Tasks


@pytest.mark.parametrize("task", TASKS)
def test_task_is_the_same_in_make_tox_and_pixi(task):
    command = TOX[f"testenv:{task}"]["commands"].removesuffix(" {posargs}")
    assert command.startswith("python -m ")
    assert command.removeprefix("python ") in recipe(task)
    pixi = {**PIXI["tasks"], **PIXI["feature"]["bench"]["tasks"]}
    assert pixi[task] == command


def test_tox_and_pixi_run_the_same_tests():
    commands: dict[str, list[str]] = {}
    for line in lines(TOX["testenv"]["commands"]):
        factor, _, command = line.partition(": ")
        command = re.sub(r"\{posargs:(.*)\}", r"\1", command).replace(RECORDING, "")
        commands.setdefault(factor, []).append(command.replace(" --suite twice", ""))
    without_max, with_max = PIXI["feature"]["torch"]["tasks"], PIXI["feature"]["max"]["tasks"]
    assert commands == {
        "max-!double": ["python -m pytest tests compat", with_max["upstream"]],
        "max-double": [with_max["double"]],
        "torch-!double": [without_max["test"]],
        "torch-double": [without_max["double"]],
    }
    assert PIXI["tasks"]["test"] == "python -m pytest"
    assert lines(SETUP["tool:pytest"]["testpaths"]) == ["tests", "compat"]
    assert (ROOT / without_max["test"].split()[-1]).is_file()


def test_matrix_runs_the_environments_of_tox():
    assert "-m compat.matrix" in recipe("matrix")
    assert PIXI["tasks"]["matrix"] == "python -m compat.matrix"


def test_every_make_target_is_declared_and_documented_commands_exist():
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert set(phony.split()) == {*TASKS, "matrix", "clean"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    (make .*)$", readme, re.MULTILINE)
    assert {"make demo", "make test"} <= set(commands)
    for command in commands:
        assert recipe(command.split()[1])


def test_continuous_integration_runs_the_test_command_of_the_readme():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert lines(script.read_text())[-1] == "exec make test"


# The wheel


def packaged() -> set[Path]:
    """The files that the globs of setup.cfg add to the Python sources."""
    package = ROOT / "whisper_max"
    patterns = lines(SETUP["options.package_data"]["whisper_max"])
    return {path for pattern in patterns for path in package.glob(pattern) if path.is_file()}


def test_wheel_carries_every_mojo_source_and_the_demonstration_and_is_typed():
    sources = {
        path
        for path in (ROOT / "whisper_max").rglob("*")
        if path.suffix in (".mojo", ".pt", ".wav", ".md") or path.name == "py.typed"
    }
    assert {".mojo", ".typed"} <= {path.suffix for path in sources}
    assert packaged() == sources


def test_wheel_stays_small():
    compressed = sum(len(zlib.compress(path.read_bytes())) for path in packaged())
    assert compressed < 5_000_000


def test_console_command_exists():
    name, _, target = lines(SETUP["options.entry_points"]["console_scripts"])[0].partition(" = ")
    module, _, function = target.partition(":")
    source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
    assert name == "whisper-max"
    assert re.search(rf"^def {function}\(", source, re.MULTILINE)
