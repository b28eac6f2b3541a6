"""The command line as a person meets it: what is on the screen, on stdout, in the exit code."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tiercel.commands.chat.render import duration, timing_block
from tiercel.commands.chat.repl import with_parameter
from tiercel.commands.doctor import report
from tiercel.errors import RequestError
from tiercel.sampling.params import SamplingParams

# A model that answers by rule, put in the place of a loaded one; everything else is the real program.
FAKE = """
import sys, time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from tiercel.commands import cli, run
from tiercel.errors import ContextOverflow, DoesNotFit
from tiercel.sampling.params import SamplingParams

@dataclass
class Answer:
    text: str = ""
    reasoning: str = ""
    prompt_ids: list = field(default_factory=lambda: [1] * 30)
    token_ids: list = field(default_factory=list)
    cached_tokens: int = 10
    finish_reason: str = None
    times: object = None

class Fake:
    last = None
    def default_params(self):
        return SamplingParams(max_tokens=None, temperature=0.8)
    def ask(self, prompt, params, *, raw=False, think=None):
        self.last = Answer(times=SimpleNamespace(prompt=0.5, generation=2.0, total=2.5))
        return self.pieces(prompt, params, think)
    def pieces(self, prompt, params, think):
        said = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        try:
            for kind, text in self.words(said, prompt, params, think):
                self.last.token_ids.append(len(self.last.token_ids))
                if kind == "text":
                    self.last.text += text
                else:
                    self.last.reasoning += text
                yield SimpleNamespace(kind=kind, text=text)
            self.last.finish_reason = "stop"
        finally:
            self.last.finish_reason = self.last.finish_reason or "abort"
    def words(self, said, prompt, params, think):
        if said == "slow":
            for i in range(400):
                yield "text", f"{i} "
                time.sleep(0.02)
        elif said == "too long":
            raise ContextOverflow("the prompt has 99 tokens and the context 50; shorten it")
        elif said == "bug":
            raise KeyError("inside\\nout")
        elif said == "memory":
            raise MemoryError
        elif said == "mute":
            Path(__file__).with_name("asked").touch()
            time.sleep(60)
        elif said == "think":
            yield "thinking", "hmm "
            yield "thinking", "well"
            yield "text", "I thought."
        elif said == "escape":
            yield "text", "\\033[31mred\\033[0m\\a"
        elif said == "settings":
            p = params
            yield "text", f"T={p.temperature} k={p.top_k} stop={p.stop} max={p.max_tokens} think={think}"
        elif said == "history":
            yield "text", repr(prompt)
        else:
            yield "text", "You "
            yield "text", f"said: {said}"

def open_backend(name, dtype, context, report):
    if name == "huge":
        raise DoesNotFit("huge needs 9 TB of memory and 1 GB are free: close something")
    return Fake()

run.open_backend = open_backend
cli.main()
"""


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """The environment of a person with no models."""
    own = {"TIERCEL_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    kept = {key: value for key, value in os.environ.items() if key not in ("TIERCEL_DEBUG", "HF_HUB_CACHE")}
    return kept | own | {"PIP_NO_INDEX": "1", "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": "100"}


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def tiercel(home: dict[str, str]) -> Run:
    def run(*words: str, pipe: str | None = "", **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tiercel", *words]
        return subprocess.run(command, input=pipe, env=home | env, capture_output=True, text=True, timeout=60)

    return run


@pytest.fixture
def fake(home: dict[str, str], tmp_path: Path) -> Run:
    (tmp_path / "fake.py").write_text(FAKE)

    def run(*words: str, pipe: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(tmp_path / "fake.py"), "run", *words]
        return subprocess.run(command, input=pipe, env=home | env, capture_output=True, text=True, timeout=60)

    return run


# ── without a model


def test_help_names_every_command(tiercel: Run) -> None:
    done = tiercel("--help")
    assert done.returncode == 0 and done.stderr == ""
    for name in ("run", "pull", "list", "show", "export", "doctor"):
        assert re.search(rf"^  {name} ", done.stdout, re.MULTILINE)
        assert "--json" in tiercel(name, "--help").stdout


def test_the_version_is_printed(tiercel: Run) -> None:
    import tiercel as package

    assert tiercel("--version").stdout == f"tiercel {package.__version__}\n"


@pytest.mark.parametrize("words", ["--help", "list", "run --help", "show nothing", "pull nothing"])
def test_commands_that_compute_nothing_start_without_torch(words: str, home: dict[str, str]) -> None:
    code = f"""
