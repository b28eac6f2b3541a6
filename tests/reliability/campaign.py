"""The campaign: every goal of docs/reliability.md, its tests, and what they measured.

    python tests/reliability/campaign.py                 run what has no result yet, each at full scale (hours)
    python tests/reliability/campaign.py R3 R37 --again  these, once more
    python tests/reliability/campaign.py --table         write the results into docs/reliability.md

Results stay in docs/assets/reliability.json, one entry a goal, so that an interrupted run continues.  `scale` there is
"full", "as tested" (a goal whose tests have one size, smaller than it asks for), or what was run instead.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "assets" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"
MARKS = "<!-- results -->", "<!-- end -->"
SCALED = set("R1 R2 R3 R4 R10 R11 R12 R18 R19 R24 R25 R29 R31 R37 R38".split())  # goals whose tests have a full scale


@dataclass(frozen=True)
class Goal:
    """promise: the row's text.  tests: files or functions.  options: of pytest at full scale.  variables: of it."""

    name: str
    promise: str
    tests: tuple[str, ...]
    options: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)


MUTATED, LIVES = "tests/weights/test_mutated_files.py", "tests/reliability/test_r18_lives.py"
OVERLOAD, LIFE, SECURITY = "tests/serve/test_overload.py", "tests/serve/test_life.py", "tests/serve/test_security.py"
ENGINE, FUZZ = "tests/engine/test_engine.py", {"TIERCEL_FUZZ": "100000"}
SLOW = ("-m", "slow or not slow")
GOALS = [
    Goal("R1", "broken GGUF files: refused, or read to the last tensor as gguf-py reads them",
         (f"{MUTATED}::test_damaged_gguf_files", "tests/weights/test_gguf.py"), variables=FUZZ),
    Goal("R2", "broken safetensors: refused, or byte-equal to the reference library",
         (f"{MUTATED}::test_damaged_safetensors_files", f"{MUTATED}::test_damaged_folders",
          "tests/weights/test_safetensors.py"), variables=FUZZ),
    Goal("R3", "no name leads out of its folder", ("tests/reliability/test_r03_names.py", "tests/weights/test_hub.py")),
    Goal("R4", "broken configs and tokenizers: refused before memory is taken",
         ("tests/families/test_configs.py", "tests/reliability/test_r04_tokenizers.py",
          "tests/reliability/test_limits.py"), variables={"TIERCEL_FUZZ": "50000"}),
    Goal("R5", "tokenizing grows with the text and leaves other threads running",
         ("tests/test_large_pieces.py", "tests/reliability/test_limits.py")),
    Goal("R6", "templates escape nothing and end in time and memory", ("tests/test_template.py",)),
    Goal("R7", "no text of a user becomes a control token", ("tests/test_text_control.py",)),
    Goal("R8", "no pickle, eval or foreign code", ("tests/test_imports.py::test_nothing_dangerous_is_called",)),
    Goal("R9", "a bad line of a data set is named", ("tests/train/test_fit.py::test_a_bad_line_is_named",)),
    Goal("R10", "requests made from the OpenAPI page: no 5xx, no undocumented status",
         ("tests/serve/test_openapi.py",), SLOW, {"TIERCEL_CASES": "20000"}),
    Goal("R11", "raw bytes on the socket do no harm", ("tests/reliability/test_r11_sockets.py",)),
    Goal("R12", "the worst bodies at every field are refused while others are served",
         ("tests/reliability/test_r12_bodies.py", "tests/serve/test_kinds.py")),
    Goal("R13", "hostile grammars end, large honest ones are taken", ("tests/engine/test_structured_output.py",)),
    Goal("R14", "no route but /health without the key", (SECURITY,)),
    Goal("R15", "foreign hosts and origins are refused", (SECURITY,)),
    Goal("R16", "nothing is fetched for a client", ("tests/weights/test_hub.py", "tests/serve/test_openai.py")),
    Goal("R17", "no error names a file, a key or a prompt",
         (f"{SECURITY}::test_no_error_names_a_file_or_a_prompt",)),
    Goal("R18", "freed memory never shows in an answer", (LIVES,)),
    Goal("R19", "caches, chunks, drafts and preemption never show in an answer", (LIVES,)),
    Goal("R20", "an adapter's cache is its own", ("tests/adapters/test_adapters.py",)),
    Goal("R21", "caches are apart by key", (f"{ENGINE}::test_keys_do_not_see_each_other",)),
    Goal("R22", "clients that hang up leave nothing behind",
         (f"{OVERLOAD}::test_two_hundred_clients_of_whom_a_third_hang_up_leave_nothing_behind",), SLOW),
    Goal("R23", "ten times the load: quick refusals, kept promises",
         (f"{OVERLOAD}::test_under_ten_times_its_capacity_it_refuses_quickly_and_keeps_its_word",), SLOW),
    Goal("R24", "SIGTERM ends each answer properly",
         (f"{OVERLOAD}::test_a_signal_in_the_middle_of_sixteen_answers_ends_each_properly",), SLOW,
         {"TIERCEL_DRAINS": "200"}),
    Goal("R25", "killed under load, it starts clean", ("tests/reliability/test_r25_kills.py",)),
    Goal("R26", "stalled readers and writers are cut off",
         (f"{LIFE}::test_a_reader_that_takes_nothing_is_cut_off",
          f"{LIFE}::test_who_does_not_finish_a_head_is_cut_off_and_who_does_is_not")),
    Goal("R27", "a row that fails ends alone",
         (f"{ENGINE}::test_a_row_of_nan_ends_with_an_error_and_its_neighbours_go_on",
          f"{ENGINE}::test_a_row_that_raises_ends_alone")),
    Goal("R28", "what does not fit is refused before memory is taken",
         (f"{ENGINE}::test_answers_that_outgrow_the_memory_wait_and_lose_nothing",
          f"{LIFE}::test_a_model_that_does_not_fit_takes_the_place_of_an_idle_one")),
    Goal("R29", "hours of mixed requests: memory, descriptors and threads flat", ("benchmarks/soak.py",)),
    Goal("R30", "each limit of time fires and frees its slot", (LIFE,)),
    Goal("R31", "an answer is the same in any batch", (LIVES, "tests/engine/test_loop.py")),
    Goal("R32", "chunks and padding never show", ("tests/ops/test_ssd.py", "tests/ops/test_scan.py")),
    Goal("R33", "the state does not drift", ("tests/ops/test_ssd.py::test_a_long_text_does_not_drift",)),
    Goal("R34", "a value that is not finite ends its request",
         (f"{ENGINE}::test_a_row_of_nan_ends_with_an_error_and_its_neighbours_go_on",)),
    Goal("R35", "every changed byte of a saved session is noticed", ("tests/engine/test_session.py",), SLOW),
    Goal("R36", "a download is right or absent", ("tests/weights/test_hub.py",)),
    Goal("R37", "a fault at any file operation: the old file or the new one, and one line",
         ("tests/reliability/test_r37_faults.py", "tests/test_atomic.py"), SLOW),
    Goal("R38", "killed training resumes bit for bit", ("tests/train/test_resume.py",), SLOW, {"TIERCEL_KILLS": "50"}),
    Goal("R39", "a damaged checkpoint is named and the one before it taken", ("tests/train/test_checkpoint.py",)),
    Goal("R40", "the wheel is reproducible; each known failure of others has a test",
         ("tests/reliability/test_r40_supply.py",), SLOW),
]  # fmt: skip

