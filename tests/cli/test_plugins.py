import json
import subprocess
import sys

import pytest
from fake_plugin import FakePlugin, Truncate
from mctk import cli
from mctk.cli import plugins
from mctk.hookspecs import OLDEST, SPEC, Method
from mctk.registry import Registry


class Misfit(Truncate):
    name = "misfit"

    def decompose(self, bank):
        return []


class OtherStage(Method):
    stage = "quantize"
    name = "truncate"
    summary = "Bears a name that another stage has too."

    def quantize(self, layer, statistics, size, options):
        return {}


@pytest.fixture
def mctk(monkeypatch, capsys):
    given = {"fake": FakePlugin(), "bad": FakePlugin([Misfit()])}

    def run(*arguments, **more):
        monkeypatch.setattr(plugins, "load_plugins", lambda: Registry({**given, **more}))
        with pytest.raises(SystemExit) as done:
            cli.main(["plugins", *arguments])
        return done.value.code, *capsys.readouterr()

    return run


def test_methods_are_listed_by_stage_and_broken_plugins_with_their_error(mctk):
    code, out, err = mctk()
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == ["stage", "method", "version", "plugin", "summary", "reference"]
    assert [line.split()[:4] for line in lines[1:6]] == [
        ["allocate", "greedy", "1", "fake"],
        ["allocate", "uniform", "1", "fake"],
        ["decompose", "score", "3", "fake"],
        ["decompose", "truncate", "3", "fake"],
        ["prune", "drop", "1", "fake"],
    ]
    assert "Cuts the smallest directions." in lines[4]
    assert lines[4].endswith("https://example.org/truncate")
    assert lines[6].startswith(
        "broken: bad: decompose/misfit: TypeError: hook decompose(bank) must"
    )
    assert "Traceback" not in out
    assert "Traceback" in mctk("--debug")[1]


def test_the_list_as_json(mctk):
    listed = json.loads(mctk("--json")[1])
    assert [method["method"] for method in listed["methods"]][:2] == ["greedy", "uniform"]
    fake, bad = listed["plugins"]
    assert fake["methods"][0] == "decompose/truncate" and fake["broken"] == {}
    assert list(bad["broken"]) == ["decompose/misfit"]
    assert listed["spec"] == {"version": SPEC, "oldest": OLDEST}
    assert fake["spec"] is None


class Newer(FakePlugin):
    MCTK_SPEC = SPEC + 1


def test_a_plugin_for_other_hooks_says_what_to_do_and_the_list_is_no_failure(mctk):
    code, out, err = mctk(newer=Newer())
    assert (code, err) == (0, "")
    assert f"broken: newer: written for hook specifications {SPEC + 1}, and this mctk has" in out
    assert out.splitlines()[-1] == (
        "What is broken is left out, all else works. --debug shows tracebacks."
    )


@pytest.mark.parametrize("name", ["truncate", "decompose/truncate"])
def test_a_method_is_shown_with_its_options(mctk, name):
    code, out, _ = mctk("show", name)
    assert code == 0
    assert "takes_size: true" in out and "scope:      bank" in out
    assert "needs:      experts.up: nothing" in out
    options = [line.split(None, 1) for line in out.splitlines()[-3:]]
    assert [option for option, _ in options] == ["balance", "multiple", "storage"]
    assert options[1][1].split("  ")[0] == "int, at least 1"
    assert "plain | pivoted" in options[2][1] and "how factors are stored" in options[2][1]


def test_a_method_as_json(mctk):
    about = json.loads(mctk("show", "drop", "--json")[1])
    assert (about["scope"], about["propagate"], about["options"]) == ("layer", "compressed", [])
    assert "It has no options." in mctk("show", "drop")[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trunkate", "no method 'trunkate' (did you mean 'truncate'?); plugin 'bad' is broken"),
        ("prune/truncate", "no method 'truncate' for stage prune"),
        ("decompose/misfit", "method decompose/misfit of plugin 'bad' is broken: TypeError"),
    ],
)
def test_an_unknown_method(mctk, name, message):
    code, _, err = mctk("show", name)
    assert code == 2 and message in err


def test_a_name_in_several_stages(mctk):
    code, _, err = mctk("show", "truncate", other=FakePlugin([OtherStage()]))
    assert code == 2
    assert "'truncate' is in several stages; write decompose/truncate or quantize/truncate" in err


def test_installed_plugins_are_whole_and_import_no_torch():
    code = (
        "import sys\nfrom mctk.registry import load_plugins\n"
        "print([info.error for info in load_plugins().plugins() if info.broken])\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "[]"], done.stderr