import sys, time
began = time.perf_counter()
sys.argv = ["tiercel", *{words.split()!r}]
from tiercel.commands import cli
try:
    cli.main()
except SystemExit:
    pass
print("torch:", "torch" in sys.modules, file=sys.stderr)
"""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], env=home, capture_output=True, text=True)
    print(f"tiercel {words}: {time.perf_counter() - began:.2f} s")
    assert "torch: False" in done.stderr


def test_an_empty_list_has_its_columns(tiercel: Run) -> None:
    assert tiercel("list").stdout.split() == ["NAME", "ID", "SIZE", "MODIFIED"]
    assert tiercel("ls").stdout == tiercel("list").stdout and json.loads(tiercel("list", "--json").stdout) == []


def test_a_model_of_the_store_is_listed_as_ollama_lists_it(tiercel: Run, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "models" / "tiny" / "7b"
    folder.mkdir(parents=True)
    (folder / "tiny.gguf").write_bytes(b"x" * 1_230_000)
    manifest = {"file": "tiny.gguf", "sha256": "ab" * 32, "bytes": 1_230_000, "source": "test"}
    (folder / "tiercel.json").write_text(json.dumps(manifest))
    then = time.time() - 2.5 * 86_400
    os.utime(folder / "tiny.gguf", (then, then))
    done = tiercel("list")
    assert re.fullmatch(r"NAME +ID +SIZE +MODIFIED\ntiny:7b +abababababab +1\.2 MB +2 days ago\n", done.stdout)
    (found,) = json.loads(tiercel("ls", "--json").stdout)
    assert found["name"] == "tiny:7b" and found["bytes"] == 1_230_000 and found["path"].endswith("tiny.gguf")


@pytest.mark.parametrize("command", ["run", "pull", "show", "export"])
def test_a_model_nobody_knows_is_exit_code_3(command: str, tiercel: Run, tmp_path: Path) -> None:
    words = {"run": ["smolm2", "hi"], "export": ["smolm2", str(tmp_path / "out")]}.get(command, ["smolm2"])
    done = tiercel(command, *words)
    assert (done.returncode, done.stdout) == (
        3,
        "",
    ) and done.stderr == "Error: no model 'smolm2': did you mean smollm2?\n"
    done = tiercel(command, *words, "--json")
    assert done.returncode == 3 and json.loads(done.stdout) == {"error": "no model 'smolm2': did you mean smollm2?"}


def test_a_model_that_is_not_here_says_how_to_get_it(tiercel: Run) -> None:
    done = tiercel("show", "smollm2")
    assert done.returncode == 3 and "tiercel pull smollm2" in done.stderr


def test_a_pull_without_a_network_is_one_line(tiercel: Run) -> None:
    done = tiercel("pull", "org/repo")
    assert (
        done.returncode == 1 and done.stderr.startswith("Error: org/repo is not here") and done.stderr.count("\n") == 1
    )
    done = tiercel("pull", "smollm2", PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull)
    assert done.returncode == 1 and done.stderr.startswith("Error: pip could not") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", ["frob", "run --temperature warm", "pull", "list --frob", "export smollm2"])
def test_wrong_usage_is_exit_code_2(words: str, tiercel: Run) -> None:
    assert tiercel(*words.split()).returncode == 2
    done = tiercel(*words.split(), "--json")
    assert done.returncode == 2 and list(json.loads(done.stdout)) == ["error"]


def test_export_never_writes_over_anything_unasked(tiercel: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    done = tiercel("export", "smollm2", str(out))
    assert done.returncode == 2 and "--force" in done.stderr and out.read_text() == "mine"
    assert tiercel("export", "smollm2", str(tmp_path / "new"), "--dtype", "q4").returncode == 2


def test_the_doctor_tells_what_is_here(tiercel: Run, tmp_path: Path) -> None:
    found = json.loads(tiercel("doctor", "--json").stdout)
    assert found["python"] and found["memory"]["total"] > 0 and found["torch"]["threads"] >= 1
    assert found["store"] == {"folder": str(tmp_path / "home" / "models"), "models": []} and found["hub"]["offline"]
    assert any("tiercel pull smollm2" in line for line in found["suggestions"])
    text = report(found)
    assert ("torch reference" in text or "native" in text) and "tiercel pull smollm2" in text


# ── one answer


def test_a_prompt_is_answered_on_stdout_and_nothing_else_is_there(fake: Run) -> None:
    done = fake("smollm2", "Why", "so?")
    assert (done.returncode, done.stdout, done.stderr) == (0, "You said: Why so?\n", "")


def test_a_piped_text_is_the_prompt_or_comes_after_it(fake: Run) -> None:
    assert fake("smollm2", pipe="from the pipe").stdout == "You said: from the pipe\n"
    assert fake("smollm2", "sum up:", pipe="a\nb\n").stdout == "You said: sum up:\n\na\nb\n\n"
    assert fake(pipe="no model named").stdout == "You said: no model named\n"


def test_no_prompt_and_no_terminal_is_said(fake: Run) -> None:
    done = fake("smollm2", pipe=" \n")
    assert done.returncode == 2 and "prompt is empty" in done.stderr


def test_a_pipe_that_is_not_text_is_refused(home: dict[str, str], tmp_path: Path, fake: Run) -> None:
    command = [sys.executable, str(tmp_path / "fake.py"), "run"]
    done = subprocess.run(command, input=b"ok \xff\xfe", env=home, capture_output=True, timeout=60)
    assert done.returncode == 2 and b"not UTF-8 (byte 3)" in done.stderr


def test_a_sentence_in_the_place_of_the_model_is_understood(tiercel: Run) -> None:
    done = tiercel("run", "Why is the sky blue?", pipe="and so on")
    assert done.returncode == 3 and "tiercel run smollm2" in done.stderr


def test_options_reach_the_sampler_and_the_rest_is_the_models_default(fake: Run) -> None:
    done = fake("m", "settings", "--top-k", "7", "--stop", "A", "--stop", "B", "--max-tokens", "9", "--no-think")
    assert done.stdout == "T=0.8 k=7 stop=['A', 'B'] max=9 think=False\n"


def test_a_bad_option_is_refused_before_the_model_is_looked_for(tiercel: Run) -> None:
    done = tiercel("run", "nobody", "hi", "--top-p", "1.5")
    assert (done.returncode, done.stderr) == (2, "Error: top_p must be a number above 0, up to 1, not 1.5\n")


def test_the_system_message_goes_first_and_raw_goes_alone(fake: Run) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "history"}]
    assert fake("m", "history", "--system", "be brief").stdout == f"{messages!r}\n"
    assert fake("m", "history", "--raw").stdout == "'history'\n"


def test_thoughts_are_shown_apart_from_the_answer(fake: Run) -> None:
    done = fake("m", "think")
    assert done.stdout == "I thought.\n" and done.stderr == "Thinking...\nhmm well\n...done thinking.\n\n"
    done = fake("m", "think", "--hidethinking")
    assert (done.stdout, done.stderr) == ("I thought.\n", "")


def test_the_timings_are_those_of_ollama(fake: Run) -> None:
    done = fake("m", "hello", "--verbose")
    assert done.stdout == "You said: hello\n"
    lines = [
        r"",
        r"total duration:       ([\d.]+)s",
        r"load duration:        ([\d.]+)(ms|µs|s)",
        r"prompt cached count:  10 token\(s\)",
        r"prompt eval count:    20 token\(s\)",
        r"prompt eval duration: 500ms",
        r"prompt eval rate:     40\.00 tokens/s",
        r"eval count:           2 token\(s\)",
        r"eval duration:        2s",
        r"eval rate:            1\.00 tokens/s",
        r"",
    ]
    found = re.fullmatch("\n".join(lines), done.stderr)
    assert found
    total, load, unit = found.groups()
    assert float(total) == pytest.approx(2.5 + float(load) * {"µs": 1e-6, "ms": 1e-3, "s": 1}[unit])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (2e-7, "200ns"), (1.25e-5, "12.5µs"), (0.345678, "345.678ms"), (1.5, "1.5s"), (62.5, "1m2.5s"),
     (3600, "1h0m0s"), (7265.25, "2h1m5.25s")],
)  # fmt: skip
def test_durations_are_written_as_go_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_json_is_one_object_with_everything_in_it(fake: Run) -> None:
    done = fake("m", "think", "--json")
    found = json.loads(done.stdout)
    assert done.stderr == "" and found["text"] == "I thought." and found["thinking"] == "hmm well"
    assert (found["model"], found["finish_reason"]) == ("m", "stop")
    assert (found["prompt_tokens"], found["cached_tokens"], found["completion_tokens"]) == (30, 10, 3)
    assert set(found["timings"]) == {"load_s", "prompt_s", "generation_s", "total_s"}


@pytest.mark.parametrize(
    ("model", "prompt", "code", "said"),
    [
        ("m", "too long", 1, "99 tokens and the context 50"),
        ("m", "memory", 4, "memory ran out"),
        ("huge", "hi", 4, "huge needs 9 TB"),
        ("m", "bug", 1, "a bug of ours"),
    ],
)
def test_a_failure_is_one_line_and_an_exit_code(model: str, prompt: str, code: int, said: str, fake: Run) -> None:
    done = fake(model, prompt)
    assert done.returncode == code and done.stderr.startswith("Error: ") and said in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    done = fake(model, prompt, "--json")
    assert done.returncode == code and said in json.loads(done.stdout)["error"]
    assert "Traceback" in fake(model, prompt, TIERCEL_DEBUG="1").stderr


def test_ctrl_c_ends_an_answer_with_130(home: dict[str, str], tmp_path: Path, fake: Run) -> None:
    command = [sys.executable, str(tmp_path / "fake.py"), "run", "m", "slow"]
    with subprocess.Popen(command, env=home, stdin=subprocess.DEVNULL, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(4)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130 and process.stderr.read() == ""


def test_a_reader_who_leaves_is_not_complained_about(home: dict[str, str], tmp_path: Path, fake: Run) -> None:
    command = [sys.executable, str(tmp_path / "fake.py"), "run", "m", "slow"]
    with subprocess.Popen(command, env=home, stdin=subprocess.DEVNULL, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(4)
        process.stdout.close()
        assert process.wait(10) == 1 and process.stderr.read() == ""


def test_control_characters_stay_in_files(fake: Run) -> None:
    assert fake("m", "escape").stdout == "\033[31mred\033[0m\a\n"


# ── the conversation


class Terminal:
    """A program on a terminal of its own; what it writes is read without its colours and cursor moves."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        import pty

        self.screen, self.seen = "", 0
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=env, preexec_fn=lambda: os.login_tty(os.dup(slave))
        )
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def expect(self, text: str, seconds: float = 60) -> str:
        """Wait for a text after what was seen already; the screen between."""
        until = time.monotonic() + seconds
        while (at := self.screen.find(text, self.seen)) < 0:
            if not select.select([self.master], [], [], max(until - time.monotonic(), 0))[0]:
                raise AssertionError(f"{text!r} did not come; the screen has {self.screen[self.seen :]!r}")
            try:
                self.raw(os.read(self.master, 65536))
            except OSError:
                raise AssertionError(f"the program left before {text!r}: {self.screen[self.seen :]!r}") from None
        between, self.seen = self.screen[self.seen : at], at + len(text)
        return between

    def raw(self, data: bytes) -> None:
        text = data.decode(errors="replace")
        self.screen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r", "", text)

    def say(self, line: str) -> None:
        """Type a line at the prompt."""
        self.expect(">>> ")
        self.type(line + "\r")

    def leave(self) -> int:
        return self.process.wait(60)