# Known failures of other projects (docs/reliability.md, "Known failures") → the tests that show them absent here.
PEERS: dict[str, tuple[str, ...]] = {
    "GGUF counts, lengths and types trusted (llama.cpp, Ollama, vLLM: CVE-2025-53630, CVE-2026-27940, CVE-2026-7482)":
        (MUTATED, "tests/weights/test_gguf.py"),
    "pickle and sockets between processes (vLLM, SGLang, PyTorch: CVE-2025-32434, CVE-2025-47277, ShadowMQ)":
        ("tests/test_imports.py::test_nothing_dangerous_is_called",),
    "weights and adapters as pickles, remote code (vLLM CVE-2025-66448, transformers CVE-2026-1839)":
        ("tests/weights/test_hub.py::test_pickle_weights_are_never_fetched",
         "tests/adapters/test_adapters.py::test_a_pickle_is_named_with_the_way_out"),
    "names as paths (Ollama CVE-2024-37032, CVE-2026-7020; transformers #47176)":
        ("tests/reliability/test_r03_names.py", "tests/weights/test_safetensors.py"),
    "numbers of a request without bounds (vLLM CVE-2026-34756, llama.cpp CVE-2026-21869)":
        ("tests/reliability/test_r12_bodies.py::test_every_number_of_every_field_is_answered_or_refused",),
    "grammars without bounds (llama.cpp #26600, xgrammar CVE-2025-58446), and bounds too tight (#25746, #25895)":
        ("tests/engine/test_structured_output.py",),
    "deep or large JSON (Rapid-MLX #798), chunks of a byte": ("tests/serve/test_kinds.py",
                                                              "tests/reliability/test_r11_sockets.py"),
    "templates without a sandbox or a clock (llama-cpp-python CVE-2024-34359, SGLang CVE-2026-5760, jinja #2149)":
        ("tests/test_template.py",),
    "user text that becomes a control token (transformers #29279)": ("tests/test_text_control.py",),
    "keys checked by URL (vLLM CVE-2026-48746), any Origin let in (llama.cpp)": (SECURITY,),
    "caches shared between keys or adapters (vLLM #42125, #44701; PROMPTPEEK)":
        (f"{ENGINE}::test_keys_do_not_see_each_other", "tests/adapters/test_adapters.py"),
    "state of a hybrid that leaks or is cut (vLLM #35219, #56524, #57266; llama.cpp #28007)":
        (LIVES, "tests/engine/test_cache_is_invisible.py"),
    "padding in the recurrence (transformers #46773)": ("tests/families/test_parity.py",),
    "one bad step ends the engine for all (vLLM EngineDeadError)": (f"{ENGINE}::test_a_row_that_raises_ends_alone",),
    "hang-ups that run on (ATOM #1562), readers that stall (opencode #19423)": (OVERLOAD, LIFE),
    "files written in place, NaN that rotates good checkpoints away (Lightning, pocket-tts)":
        ("tests/reliability/test_r37_faults.py", "tests/train/test_checkpoint.py"),
    "regular expressions and merges that explode (transformers, tiktoken)":
        ("tests/test_large_pieces.py", "tests/test_text_tools.py"),
    "poisoned packages (LiteLLM 1.82.7)": ("tests/reliability/test_r40_supply.py",),
}  # fmt: skip


