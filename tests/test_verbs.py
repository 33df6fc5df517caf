"""What holds for every verb: examples that parse, common options, suggestions, Ctrl-C."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
from rich.console import Console
from typer.main import get_command

import cactus_edge
from cactus_edge import __main__, flatbuffer
from cactus_edge.bench import ceilings
from cactus_edge.bench.peers import peer_named
from cactus_edge.cli import app, ignored, options, output, run, verbs
from cactus_edge.datasets import load
from cactus_edge.errors import CactusEdgeError, UsageError, counted, meant
from cactus_edge.kernels.simd.tiers import choose
from cactus_edge.lowering.calibration import method_of
from cactus_edge.profiles import profile_of
from cactus_edge.runtime import Session
from cactus_edge.search.measure import board_named
from cactus_edge.train.recipe import parse_recipe
from cactus_edge.train.zoo import build
from firmware_sim import boards
from tests.test_cli import call, certify, digits_graph, model  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
GROUP = get_command(app)
VERBS = sorted(GROUP.commands)  # type: ignore[attr-defined]
COLOUR = re.compile(r"\x1b\[[0-9;]*(?:3[0-7]|4[0-7]|9[0-7]|38|48)[0-9;]*m")


def command_of(verb: str) -> SimpleNamespace:
    """The command of a verb, and its options by their long names."""
    command = GROUP.commands[verb]  # type: ignore[attr-defined]
    named = {name: p.opts for p in command.params for name in p.opts if name.startswith("--")}
    return SimpleNamespace(command=command, named=named, epilog=command.epilog)


@pytest.mark.parametrize("verb", VERBS)
def test_every_example_parses(verb: str) -> None:
    found = command_of(verb)
    lines = [line.removeprefix("Example: ") for line in found.epilog.split("\n\n")]
    assert lines and all(line.startswith(f"cactus-edge {verb}") for line in lines)
    for line in lines:
        _, name, *arguments = shlex.split(line)
        assert name == verb
        context = found.command.make_context(verb, arguments)
        ignored.refuse_ignored(verb, verbs._given(context), context.params)
    assert "Example:" not in found.command.help


@pytest.mark.parametrize("verb", VERBS)
def test_options_are_the_same_everywhere(verb: str) -> None:
    named = command_of(verb).named
    assert "-q" in named["--quiet"]
    assert "--json" in named
    if "--output" in named:
        assert "-o" in named["--output"]
        assert "--force" in named
    if "--samples" in named:
        assert "-n" in named["--samples"]
    short = [name for names in named.values() for name in names if re.fullmatch("-[a-z]", name)]
    assert set(short) <= {"-o", "-q", "-n", "-h"}


def test_paths_are_read_or_written() -> None:
    """A new option that names a file is one of these, so that no input is ever replaced."""
    read = {"certificate", "check", "folder", "key", "mask", "model", "models", "other", "query"}
    read |= {"radii", "recipe", "runs", "shards", "signature", "source", "sources"}
    named = {
        name
        for command in app.registered_commands
        for name, parameter in inspect.signature(command.callback or run).parameters.items()
        if "Path" in str(get_args(parameter.annotation)[:1])
    }
    assert named == read | verbs.OUTPUTS


IGNORED = (
    ("train r.toml -o run --port 8000", "--port", "--serve"),
    ("certify m.tflite --data digits --eps 0.1 -o c --port 0", "--port", "--serve"),
    ("certify m.tflite --data digits --eps 0 -o c --radii-kind levels", "--radii-kind", "--radii"),
    ("certify m.tflite --data digits --eps 0.1 -o c --budget 60", "--budget", "--method complete"),
    ("radius m.tflite --data digits --memory 1G", "--memory", "--method complete"),
    ("verify m.tflite q.vnnlib --budget 1", "--budget", "--method complete"),
    ("verify m.tflite q.vnnlib --no-attack --steps 3", "--steps", "--no-attack"),
    ("verify m.tflite q.vnnlib --no-attack --strong", "--strong", "--no-attack"),
    ("convert m.onnx -o t --ranges mse --percentile 0.9", "--percentile", "--ranges percentile"),
    ("export-onnx m.tflite -o o.onnx -n 5", "--samples", "--data"),
    ("export-onnx m.tflite -o o.onnx --split train", "--split", "--data"),
    ("export-onnx m.tflite -o o.onnx --float --index 1", "--index", "--eps"),
    ("export-onnx m.tflite -o o.onnx --float --data digits --eps 0 -n 5", "--samples", "--index"),
    ("supported-ops --write ops.md --json", "--json", "--write"),
    ("faults m.tflite --data digits --check f.json --split test", "--split", "says itself"),
    ("faults m.tflite --data digits --check f.json --bit 1", "--bit", "leave it out of --check"),
    ("faults m.tflite --data digits -o f.json --attack", "--attack", "--levels"),
    ("explain m.tflite --batch --data digits", "--data", "--batch"),
    ("compare run m.tflite --no-costs --eps 0.1", "--eps", "--no-costs"),
    ("validate --learn-profile --device /dev/ttyACM0", "--device", "leave it out"),
    ("validate --learn-profile -n 100", "--samples", "leave it out"),
    ("validate m.tflite --data digits --device x --onnx", "--onnx", "without --device"),
    ("validate m.tflite --data digits --device x --profile ideal", "--profile", "without --device"),
    ("validate m.tflite --data digits --baud 9600", "--baud", "--device"),
    ("simulate m.tflite --data digits --volts 1.8", "--volts", "--microamp-per-mhz"),
    ("bench m.tflite --threads 2 --roofline r.svg", "--roofline", "--threads 1"),
    ("bench m.tflite --threads 2 --ceilings", "--ceilings", "--threads 1"),
    ("report c.jsonl --card README.md --data digits", "--data", "-o PAGE.html"),
    ("report c.jsonl --bom bom.json --title x", "--title", "-o PAGE.html"),
)  # fmt: skip


@pytest.mark.parametrize(("command", "option", "remedy"), IGNORED)
def test_no_option_is_ignored(
    command: str, option: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found before any file is opened, so that nothing is written and no time is lost."""
    code, out, err = call(capsys, *command.split())
    assert (code, out) == (2, "")
    assert f"{option} would be ignored: " in err and remedy in err