@pytest.fixture
def conversation(home: dict[str, str], tmp_path: Path, fake: Run) -> Iterator[Callable[..., Terminal]]:
    open_ones: list[Terminal] = []

    def start(*words: str, **env: str) -> Terminal:
        command = [sys.executable, str(tmp_path / "fake.py"), "run", *words]
        open_ones.append(Terminal(command, home | env))
        return open_ones[-1]

    yield start
    for terminal in open_ones:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)


def test_a_conversation_remembers_what_was_said(conversation: Callable[..., Terminal]) -> None:
    talk = conversation("m", "--system", "be brief")
    talk.say("hello there")
    talk.expect("You said: hello there")
    talk.say("history")
    shown = talk.expect("}]")
    assert "be brief" in shown and "'assistant', 'content': 'You said: hello there'" in shown.replace("\n", "")
    talk.say("/clear")
    talk.expect("Cleared session context")
    talk.say("history")
    assert "hello there" not in talk.expect("}]")
    talk.say("/bye")
    assert talk.leave() == 0


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(conversation: Callable[..., Terminal]) -> None:
    talk = conversation("m")
    talk.say("slow")
    talk.expect("0 1 2 3")
    talk.type("\x03")
    talk.say("history")
    kept = talk.expect("}]").replace("\n", "")
    assert "0 1 2 3" in kept and "399" not in kept
    talk.say("/set verbose")
    talk.say("hi")
    talk.expect("eval rate:")
    talk.expect(">>> ")
    talk.type("\x03")
    talk.expect("Use Ctrl + d or /bye to exit.")
    talk.expect(">>> ")
    talk.type("\x04")
    assert talk.leave() == 0