def run(goal: Goal, smaller: dict[str, str]) -> dict[str, object]:
    """Run a goal's tests, at full scale unless variables say otherwise; its entry of the results."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures"
        variables = {"TIERCEL_FULL": "1", "TIERCEL_FIGURES": str(figures)} | goal.variables | smaller
        command = ["pytest", *goal.options, *goal.tests]
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=os.environ | variables,
                              capture_output=True, text=True)  # fmt: skip
        lines = figures.read_text().splitlines() if figures.exists() else []
    own = [text for name, _, text in (line.partition("\t") for line in lines) if name == goal.name]
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-200:]
    shown = " ".join(f"{name}={value}" for name, value in {"TIERCEL_FULL": "1", **goal.variables, **smaller}.items())
    return {
        "met": done.returncode == 0, "figure": "; ".join(own) or summary.strip("= "),
        "scale": ", ".join(f"{name}={value}" for name, value in smaller.items()) 
        or ("full" if goal.name in SCALED else "as tested"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"), "seconds": round(time.monotonic() - began),
        "command": f"{shown} {' '.join(command)}",
    }  # fmt: skip


def table(results: dict[str, dict[str, object]]) -> str:
    """The rows of docs/reliability.md."""
    lines = ["| goal | promise | measured | scale | date | met |", "|---|---|---|---|---|---|"]
    for goal in GOALS:
        found = results.get(goal.name, {"figure": "–", "scale": "not run", "date": "–", "met": None})
        met = (
            "–"
            if found["met"] is None
            else "no"
            if not found["met"]
            else "yes"
            if found["scale"] == "full"
            else "so far"
        )
        lines.append(
            f"| {goal.name} | {goal.promise} | {found['figure']} | {found['scale']} | {found['date']} | {met} |"
        )
    return "\n".join(lines)


def write_page(results: dict[str, dict[str, object]]) -> None:
    """Put the table between the marks of the page."""
    before, rest = PAGE.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    PAGE.write_text(f"{before}{MARKS[0]}\n{table(results)}\n{MARKS[1]}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("goals", nargs="*", metavar="GOAL")
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="TIERCEL_CASES=500: a smaller run"
    )
    parser.add_argument("--table", action="store_true", help="only write the page")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for goal in [] if options.table else GOALS:
        if options.goals and goal.name not in options.goals:
            continue
        if goal.tests[0].startswith("tests/") and (
            options.again or results.get(goal.name, {}).get("scale") not in ("full", "as tested")
        ):
            results[goal.name] = run(goal, dict(pair.split("=") for pair in options.set))
            print(goal.name, json.dumps(results[goal.name]), flush=True)
            RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_page(results)


if __name__ == "__main__":
    main()