def test_rules_name_what_there_is() -> None:
    for rule in ignored.RULES:
        for verb in rule.verbs:
            found = {parameter.name for parameter in command_of(verb).command.params}
            assert set(rule.options) <= found, (rule, verb)
        assert any(
            command.split()[0] in rule.verbs and err == f"would be ignored: {rule.remedy}"
            for command, err in _refused()
        ), f"no case above for {rule}"


def _refused() -> list[tuple[str, str]]:
    """The cases above with the ends of their messages."""
    found: list[tuple[str, str]] = []
    for command, _, _ in IGNORED:
        verb, *arguments = command.split()
        context = command_of(verb).command.make_context(verb, arguments)
        given = verbs._given(context)
        with pytest.raises(UsageError) as caught:
            ignored.refuse_ignored(verb, given, context.params)
        found.append((command, str(caught.value).split(maxsplit=1)[1]))
    return found


def test_no_input_is_replaced(
    model: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not even with --force, and under no other name."""
    monkeypatch.chdir(tmp_path)
    claim, link, run_folder = tmp_path / "claim.jsonl", tmp_path / "link", tmp_path / "run"
    assert call(capsys, "certify", model, "--data", "digits", "--levels", 1, "-n", 3, "-o", claim)[
        0
    ] == 0  # fmt: skip
    link.symlink_to(model)
    run_folder.mkdir()
    weights = run_folder / "model.safetensors"
    weights.write_bytes(b"precious")
    images, labels = np.zeros((2, 8, 8, 1), np.uint8), np.arange(2)
    parts = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    np.savez(tmp_path / "data.npz", **parts)
    before = {path.name: path.read_bytes() for path in (model, claim, weights)}
    about = ["--data", "digits", "--levels", 1]
    for arguments, named in (
        (["certify", model, *about, "-o", model], "give --output another name"),
        (["certify", model, *about, "-o", Path("run") / ".." / model.name], "read by this command"),
        (["certify", model, *about, "-o", link], "read by this command"),
        (["certify", model, "--data", "data.npz", "--levels", 1, "-o", "./data.npz"], "data.npz"),
        (["merge", claim, "-o", claim], "read by this command"),
        (["report", claim, model, "-o", claim], "read by this command"),
        (["report", claim, model, "--card", model], "give --card another name"),
        (["report", tmp_path, "-o", claim], "read by this command"),
        (["convert", run_folder, "-o", weights], "read by this command"),
        (["sweep", model, *about, "-o", "one", "--svg", "./one"], "files of their own"),
        (["report", claim, model, "-o", "a.html", "--bom", "run/../a.html"], "files of their own"),
        (["certify", model, *about, "-o", run_folder], "is a folder; give the name of a file"),
        (["certify", model, *about, "-o", claim / "x"], "claim.jsonl is not a folder"),
        (["certify", model, *about, "-o", "/dev/null"], "not a regular file"),
    ):
        code, _, err = call(capsys, *arguments, "--force")
        assert (code, named in " ".join(err.split())) == (2, True), (arguments, err)
    assert {path.name: path.read_bytes() for path in (model, claim, weights)} == before
    assert not (tmp_path / "one").exists() and not (tmp_path / "a.html").exists()


def test_a_verb_without_an_example_would_be_found() -> None:
    assert verbs.examples("Do it.\n\nExample: other-tool run") == []
    text = "Do it. Example:\ncactus-edge do it\n-o there\n\nExample: cactus-edge do more\n"
    assert verbs.examples(text) == ["cactus-edge do it -o there", "cactus-edge do more"]


def test_the_readme_names_every_verb() -> None:
    """Or a page that it leads to."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    assert [verb for verb in VERBS if not re.search(rf"`{verb}\b|cactus-edge {verb}\b", text)] == []


def test_help_is_quick_and_plain_where_it_has_to_be() -> None:
    """Neither torch nor Numba is loaded for it, and NO_COLOR is heeded."""
    program = (
        "import sys; from cactus_edge.cli import run\n"
        "assert run(['--help']) == 0 and run(['certify', '--help']) == 0\n"
        "heavy = {'torch', 'numba', 'llvmlite', 'scipy', 'sklearn', 'onnx', 'matplotlib'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    colourful = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    colourful.pop("NO_COLOR", None)
    for environment, coloured in ((colourful, True), ({**colourful, "NO_COLOR": "1"}, False)):
        result = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert "Train, convert, certify" in result.stdout
        assert bool(COLOUR.search(result.stdout)) == coloured


def test_quiet_leaves_errors_and_json(
    model: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(capsys, "analyze", model, "--quiet") == (0, "", "")
    assert call(capsys, *certify(model, "--levels", 1, "-n", 3, "-q")) == (0, "", "")
    code, out, err = call(capsys, "analyze", model, "-q", "--json")
    assert (code, err) == (0, "") and json.loads(out)["layers"]
    code, out, err = call(capsys, *certify(model, "--levels", 1, "-n", 3, "-q"))
    assert (code, out) == (2, "") and "--force" in err
    code, out, err = call(capsys, "analyze", model)
    assert code == 0 and "CONV_2D" in out


def test_ctrl_c_has_a_word_and_a_code_of_its_own(
    model: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(flatbuffer, "load", stopped)
    code, out, err = call(capsys, "analyze", model)
    assert (code, out) == (130, "") and "same command" in err
    monkeypatch.setattr("cactus_edge.cli.app", stopped)
    assert call(capsys, "analyze", model) == (130, "", "")


def test_ctrl_c_while_the_command_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("cactus_edge.cli.run", stopped)
    with pytest.raises(SystemExit) as end:
        __main__.main()
    assert end.value.code == 130
    command = [sys.executable, "-m", "cactus_edge", "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert shown.strip() == cactus_edge.__version__


def test_what_resumes_a_training_can_be_pasted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quoted, and with the options that have to be the same."""

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cactus_edge.train.train", stopped)
    recipe, folder = ROOT / "recipes" / "digits.toml", tmp_path / "my run's"
    options_ = ["--device", "cpu", "--devices", "2", "--checkpoint-every", "5.0", "--tensorboard"]
    code, _, err = call(capsys, "train", recipe, "-o", folder, *options_)
    assert code == 130
    again = err.split("go on with: ")[1]
    assert shlex.split(again) == [
        *("cactus-edge", "train", str(recipe), "-o", str(folder), "--resume"),
        *options_,
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_stdout_that_is_full_or_closed() -> None:
    """Said as what it is, and without a traceback."""
    command = f"{shlex.quote(sys.executable)} -m cactus_edge supported-ops"
    for redirected, code, said in ((">/dev/full", 5, "No space left"), (">&-", 0, "")):
        result = subprocess.run(
            ["sh", "-c", f"{command} {redirected}"], capture_output=True, text=True, cwd=ROOT
        )
        assert (result.returncode, said in result.stderr) == (code, True), result.stderr
        assert "Traceback" not in result.stderr and "defect" not in result.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("cactus-edge cert", "certify"),
        ("cactus-edge certify --meth", "--method"),
        ("cactus-edge certify --method li", "linear"),
        ("cactus-edge check --data fash", "fashion-mnist"),
        ("cactus-edge simulate --profile tflite-mi", "tflite-micro"),
        ("cactus-edge radius --split v", "validation"),
    ],
)
def test_shells_complete(
    words: str, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_CACTUS_EDGE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    with pytest.raises(SystemExit) as end:
        app(args=[], prog_name="cactus-edge")
    assert end.value.code == 0
    assert capsys.readouterr().out.split() == [expected]


def test_wide_tables_go_on_below(monkeypatch: pytest.MonkeyPatch) -> None:
    """No word or number is broken on a screen of 80 columns; only sentences are wrapped."""
    columns = ("#", *(f"a column {n}" for n in range(9)), "why", "sha256")
    reason = "this line holds many words that may well stand one below the other " * 2
    rows = [(n, *["FULLY_CONNECTED"] * 9, reason, "f" * 64) for n in range(2)]
    text: dict[int, str] = {}
    for width in (80, 400):
        screen = StringIO()
        monkeypatch.setattr(output, "stdout", Console(file=screen, width=width))
        output.emit(None, False, output.table("title", columns, rows))
        text[width] = screen.getvalue()
        assert text[width].count("FULLY_CONNECTED") == 2 * 9
        assert text[width].count("f" * 64) == 2
        assert text[width].count("title") == 1
        assert max(map(len, text[width].splitlines())) <= width
    assert (text[80].count("┃ # ┃"), text[400].count("┃ # ┃")) == (4, 1)
    assert set(reason.split()) <= set(text[80].split())
    assert reason.strip() in text[400]


def test_names_do_not_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = StringIO()
    for name in ("stdout", "console"):
        monkeypatch.setattr(output, name, Console(file=screen, width=120))
    names = ("weights [out, kh, kw, in]", "[/red]", "a\x1b]0;owned\x07b", "two\nlines")
    output.emit(
        None, False, output.table("model[red].tflite", ("", "value"), [names[:2], names[2:]])
    )
    shown = screen.getvalue()
    assert "model[red].tflite" in shown
    assert all(name in shown for name in names[:2])
    assert r"a\x1b]0;owned\x07b" in shown and "\x1b]" not in shown
    assert len(shown.splitlines()) == 8
    for line in (output.say, output.tell):
        screen.truncate(screen.seek(0))
        line("\x1b]0;[red]\x07 of \udcff.tflite")
        assert screen.getvalue() == "\\x1b]0;[red]\\x07 of \\udcff.tflite\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    screen = StringIO()
    console = Console(file=screen, force_terminal=terminal, width=120)
    monkeypatch.setattr(output, "console", console)
    clock = iter(range(1000))
    monkeypatch.setattr(console, "get_time", lambda: next(clock))
    with output.bar("certify") as progress:
        for done in range(1, 21):
            progress(done, 20)
    with output.working("convert"):
        pass
    with output.bar("radius"):
        pass
    shown = screen.getvalue()
    assert bool(shown) == terminal
    if terminal:
        assert "certify" in shown and "samples/s" in shown and "20/20" in shown
        assert re.search(r"0:00:\d\d.*\d:\d\d", shown)
        assert "convert" in shown
        assert re.search(r"radius .*preparing", shown)


@pytest.mark.parametrize("quiet", [False, True])
def test_what_is_counted_is_shown(
    model: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    quiet: bool,
) -> None:
    """Layers that are timed, samples that are joined: done, in all, and a rate."""
    screen = StringIO()
    monkeypatch.setattr(output, "console", Console(file=screen, force_terminal=True, width=120))
    monkeypatch.setattr(
        "cactus_edge.bench.ceilings.measure", lambda: ceilings.Ceilings("", 1, {}, {})
    )
    parts = [model.with_name(f"{n}.jsonl") for n in (1, 2)]
    for n, part in enumerate(parts, 1):
        shard = ("--shard", f"{n}/2", "--levels", 1, "-n", 9, "--quiet")
        assert call(capsys, "certify", model, "--data", "digits", "-o", part, *shard)[0] == 0
    more = ("--quiet",) if quiet else ()
    assert call(capsys, "merge", *parts, "-o", model.with_name("whole.jsonl"), *more)[0] == 0
    assert call(capsys, "explain", model, *more)[0] == 0
    shown = screen.getvalue()
    for text in ("merge", "9/9", "explain", "3/3", "layers/s"):
        assert (text in shown) != quiet, text


@pytest.mark.parametrize("terminal", [True, False])
def test_titles_stand_above_narrow_tables(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    """Whole, as text: on a terminal broken between words, in a pipe nowhere."""
    screen = StringIO()
    width = 60
    monkeypatch.setattr(
        output, "stdout", Console(file=screen, force_terminal=terminal, width=width, no_color=True)
    )
    words = " ".join(f"word{n}" for n in range(30))
    names = ("a[0]", "[bold]b", "c[/d]")
    output.emit(None, False, output.table(words, ("", "n"), [(name, 1) for name in names]))
    shown = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
    above, _, below = shown.partition("┏")
    assert " ".join(above.split()) == words
    lines = above.splitlines()
    assert len(lines) == (4 if terminal else 1)
    assert all(len(line) <= width for line in lines) == terminal
    assert all(name in below for name in names)


def test_numbers_agree_with_their_nouns() -> None:
    assert counted(1, "sample") == "1 sample"
    assert (counted(0, "sample"), counted(2000, "sample")) == ("0 samples", "2,000 samples")
    nouns = "problem|sample|thread|shard|profile|output|logit|decision|verdict|element|level|layer"
    for path in (ROOT / "cactus_edge" / "cli").glob("*.py"):
        wrong = re.search(rf"\}} ({nouns})s\b(?!/)", path.read_text(encoding="utf-8"))
        assert wrong is None, f"{path.name}: '{wrong}'; write counted(number, noun)"


def test_typing_mistakes(
    model: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments, expected in (
        (["cerify"], "certify"),
        (["verify-sig"], "verify-signature"),
        (["certify", "--josn"], "--json"),
        ([*certify(model), "--levles", 1], "--levels"),
        ([*certify(model), "--levels", 1, "--data", "digts"], "did you mean 'digits'?"),
        ([*certify(model), "--levels", 1, "--profile", "tflite-mirco"], "'tflite-micro'?"),
        ([*certify(model), "--levels", 1, "--method", "Linar"], "did you mean 'linear'?"),
        ([*certify(model), "--levels", 1, "--split", "tset"], "did you mean 'test'?"),
    ):
        code, _, err = call(capsys, *arguments)
        assert code == 2
        assert expected in " ".join(err.replace("│", "").split())


def test_mistakes_in_names() -> None:
    recipe = (ROOT / "recipes" / "digits.toml").read_text(encoding="utf-8")
    graph = digits_graph()
    known = (
        (lambda: choose("neno"), "neon"),
        (lambda: Session(graph, layout="dence"), "dense"),
        (lambda: peer_named("litert-xnpack"), "litert-xnnpack"),
        (lambda: board_named("cortex-m44"), "cortex-m4"),
        (lambda: boards.board_named("rp204o"), "RP2040"),
        (lambda: boards.board_of("cortexm4", None), "cortex-m4"),
        (lambda: method_of("min-max"), "minmax"),
        (lambda: profile_of("tflite_micro"), "tflite-micro"),
        (lambda: load("cifar-10", "test"), "cifar10"),
        (lambda: options.method_of("intervall"), "interval"),
        (lambda: build("cnn-smal", (1, 8, 8), 10), "cnn-small"),
        (lambda: parse_recipe(recipe.replace("members", "membres")), "members"),
        (lambda: parse_recipe(recipe.replace('"pruned', '"prunned')), "pruned-quantized"),
        (lambda: parse_recipe(recipe.replace("[objective]", '[objective]\nloss = "sarb"')), "sabr"),
    )
    for mistaken, right in known:
        with pytest.raises(CactusEdgeError, match=f"did you mean '{right}'"):
            mistaken()
    with pytest.raises(UsageError, match="no rounding profile 'zzz'; known:"):
        profile_of("zzz")


def test_suggestions() -> None:
    assert meant("abc", []) == ";"
    assert meant("ABC", ["abd", "zzz"]) == "; did you mean 'abd'?"
    assert inspect.signature(meant).parameters.keys() == {"name", "known"}
    assert run(["--version"]) == 0