def test_a_message_that_got_no_answer_is_taken_back(conversation: Callable[..., Terminal], tmp_path: Path) -> None:
    talk = conversation("m")
    talk.say("too long")
    talk.expect("Error: the prompt has 99 tokens")
    talk.say("mute")
    while not (tmp_path / "asked").exists():
        time.sleep(0.01)
    talk.type("\x03")
    talk.say("history")
    talk.expect("[{")
    assert talk.expect("}]") == "'role': 'user', 'content': 'history'"
    talk.say("/bye")
    assert talk.leave() == 0


def test_settings_of_a_conversation(conversation: Callable[..., Terminal]) -> None:
    talk = conversation("m")
    talk.say("/set parameter temperature 0.25")
    talk.expect("Set parameter 'temperature' to '0.25'")
    talk.say("/set parameter num_predict 33")
    talk.say('/set parameter stop "END NOW" x')
    talk.say("/set nothink")
    talk.expect("Set 'nothink' mode.")
    talk.say("settings")
    talk.expect("T=0.25 k=0 stop=['END NOW', 'x'] max=33 think=False")
    talk.say("/set parameter temperature hot")
    talk.expect("Error: temperature must be a number from 0 to 100, not 'hot'")
    talk.say("/set parameter frob 1")
    talk.expect("Error: unknown parameter 'frob'")
    talk.say("/set system Be kind.")
    talk.expect("Set system message.")
    talk.say("/show")
    assert "temperature 0.25" in talk.expect("system Be kind.")
    talk.say("/frob")
    talk.expect("Error: unknown command '/frob'; type /? for help")
    talk.say("/?")
    talk.expect("Available Commands:")
    talk.say("/bye")
    assert talk.leave() == 0


def test_a_message_of_several_lines(conversation: Callable[..., Terminal]) -> None:
    talk = conversation("m")
    talk.say('"""first')
    talk.expect("... ")
    talk.type("second\r")
    talk.expect("... ")
    talk.type('third"""\r')
    assert "You said: first" in talk.expect("You said: first") + "You said: first"
    talk.expect("second\nthird")
    talk.say("/regenerate")
    talk.expect("You said: first\nsecond\nthird")
    talk.say("/bye")
    assert talk.leave() == 0


def test_a_models_words_cannot_steer_the_terminal(conversation: Callable[..., Terminal]) -> None:
    talk = conversation("m")
    talk.say("escape")
    talk.expect("[31mred[0m")  # the escape character itself is gone
    talk.say("/bye")
    assert talk.leave() == 0


def test_a_conversation_shows_thoughts_and_the_answer(conversation: Callable[..., Terminal]) -> None:
    talk = conversation("m")
    talk.say("think")
    talk.expect("Thinking...\nhmm well\n...done thinking.\n\nI thought.")
    talk.say("/bye")
    assert talk.leave() == 0


@pytest.mark.parametrize(("name", "words"), [("frob", ["1"]), ("top_k", []), ("top_k", ["many"]), ("seed", ["-5"])])
def test_a_parameter_that_cannot_be_set_is_refused(name: str, words: list[str]) -> None:
    with pytest.raises(RequestError, match=name):
        with_parameter(SamplingParams(), name, words)


def test_the_timing_block_leaves_out_what_did_not_happen() -> None:
    from types import SimpleNamespace

    answer: Any = SimpleNamespace(
        prompt_ids=[1, 2], token_ids=[], cached_tokens=0, times=SimpleNamespace(prompt=0, generation=0, total=0)
    )
    assert timing_block(answer, 0.0).splitlines() == [
        "total duration:       0s",
        "prompt eval count:    2 token(s)",
        "eval count:           0 token(s)",
    ]


# ── show, on files


def test_show_draws_a_folder_from_its_config(tiercel: Run, tmp_path: Path) -> None:
    pytest.importorskip("tiercel.families.family")
    import torch
    from safetensors.torch import save_file

    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 3,
              "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48,
              "vocab_size": 97, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
              "hidden_act": "silu", "tie_word_embeddings": False}  # fmt: skip
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    save_file(
        {"a": torch.zeros(3, dtype=torch.bfloat16), "b": torch.zeros(3)}, tmp_path / "model" / "model.safetensors"
    )
    found = json.loads(tiercel("show", str(tmp_path / "model"), "--json").stdout)
    assert found["pattern"] == "3 × (attention + gated_mlp)" and found["context"] == 512 and found["width"] == 32
    assert found["kv_bytes_per_token"] == 3 * 2 * 2 * 8 * 2 and found["state_bytes"] == 0
    assert found["types"] == {"BF16": 1, "F32": 1} and found["template"] is False
    text = tiercel("show", str(tmp_path / "model")).stdout
    assert re.search(r"architecture +llama", text) and re.search(r"mixer +attention 4 × 8, 2 key/value", text)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\xff" * 8)
    broken = tiercel("show", str(tmp_path / "model"))
    assert broken.returncode == 1 and "not a safetensors file" in broken.stderr


def test_show_reads_a_gguf_header_without_torch(home: dict[str, str]) -> None:
    gguf = os.environ.get("TIERCEL_TEST_SMOLLM2")
    if not gguf:
        pytest.skip("set TIERCEL_TEST_SMOLLM2 to the path of SmolLM2-135M-Instruct.Q4_1.gguf")
    pytest.importorskip("tiercel.weights.gguf")
    code = f"""
import json, sys
from pathlib import Path
from tiercel.hub.describe import describe
print(json.dumps(describe(Path({gguf!r})) | {{"torch": "torch" in sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", code], env=home, capture_output=True, text=True, timeout=60)
    found = json.loads(done.stdout)
    assert found["parameters"] == 134_515_008 and found["template"] and found["licence"] == "apache-2.0"
    assert found["types"] == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert found["torch"] is False


# ── quantize


def test_quantize_writes_measures_and_says_what_it_did(tiercel: Run, tmp_path: Path) -> None:
    import tiny

    tiny.checkpoint(tmp_path / "model", max_length=640)
    words = tmp_path / "words.txt"
    words.write_text("The falcon can not hear the falconer; things fall apart. " * 12)
    base = ["quantize", str(tmp_path / "model"), str(tmp_path / "out"), "--to", "INT8"]
    done = tiercel(*base, "--importance", str(words), "--save-importance", str(tmp_path / "i.safetensors"))
    assert done.returncode == 0, done.stderr
    assert "as int8" in done.stdout and "kept unpacked: layers." in done.stdout
    assert re.search(r"importance from 684 tokens, for \d+ matrices", done.stdout)
    done = tiercel(*base, "--force", "--json", "--report", "--text", str(words),
                   "--importance", str(tmp_path / "i.safetensors"))  # fmt: skip
    found = json.loads(done.stdout)
    assert found["recipe"] == "int8" and found["importance_tokens"] == 684 and found["types"]["INT8"] > 10
    first = found["report"]["costs"][0]
    assert first["packed"] == "all" and first["position"] == 512 and 0 <= first["kl"] < 0.1
    assert "640" in found["report"]["skipped"]["8192"]
    shown = json.loads(tiercel("show", str(tmp_path / "out"), "--json").stdout)
    assert shown["types"] == found["types"]
    assert tiercel("quantize", str(tmp_path / "model"), str(tmp_path / "nf4"), "--to", "nf4").returncode == 0
    assert tiercel("show", str(tmp_path / "nf4"), "--json").returncode == 0


@pytest.mark.parametrize(
    "words, says",
    [
        (["--to", "int8"], "out exists; choose another name"),
        (["--to", "int8", "--force", "--report"], "name a file with --text"),
        (["--to", "q9", "--force"], "there is no recipe 'q9'; choose one of q4_0"),
        (["--to", "int8", "--force", "--importance", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--to", "int8", "--force", "--save-importance", "i"], "--importance learns from a text; name one"),
    ],
)
def test_quantize_refuses_in_one_line(words, says, tiercel: Run, tmp_path: Path) -> None:
    import tiny

    tiny.checkpoint(tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    done = tiercel("quantize", str(tmp_path / "model"), str(tmp_path / "out"), *words)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
